"""Which validation's weights are kept, when a stage ends before its last step, and at which steps it is validated.

The score of every validation is over the same conditions and noises, so two of them are compared by the difference of their scores
and its paired jackknife error (`eval.frechet.difference_with_error`): what a clip adds to both cancels. All are compared with the
kept one, not with the last, so gains that are small each add up; the weights are averages over steps already (EMA).

Kept is a validation that is better than the kept one by more than `train.sure` standard errors. With 1 this is the
one-standard-error rule of Breiman et al. (CART, 1984), one validation at a time: within the error the earlier one stays. The
default is 0, the lowest score: fewer steps cost a served student nothing, and the earlier one was the worse (docs/results.md).

`StopConfig` ends a stage where `patience` validations showed that nothing worth the steps is to be had (after Prechelt, Early
Stopping - but when?, 1998), or where the student has collapsed (`health.collapse`). A validation shows that where its gain, and
`sure` errors more, are below `worth` of the kept score: one whose error is too large to know leaves the count as it is, so that few
clips end no stage. Each validation comes `growth` times as many steps after the start as the one before, so that their number grows
with the logarithm of the steps, and patience in proportion to the steps already spent.
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
    """End a stage before num_steps where `patience` validations, since one that was better, are not better than the kept one by
    `worth` of its score, surely so: by `sure` standard errors; or where the student collapses. Validations are due at multiples of
    validate_every, each at least `growth` times the step of the one before."""

    patience: int = 2
    growth: float = 1.5
    worth: float = 0.03
    sure: float = 2.0

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise UserError(f"train.stop.patience: got {self.patience}; it must be at least 1")
        if not 1.0 <= self.growth < math.inf:
            raise UserError(f"train.stop.growth: got {self.growth}; it must be at least 1")
        if not 0.0 <= self.worth < 1.0:
            raise UserError(f"train.stop.worth: got {self.worth}; it is a share of the score, from 0 to below 1")
        if not 0.0 <= self.sure < math.inf:
            raise UserError(f"train.stop.sure: got {self.sure}; it must be 0 or more")


def validations(every: int, num_steps: int, stop: StopConfig | None) -> Iterator[int]:
    """The steps at which a stage that is not ended before is validated: its last one, and those that are due."""
    growth, due = stop.growth if stop else 1.0, every
    while 0 < due < num_steps:
        yield due
        due = every * max(due // every + 1, math.ceil(due * growth / every))
    yield num_steps


@dataclass
class Selection:
    """The kept validation, its numbers with its `step`; how many since showed nothing worth it; and why the stage ended before its
    last step. It is part of a checkpoint: a stage that goes on decides as one that was never stopped."""

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

    def take(self, values: Mapping[str, Any], step: int, sure: float, stop: StopConfig | None = None) -> bool:
        """Whether the validation of a step is kept: its score is finite and better than the kept one by more than `sure` errors.
        By the rule it is counted where it is surely not better by what is worth it; else the count begins anew if it is kept."""
        finite = math.isfinite(values["score"])
        if self.best is None:
            self.best = {**values, "step": step} if finite else None
            return finite
        gain, error = self.gain(values)
        kept = finite and gain > sure * error
        if stop is not None and (not finite or gain + stop.sure * error < stop.worth * abs(self.best["score"])):
            self.stale += 1
        elif kept:
            self.stale = 0
        if kept:
            self.best = {**values, "step": step}
        return kept

    def is_over(self, stop: StopConfig | None) -> bool:
        """Whether the rule ends the stage here; `ended` then says why."""
        if stop is not None and self.stale >= stop.patience:
            assert self.best is not None
            words = f"{self.stale} validations were not better by {stop.worth:g} of the score"
            self.ended = f"{words}; kept is that of step {self.best['step']}"
        return bool(self.ended)
