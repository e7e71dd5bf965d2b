"""Sequence parallelism: the ranks of a group share the tokens of every sequence (DeepSpeed-Ulysses, 2309.14509).

A rank has an equal part of the tokens of every latent frame, so that what acts on tokens or frames one by one (modulation, audio,
pose, cross-attention to a text that every rank has, the MLP) runs as it does alone. Self-attention wants all tokens: one all-to-all
of queries, keys and values trades tokens for heads, and one of its result trades them back. In between a rank has all tokens, in
their usual order, of its part of the heads; masks, rotary positions and lengths that differ between queries and keys are as ever.
A KV cache is kept so too: all positions of the rank's heads. It is sent once, when its chunk is at work, where one that is split
along the sequence would be sent again in every later step.

Gradients are exact for one rule: the objective is the mean over all ranks of their losses, and ranks of a group compute the same
one. So an engine averages gradients over all ranks, whatever the groups; a parameter that each rank uses on its own tokens gets the
sum over the group, since `Split.leave` hands back `size` times the rank's part; and what every rank computes alike stays as it is.

B = batch, F = latent frames, N = tokens of the sequence, P = size of the group, n = N / P, M = heads, d = head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(eq=False)
class SequenceGroup:
    """`size` ranks, of which this is number `rank`, that share sequences over the process `group` (None: on the meta device, for a
    plan). `calls` and `sent`: the collectives of a plan, and the bytes that a rank sends in them."""

    size: int
    rank: int = 0
    group: Any = None
    calls: int = 0
    sent: int = 0
    active: bool = True

    def split(self, frames: int) -> "Split | None":
        """How sequences of so many latent frames are shared; None where they are not."""
        return Split(self, frames) if self.active else None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, this rank computes whole sequences by itself."""
        self.active, before = False, self.active
        try:
            yield
        finally:
            self.active = before

    def note(self, x: Tensor, passes: int = 1) -> None:
        """A collective of a plan, in which a rank sends all of x but its own part, so many times."""
        self.calls += 1
        self.sent += passes * x.numel() * x.element_size() * (self.size - 1) // self.size

    def __deepcopy__(self, memo: dict) -> "SequenceGroup":
        """Copies of a network are of the same ranks."""
        return self


@dataclass(frozen=True)
class Split:
    """Sequences of `frames` latent frames, and of so many tokens `behind` them, over a group; every rank of it calls every method,
    in the same order."""

    group: SequenceGroup
    frames: int
    behind: int = 0

    def enter(self, x: Tensor) -> Tensor:
        """What every rank has whole; its gradient is the mean of the ranks' parts."""
        return _Enter.apply(x, self.group)

    def own(self, x: Tensor) -> Tensor:
        """This rank's tokens of x, which has those of the frames alone: [B, N, ..] -> [B, n, ..]."""
        return x.unflatten(1, (self.frames, self.group.size, -1))[:, :, self.group.rank].flatten(1, 2)

    def to_heads(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """All tokens of this rank's heads, for tensors of one type and shape: [B, n, M, d] -> [B, N, M/P, d]."""
        ranks = self.group.size
        sent = torch.stack([x.unflatten(2, (ranks, -1)).movedim(2, 0) for x in parts], dim=1)
        found = _Swap.apply(sent, self.group)  # [P, parts, B, n, M/P, d]
        return tuple(self._whole(x) for x in found.unbind(1))  # each in memory of its own

    def _whole(self, x: Tensor) -> Tensor:
        """Every rank's tokens [P, B, n, ..] in their usual order [B, N, ..]."""
        count = x.shape[2] - self.behind // self.group.size
        front = x[:, :, :count].unflatten(2, (self.frames, -1)).movedim(0, 2).flatten(1, 3)
        return torch.cat([front, x[:, :, count:].movedim(0, 1).flatten(1, 2)], dim=1) if self.behind else front

    def to_tokens(self, x: Tensor) -> Tensor:
        """This rank's tokens of all heads: [B, N, M/P, d] -> [B, n, M, d], what `to_heads` undoes."""
        ranks, count = self.group.size, x.shape[1] - self.behind
        sent = x[:, :count].unflatten(1, (self.frames, ranks, -1)).movedim(2, 0).flatten(2, 3)
        if self.behind:
            sent = torch.cat([sent, x[:, count:].unflatten(1, (ranks, -1)).movedim(1, 0)], dim=2)
        return _Swap.apply(sent, self.group).movedim(0, 2).flatten(2, 3)

    @torch.no_grad()
    def mean(self, x: Tensor) -> Tensor:
        """The mean of the ranks' x, such as of what each has made of its heads; without gradient."""
        return _mean(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """All ranks' tokens of the frames, given without those behind: [B, n, ..] -> [B, N, ..]. What follows is the same on every
        rank."""
        found = _Gather.apply(x, self.group).unflatten(2, (self.frames, -1))  # [P, B, F, n/F, ..]
        return found.movedim(0, 2).flatten(1, 3)


class _OfGroup(torch.autograd.Function):
    """A linear function of x over a group."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, SequenceGroup], _output: Tensor) -> None:
        ctx.group = inputs[1]


def _swap(x: Tensor, group: SequenceGroup) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.is_meta:
        group.note(x)
    else:
        dist.all_to_all_single(out, x, group=group.group)
    return out


class _Swap(_OfGroup):
    """[P, ..]: entry i goes to rank i, whose entry it is that comes back from it. It is its own transpose."""

    @staticmethod
    def forward(x: Tensor, group: SequenceGroup) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _swap(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _swap(grad, ctx.group), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _swap(tangent, ctx.group)


def _gather(x: Tensor, group: SequenceGroup) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(group.size, *x.shape)
    if x.is_meta:
        group.note(out)
    else:
        dist.all_gather(list(out.unbind()), x, group=group.group)
    return out


class _Gather(_OfGroup):
    """x of every rank, [P, ..]. Its gradient, which is the same on every rank, comes back once from each."""

    @staticmethod
    def forward(x: Tensor, group: SequenceGroup) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad[ctx.group.rank] * ctx.group.size, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gather(tangent, ctx.group)


def _mean(x: Tensor, group: SequenceGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    if total.is_meta:
        group.note(total, passes=2)
    else:
        dist.all_reduce(total, group=group.group)
    return total / group.size


class _Enter(_OfGroup):
    """x itself; backward the mean over the ranks."""

    @staticmethod
    def forward(x: Tensor, _: SequenceGroup) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _mean(grad, ctx.group), None

    @staticmethod
    def jvp(_ctx: Any, tangent: Tensor, _: None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tangent.view_as(tangent)
