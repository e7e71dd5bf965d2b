"""How a trained role is distributed: replicated (ddp), sharded by FSDP2 (fsdp2), or partitioned by DeepSpeed (zero1, zero2, zero3).

All do the same arithmetic: gradients averaged over ranks and accumulation in fp32, clipped by their norm, AdamW on fp32
weights; with bf16 the matrix products alone are bf16. `distill.training.trainer` uses the protocol `DistributedRole` only.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Kind = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
RoleName = Literal["teacher", "student", "fake_score"]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
"""An optimizer of these parameters, or of these groups of them."""
WEIGHT, MOMENTS, COUNT = "weight", ("exp_avg", "exp_avg_sq"), "step"
"""State of each trained parameter: the fp32 weight, AdamW's two moments, and its number of steps."""


class Rows(Protocol):
    """A tensor of at least one axis, or what reads rows of one that lies in a file (safetensors' slices)."""

    def __getitem__(self, rows: slice, /) -> Tensor: ...


class Piece(NamedTuple):
    """Elements [start, start + len(values)) of a flattened tensor of this name and shape; `values` [n] may share its memory."""

    name: str
    shape: torch.Size
    start: int
    values: Tensor

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> "Piece":
        return cls(name, tensor.shape, 0, tensor.detach().flatten())


def whole(full: Rows) -> Tensor:
    """The tensor itself, read where it lies in a file."""
    return full if isinstance(full, Tensor) else full[:]


def elements(full: Rows, shape: torch.Size, start: int, count: int) -> Tensor:
    """Elements [start, start + count) of the flattened tensor of this shape; no more than the rows that hold them are read."""
    if not shape or not count:
        return whole(full).flatten()[start : start + count]
    width = shape[1:].numel()
    first, last = start // width, -(-(start + count) // width)
    return full[first:last].flatten()[start - first * width :][:count]


class DistributedRole(Protocol):
    """A trained role and its optimizer. Every rank calls every method, in the same order."""

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        """compute(), a loss of this role, under the engine's hooks and autocast."""
        ...

    def backward(self, value: Tensor, last: bool) -> None:
        """Add the gradient of `value` / accumulation; ranks exchange theirs in the `last` micro-step (ZeRO-2 and 3: in each)."""
        ...

    def step(self, rate: float) -> Tensor:
        """Average and clip the gradients, step, zero them; returns their norm before clipping. No step if that is not finite."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of the trained fp32 master weights, sharing the optimizer's memory."""
        ...

    def sync_from_master(self) -> None:
        """Copy what was written into `named_parameters` to the weights that the network computes with."""
        ...

    def release(self) -> None:
        """Let go of weights that a micro-step has gathered."""
        ...

    def pieces(self, what: str, parts: Mapping[str, Tensor] | None = None) -> Iterator[Piece]:
        """What this rank stores of each trained parameter's `what` (WEIGHT, a moment, COUNT), where it exists; of the tensors
        `parts`, laid out as `named_parameters`, where these are given. The pieces of all ranks are every tensor once. No rank
        waits for another."""
        ...

    def load_full_state(self, what: str, full: Mapping[str, Rows], parts: Mapping[str, Tensor] | None = None) -> None:
        """The inverse of `pieces`, from full tensors that every rank passes and of which it reads its own rows."""
        ...


def trained(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}
