"""The state of a training stage and its updates: for each role accumulate, clip, step; EMA; what a checkpoint stores of it.

What holds weights and moments, whole or in shards, is an engine (`distill.training.role`); a checkpoint of one is read by every
other.
"""

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from distill.methods import Adaptive, Batch, Method
from distill.training import checkpoint
from distill.training.config import OptimizerConfig, TrainConfig, learning_rate
from distill.training.engines.engine import Engine, make_role
from distill.training.lifecycle.selection import Selection
from distill.training.role import COUNT, MOMENTS, WEIGHT, DistributedRole, Piece, trained
from teachers.checkpoints.strict import is_finite
from teachers.errors import UserError


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


class Trainer:
    """The state of a training stage and its checkpoints; `train` runs it. `roles` are whole networks, which an engine may shard
    in place; `average` is the role whose average is kept. UserError for a role without an optimizer."""

    def __init__(self, engine: Engine, config: TrainConfig, roles: Mapping[str, nn.Module], average: str, folder: Path):
        self.engine, self.config, self.roles = engine, config, roles
        self.average, self.folder = average, folder
        missing = [name for name in roles if name not in config.optimizers]
        if missing:
            raise UserError(f"no optimizer for role '{missing[0]}': give train.optimizers.{missing[0]}.lr")
        self.kind = engine.kind
        self.writer = checkpoint.Writer(folder, engine, engine.config.keep_checkpoints)
        self.accumulation = config.micro_steps(engine.data_ranks)
        self.held = {
            name: make_role(engine, self.kind, net, functools.partial(_adamw, o), o.clip, self.accumulation, wait)
            for name, net in roles.items()
            for o, wait in [(config.optimizers[name], name in engine.config.offload)]
        }
        self.trained = {name: trained(net) for name, net in roles.items()}
        self.updates = dict.fromkeys(roles, 0)
        self.roles_done = 0  # of the step after `step`, where training was stopped within it
        self.skipped = 0
        self.position = 0
        self.ema = EMA(self.held[average], config.ema_decay)
        self.selection = Selection()
        self.adaptive: Adaptive | None = None
        self.step = 0

    @property
    def best(self) -> dict[str, Any] | None:
        """The numbers of the kept validation, and its `step`."""
        return self.selection.best

    def save(self) -> None:
        """Begin to write everything that resume needs, whole or not at all; every rank calls it. See `checkpoint.Writer`."""
        facts = {
            "step": self.step,
            "rows": self.position * self.config.batch_size * self.engine.data_ranks,
            "updates": self.updates,
            "roles_done": self.roles_done,
            "skipped": self.skipped,
            **vars(self.selection),
            "method": self.adaptive.state() if self.adaptive else {},
            "ema_updates": self.ema.num_updates,
            "engine": {"kind": self.kind, "processes": self.engine.world_size},
        }
        name = f"{checkpoint.CHECKPOINT}-{self.step:08d}" + (f"-{self.roles_done:02d}" if self.roles_done else "")
        self.writer.begin(name, json.loads(json.dumps(facts)), self.pieces())  # as they are now

    def save_best(self) -> None:
        """Begin to write the averaged weights, as those of the validation `best`; every rank calls it."""
        assert self.best is not None
        self.writer.begin(checkpoint.best_in(self.folder, self.best).name, {}, self._average())

    def pieces(self) -> Iterator[Piece]:
        """What this rank stores of everything that resume needs."""
        for role, held in self.held.items():
            for what in (WEIGHT, *MOMENTS, COUNT):
                yield from (own._replace(name=f"{role}/{what}/{own.name}") for own in held.pieces(what))
            if role != self.average:
                yield from self._buffers(role)
        yield from self._average()

    def _average(self) -> Iterator[Piece]:
        """Of what this rank stores, the averaged role as it is handed on: `averaged` reads it."""
        shadow = self.held[self.average].pieces(WEIGHT, self.ema.shadow)
        yield from (own._replace(name=f"ema/{own.name}") for own in shadow)
        yield from self._buffers(self.average)

    def _buffers(self, role: str) -> Iterator[Piece]:
        buffers = _buffers(self.roles[role]) if self.engine.is_main else {}
        yield from (Piece.whole(f"{role}/buffer/{name}", x) for name, x in buffers.items())

    def load(self) -> bool:
        """Resume from the stage's newest checkpoint if there is one, whichever engine and number of processes wrote it."""
        found = self.engine.from_main(checkpoint.saved(self.folder))  # a rank's listing of a network disk may be old
        if not found:
            checkpoint.on_main(self.engine, self.folder, lambda: checkpoint.forget_after(self.folder, 0))
            return False
        self._verify(found[-1])
        reader = checkpoint.Reader(found[-1])
        facts, together = reader.metadata, self.config.batch_size * self.engine.data_ranks
        if facts["rows"] % together:
            raise UserError(
                f"{found[-1]} was written after {facts['rows']} rows, which {self.engine.world_size} processes of batch_size "
                f"{self.config.batch_size} never reach; use another number of processes"
            )
        self.step, self.position = facts["step"], facts["rows"] // together
        self.updates, self.selection = facts["updates"], Selection(*(facts[name] for name in vars(self.selection)))
        if self.adaptive:
            self.adaptive.load(facts["method"])
        self.roles_done, self.skipped = facts["roles_done"], facts["skipped"]
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
        checkpoint.on_main(self.engine, self.folder, lambda: checkpoint.forget_after(self.folder, self.step))
        return True

    def _verify(self, path: Path, *words: str) -> None:
        """Each rank compares its share of the files with their digests; UserError on every rank where one differs."""
        rank, world = self.engine.rank, self.engine.world_size
        checkpoint.on_all(self.engine, path, lambda: checkpoint.verify(path, rank, world, *words))

    def averaged(self) -> dict[str, Tensor]:
        """The averaged role's state dict as it is handed on, from the disk: that of the best validation, without one that of the
        last checkpoint. Any rank may call it alone."""
        best = self.best
        path = checkpoint.best_in(self.folder, best) if best else checkpoint.saved(self.folder)[-1]
        reader = checkpoint.Reader(path)
        return reader.tensors("ema/") | reader.tensors(f"{self.average}/buffer/")

    def hand_on(self, path: Path, work: Callable[[dict[str, Tensor]], None]) -> None:
        """work(averaged()), which writes `path`, by a thread of rank 0. All ranks wait, in no collective for long; UserError on
        each for weights that are damaged or cannot be written."""
        if self.best:
            hint = f"delete {self.folder} and run again"
            self._verify(checkpoint.best_in(self.folder, self.best), "weights", hint)
        self.writer.write(path, lambda: work(self.averaged()))

    def advance(
        self,
        method: Method,
        batches: Callable[[int], Batch],
        seed: int,
        totals: Mapping[str, int],
        stopping: Callable[[], bool],
    ) -> dict[str, Tensor] | None:
        """The updates of one step, or those that are left of it. Returns what to log; None where `stopping()`, asked before every
        micro-step, ended it: the updates that were complete stay, the one under way is dropped."""
        metrics: dict[str, Tensor] = {}
        for role in method.roles_to_update(self.step)[self.roles_done :]:
            found = self.update(role, method, batches, seed, self._total(role, totals), stopping)
            if found is None:
                return None
            metrics |= found
            self.roles_done += 1
        self.step, self.roles_done = self.step + 1, 0
        if self.adaptive and (seen := {name: metrics[name] for name in self.adaptive.watched if name in metrics}):
            self.adaptive.observe(self.reduced(seen))
        return metrics

    def _total(self, role: str, totals: Mapping[str, int]) -> int:
        """The updates of a role by which its rate decays. Where their number is not known before, as many as it had so far a step:
        the rate then follows the steps."""
        if self.adaptive is None:
            return totals[role]
        return round(max(1, self.updates[role]) * self.config.num_steps / max(1, self.step))

    def update(
        self,
        role: str,
        method: Method,
        batches: Callable[[int], Batch],
        seed: int,
        total: int,
        stopping: Callable[[], bool] = lambda: False,
    ) -> dict[str, Tensor] | None:
        """One optimizer step of one role: accumulate, average over processes, clip, step. Returns what to log, None where it was
        stopped.

        A gradient that is not finite leaves the weights as before: the update is skipped (`TrainConfig.skip_nonfinite`), or
        UserError names step, role and metric.
        """
        engine, held, first = self.engine, self.held[role], self.position
        metrics: dict[str, Tensor] = {}
        self._require_grad(role)
        for micro in range(self.accumulation):
            if stopping():
                self.position = first
                self._require_grad(*self.roles)
                return None
            rng = engine.generator(seed, "loss", self.position, device="cpu")
            shared = engine.generator(seed, "shared", self.position, shared=True, device="cpu")
            found: dict[str, Tensor] = {}

            def compute(rng=rng, shared=shared, found=found) -> Tensor:
                loss = method.loss(role, batches(self.position), rng, shared)
                found.update(loss.metrics)
                return loss.value

            held.backward(held.forward(compute), last=micro == self.accumulation - 1)
            for other in self.held.values():
                other.release()
            for name, value in found.items():
                metrics[f"{role}/{name}"] = metrics.get(f"{role}/{name}", 0.0) + value / self.accumulation
            self.position += 1
        rate = learning_rate(self.config.optimizers[role], self.updates[role], total)
        norm = held.step(rate)
        self._require_grad(*self.roles)
        if not torch.isfinite(norm):
            if self.skipped == self.config.skip_nonfinite:
                self._diverged(role, self.reduced(metrics), method, [batches(p) for p in range(first, self.position)])
            self.skipped += 1
            return {f"{role}/skipped": torch.tensor(float(self.skipped))}
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

    def _diverged(self, role: str, values: Mapping[str, float], method: Method, batches: Sequence[Batch]) -> NoReturn:
        wrong = [name.removeprefix(f"{role}/") for name, value in values.items() if not math.isfinite(value)]
        what = f"{wrong[0]} and gradient of {role} are" if wrong else f"gradient of {role} is"
        skipped = f" after {self.skipped} skipped updates" if self.skipped else ""
        where = f"{what} not finite at step {self.step}{skipped}"
        if bad := next((name for batch in batches for name in batch.not_finite()), None):
            raise UserError(
                f"the data are not finite: {bad} of a clip, so that {where}; check the data that its stage has left"
            )
        given = {
            name: net for name, net in vars(method).items() if isinstance(net, nn.Module) and name not in self.roles
        }
        for name, net in given.items():
            if bad := next((key for key, x in net.state_dict().items() if not is_finite(x)), None):
                raise UserError(
                    f"the weights of {name} are not finite: {bad}, so that {where}; check where they come from"
                )
        raise UserError(f"training diverged: {where}; lower train.optimizers.{role}.lr")

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
    stored = set(reader.names(f"{role}/{WEIGHT}/"))
    if wrong := sorted(stored.symmetric_difference(names)):
        raise UserError(f"{reader.path} does not fit: {role} differs in {wrong[0]}; is it this recipe's folder?")
