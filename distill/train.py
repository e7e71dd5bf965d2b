"""The one training loop: for each role to update accumulate, clip, step; EMA; validate; checkpoint. Resume is replay.

Randomness and data are functions of (seed, stage, step, position, rank), so a killed run continues bit for bit.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from distill.engine import Engine
from distill.methods import Batch, Method
from distill.run_folder import MetricsLog, replacing
from teachers.errors import UserError
from teachers.flow import keyed_generator


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW of one role. The rate warms up over `warmup` of its updates, then follows a cosine to `final` of it."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 0
    final: float = 0.0
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and batches of a training stage; `batch_size` is per process and micro-step. A period of 0 means never."""

    num_steps: int
    batch_size: int
    accumulation: int = 1
    ema_decay: float = 0.99
    log_every: int = 20
    checkpoint_every: int = 250
    validate_every: int = 0
    optimizers: dict[str, OptimizerConfig] = field(default_factory=dict)


class EMA:
    """fp32 moving average of a network's parameters, one tensor each (shards stay shards); stepped when the network stepped.

    The decay warms up as min(decay, (1 + n) / (10 + n)) so that short runs are not tied to their start.
    """

    def __init__(self, net: nn.Module, decay: float):
        self.decay, self.num_updates = decay, 0
        self.shadow = {name: p.detach().float().clone() for name, p in net.named_parameters()}

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, p in net.named_parameters():
            self.shadow[name].lerp_(p.detach().float(), 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, net: nn.Module) -> None:
        for name, p in net.named_parameters():
            p.copy_(self.shadow[name])


def batch_rows(size: int, batch: int, position: int, seed: int, rank: int = 0, world: int = 1) -> Tensor:
    """Rows of batch number `position`: an endless shuffled stream of `size` rows, a new permutation each epoch, no rank twice."""
    start = (position * world + rank) * batch
    wanted = torch.arange(start, start + batch)
    rows = torch.empty_like(wanted)
    for epoch in range(start // size, (start + batch - 1) // size + 1):
        order = torch.randperm(size, generator=keyed_generator(seed, "epoch", epoch))
        here = wanted // size == epoch
        rows[here] = order[wanted[here] % size]
    return rows


def learning_rate(config: OptimizerConfig, update: int, total: int) -> float:
    """Rate of update number `update` of `total`."""
    if update < config.warmup:
        return config.lr * (update + 1) / config.warmup
    progress = (update - config.warmup) / max(1, total - config.warmup)
    return config.lr * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Trainer:
    """The state of a training stage and its checkpoint; `train` runs it."""

    def __init__(self, engine: Engine, config: TrainConfig, roles: Mapping[str, nn.Module], average: str, folder: Path):
        self.engine, self.config, self.roles = engine, config, roles
        self.average, self.folder = average, folder
        missing = [name for name in roles if name not in config.optimizers]
        if missing:
            raise UserError(f"no optimizer for role '{missing[0]}': give train.optimizers.{missing[0]}.lr")
        self.optimizers = {
            name: torch.optim.AdamW(net.parameters(), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, fused=True)
            for name, net in roles.items()
            for o in [config.optimizers[name]]
        }
        self.updates = dict.fromkeys(roles, 0)
        self.position = 0
        self.ema = EMA(roles[average], config.ema_decay)
        self.best: dict[str, float] | None = None
        self.step = 0

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """One atomic file with everything that resume needs; rank 0."""
        if not self.engine.is_main:
            return
        state = {
            "step": self.step,
            "position": self.position,
            "updates": self.updates,
            "best": self.best,
            "ema": {"shadow": self.ema.shadow, "num_updates": self.ema.num_updates},
            "roles": {name: net.state_dict() for name, net in self.roles.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }
        size = 16 * sum(p.numel() for net in self.roles.values() for p in net.parameters())
        with replacing(self.checkpoint, size) as temporary:
            torch.save(state, temporary)

    def load(self) -> bool:
        """Resume from the stage's checkpoint if there is one."""
        if not self.checkpoint.is_file():
            return False
        state = torch.load(self.checkpoint, map_location=self.engine.device, weights_only=True)
        self.step, self.position = state["step"], state["position"]
        self.updates, self.best = state["updates"], state["best"]
        self.ema.shadow, self.ema.num_updates = state["ema"]["shadow"], state["ema"]["num_updates"]
        for name, net in self.roles.items():
            net.load_state_dict(state["roles"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        return True

    def update(
        self, role: str, method: Method, batches: Callable[[int], Batch], seed: int, total: int
    ) -> dict[str, Tensor]:
        """One optimizer step of one role: accumulate, average over processes, clip, step. Returns what to log."""
        engine, config, net = self.engine, self.config, self.roles[role]
        metrics: dict[str, Tensor] = {}
        for _ in range(config.accumulation):
            rng = engine.generator(seed, "loss", self.position, device="cpu")
            shared = engine.generator(seed, "shared", self.position, shared=True, device="cpu")
            with engine.autocast():
                loss = method.loss(role, batches(self.position), rng, shared)
            (loss.value / config.accumulation).backward()
            for name, value in loss.metrics.items():
                metrics[f"{role}/{name}"] = metrics.get(f"{role}/{name}", 0.0) + value / config.accumulation
            self.position += 1
        params = [p for p in net.parameters() if p.grad is not None]
        engine.all_reduce_mean([p.grad for p in params if p.grad is not None])
        norm = nn.utils.clip_grad_norm_(params, config.optimizers[role].clip)
        if not torch.isfinite(norm):
            raise UserError(
                f"training diverged: gradient of {role} is not finite at step {self.step}; lower train.optimizers.{role}.lr"
            )
        rate = learning_rate(config.optimizers[role], self.updates[role], total)
        for group in self.optimizers[role].param_groups:
            group["lr"] = rate
        self.optimizers[role].step()
        for other in self.roles.values():
            other.zero_grad(set_to_none=True)
        self.updates[role] += 1
        if role == self.average:
            self.ema.update(net)
        return metrics | {f"{role}/grad_norm": norm}


def train(
    trainer: Trainer,
    method: Method,
    batches: Callable[[int], Batch],
    *,
    stage: str,
    seed: int,
    log: MetricsLog,
    validate: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Run `method` to config.num_steps, from the checkpoint if there is one. The average of the student is in trainer.ema.

    validate() sees the averaged weights loaded into the averaged role and returns numbers with a "score" (lower is better);
    the best weights stay in folder/best.pt.
    """
    config, engine = trainer.config, trainer.engine
    trainer.load()
    log.resume(stage, trainer.step + 1)
    totals = dict.fromkeys(trainer.roles, 0)
    for step in range(config.num_steps):
        for role in method.roles_to_update(step):
            totals[role] += 1
    bar = tqdm(total=config.num_steps, initial=trainer.step, desc=stage, disable=not engine.is_main, mininterval=1.0)
    while trainer.step < config.num_steps:
        metrics: dict[str, Tensor] = {}
        for role in method.roles_to_update(trainer.step):
            metrics |= trainer.update(role, method, batches, seed, totals[role])
        trainer.step += 1
        done = trainer.step == config.num_steps
        if done or (config.log_every and trainer.step % config.log_every == 0):
            values = {name: float(value) for name, value in metrics.items()}
            log.write(stage, trainer.step, values)
            bar.set_postfix({k.split("/")[-1]: f"{v:.3g}" for k, v in values.items() if "grad_norm" not in k})
        if validate and (done or (config.validate_every and trainer.step % config.validate_every == 0)):
            _validate(trainer, validate, stage, log)
        if done or (config.checkpoint_every and trainer.step % config.checkpoint_every == 0):
            trainer.save()
        bar.update(1)
    bar.close()
    engine.barrier()


def _validate(trainer: Trainer, validate: Callable[[], dict[str, float]], stage: str, log: MetricsLog) -> None:
    """Score the averaged weights and keep them if they are the best so far."""
    net = trainer.roles[trainer.average]
    current = {name: p.detach().clone() for name, p in net.named_parameters()}
    trainer.ema.copy_to(net)
    values = validate()
    log.write(stage, trainer.step, {f"validate/{name}": value for name, value in values.items()})
    if trainer.best is None or values["score"] < trainer.best["score"]:
        trainer.best = {**values, "step": trainer.step}
        if trainer.engine.is_main:
            with replacing(trainer.folder / "best.pt", 4 * sum(p.numel() for p in net.parameters())) as temporary:
                torch.save(net.state_dict(), temporary)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(current[name])
