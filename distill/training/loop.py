"""The one training loop: for each role to update accumulate, clip, step; EMA; validate; checkpoint. Resume is replay.

Randomness and data are functions of (seed, stage, step, position, rank), so a killed run continues bit for bit. What holds
weights and moments, whole or in shards, is an engine (`distill.training.role`); a checkpoint of one is read by every other.
"""

import functools
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from distill.methods import Batch, Method
from distill.training import checkpoint
from distill.training.engine import Engine, make_role
from distill.training.metrics_log import MetricsLog
from distill.training.role import COUNT, MOMENTS, WEIGHT, DistributedRole, trained
from teachers.errors import UserError
from teachers.files import replacing


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
    """Length and batches of a training stage; `batch_size` is per process and micro-step. A period of 0 means never.

    `global_batch` is that of an update over all processes; `accumulation` follows from it, where it is given.
    """

    num_steps: int
    batch_size: int
    accumulation: int = 1
    global_batch: int | None = None
    ema_decay: float = 0.99
    log_every: int = 20
    checkpoint_every: int = 250
    validate_every: int = 0
    optimizers: dict[str, OptimizerConfig] = field(default_factory=dict)

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


class EMA:
    """fp32 moving average of a role's parameters, one tensor each (shards stay shards); stepped when the role stepped.

    The decay warms up as min(decay, (1 + n) / (10 + n)) so that short runs are not tied to their start.
    """

    def __init__(self, net: nn.Module | DistributedRole, decay: float):
        self.decay, self.num_updates = decay, 0
        self.shadow = {name: p.detach().float().clone() for name, p in net.named_parameters()}

    @torch.no_grad()
    def update(self, net: nn.Module | DistributedRole) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, p in net.named_parameters():
            self.shadow[name].lerp_(p.detach().float(), 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, net: nn.Module | DistributedRole) -> None:
        for name, p in net.named_parameters():
            if name in self.shadow:
                p.copy_(self.shadow[name])


def learning_rate(config: OptimizerConfig, update: int, total: int) -> float:
    """Rate of update number `update` of `total`."""
    if update < config.warmup:
        return config.lr * (update + 1) / config.warmup
    progress = (update - config.warmup) / max(1, total - config.warmup)
    return config.lr * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Trainer:
    """The state of a training stage and its checkpoints; `train` runs it. `roles` are whole networks, which an engine may shard
    in place; `average` is the role whose average is kept. UserError for a role without an optimizer."""

    def __init__(self, engine: Engine, config: TrainConfig, roles: Mapping[str, nn.Module], average: str, folder: Path):
        self.engine, self.config, self.roles = engine, config, roles
        self.average, self.folder = average, folder
        missing = [name for name in roles if name not in config.optimizers]
        if missing:
            raise UserError(f"no optimizer for role '{missing[0]}': give train.optimizers.{missing[0]}.lr")
        self.kind, self.keep = engine.kind, engine.config.keep_checkpoints
        self.accumulation = config.micro_steps(engine.world_size)
        self.held = {
            name: make_role(engine, self.kind, net, functools.partial(_adamw, o), o.clip, self.accumulation)
            for name, net in roles.items()
            for o in [config.optimizers[name]]
        }
        self.trained = {name: trained(net) for name, net in roles.items()}
        self.updates = dict.fromkeys(roles, 0)
        self.position = 0
        self.ema = EMA(self.held[average], config.ema_decay)
        self.best: dict[str, float] | None = None
        self.step = 0

    def save(self) -> None:
        """Write everything that resume needs, whole or not at all; every rank calls it."""
        facts = {
            "rows": self.position * self.config.batch_size * self.engine.world_size,
            "updates": self.updates,
            "best": self.best,
            "ema_updates": self.ema.num_updates,
            "engine": {"kind": self.kind, "processes": self.engine.world_size},
        }
        checkpoint.save(self.folder, self.step, facts, self.tensors(), self.engine, self.keep)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor by name, whole, one at a time; every rank goes through them."""
        for role, held in self.held.items():
            for what in (WEIGHT, *MOMENTS, COUNT):
                yield from ((f"{role}/{what}/{name}", x) for name, x in held.full_state(what))
            yield from ((f"{role}/buffer/{name}", x) for name, x in _buffers(self.roles[role]).items())
        yield from ((f"ema/{name}", x) for name, x in self.held[self.average].full_state(WEIGHT, self.ema.shadow))

    def load(self) -> bool:
        """Resume from the stage's newest checkpoint if there is one, whichever engine and number of processes wrote it."""
        found = checkpoint.saved(self.folder)
        if not found:
            return False
        reader = checkpoint.Reader(found[-1])
        facts, together = reader.metadata, self.config.batch_size * self.engine.world_size
        if facts["rows"] % together:
            raise UserError(
                f"{found[-1]} was written after {facts['rows']} rows, which {self.engine.world_size} processes of batch_size "
                f"{self.config.batch_size} never reach; use another number of processes"
            )
        self.step, self.position = facts["step"], facts["rows"] // together
        self.updates, self.best = facts["updates"], facts["best"]
        self.ema.num_updates = facts["ema_updates"]
        for role, held in self.held.items():
            _check_names(reader, role, self.trained[role])
            for what in (WEIGHT, *MOMENTS, COUNT):
                for name, whole in reader.stream(f"{role}/{what}/"):
                    held.load_full_state(what, {name: whole})
            held.sync_from_master()
            for name, buffer in _buffers(self.roles[role]).items():
                buffer.copy_(reader.tensors(f"{role}/buffer/{name}")[""])
        for name, whole in reader.stream("ema/"):
            self.held[self.average].load_full_state(WEIGHT, {name: whole}, self.ema.shadow)
        return True

    def averaged(self) -> dict[str, Tensor]:
        """The averaged role's state dict with its averaged weights, whole, on the CPU; every rank calls it."""
        shadow = self.held[self.average].full_state(WEIGHT, self.ema.shadow)
        state = {name: x.detach().to("cpu", copy=True) for name, x in shadow}
        return state | {name: x.cpu() for name, x in _buffers(self.roles[self.average]).items()}

    def save_best(self) -> None:
        """best.pt: what `averaged` returns; every rank calls it."""
        state, path = self.averaged(), self.folder / "best.pt"

        def write() -> None:
            with replacing(path, sum(x.numel() * x.element_size() for x in state.values())) as temporary:
                torch.save(state, temporary)

        checkpoint.on_main(self.engine, path, write)

    def update(
        self, role: str, method: Method, batches: Callable[[int], Batch], seed: int, total: int
    ) -> dict[str, Tensor]:
        """One optimizer step of one role: accumulate, average over processes, clip, step. Returns what to log.

        Raises UserError that names step, role and metric when a number is not finite; the weights are then as before.
        """
        engine, held = self.engine, self.held[role]
        metrics: dict[str, Tensor] = {}
        self._require_grad(role)
        for micro in range(self.accumulation):
            rng = engine.generator(seed, "loss", self.position, device="cpu")
            shared = engine.generator(seed, "shared", self.position, shared=True, device="cpu")
            found: dict[str, Tensor] = {}

            def compute(rng=rng, shared=shared, found=found) -> Tensor:
                loss = method.loss(role, batches(self.position), rng, shared)
                found.update(loss.metrics)
                return loss.value

            held.backward(held.forward(compute), last=micro == self.accumulation - 1)
            for name, value in found.items():
                metrics[f"{role}/{name}"] = metrics.get(f"{role}/{name}", 0.0) + value / self.accumulation
            self.position += 1
        rate = learning_rate(self.config.optimizers[role], self.updates[role], total)
        norm = held.step(rate)
        self._require_grad(*self.roles)
        if not torch.isfinite(norm):
            self._diverged(role, self.reduced(metrics))
        self.updates[role] += 1
        if role == self.average:
            self.ema.update(held)
        return metrics | {f"{role}/grad_norm": norm}

    def _require_grad(self, *roles: str) -> None:
        """Of the trained parameters only those of `roles` receive gradients."""
        for name, params in self.trained.items():
            for p in params.values():
                p.requires_grad_(name in roles)

    def reduced(self, metrics: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics as numbers, averaged over the ranks."""
        values = torch.stack([torch.as_tensor(x, device=self.engine.device).double() for x in metrics.values()])
        self.engine.all_reduce_mean([values])
        return dict(zip(metrics, values.tolist(), strict=True))

    def _diverged(self, role: str, values: Mapping[str, float]) -> None:
        wrong = [name.removeprefix(f"{role}/") for name, value in values.items() if not math.isfinite(value)]
        what = f"{wrong[0]} and gradient of {role} are" if wrong else f"gradient of {role} is"
        raise UserError(f"training diverged: {what} not finite at step {self.step}; lower train.optimizers.{role}.lr")

    @contextmanager
    def showing_average(self) -> Iterator[None]:
        """The averaged role computes with its averaged weights."""
        held = self.held[self.average]
        current = {name: p.clone() for name, p in held.named_parameters()}
        with torch.no_grad():
            self.ema.copy_to(held)
            held.sync_from_master()
            try:
                yield
            finally:
                for name, p in held.named_parameters():
                    p.copy_(current[name])
                held.sync_from_master()


def _adamw(config: OptimizerConfig, params) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def _buffers(net: nn.Module) -> dict[str, Tensor]:
    """What a network stores beside its parameters."""
    return {
        f"{path}.{name}".lstrip("."): buffer
        for path, module in net.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def _check_names(reader: "checkpoint.Reader", role: str, names: Iterable[str]) -> None:
    prefix = f"{role}/{WEIGHT}/"
    stored = {key.removeprefix(prefix) for key in reader.files if key.startswith(prefix)}
    if wrong := sorted(stored.symmetric_difference(names)):
        raise UserError(f"{reader.path} does not fit: {role} differs in {wrong[0]}; is it this recipe's folder?")


def train(
    trainer: Trainer,
    method: Method,
    batches: Callable[[int], Batch],
    *,
    stage: str,
    seed: int,
    log: MetricsLog,
    validate: Callable[[], dict[str, float]] | None = None,
    alarm: Callable[[Mapping[str, float]], str | None] | None = None,
) -> None:
    """Run `method` to config.num_steps, from the newest checkpoint if there is one. The average is in trainer.ema.

    validate() sees the averaged weights loaded into the averaged role and returns numbers with a "score" (lower is better);
    the best weights stay in folder/best.pt. Where alarm(those numbers) gives a reason to stop, UserError says it, the best and the
    last checkpoint being older. On SIGTERM the step is finished and saved, then SystemExit(143) is raised.
    """
    config, engine = trainer.config, trainer.engine
    trainer.load()
    log.resume(stage, trainer.step + 1)
    totals = dict.fromkeys(trainer.roles, 0)
    for step in range(config.num_steps):
        for role in method.roles_to_update(step):
            totals[role] += 1
    bar = tqdm(total=config.num_steps, initial=trainer.step, desc=stage, disable=not engine.is_main, mininterval=1.0)
    with terminations() as received:
        while trainer.step < config.num_steps:
            metrics: dict[str, Tensor] = {}
            for role in method.roles_to_update(trainer.step):
                metrics |= trainer.update(role, method, batches, seed, totals[role])
            trainer.step += 1
            done = trainer.step == config.num_steps
            if done or (config.log_every and trainer.step % config.log_every == 0):
                values = trainer.reduced(metrics)
                log.write(stage, trainer.step, values)
                bar.set_postfix({k.split("/")[-1]: f"{v:.3g}" for k, v in values.items() if "grad_norm" not in k})
            if validate and (done or (config.validate_every and trainer.step % config.validate_every == 0)):
                _validate(trainer, validate, alarm, stage, log)
            stop = checkpoint.any_rank(engine, bool(received))
            if done or stop or (config.checkpoint_every and trainer.step % config.checkpoint_every == 0):
                trainer.save()
            bar.update(1)
            if stop and not done:
                bar.close()
                if engine.is_main:
                    words = f"{stage} is saved after step {trainer.step}; the same command continues"
                    tqdm.write(f"distill: SIGTERM: {words}", file=sys.stderr)
                raise SystemExit(128 + signal.SIGTERM)
    bar.close()
    engine.barrier()


@contextmanager
def terminations() -> Iterator[list[int]]:
    """A list to which a SIGTERM adds itself instead of killing the process (in the main thread, where Python handles signals)."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _validate(
    trainer: Trainer,
    validate: Callable[[], dict[str, float]],
    alarm: Callable[[Mapping[str, float]], str | None] | None,
    stage: str,
    log: MetricsLog,
) -> None:
    """Score the averaged weights and keep them if they are the best so far; UserError when they set off the alarm."""
    # fsdp2 gathers blocks in bf16, and what is under an adapter may be held in it
    held = {p.dtype for p in trainer.roles[trainer.average].parameters()}
    narrow = trainer.engine.autocast() if trainer.kind == "fsdp2" or len(held) > 1 else nullcontext()
    with trainer.showing_average(), narrow:
        values = validate()
    log.write(stage, trainer.step, {x if "/" in x else f"validate/{x}": value for x, value in values.items()})
    reason = alarm(values) if alarm else None
    if checkpoint.any_rank(trainer.engine, reason is not None):
        kept = "this was the first validation: there are no better weights"
        if trainer.best:
            kept = f"the best weights, of step {trainer.best['step']:.0f}, are in {trainer.folder / 'best.pt'}"
        reason = reason or "another rank says why"
        raise UserError(f"{stage} collapsed at step {trainer.step}: {reason}; {kept}; health.stop=false goes on")
    if trainer.best is None or values["score"] < trainer.best["score"]:
        trainer.best = {**values, "step": trainer.step}
        trainer.save_best()
