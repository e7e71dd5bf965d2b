"""metrics.jsonl, and trackers by accelerate: `tracker=tensorboard|wandb|trackio` gets every row once, also over resumes.

Beside metrics.jsonl the main process keeps `tracker.json` (the run's name at the tracker) and, in a stage's folder,
`tracked.json` (the number of its rows that were sent). Resume is replay: the rows of a stage come again in the same order with the
same values, so rows that were sent are skipped. The count is written first: killed in between, a row is missing at the tracker,
never duplicated.
"""

import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from teachers.config import to_plain
from teachers.disk.read import read_json
from teachers.errors import UserError
from teachers.files import atomic_write, flatten

Kind = Literal["none", "tensorboard", "wandb", "trackio"]


def check(kind: Kind) -> None:
    """UserError where the tracker is not installed."""
    if kind != "none" and kind not in [str(name) for name in get_available_trackers()]:
        raise UserError(f"tracker={kind} is not installed: recipe; pip install {kind}, or remove tracker=")


class Tracker:
    """One of accelerate's trackers for one run; it is started when the first row comes."""

    def __init__(self, make: Callable[[str], Any], path: Path, settings: Mapping[str, Any]):
        """`make(name)` returns the accelerate.tracking.GeneralTracker of a run of this name, which gets `settings` once; `path`:
        the run folder."""
        self.make, self.path, self.settings = make, path, settings
        self.tracker: Any = None
        self.axes: set[str] = set()

    def log(self, stage: str, step: int, values: Mapping[str, float], number: int) -> None:
        """Row `number` (1, 2, ...) of a stage, as `stage/role/quantity` at its step, unless it was sent before."""
        count_file = self.path / "stages" / stage / "tracked.json"
        if number <= read_json(count_file, "delete it: its rows are sent again").get("sent", 0):
            return
        tracker = self._started()
        count_file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(count_file, json.dumps({"sent": number}))
        row = {f"{stage}/{name}": value for name, value in values.items()}
        if tracker.name == "wandb":  # its own step never goes back, ours begins anew with each stage
            if stage not in self.axes:
                tracker.tracker.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                self.axes.add(stage)
            tracker.log({**row, f"{stage}/step": step})
        else:
            tracker.log(row, step=step)

    def close(self) -> None:
        """Flush and finish the tracker's run."""
        if self.tracker:
            self.tracker.finish()
            self.tracker = None

    def _started(self) -> Any:
        if self.tracker is None:
            file = self.path / "tracker.json"
            name = read_json(file, "delete it: the run gets another name").get("name")
            if name is None:
                atomic_write(file, json.dumps({"name": f"{self.path.name}-{uuid.uuid4().hex[:8]}"}))
            self.tracker = self.make(read_json(file)["name"])
            self.tracker.start()
            if name is None:
                self.tracker.store_init_configuration(dict(self.settings))
        return self.tracker


def open_tracker(recipe: Any, path: Path) -> Tracker | None:
    """The tracker that the recipe names, for the run folder `path`; None for none. For the main process alone."""
    kind: Kind = recipe.tracker
    if kind == "none":
        return None

    def make(name: str) -> Any:
        new = LOGGER_TYPE_TO_CLASS[kind]
        if kind == "tensorboard":
            return new(run_name="tensorboard", logging_dir=path)
        if kind == "wandb":
            return new(run_name=recipe.name, id=name, name=name, resume="allow", dir=str(path))
        return new(run_name=recipe.name, name=name, resume="allow")

    settings = flatten(to_plain(recipe))  # every tracker accepts numbers and text
    plain = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in settings.items()}
    return Tracker(make, path, plain)


class MetricsLog:
    """Append-only JSON lines {"stage", "step", name: value...}; `resume` drops what a killed run logged ahead.

    A `tracker` gets every row once: rows that are logged again on resume are not sent again.
    """

    def __init__(self, path: Path, is_main: bool = True, tracker: "Tracker | None" = None):
        self.path = path
        self.is_main = is_main
        self.tracker = tracker
        self._numbers: dict[str, int] = {}  # rows of a stage, for the tracker

    def resume(self, stage: str, step: int) -> None:
        """Drop the lines of `stage` with a step >= `step` (and a torn last line): they will be logged again."""
        if not self.is_main or not self.path.exists():
            return
        lines = self._lines()
        kept = [
            line for line in lines if (row := _parse_line(line)) and not (row["stage"] == stage and row["step"] >= step)
        ]
        self._numbers[stage] = sum(json.loads(line)["stage"] == stage for line in kept)
        if kept != lines:
            atomic_write(self.path, "".join(kept))

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Append one line; values are Python numbers, named `role/quantity`."""
        if self.is_main:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
            self._numbers[stage] = self._numbers.get(stage, 0) + 1
            if self.tracker:
                self.tracker.log(stage, step, values, number=self._numbers[stage])

    def close(self) -> None:
        """Finish the tracker's run."""
        if self.tracker:
            self.tracker.close()

    def rows(self, stage: str | None = None) -> list[dict[str, Any]]:
        """All rows, or those of one stage, in the order they were logged."""
        if not self.path.exists():
            return []
        return [row for line in self._lines() if (row := _parse_line(line)) and stage in (None, row["stage"])]

    def _lines(self) -> list[str]:
        return self.path.read_bytes().decode("utf-8", "replace").splitlines(keepends=True)


def _parse_line(line: str) -> dict[str, Any] | None:
    """A row; None for a torn or damaged one."""
    try:
        row = json.loads(line) if line.endswith("\n") else None
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and isinstance(row.get("stage"), str) and isinstance(row.get("step"), int)
    return row if whole else None
