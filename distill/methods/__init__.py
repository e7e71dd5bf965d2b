"""One file per method: a final class with `roles_to_update` and `loss`, and its frozen `Config`.

A method does no backward, no optimizer step and no I/O, and draws only from the generators it is given: `rng`, this rank's own,
and `shared`, the same on every rank (the exit step, say).
`build(config, roles, grid)` makes it: roles are named networks, grid the sigmas of the stored trajectories (or None).
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from teachers.conditions import Conditions


@dataclass(frozen=True)
class Loss:
    """`value` is differentiated; `metrics` are detached scalars to log."""

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """conditions; x0 [B, C, F, H, W] of data where a method needs data; states [B, K+1, C, F, H, W] of trajectories, x0 last."""

    conditions: Conditions
    x0: Tensor | None = None
    states: Tensor | None = None


class Method(Protocol):
    """What the loop needs of a method."""

    def roles_to_update(self, step: int) -> tuple[str, ...]: ...

    def loss(self, role: str, batch: Batch, rng: torch.Generator, shared: torch.Generator) -> Loss: ...
