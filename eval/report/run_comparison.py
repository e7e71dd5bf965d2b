"""Several runs beside each other: what their students score and cost, in which recipe keys they differ, and whether they may be
compared."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.cards import first_difference
from eval.metric import Column
from eval.report.conclusion import is_withheld
from eval.report.figures import dot_svg, number, plain
from eval.report.page import Page
from eval.report.run_report import COST, fps_of
from eval.report.tables import Table, cell, grid, words
from eval.report.videos import side_by_side
from teachers.files import flatten

MAY_DIFFER = ("run.seeds.training", "run.admitted", "run.probes")
"""Keys of a card in which runs may differ: with equal extractors and held-out clips their scores are of one scale."""
RULE = (
    "Runs are compared where their cards agree in all but the training seed, which metrics were admitted and how the extractors "
    "were trained, and where real clips score alike against real clips."
)
LONGEST = 17  # characters of a run's name in a figure


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run: its report.json, its recipe by dotted keys, and its folder; `name` is unique among those compared."""

    name: str
    folder: Path
    report: Mapping[str, Any]
    recipe: Mapping[str, Any]

    @property
    def student(self) -> Mapping[str, Any]:
        return self.report["systems"]["student"]


def obstacle(first: Run, other: Run) -> str | None:
    """Why the scores of two runs are of two scales; None where they may be compared.

    Equal extractors score equal real clips alike but for rounding (2 percent and a tenth of the error are allowed), so that a
    floor which differs tells other clips, such as those of a changed source of data.
    """
    cards = first.report["protocol"], other.report["protocol"]
    if cards[0].get("probes") != cards[1].get("probes"):
        return f"other extractors ({str(cards[0].get('probes'))[:12]} and {str(cards[1].get('probes'))[:12]})"
    if difference := first_difference(*cards, ignored=MAY_DIFFER):
        return f"another protocol ({difference})"
    floors = [run.report["floor"] for run in (first, other)]
    floors = [floor.get("metrics", floor) for floor in floors]
    for metric in (name for name in floors[0] if name in floors[1]):
        one, two = (floor[metric]["mean"] for floor in floors)
        if None in (one, two):
            continue
        if abs(one - two) > 0.02 * max(abs(one), abs(two)) + 0.1 * (floors[0][metric]["error"] or 0.0):
            return f"other real clips (the floor's {plain(metric)} is {number(one)} and {number(two)})"
    return None


def remarks(runs: Sequence[Run]) -> list[str]:
    """What must stand beside the numbers, a line each: which runs are not comparable with the first, whose costs are not."""
    first, lines = runs[0], []
    obstacles = {run.name: obstacle(first, run) for run in runs[1:]}
    if not any(obstacles.values()):
        lines.append("Comparable: the same protocol, extractors and held-out clips.")
    for name, why in obstacles.items():
        if why:
            lines.append(f"NOT COMPARABLE: {name} with {first.name}: {why}; compare each with its own teacher only.")
    for run in runs[1:]:
        differing = [key for key, value in _measured_on(first).items() if _measured_on(run).get(key) != value]
        if differing:
            lines.append(f"Costs of {run.name} and {first.name} were measured differently: {', '.join(differing)}.")
    return lines


def _measured_on(run: Run) -> dict[str, Any]:
    """What costs depend on besides the recipe's networks and schedule."""
    facts = {
        key: value for key, value in made_with(run).items() if key.startswith("device.") or key == "versions.torch"
    }
    return {**facts, "engine.precision": run.recipe.get("engine.precision")}


def made_with(run: Run) -> dict[str, Any]:
    """Revision, machine and versions of a run by dotted keys."""
    facts = {key: run.report.get(key, {}) for key in ("revision", "device", "versions")}
    return flatten(facts)


def comparison_tables(runs: Sequence[Run]) -> list[Table]:
    """Lines of scores, costs, targets, differing recipe keys, and machine and versions where they differ; a column a run."""
    groups = {
        "Scores of the student": _scores(runs),
        "Student and teacher": _ratios(runs),
        "Cost of the student": _costs(runs),
        "Recipe, keys that differ": _differing([run.recipe for run in runs]),
        "Made with, where it differs": _differing([made_with(run) for run in runs]),
    }
    heads = [{"name": run.name, "hint": ""} for run in runs]
    found = [Table(title=title, columns=heads, rows=list(rows)) for title, rows in groups.items()]
    return [table for table in found if table.rows]


def _line(name: str, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, "kind": "", "card": "", "n": "", "cells": list(cells)}


def _text(value: Any) -> dict[str, Any]:
    return {"value": str(value), "spread": "", "error": "", "refused": False}


def _scores(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    columns: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        columns |= {name: column for name, column in run.report["columns"].items() if name not in columns}
    for name, column in columns.items():
        shown = Column(**column)
        scored = any(name in run.student["metrics"] or name in run.student.get("not_admitted", {}) for run in runs)
        if shown.table is not None and scored:
            label = f"{shown.label} ({shown.words})" if shown.words else shown.label
            cells = (
                cell(run.student["metrics"].get(name), name in run.student.get("not_admitted", {})) for run in runs
            )
            yield _line(label, list(cells))


def _ratios(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """The ratios that hold within a run, and how many of its targets are met."""
    for name in dict.fromkeys(name for run in runs for name in run.report.get("ratios", {})):
        if "teacher" in name:
            hidden = [is_withheld(name, run.report["systems"]) for run in runs]
            values = (cell(run.report.get("ratios", {}).get(name), no) for run, no in zip(runs, hidden, strict=True))
            yield _line(plain(name), list(values))
    evaluated = [
        [x["passed"] for x in run.report.get("targets", {}).values() if x["passed"] is not None] for run in runs
    ]
    if any(evaluated):
        yield _line("targets met", [_text(f"{sum(passed)} of {len(passed)}" if passed else "") for passed in evaluated])


def _costs(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    for name, column in COST.items():
        if any(name in run.student.get("cost", {}) for run in runs):
            label = f"{column['label']} ({Column(**column).words})"
            yield _line(label, [cell(run.student.get("cost", {}).get(name), False) for run in runs])
    minutes = [sum(stage.get("seconds") or 0 for stage in run.report["stages"].values()) / 60 for run in runs]
    yield _line("all stages (minutes)", [cell(value, False) for value in minutes])


def _differing(sides: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for key in dict.fromkeys(key for side in sides for key in side):
        values = [_word(side[key]) if key in side else "-" for side in sides]
        if len(set(values)) > 1:
            yield _line(key, [_text(value) for value in values])


def _word(value: Any) -> str:
    return "null" if value is None else str(value)


def comparison_text(runs: Sequence[Run]) -> str:
    """The remarks and one table of all lines, for a terminal."""
    rows = [["", *(run.name for run in runs)]]
    for table in comparison_tables(runs):
        rows.append([f"**{table.title}**", *[""] * len(runs)])
        rows += [[row["name"], *map(words, row["cells"])] for row in table.rows]
    rows = [[value.replace("|", "\\|") for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    heads, *lines = ([value.ljust(width) for value, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join([*remarks(runs), "", *grid(heads, lines)]) + "\n"


def _plots(runs: Sequence[Run]) -> list[dict[str, Any]]:
    plots = []
    for name, column in runs[0].report["columns"].items():
        shown = Column(**column)
        scores = [(_short(run.name), run.student["metrics"].get(name)) for run in runs]
        kept = [(run, score) for run, score in scores if score is not None]
        if shown.plot and shown.table is not None and len(kept) > 1:
            goal = shown.better if isinstance(shown.better, float) else None
            plots.append({"name": shown.label, "hint": shown.words, "svg": dot_svg(kept, goal)})
    return plots


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def comparison_page(runs: Sequence[Run], page_dir: Path) -> Page:
    """The page of the comparison, to lie in `page_dir`: students' videos of the same conditions in step, tables, figures."""
    same = all(obstacle(runs[0], run) is None for run in runs[1:])
    videos: dict[str, dict[str, Path]] = {}
    for title, group in (runs[0].report.get("videos", {}) if same else {}).items():
        files = {"real": runs[0].folder / group["real"]} if "real" in group else {}
        for run in runs:
            if file := run.report.get("videos", {}).get(title, {}).get("student"):
                files[run.name] = run.folder / file
        videos[title] = {name: file for name, file in files.items() if file.is_file()}
    card, (verdict, *lines) = runs[0].report["protocol"], remarks(runs)
    return Page(
        title=f"Runs compared: {', '.join(run.name for run in runs)}",
        conclusion=verdict,
        lines=lines,
        label=card["note"],
        videos=side_by_side(videos, page_dir),
        fps=fps_of(card),
        note="Mean over noise seeds ± half the range over seeds; then the jackknife standard error over clips.",
        tables=comparison_tables(runs),
        plots=_plots(runs) if same else [],
        rule=RULE,
        choices=card["choices"],
        details={f"Card of {run.name}": json.dumps(run.report["protocol"], indent=1) for run in runs},
    )
