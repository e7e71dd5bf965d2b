"""Settings of a training stage: length, batches, checkpoints, and AdamW of each role with its learning rate."""

import math
from dataclasses import dataclass, field

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
    stage whose gradient is not finite are skipped, counted and logged; one more stops it.
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
    skip_nonfinite: int = 0
    optimizers: dict[str, OptimizerConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "log_every", "num_steps"):
            least = 0 if name in ("log_every", "num_steps") else 1
            if getattr(self, name) < least:
                raise UserError(f"train.{name}: got {getattr(self, name)}; it must be at least {least}")
        for name in ("checkpoint_every", "checkpoint_minutes", "validate_every", "skip_nonfinite"):
            if not getattr(self, name) >= 0:
                raise UserError(f"train.{name}: got {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.ema_decay <= 1:
            raise UserError(f"train.ema_decay: got {self.ema_decay}; it must lie in 0..1")

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
                f"{self.batch_size}; change one of the three"
            )
        return self.global_batch // together


def learning_rate(config: OptimizerConfig, update: int, total: int) -> float:
    """Rate of update number `update` of `total`."""
    if update < config.warmup:
        return config.lr * (update + 1) / config.warmup
    progress = (update - config.warmup) / max(1, total - config.warmup)
    return config.lr * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
