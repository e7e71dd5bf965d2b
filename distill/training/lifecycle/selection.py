"""Which validation's weights are kept, when a stage ends before its last step, and at which steps it is validated.

The score of every validation is over the same conditions and noises, so two of them are compared by the difference of their scores
and its paired jackknife error (`eval.frechet.difference_with_error`): what a clip adds to both cancels. A validation is better than
the kept one where it is so by more than `train.sure` standard errors; otherwise the earlier one, of fewer steps, stays. This is the
one-standard-error rule of Breiman et al. (CART, 1984), one validation at a time: since all are compared with the kept one, not with
the last, gains that are small each add up. The weights that are compared are averages over steps already (EMA).

`StopConfig` ends a stage where `patience` validations in a row were not better (Prechelt, Early Stopping - but when?, 1998, UP), or
where the student has collapsed (`health.collapse`). Each validation comes `growth` times as many steps after the start as the one
before, so that their number grows with the logarithm of the steps, and patience in proportion to the steps already spent: a stage
ends after growth^patience times the steps of what it keeps.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from eval.frechet import difference_with_error
from teachers.errors import UserError

LEFT = "left"
"""Name, among the numbers of a validation, of its scores without each clip."""


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """End a stage before num_steps where `patience` validations in a row are not better than the kept one, or where the student
    collapses. Validations are due at multiples of validate_every, each at least `growth` times the step of the one before."""

    patience: int = 2
    growth: float = 1.5

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise UserError(f"train.stop.patience: got {self.patience}; it must be at least 1")
        if not 1.0 <= self.growth < math.inf:
            raise UserError(f"train.stop.growth: got {self.growth}; it must be at least 1")


def validations(every: int, num_steps: int, stop: StopConfig | None) -> Iterator[int]:
    """The steps at which a stage that is not ended before is validated: its last one, and those that are due."""
    growth, due = stop.growth if stop else 1.0, every
    while 0 < due < num_steps:
        yield due
        due = every * max(due // every + 1, math.ceil(due * growth / every))
    yield num_steps


@dataclass
class Selection:
    """The kept validation, its numbers with its `step`; how many since were not better; and why the stage ended before its last
    step. It is part of a checkpoint: a stage that goes on decides as one that was never stopped."""

    best: dict[str, Any] | None = None
    stale: int = 0
    ended: str = ""

    def gain(self, values: Mapping[str, Any]) -> tuple[float, float]:
        """By how much less a validation scores than the kept one, and the standard error of that: 0 where scores have none."""
        assert self.best is not None
        ours, kept = values.get(LEFT), self.best.get(LEFT)
        if not ours or not kept:
            return self.best["score"] - values["score"], 0.0
        left = (torch.tensor(x, dtype=torch.float64) for x in (kept, ours))
        return difference_with_error((self.best["score"], next(left)), (values["score"], next(left)))

    def take(self, values: Mapping[str, Any], step: int, sure: float) -> bool:
        """Whether the validation of a step is kept: its score is finite and better than the kept one by more than `sure` errors."""
        first = self.best is None
        gain, error = (math.inf, 0.0) if first else self.gain(values)
        if math.isfinite(values["score"]) and gain > sure * error:
            self.best, self.stale = {**values, "step": step}, 0
            return True
        self.stale += not first
        return False

    def is_over(self, stop: StopConfig | None) -> bool:
        """Whether the rule ends the stage here; `ended` then says why."""
        if stop is not None and self.stale >= stop.patience:
            assert self.best is not None
            self.ended = f"{self.stale} validations in a row are not better than that of step {self.best['step']}"
        return bool(self.ended)
