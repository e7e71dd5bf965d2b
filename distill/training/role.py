"""How a role is held: whole on every rank (ddp), in FSDP2's shards (fsdp2), or in DeepSpeed's partitions (zero1, zero2, zero3).

All do the same arithmetic: gradients averaged over ranks and accumulation in fp32, clipped by their norm, AdamW on fp32
weights; with bf16 the matrix products alone are bf16. `distill.training.loop` sees the protocol `DistributedRole` and nothing else.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

Kind = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
"""An optimizer of these parameters, or of these groups of them."""
WEIGHT, MOMENTS, COUNT = "weight", ("exp_avg", "exp_avg_sq"), "step"
"""What a role keeps of each trained parameter: the weight, AdamW's two moments, and how often it was stepped."""


class DistributedRole(Protocol):
    """A trained role and its optimizer. Every rank calls every method, in the same order."""

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        """compute(), a loss of this role, where the engine can follow it."""
        ...

    def backward(self, value: Tensor, last: bool) -> None:
        """Add the gradient of `value` / accumulation; ranks exchange theirs in the `last` micro-step (ZeRO-2 and 3: in each)."""
        ...

    def step(self, rate: float) -> Tensor:
        """Average, clip, step and forget the gradients; returns their norm before clipping. No step if that is not finite."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of the trained fp32 weights, in the memory that the optimizer steps."""
        ...

    def refresh(self) -> None:
        """Make the network compute with what was written into `named_parameters`."""
        ...

    def gather(self, what: str, parts: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of each trained parameter that has a `what`; if given, of `parts` as in `named_parameters`."""
        ...

    def fill(self, what: str, whole: Mapping[str, Tensor], parts: Mapping[str, Tensor] | None = None) -> None:
        """The inverse of `gather`, from whole tensors that every rank gives."""
        ...


def trained(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}
