"""Successive halving over a space of overrides: what the next trial is, and whether the one that runs goes on.

Optuna proposes (TPE, Bergstra et al. 2011) and prunes (asynchronous successive halving, ASHA, Li et al. 1810.05934). Its study is
made anew of the finished trials, in their order, for each trial: proposals and decisions are functions of the search file, the
finished trials and the rows of the trial at work, so a search that was killed goes on as one that was not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from teachers.errors import UserError
from teachers.flow import keyed_generator

if TYPE_CHECKING:
    import optuna

Value = int | float | str | bool | None
State = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """Where the values of a key come from: `choices`, or numbers from `low` to `high`, whole ones where both are, by the logarithm
    with `log`."""

    choices: tuple[Value, ...] = ()
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False

    def __post_init__(self) -> None:
        if self.choices and (self.low is not None or self.high is not None or self.log):
            raise UserError(f"a parameter has choices or a range: got both, {list(self.choices)}; remove one")
        if self.choices:
            if len(set(map(repr, self.choices))) < len(self.choices) or len(self.choices) < 2:
                raise UserError(f"choices: got {list(self.choices)}; give at least two, each once")
            return
        low, high = self.low, self.high
        if low is None or high is None:
            raise UserError("a parameter without values; give choices: [A, B], or low and high")
        if not -math.inf < low < high < math.inf:
            raise UserError(f"low, high: got {low}, {high}; low must be below high, both finite")
        if self.log and low <= 0:
            raise UserError(f"low: got {low} with log: true; a logarithm needs a low above 0")

    def suggest(self, trial: "optuna.Trial", key: str) -> Value:
        """The trial's value of this key."""
        if self.choices:
            return trial.suggest_categorical(key, self.choices)
        low, high = self.low, self.high
        if isinstance(low, int) and isinstance(high, int):
            return trial.suggest_int(key, low, high, log=self.log)
        assert low is not None
        assert high is not None
        return trial.suggest_float(key, low, high, log=self.log)


@dataclass(frozen=True, kw_only=True)
class SearchFile:
    """What a search file holds: the `space` of overrides and those that all `trials` share. At the rungs, after `first` training
    steps of the `stage` and each `factor` times as many, a trial goes on where its `validation` (a key of metrics.jsonl) is among
    the best 1 / factor of all that came so far. `score`: a metric of the report (fid, sync, ..) by which those that reach the end
    are compared, in the same direction; null: the last validation, and trials end with the stage."""

    space: dict[str, Parameter]
    first: int
    factor: int = 3
    trials: int = 16
    stage: str = "distill"
    validation: str = "validate/score"
    score: str | None = None
    direction: Literal["minimize", "maximize"] = "minimize"
    seed: int = 0
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.space:
            raise UserError("space: it is empty; give it keys, such as seed: {choices: [0, 1]}")
        for name, least in (("first", 1), ("factor", 2), ("trials", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: got {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial: its `number` from 0, values by key, (training step, validation) `rows`, and, of a finished one, how it ended."""

    number: int
    values: dict[str, Value]
    rows: tuple[tuple[int, float], ...] = ()
    state: State | None = None
    score: float | None = None
    why: str = ""

    @property
    def name(self) -> str:
        """Of its run folder."""
        return f"trial-{self.number:03}"

    @property
    def overrides(self) -> tuple[str, ...]:
        """Its values as a command line has them."""
        return tuple(f"{key}={_in_words(value)}" for key, value in self.values.items())


def best(search: SearchFile, finished: Sequence[Trial]) -> Trial | None:
    """Of the trials that reached the end the one with the best score, the earliest of equals."""
    sign = 1 if search.direction == "minimize" else -1
    scored = [
        (sign * one.score, one.number, one) for one in finished if one.state == "complete" and one.score is not None
    ]
    return min(scored)[2] if scored else None


class Replay:
    """Optuna's study of the finished trials, in memory, and the `trial` that comes after them."""

    def __init__(self, search: SearchFile, finished: Sequence[Trial]):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.search = search
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=search.first, reduction_factor=search.factor)
        self.study = optuna.create_study(
            direction=search.direction, pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0)
        )
        states = optuna.trial.TrialState
        kinds = {"complete": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}
        for one in finished:
            assert one.state is not None
            self.study.enqueue_trial(one.values)
            self._ask()
            self.pruned_at(one.rows)
            self.study.tell(self._trial, one.score if one.state == "complete" else None, state=kinds[one.state])
        # its own generator: a function of the seed, its number and the trials before it
        seed = keyed_generator(search.seed, f"trial {len(finished)}").initial_seed() % 2**32
        self.study.sampler = optuna.samplers.TPESampler(seed=seed)
        self._ask()
        self.trial = Trial(number=self._trial.number, values=dict(self._trial.params))

    def _ask(self) -> None:
        self._trial, self._told, self._pruned = self.study.ask(), 0, None
        for key, parameter in self.search.space.items():
            parameter.suggest(self._trial, key)

    def pruned_at(self, rows: Sequence[tuple[int, float]]) -> int | None:
        """The training step at which the trial, whose rows so far are these, has to end; None: it goes on. Rows only grow."""
        for step, value in rows[self._told :]:
            if self._pruned is None:
                self._trial.report(value, step)
                self._pruned = step if self._trial.should_prune() else None
        self._told = len(rows)
        return self._pruned


def _in_words(value: Value) -> str:
    """A value as an override has it; texts as they were written."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else repr(value)


def plain(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Finished trials as JSON holds them."""
    return [{**vars(one), "rows": [list(row) for row in one.rows]} for one in trials]


def read(records: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """What `plain` gave; KeyError, TypeError or ValueError for something else."""
    found = []
    for number, record in enumerate(records):
        rows = tuple((int(step), float(value)) for step, value in record["rows"])
        if record["number"] != number or record["state"] not in ("complete", "pruned", "failed"):
            raise ValueError(f"trial {number} is damaged")
        found.append(Trial(**{**record, "rows": rows}))
    return found
