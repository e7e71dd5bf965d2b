"""Faults, each planted in a network by a few lines, which a comparison with an independent one has to see."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import pytest
import torch

from teachers.checkpoints import layouts

Plant = Callable[[pytest.MonkeyPatch], object]


class Faults(dict[str, tuple[int, Plant]]):
    """Name -> (speakers of the inputs that show it, what plants it)."""

    def fault(self, name: str, speakers: int = 1) -> Callable[[Plant], Plant]:
        """Above a function that plants it."""

        def add(plant: Plant) -> Plant:
            self[name] = (speakers, plant)
            return plant

        return add


def around(patch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable) -> None:
    """`change(original, *arguments)` in the place of a function."""
    original = getattr(owner, name)
    patch.setattr(owner, name, wraps(original)(lambda *given, **named: change(original, *given, **named)))


def in_fp64(net: Any, inputs: tuple, sigma: torch.Tensor) -> tuple:
    """A network's own velocity in fp64, where no rounding hides a fault, and the clips and other inputs of its reference. inputs:
    clips x, conditions, and what the reference takes in their place."""
    net, (x, given, parts) = net.double(), inputs
    x, given, parts = x.double(), given.to(torch.float64), [None if part is None else part.double() for part in parts]
    return net.kind.run(net, net.kind.compose(x, given, ())[1], sigma.double(), given), x, parts


def published(net: Any) -> dict[str, torch.Tensor]:
    """A network's weights under Wan's published names."""
    return {layouts.rename(name, layouts.TO_WAN): value for name, value in net.state_dict().items()}


def deviations(
    reference: Callable, net: Callable[[], Any], inputs: Callable[[], tuple], sigma: torch.Tensor, heads: int
) -> Callable:
    """`deviation(fault="")`: the greatest difference, in fp64, between a network's velocity and that of `reference(weights, heads,
    fault=)`, which reads them under their published names."""

    @lru_cache(maxsize=1)
    def exact() -> tuple:
        made = net()
        found = in_fp64(made, inputs(), sigma)
        return published(made), *found

    def deviation(fault: str = "") -> float:
        weights, ours, x, parts = exact()
        return float((ours - reference(weights, heads, fault=fault)(x, *parts)).abs().max())

    return deviation
