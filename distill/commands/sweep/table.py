"""What a sweep ends with: sweep.csv, sweep.md and sweep.svg, one row a job, the numbers those of its report.json."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from eval.report.figures import dot_svg, number, plain
from eval.report.tables import grid
from teachers.disk.read import read_json
from teachers.files import atomic_write

METRICS = ("fid", "fvd", "sync", "motion")
PANEL, GAP = 340, 24  # eval.report.figures.dot_svg is 340 wide
STYLE = """\
text{font:12px system-ui,sans-serif;fill:#222}.tick{font-size:10px;fill:#666}.value,.head{font-weight:600}.head{font-size:14px}
.grid{stroke:#ddd}.bar{stroke:#9bb3d6;stroke-width:5}.seed{stroke:#33619f}.dot{fill:#1d4f91}rect{fill:#fff}"""


@dataclass(frozen=True)
class Row:
    """A job: student's metric -> {"mean", "error", ...} of its report, those not admitted apart; seconds, how it stands, why."""

    name: str
    overrides: tuple[str, ...]
    scores: dict[str, dict]
    withheld: tuple[str, ...]
    seconds: float | None
    status: str
    error: str | None

    def __str__(self) -> str:
        shown = [f"{name} {number(self.scores[name]['mean'])}" for name in METRICS if name in self.scores]
        took = "" if self.seconds is None else f", {self.seconds:.0f} s"
        why = f": {self.error}" if self.error and self.status != "done" else ""
        return f"{self.name}: {self.status}{why}{took}{', ' if shown else ''}{', '.join(shown)}"


def read_row(
    run: Path, name: str, overrides: tuple[str, ...], seconds: float | None, status: str, error: str | None
) -> Row:
    """A job's row; the scores of one that is done."""
    student, scores = {}, {}
    if status == "done":
        report = read_json(run / "report.json", "delete it and run the sweep again")
        try:
            student = report["systems"]["student"]
            scores = {metric: _score(student["metrics"][metric]) for metric in METRICS if metric in student["metrics"]}
            dict(student.get("not_admitted", {}))
        except (KeyError, TypeError, ValueError, AttributeError):
            status, error, student = "damaged", f"{run / 'report.json'} is no report", {}
    withheld = tuple(metric for metric in METRICS if metric in student.get("not_admitted", {}))
    return Row(name, overrides, scores, withheld, seconds, status, None if status == "done" else error)


def _score(score: dict) -> dict:
    """A report's score; KeyError without a mean, TypeError where its numbers are none."""
    for value in (score["mean"], score.get("error")):
        if not isinstance(value, int | float | None) or isinstance(value, bool):
            raise TypeError(f"{value!r} is no number")
    return dict(score)


def write_tables(folder: Path, rows: Sequence[Row]) -> None:
    """sweep.csv, sweep.md and sweep.svg in the sweep's folder, each whole or as it was."""
    atomic_write(folder / "sweep.csv", csv_text(rows))
    atomic_write(folder / "sweep.md", markdown(rows))
    atomic_write(folder / "sweep.svg", svg(rows))


def csv_text(rows: Sequence[Row]) -> str:
    """Full precision; empty where there is no score."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    both = [key for metric in METRICS for key in (metric, f"{metric}_error")]
    table.writerow(["job", "overrides", *both, "seconds", "status", "error"])
    for row in rows:
        values = [row.scores.get(metric, {}).get(key) for metric in METRICS for key in ("mean", "error")]
        seconds = None if row.seconds is None else round(row.seconds, 1)
        table.writerow([row.name, " ".join(row.overrides), *values, seconds, row.status, row.error])
    return out.getvalue()


def markdown(rows: Sequence[Row]) -> str:
    """The table to be read: mean +- error over clips."""
    named = any(row.name != ",".join(row.overrides) for row in rows)
    head = ["job", *(["overrides"] if named else []), *METRICS, "seconds", "status"]
    lines = []
    for row in rows:
        words = [" ".join(f"`{word}`" for word in row.overrides)] if named else []
        seconds = "-" if row.seconds is None else f"{row.seconds:.0f}"
        status = f"{row.status}: {row.error}" if row.error else row.status
        lines.append([row.name, *words, *(_cell(row, metric) for metric in METRICS), seconds, status])
    return "\n".join(grid(head, [[cell.replace("|", "\\|") for cell in line] for line in lines])) + "\n"


def _cell(row: Row, metric: str) -> str:
    if metric in row.withheld:
        return "not admitted"
    score = row.scores.get(metric, {})
    error = score.get("error")
    return number(score.get("mean")) + (f" ± {number(error, 2)}" if error is not None else "")


def svg(rows: Sequence[Row]) -> str:
    """One panel a metric, a line a job: mean, error and seeds."""
    panels, left, height = [], GAP, 0
    for metric in METRICS:
        body = dot_svg([(_short(row.name), row.scores[metric]) for row in rows if metric in row.scores])
        size = re.search(r'viewBox="0 0 \d+ (\d+)"', body)
        if size:
            placed = f'<svg x="{left}" y="34" width="{PANEL}" height="{size[1]}"'
            panels.append(f'<text class="head" x="{left}" y="22">{escape(plain(metric))}</text>')
            panels.append(body.replace("<svg", placed, 1))
            left, height = left + PANEL + GAP, max(height, int(size[1]))
    if not panels:
        panels, left, height = ['<text class="head" x="24" y="22">no job is done</text>'], 200, 0
    size = f'width="{left}" height="{height + 44}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style><rect {size}/>{"".join(panels)}</svg>\n'
    )


def _short(name: str, most: int = 18) -> str:
    """The last parts of the keys, cut to what fits beside a panel."""
    short = ",".join(re.sub(r"^[^=]*\.", "", word) for word in name.split(","))
    return short if len(short) <= most else f"{short[: most - 1]}…"
