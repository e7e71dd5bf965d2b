"""Reward hacking: a reward that rises while what it does not see gets worse, named.

The rewards' own means over the clips of the first and the last quarter of a stage's student updates are in metrics.jsonl
(`reward_NAME`, `spread_NAME` of a method with `rewards`). They are held against everything that was not rewarded: rewards of weight
0, the scores of the validation beside those of the student that the stage began with, and health beside the teacher's. The limits
are guesses: no run has set them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

GAINED = 0.5
"""A rewarded mean has risen when it did by so many of its standard deviations over clips."""
LOST = 1.0
"""A watched reward has got worse when it fell by so many of its own; one of which neither way is better is not judged."""
WORSE = {"fid": 1.25, "fvd": 1.25}
"""A distance has got worse when it grew to more than so many times the start's."""
AWAY = {"motion_energy": 0.15, "sharpness": 0.15}
"""A ratio that should be 1 has got worse when it is so much further from it."""
FELL = {"motion": 0.1, "sync": 0.02}
"""A score has got worse when it fell by so much."""


def hacked(
    rewards: Mapping[str, Any],
    rows: Sequence[Mapping[str, float]],
    start: Mapping[str, float],
    now: Mapping[str, float],
    violations: Sequence[str],
) -> list[str]:
    """A line for every reward that has been hacked, [] for none. rewards: by name, with `weight` and `metric`; rows: of the stage
    in metrics.jsonl; start, now: scores of the validation; violations: of health (`health.violations`)."""
    changes = {name: found for name in rewards if (found := _change(name, rows)) is not None}
    gained = {
        name: change
        for name, change in changes.items()
        if rewards[name].weight and change[2] * (1 if rewards[name].weight > 0 else -1) >= GAINED
    }
    lost = [
        f"{name} {before:.3g} -> {after:.3g}"
        for name, (before, after, moved) in changes.items()
        if name not in gained and _is_worse(rewards[name], moved)
    ]
    lost += _scores(start, now, set(rewards)) + list(violations)
    return [
        f"reward {name} is hacked: it rose from {before:.3g} to {after:.3g} while these got worse: {'; '.join(lost)}"
        for name, (before, after, _) in gained.items()
        if lost
    ]


def _change(name: str, rows: Sequence[Mapping[str, float]]) -> tuple[float, float, float] | None:
    """Means of a reward in the first and the last quarter, and the change in standard deviations; None where it was not logged."""
    key, spread = f"student/reward_{name}", f"student/spread_{name}"
    found = [(row[key], row[spread]) for row in rows if key in row]
    quarter = len(found) // 4
    if quarter == 0:
        return None
    first, last = (sum(value for value, _ in part) / quarter for part in (found[:quarter], found[-quarter:]))
    size = sum(value for _, value in found) / len(found)
    return first, last, (last - first) / size if size > 0 else 0.0


def _is_worse(reward: Any, moved: float) -> bool:
    if reward.weight:
        return moved * (1 if reward.weight > 0 else -1) <= -LOST
    better = reward.metric.columns[reward.column].better if reward.band is None else "higher"
    if better == "lower":
        return moved >= LOST
    return better is not None and moved <= -LOST


def _scores(start: Mapping[str, float], now: Mapping[str, float], rewarded: set[str]) -> list[str]:
    """Scores of the validation that got worse, in words."""
    both = [name for name in start if name in now and name not in rewarded]

    def worse(name: str) -> bool:
        before, after = start[name], now[name]
        if name in WORSE:
            return after > WORSE[name] * before
        if name in AWAY:
            return abs(after - 1) > abs(before - 1) + AWAY[name]
        return after < before - FELL.get(name, float("inf"))

    return [f"{name} {start[name]:.3g} -> {now[name]:.3g}" for name in both if worse(name)]
