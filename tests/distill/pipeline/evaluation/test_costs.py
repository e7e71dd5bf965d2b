"""What costs are measured of: a clip of a slow teacher by some of its steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from distill.pipeline.evaluation import costs
from eval.speed.latency import Took
from tests.support.tiny import some_conditions

GRID = tuple(1 - i / 48 for i in range(49))


class Clock:
    """A clock that stands still but for the work: a step of a solution, and a decode."""

    def __init__(self, step: float, decode: float, monkeypatch):
        self.now, self.each, self.decoding, self.steps = 0.0, step, decode, 0
        monkeypatch.setattr(costs, "clocked", self.clocked)

    def clocked(self, call: Callable[[], object]) -> Took:
        began = self.now
        call()
        return Took(self.now - began, 0.0)

    def generate(self, *_: Any, grid: tuple[float, ...]) -> torch.Tensor:
        self.steps += len(grid) - 1
        self.now += self.each * (len(grid) - 1)
        return torch.zeros(1)

    def decode(self, x0: torch.Tensor, conditions: Any) -> None:
        assert x0.shape == (1,)
        self.now += self.decoding


@pytest.mark.parametrize(("step", "timed"), [(0.5, 48), (1.25, 48), (5.0, 12), (59.0, 1), (100.0, 1)])
def test_a_slow_teacher_is_timed_by_as_many_steps_as_fit(step, timed, monkeypatch):
    clock, given = Clock(step, 7.0, monkeypatch), some_conditions()
    steps = costs.steps_that_fit(clock.generate, given, GRID)
    assert (steps, clock.steps) == (timed, 1)
    assert costs.solution_seconds(clock.generate, clock.decode, GRID, steps, given) == pytest.approx(48 * step + 7.0)
    assert clock.steps == 1 + timed
    assert clock.now <= step + max(costs.COSTS_SECONDS, step) + 7.0
