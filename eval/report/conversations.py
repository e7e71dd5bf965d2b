"""The report of `distill eval multiturn`: times of answers and what they consist of, interruptions, scores; of one served system or
of several beside each other."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from eval.metric import Column
from eval.metrics.quality import slope
from eval.report.figures import dot_svg, plain
from eval.report.page import Page
from eval.report.tables import Row, Table, grid, tables
from eval.speed.latency import percentile

TIMES = ("latency", "dead", "stalled")  # seconds
GROUPS = {
    "waiting": ("talker", "queue", "wait"),
    "drawing": ("encode", "denoise", "decode", "rest"),
    "network": ("transport",),
    "playout": ("playout",),
}
"""Of the parts of an answer's latency: for the talker and other work; for the first chunk; on the line; for the chunk that is being
seen, at this client."""
QUIET_WITHIN, SILENT = 0.5, 0.01
"""Seconds: an interruption has succeeded if the avatar stopped within the first and less than the second was heard after that."""
RULE = (
    "Systems may be compared where the conversations, the way of speaking (typed turns, or sound that is sent), this client's "
    "machine and the line to them were the same. Typed turns have each server's own voice in them."
)
ANSWERS, WHERE, CUT = "Answers", "Where the time to the first talking frame goes", "Interruptions"
COLUMNS = {
    "latency.p50": Column("first talking frame, p50", "lower", "s after the user's turn", table=ANSWERS),
    "latency.p95": Column("first talking frame, p95", "lower", "s", table=ANSWERS),
    "dead.p50": Column("first sound, p50", "lower", "s", table=ANSWERS),
    "dead.p95": Column("first sound, p95", "lower", "s", table=ANSWERS),
    "stalled.max": Column("video stood still, max", "lower", "s a turn", table=ANSWERS),
    "connect": Column("connect", "lower", "ms, p50", table=ANSWERS),
    "open": Column("first frame of a stream", "lower", "ms, p50", table=ANSWERS),
    **{name: Column(name, "lower", "ms, p50", table=WHERE) for name in (*GROUPS, "undivided")},
    "round_trip": Column("round trip", "lower", "ms, least ping", table=WHERE),
    "stopped.p50": Column("stopped, p50", "lower", "s after the interrupt", table=CUT),
    "stopped.p95": Column("stopped, p95", "lower", "s", table=CUT),
    "after.max": Column("heard after it, max", "lower", "s", table=CUT),
    "never": Column("went on talking", "lower", "times", table=CUT),
    "score": Column("score", "higher", f"share quiet within {QUIET_WITHIN:g} s", table=CUT),
}


def summary(
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    lines: Sequence[Mapping[str, float]] = (),
    cut: Sequence[Any] = (),
) -> dict[str, Any]:
    """Percentiles of the times and parts over all turns, mean of each score and its mean change a turn. `lines`: seconds (connect,
    open, round_trip) of each conversation; `cut`: interruptions with `stopped` and `after`."""
    turns = [row for rows in conversations for row in rows]
    scores = dict.fromkeys(
        name for row in turns for name, value in row.items() if isinstance(value, float) and name not in TIMES
    )
    out: dict[str, Any] = {"num_turns": len(turns)}
    for name in TIMES:
        values = [row[name] for row in turns if row[name] is not None]
        out[f"{name}_seconds"] = _spread(values)
    parts = [row["parts_ms"] for row in turns]
    for name, values in (("parts_ms", parts), ("groups_ms", [grouped(row) for row in parts])):
        known = sorted({part for row in values for part in row})
        out[name] = {part: _middle([row.get(part, 0.0) for row in values]) for part in known}
    if lines:
        out["line_ms"] = {name: _middle([1000 * line[name] for line in lines]) for name in lines[0]}
    if cut:
        out["interruptions"] = interrupted(cut)
    for name in scores:
        series = [[row[name] for row in rows if name in row] for rows in conversations]
        slopes = [slope(values) for values in series if len(values) > 1]
        mean = statistics.fmean(value for values in series for value in values)
        out[name] = {"mean": mean, "change_a_turn": statistics.fmean(slopes) if slopes else 0.0}
    return {**out, "turns": turns}


def grouped(parts: Mapping[str, float]) -> dict[str, float]:
    """The parts of a latency by GROUPS, in ms; `undivided` where the server tells nothing of its own."""
    if not any(name in parts for names in (GROUPS["waiting"], GROUPS["drawing"]) for name in names):
        found = {"undivided": parts.get("transport", 0.0), "playout": parts.get("playout", 0.0)}
        return found if parts else {}
    groups = {name: sum(parts.get(part, 0.0) for part in names) for name, names in GROUPS.items()}
    known = {part for names in GROUPS.values() for part in names}
    groups["waiting"] += sum(value for part, value in parts.items() if part not in known)
    return groups


def interrupted(cut: Sequence[Any]) -> dict[str, Any]:
    """How an avatar took its interruptions: seconds until it stopped, what was heard behind that, and the share that succeeded."""
    stopped = [one.stopped for one in cut if one.stopped is not None]
    good = [one for one in cut if one.stopped is not None and one.stopped <= QUIET_WITHIN and one.after < SILENT]
    return {
        "num": len(cut),
        "never": len(cut) - len(stopped),
        "stopped_seconds": _spread(stopped),
        "after_seconds": _spread([one.after for one in cut]),
        "score": len(good) / len(cut),
    }


def scores_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """A system's numbers by the names of COLUMNS; its other scores by their own."""
    out: dict[str, Any] = {}
    for name, of in (("latency", "p50 p95"), ("dead", "p50 p95"), ("stalled", "max")):
        out |= {
            f"{name}.{which}": report[f"{name}_seconds"][which] for which in of.split() if report[f"{name}_seconds"]
        }
    out |= {name: value["p50"] for part in ("groups_ms", "line_ms") for name, value in report.get(part, {}).items()}
    if found := report.get("interruptions"):
        out |= {
            f"stopped.{which}": found["stopped_seconds"][which] for which in ("p50", "p95") if found["stopped_seconds"]
        }
        out |= {"after.max": found["after_seconds"]["max"], "never": found["never"], "score": found["score"]}
    drifting = {
        name: value for name, value in report.items() if isinstance(value, Mapping) and "change_a_turn" in value
    }
    for name, value in drifting.items():
        out |= {name: value["mean"], f"{name} a turn": value["change_a_turn"]}
    return out


def tables_of(reports: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Answers, parts, interruptions and scores, a row a system."""
    rows = [Row(name=name, scores=scores_of(report)) for name, report in reports.items()]
    quality = dict.fromkeys(name for row in rows for name in row.scores if name not in COLUMNS)
    columns = {**COLUMNS, **{name: Column(plain(name), table="Frames of the answers") for name in quality}}
    return tables({name: column.plain() for name, column in columns.items()}, rows)


def page(reports: Mapping[str, Mapping[str, Any]], videos: Sequence[Mapping[str, Any]] = (), fps: float = 25.0) -> Page:
    """The page of one report or of several."""
    first = next(iter(reports.values()))
    quickest = min(reports, key=lambda name: reports[name]["latency_seconds"].get("p50", math.inf))
    said = f"{quickest} answers first: its" if len(reports) > 1 else "The"
    conclusion = (
        f"{said} first talking frame is due {_seconds(reports[quickest])} after the user's turn, in the median of "
        f"{first['num_turns']} turns."
    )
    facts = ("server", "student", "turns_by", "talker", "lead")
    lines = [
        f"{name}: " + ", ".join(f"{fact.replace('_', ' ')} {report[fact]}" for fact in facts if report.get(fact))
        for name, report in reports.items()
    ]
    details = {f"Every turn of {name}": "\n".join(_every_turn(report)) for name, report in reports.items()}
    return Page(
        title="Conversations in real time",
        conclusion=conclusion,
        lines=lines,
        tables=tables_of(reports),
        plots=_plots(reports),
        plot_note="Dot: mean over turns. Bar: ± one standard error.",
        videos=videos,
        fps=fps,
        rule=RULE,
        details=details,
    )


def _plots(reports: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    found = []
    for name, label in (("latency", "first talking frame"), ("dead", "first sound")):
        rows = []
        for system, report in reports.items():
            values = [row[name] for row in report["turns"] if row[name] is not None]
            if values:
                error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
                rows.append((system, {"mean": statistics.fmean(values), "error": error}))
        found.append({"name": label, "hint": "s after the user's turn", "svg": dot_svg(rows)})
    return [plot for plot in found if plot["svg"]]


def _every_turn(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in report["turns"]:
        parts = grouped(row["parts_ms"])
        times = ["-" if row[name] is None else f"{row[name]:.3f}" for name in TIMES]
        shown = ", ".join(f"{name} {value:.0f}" for name, value in parts.items())
        rows.append([f"{row['conversation']} {row['turn'] + 1}", *times, shown, row["text"]])
    return grid(["turn", "frame, s", "sound, s", "stood still, s", "ms", "text"], rows)


def _seconds(report: Mapping[str, Any]) -> str:
    found = report["latency_seconds"]
    return f"{found['p50']:.2f} s" if found else "never"


def _middle(values: Sequence[float]) -> dict[str, float]:
    return {"p50": percentile(values, 50), "p95": percentile(values, 95)}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {**_middle(values), "max": max(values)} if values else {}
