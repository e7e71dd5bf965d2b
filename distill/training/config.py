"""Settings of training: the engine of a run; length, batches and checkpoints of a stage; AdamW of each role and its rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from distill.training.lifecycle.selection import StopConfig
from distill.training.role import Kind, RoleName
from students.serving.optimize import Compile
from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW of one role. The rate warms up over `warmup` of its updates, then follows a cosine to `final` of it."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 0
    final: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup", "final"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"train.optimizers: {name}={getattr(self, name)}; it must be 0 or more")
        if not self.clip > 0:
            raise UserError(f"train.optimizers: clip={self.clip}; it must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"train.optimizers: betas={list(self.betas)}; each must lie in 0..1, 1 excluded")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and batches of a training stage; `batch_size` is per process and micro-step. A period of 0 means never.

    `global_batch` is that of an update over all processes; `accumulation` follows from it, where it is given. Checkpoints are
    written every `checkpoint_every` steps and after `checkpoint_minutes` since the last. Up to `skip_nonfinite` updates of a
    stage whose gradient is not finite are skipped, counted and logged; one more stops it. `seed` is this stage's alone (null: the
    recipe's), so that a stage can be repeated on what those before it made. Of its validations the best is kept, a later one where
    it is better by more than `sure` standard errors; `stop` ends the stage before `num_steps`
    (`distill.training.lifecycle.selection`).
    """

    num_steps: int
    batch_size: int
    accumulation: int = 1
    global_batch: int | None = None
    ema_decay: float = 0.99
    log_every: int = 20
    checkpoint_every: int = 250
    checkpoint_minutes: float = 30.0
    validate_every: int = 0
    sure: float = 0.0
    stop: StopConfig | None = None
    skip_nonfinite: int = 0
    seed: int | None = None
    optimizers: dict[str, OptimizerConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "log_every", "num_steps"):
            least = 0 if name in ("log_every", "num_steps") else 1
            if getattr(self, name) < least:
                raise UserError(f"train.{name}: got {getattr(self, name)}; it must be at least {least}")
        for name in ("checkpoint_every", "checkpoint_minutes", "validate_every", "sure", "skip_nonfinite"):
            if not getattr(self, name) >= 0:
                raise UserError(f"train.{name}: got {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.ema_decay <= 1:
            raise UserError(f"train.ema_decay: got {self.ema_decay}; it must lie in 0..1")
        if self.stop is not None and not self.validate_every:
            raise UserError(
                "train.stop: it goes by validations, and there are none; set train.validate_every, or remove it"
            )

    def micro_steps(self, world_size: int) -> int:
        """Batches that each of `world_size` processes adds up for one update; UserError where they do not divide."""
        if self.global_batch is None:
            return self.accumulation
        together = self.batch_size * world_size
        if self.accumulation != 1:
            raise UserError("train.accumulation and train.global_batch set the same thing twice: remove one")
        if self.global_batch % together:
            raise UserError(
                f"train.global_batch: {self.global_batch} is no multiple of {together}, {world_size} processes of batch_size "
                f"{self.batch_size}; change one of the three, or let several processes share each clip (engine.sequence_parallel)"
            )
        return self.global_batch // together


def learning_rate(config: OptimizerConfig, update: int, total: int) -> float:
    """Rate of update number `update` of `total`."""
    if update < config.warmup:
        return config.lr * (update + 1) / config.warmup
    progress = (update - config.warmup) / max(1, total - config.warmup)
    return config.lr * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """`kind` null is what accelerate's flags ask for, else ddp. `precision` is that of autocast (parameters, moments and
    reductions stay fp32); a recipe's `auto` is what the machine is fast in. A reduction moves `bucket_mib` at once. The last
    `keep_checkpoints` of a stage are kept. With `checkpointing` trained networks compute each block again in the backward pass in
    place of keeping what is inside it. A rank that waits for another longer than `timeout_minutes` ends the run.

    `offload`: roles that wait in the host's memory. Of the teacher each block comes to the device when it computes, the next one on
    its way; of trained roles (not with ddp) it is the shards of weights, gradients and moments. `attention`, a backend of
    diffusers' dispatcher, and `compile`, a mode of torch.compile for each block, are those of what trains, as the commands' own.

    fsdp2 alone: `shard_ranks` share one copy of each network's shards and the groups of them are replicas (HSDP: the ranks of a
    node, say); null, or with no more ranks than that: all ranks share one. With `gather_once` a trained network's weights stay
    gathered until the micro-step's end, so that a rollout of many calls moves them once, for the memory of one whole copy in
    `precision`.

    `sequence_parallel` ranks, neighbours, share the tokens of every clip and its context (`teachers.networks.sequence`): they take
    the same data and noise, so that there are as many batches at once as there are such groups."""

    kind: Kind | None = None
    precision: Literal["fp32", "bf16"]
    bucket_mib: int = 32
    offload: tuple[RoleName, ...] = ()
    keep_checkpoints: int = 2
    checkpointing: bool = False
    timeout_minutes: int = 60
    shard_ranks: int | None = None
    gather_once: bool = False
    attention: str = "native"
    compile: Compile = "none"
    sequence_parallel: int = 1

    def __post_init__(self):
        for name in ("bucket_mib", "keep_checkpoints", "timeout_minutes", "sequence_parallel"):
            if getattr(self, name) < 1:
                raise UserError(f"engine.{name}: got {getattr(self, name)}; it must be at least 1")
        if self.shard_ranks is not None and self.shard_ranks < 1:
            raise UserError(f"engine.shard_ranks: got {self.shard_ranks}; it must be at least 1, or null")
        for name in ("shard_ranks", "gather_once"):
            if getattr(self, name) and self.kind not in (None, "fsdp2"):
                raise UserError(f"engine.{name}: {self.kind} has no such option; remove it, or use engine=fsdp2")
        check_offload(self.kind or "fsdp2", self.offload)


def check_offload(kind: Kind, roles: Sequence[RoleName]) -> None:
    """UserError where an engine cannot keep what a role trains in the host's memory."""
    trained = [name for name in roles if name != "teacher"]
    if trained and kind == "ddp":
        raise UserError(
            f"engine.offload: ddp keeps a trained {trained[0]} on the device; name teacher alone, or use engine=fsdp2, zero1, "
            "zero2 or zero3"
        )
