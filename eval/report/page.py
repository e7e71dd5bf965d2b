"""The page of every report: one self-contained HTML document, for runs and for `distill eval`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from eval.report.tables import Table, markdown
from teachers.files import atomic_write


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows; what is empty is not there.

    conclusion: one sentence; lines: what must stand beside the numbers; label: one that stands framed
    videos: {title, videos {name, source}}, those of one title are played in step; fps: their frames a second
    checks: targets {name, value, target, passed}; tables, plots {name, hint, svg}, refused: reasons by metric
    left_out: reasons by measure; curves {name, svg, series}; sheets {title, names, image}
    cases: admission {name, admitted, values}; stages {name, seconds, fingerprint, metrics}
    rule: which numbers may be compared; choices: what the protocol leaves to us; details: folded texts by title
    """

    title: str
    conclusion: str = ""
    lines: Sequence[str] = ()
    label: str = ""
    videos: Sequence[Mapping[str, Any]] = ()
    fps: float = 25.0
    checks: Sequence[Mapping[str, Any]] = ()
    note: str = ""
    tables: Sequence[Table] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    plots: Sequence[Mapping[str, Any]] = ()
    plot_note: str = "Dot: mean. Ticks: single seeds. Bar: ± one standard error over clips. Dashed: the target value."
    curves: Sequence[Mapping[str, Any]] = ()
    sheets: Sequence[Mapping[str, Any]] = ()
    cases: Sequence[Mapping[str, Any]] = ()
    stages: Sequence[Mapping[str, Any]] = ()
    rule: str = "Two numbers may be compared only if their cards have the same hash."
    choices: Sequence[str] = ()
    details: Mapping[str, str] = field(default_factory=dict)


def render(page: Page) -> str:
    """HTML without other files but the videos that it links to."""
    return _template().render(**vars(page))


@cache
def _template() -> jinja2.Template:
    source = (resources.files("eval.report") / "templates" / "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(source)


def write_page(page: Page, report: Mapping[str, Any], out: Path, name: str) -> None:
    """NAME.json for programs, NAME.md and NAME.html for people in the folder `out`, each whole or as it was. ValueError for NaN."""
    atomic_write(out / f"{name}.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    lines = [page.conclusion, "", *page.lines] if page.conclusion else page.lines
    atomic_write(out / f"{name}.md", markdown(page.title, lines, page.tables, page.refused))
    atomic_write(out / f"{name}.html", render(page))
