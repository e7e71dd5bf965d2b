"""What a recipe expects of its own report: `expect: {fid_student_over_teacher: {at_most: 1.1}, ...}`.

A name is read by one rule, QUANTITY_SYSTEM, QUANTITY_SYSTEM_over_OTHER or QUANTITY_SYSTEM_minus_OTHER. A quantity is a metric (its
mean), or one of COSTS.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from teachers.errors import UserError

SYSTEMS = ("teacher", "teacher_few_step", "ar_teacher", "zero_shot", "init", "student")
COSTS = {
    "cost": "seconds_per_video_second",
    "batch_cost": "batch_seconds_per_video_second",
    "ttff": "ttff_seconds",
    "nfe": "nfe_per_chunk",
}
_ONE = "|".join(sorted(SYSTEMS, key=len, reverse=True))
_WORD = rf"(?!(?:{_ONE})(?:_|\Z))[a-z0-9]+"  # of a quantity, whose name holds no system
_NAME = re.compile(
    rf"(?P<quantity>{_WORD}(?:_{_WORD})*?)_(?P<system>{_ONE})(?:_(?P<operation>over|minus)_(?P<other>{_ONE}))?"
)
SHOWN = (  # comparisons of every report, where they are measured
    *(f"{name}_student_over_teacher" for name in ("fid", "fvd", "sync", "motion")),
    *(f"{name}_student_over_ar_teacher" for name in ("fid", "fvd", "sync", "motion")),
    *("fid_student_over_init", "fvd_student_over_init", "diversity_student_minus_init", "sync_student_minus_init"),
    *("fid_init_over_zero_shot", "fvd_init_over_zero_shot", "diversity_init_minus_zero_shot"),
    *(f"{name}_teacher_over_student" for name in ("cost", "batch_cost", "ttff")),
)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Where a value is expected to lie, both ends included."""

    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self):
        if self.at_least is None and self.at_most is None:
            raise UserError("expect: an entry without bounds; give it at_least, at_most or both")


def check(names: Mapping[str, Bounds]) -> None:
    """UserError for a name that the rule does not read."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"expect.{name}: not QUANTITY_SYSTEM, QUANTITY_SYSTEM_over_OTHER or QUANTITY_SYSTEM_minus_OTHER; "
                f"systems are {', '.join(SYSTEMS)}"
            )


def compare(name: str, systems: Mapping[str, Mapping]) -> float | None:
    """The value of a name among a report's systems ({"metrics", "cost"} each); None where it is not measured, NaN over 0."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"no comparison: {name}")
    own = _value(match["quantity"], systems.get(match["system"]))
    if match["operation"] is None or own is None:
        return own
    other = _value(match["quantity"], systems.get(match["other"]))
    if other is None:
        return None
    if match["operation"] == "minus":
        return own - other
    return own / other if other else math.nan


def _value(quantity: str, system: Mapping | None) -> float | None:
    if system is None:
        return None
    if quantity in COSTS:
        return system.get("cost", {}).get(COSTS[quantity])
    score = system["metrics"].get(quantity)
    return None if score is None else score["mean"]
