"""Data parallel: every rank has the full role; gradients are averaged once an update, in fp32 buckets.

Not torch's DistributedDataParallel, which hides a network's verbs behind its own forward; the numbers are the same.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from distill.training.role import COUNT, WEIGHT, MakeOptimizer, Piece, Rows, trained, whole


class DDPRole:
    """`DistributedRole` with weights, gradients and moments replicated on every rank."""

    def __init__(self, engine, net: nn.Module, make: MakeOptimizer, clip: float, accumulation: int):
        self.engine, self.clip, self.accumulation = engine, clip, accumulation
        self.params = trained(net)
        self.optimizer = make(list(self.params.values()))

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        with self.engine.autocast():
            return compute()

    def backward(self, value: Tensor, last: bool) -> None:
        del last
        (value / self.accumulation).backward()

    def step(self, rate: float) -> Tensor:
        params = [p for p in self.params.values() if p.grad is not None]
        self.engine.all_reduce_mean([p.grad for p in params if p.grad is not None])
        norm = nn.utils.clip_grad_norm_(params, self.clip)
        if torch.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter((name, p.detach()) for name, p in self.params.items())

    def sync_from_master(self) -> None:
        """Nothing to copy: the master weights are the network's."""

    def release(self) -> None:
        """Nothing is gathered."""

    def pieces(self, what: str, parts: Mapping[str, Tensor] | None = None) -> Iterator[Piece]:
        for name, p in self.params.items() if self.engine.is_main else ():
            if parts is not None:
                yield Piece.whole(name, parts[name])
            elif what == WEIGHT:
                yield Piece.whole(name, p)
            elif what in self.optimizer.state[p]:
                yield Piece.whole(name, self.optimizer.state[p][what])

    def load_full_state(self, what: str, full: Mapping[str, Rows], parts: Mapping[str, Tensor] | None = None) -> None:
        for name, value in ((name, whole(rows)) for name, rows in full.items()):
            p = self.params[name]
            if parts is not None:
                parts[name].copy_(value)
            elif what == WEIGHT:
                p.detach().copy_(value)
            else:  # the count of steps of a fused AdamW is on the parameter's device
                kind = torch.float32 if what == COUNT else p.dtype
                self.optimizer.state[p][what] = value.to(p.device, kind, copy=True)
