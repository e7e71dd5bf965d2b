"""What a run's report shows, in one sentence."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.report.figures import number, plain

SCORES = ("fid", "fvd", "sync", "motion")  # student over teacher, where the teacher's score is positive
SPEEDS = {
    "batch_cost_teacher_over_student": "generates {} times as fast in a batch",
    "ttff_teacher_over_student": "shows its first frame {} times as early",
}
MOST_NAMED = 3  # missed targets that are named


def is_withheld(comparison: str, systems: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a comparison (`distill.expect`) is of a metric that was not admitted: one in a system's `not_admitted`."""
    refused = {name for system in systems.values() for name in system.get("not_admitted", {})}
    known = refused.union(*(system.get("metrics", {}) for system in systems.values()))
    return max((name for name in known if f"{comparison}_".startswith(f"{name}_")), key=len, default="") in refused


def conclusion(report: Mapping[str, Any]) -> str:
    """One sentence of a report as `write_report` leaves it: student against teacher, speed, targets; "" where nothing is there."""
    clauses = [_against_teacher(report), _targets(report.get("targets", {}))]
    text = "; ".join(clause for clause in clauses if clause)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _against_teacher(report: Mapping[str, Any]) -> str:
    ratios = report.get("ratios", {})
    scores = []
    for metric in SCORES:
        name = f"{metric}_student_over_teacher"
        value = ratios.get(name)
        if value is not None and value > 0 and not is_withheld(name, report.get("systems", {})):
            scores.append(f"{number(value)} times the {plain(metric)}")
    speeds = [words.format(number(ratios[name])) for name, words in SPEEDS.items() if ratios.get(name) is not None]
    parts = ([f"has {_listed(scores)}"] if scores else []) + speeds
    return f"against its teacher the student {_listed(parts)}" if parts else ""


def _targets(lines: Mapping[str, Mapping[str, Any]]) -> str:
    evaluated = {name: line["passed"] for name, line in lines.items() if line["passed"] is not None}
    open_lines = sum(bool(line["target"]) and line["passed"] is None for line in lines.values())
    missed = [plain(name) for name, passed in evaluated.items() if not passed]
    parts = []
    if evaluated and not missed:
        parts.append(f"all {len(evaluated)} targets are met" if len(evaluated) > 1 else "its one target is met")
    elif evaluated:
        named = missed[:MOST_NAMED] + ([f"{len(missed) - MOST_NAMED} more"] if len(missed) > MOST_NAMED else [])
        parts.append(f"{len(evaluated) - len(missed)} of {len(evaluated)} targets are met, missed: {_listed(named)}")
    if open_lines:
        parts.append(
            f"{open_lines} more could not be evaluated" if evaluated else f"{open_lines} targets could not be evaluated"
        )
    return "; ".join(parts)


def _listed(parts: Sequence[str]) -> str:
    """a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
