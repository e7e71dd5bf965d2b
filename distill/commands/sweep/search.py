"""`distill search RECIPE SPACE [KEY=VALUE ...]`: trials of a recipe over a space of overrides, by successive halving.

SPACE is recipes/search/NAME.yaml or a path (`distill.commands.sweep.halving.SearchFile`). A trial is an ordinary run folder, one
after the other, started as a sweep's jobs are (`--launcher`), with the finished stages of all others that have equal fingerprints.
It ends at its last step, at a rung where others were better, or where the health gate alarms (health.stop). What was found is in
search.json, search.csv and search.md, the best trial's recipe in best.yaml. The same command continues a search that was killed,
and its table is the same. A trial that failed otherwise is counted as failed and not repeated.
"""

import argparse
import csv
import io
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distill.commands.sweep import halving
from distill.commands.sweep.command import (
    Job,
    Sweep,
    find_file,
    is_finished,
    load_job,
    open_folder,
    refuse_alive,
    run_job,
    state_of,
)
from distill.commands.sweep.halving import Replay, SearchFile, Trial, Value
from distill.compose import find_recipe
from distill.pipeline.run_folder import check_same
from distill.recipe import Recipe, to_dict
from distill.training.lifecycle.selection import validations
from distill.training.metrics_log import MetricsLog
from eval.report.tables import grid
from teachers.config import HEADER, convert, dump, to_plain
from teachers.disk.read import read_json, read_yaml
from teachers.errors import UserError
from teachers.files import atomic_write

STATE = "search.json"
COLLAPSED = " collapsed at step "


@dataclass(frozen=True)
class Search:
    """What is searched where: the space, and what every trial shares."""

    recipe: Path
    space: SearchFile
    common: tuple[str, ...]
    folder: Path
    launcher: tuple[str, ...]

    def sweep(self, trial: Trial) -> Sweep:
        """A trial as a sweep of one job, its recipe read; UserError that names the trial."""
        job = Job(trial.name, trial.overrides, self.common)
        return Sweep(self.recipe, self.folder, (job,), {job.name: self.load(trial)}, self.launcher)

    def load(self, trial: Trial) -> Recipe:
        """A trial's recipe; UserError that names the trial and its values."""
        job = Job(f"{trial.name} ({' '.join(trial.overrides)})", trial.overrides, self.common)
        return load_job(self.recipe, job, self.folder / trial.name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `distill search`."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a shipped recipe's name or a .yaml file")
    parser.add_argument("space", metavar="SPACE", help="the name of a search file (recipes/search) or a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="what all trials share")
    parser.add_argument("--dir", type=Path, help="the folder of the runs (default runs/RECIPE_SPACE)")
    parser.add_argument("--launcher", default="", help="starts the trials, as a sweep's launcher= (e.g. 'srun python')")


def run(args: argparse.Namespace) -> int:
    """Run every trial that is not finished and write the tables; 0 when one reached the end, else 1. UserError before the first."""
    search = plan(args.recipe, args.space, args.overrides, args.dir, args.launcher)
    first = search.sweep(Replay(search.space, []).trial)
    lock = open_folder(first)
    try:
        trials = _read(search)
        with tqdm(total=search.space.trials, initial=len(trials), desc="search", unit="trial") as bar:
            while len(trials) < search.space.trials:
                trials.append(_run(search, trials, bar))
                _write(search, trials)
                bar.write(f"distill: {trials[-1].name}: {trials[-1].why}", file=sys.stderr)
                bar.update(1)
        _write(search, trials)
    finally:
        lock.release()
    sys.stdout.write("\n".join(table(search.space, trials)) + "\n")
    winner = halving.best(search.space, trials)
    if winner is None:
        sys.stderr.write(f"distill: no trial reached the end: {search.folder / 'search.md'}\n")
        return 1
    sys.stdout.write(f"\nbest: {shlex.join(winner.overrides)}\ndistill run {search.folder / 'best.yaml'}\n")
    return 0


def plan(recipe: Path, space: str, overrides: list[str], folder: Path | None, launcher: str) -> Search:
    """Read the search file and a recipe with each end of the space; UserError in one line."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UserError("distill search needs Optuna: pip install 'avatar-distill[search]'") from error
    recipe = find_recipe(recipe)
    file = find_file(recipe, space, "search")
    content = read_yaml(file)
    try:
        given: SearchFile = convert(SearchFile, content, locate=lambda _: str(file))
    except UserError as error:
        raise UserError(f"{error}" if str(file) in str(error) else f"{error} (search file {file})") from error
    common = (*given.overrides, *overrides)
    for word in (*common, *(f"{key}=" for key in given.space)):
        if word.partition("=")[0].lstrip("+") == "run_dir" or "=" not in word:
            raise UserError(f"'{word}': {file} and command line; give KEY=VALUE, and the folder of all runs by --dir")
    found = Search(recipe, given, common, Path("-"), tuple(shlex.split(launcher)))
    start = Replay(given, []).trial
    named = found.load(start).name
    for key, parameter in given.space.items():
        for value in parameter.choices or (parameter.low, parameter.high):
            _check_rungs(found.load(replace(start, values={**start.values, key: value})), given, file)
    return replace(found, folder=folder or Path(f"runs/{named}_{file.stem}"))


def _check_rungs(recipe: Recipe, space: SearchFile, file: Path) -> None:
    """UserError where a stage is not validated at the rungs."""
    train = getattr(getattr(recipe, space.stage, None), "train", None)
    if train is None:
        raise UserError(f"stage: got '{space.stage}' in {file}; the recipe has no such stage that trains")
    if not space.first < train.num_steps:
        raise UserError(
            f"first: got {space.first} in {file}; {space.stage}.train.num_steps is {train.num_steps}: no rung"
        )
    due, rung = set(validations(train.validate_every, train.num_steps, train.stop)), space.first
    while rung < train.num_steps:
        if rung not in due:
            raise UserError(
                f"first, factor: the rung of step {rung} in {file} is not validated; "
                f"{space.stage}.train.validate_every={train.validate_every} must divide it, without stop"
            )
        rung *= space.factor


def _run(search: Search, finished: list[Trial], bar: tqdm) -> Trial:
    """The next trial, run to its end."""
    replay = Replay(search.space, finished)
    trial = replay.trial
    sweep, folder = search.sweep(trial), search.folder / trial.name
    (job,) = sweep.jobs
    if (folder / "recipe.yaml").is_file():
        check_same(folder / "recipe.yaml", to_dict(sweep.recipes[job.name]))
    refuse_alive(sweep, job)
    rows = _rows_of(folder, search.space)

    def is_over() -> bool:
        return _trained(folder, search.space) or replay.pruned_at(rows()) is not None

    bar.set_postfix_str(trial.name)
    if not is_over() and not is_finished(folder):
        run_job(sweep, job, bar, is_over)
    trial = replace(trial, rows=rows())
    return _ended(search, trial, replay.pruned_at(trial.rows), state_of(sweep, job).get("error"))


def _ended(search: Search, trial: Trial, step: int | None, error: str | None) -> Trial:
    """A trial that has ended, with how and why; pruned at `step`, where it was."""
    space, folder = search.space, search.folder / trial.name
    if step is not None:
        rows = tuple(row for row in trial.rows if row[0] <= step)
        return replace(trial, rows=rows, state="pruned", why=f"pruned at step {step}: {rows[-1][1]:.4g}")
    score = _score(folder, space, trial)
    if score is not None:
        return replace(trial, state="complete", score=score, why=f"complete: {score:.4g}")
    if error and COLLAPSED in error:
        return replace(trial, state="pruned", why=f"health: {error}")
    return replace(trial, state="failed", why=f"failed: {error or f'no score {space.score or space.validation}'}")


def _trained(folder: Path, space: SearchFile) -> bool:
    """Whether a trial needs no more: its stage is done and no report is asked for."""
    return space.score is None and (folder / "stages" / space.stage / "fingerprint.json").is_file()


def _score(folder: Path, space: SearchFile, trial: Trial) -> float | None:
    """The score of a trial that reached the end; None for another."""
    if space.score is None:
        return trial.rows[-1][1] if trial.rows and (_trained(folder, space) or is_finished(folder)) else None
    if not is_finished(folder):
        return None
    try:
        found = read_json(folder / "report.json")["systems"]["student"]["metrics"][space.score]["mean"]
        return float(found)
    except (KeyError, TypeError, ValueError):
        return None


def _rows_of(folder: Path, space: SearchFile) -> Callable[[], tuple[tuple[int, float], ...]]:
    """(Step, validation) of a run so far, read again where its log has changed."""
    log, seen = MetricsLog(folder / "metrics.jsonl", is_main=False), [-1, ()]

    def rows() -> tuple[tuple[int, float], ...]:
        size = log.path.stat().st_size if log.path.is_file() else 0
        if size != seen[0]:
            found = {row["step"]: row[space.validation] for row in log.rows(space.stage) if space.validation in row}
            seen[:] = size, tuple((step, float(value)) for step, value in sorted(found.items()))
        return seen[1]

    return rows


def _read(search: Search) -> list[Trial]:
    """The finished trials of a search that goes on; UserError for another one's."""
    file = search.folder / STATE
    state = read_json(file, "delete it: the trials are read again from their runs")
    if not state:
        return []
    try:
        trials, before = halving.read(state["trials"]), state["search"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"damaged file: {file} ({error}); delete it: the trials are read again from their runs"
        ) from error
    for name, value in _facts(search).items():
        if name != "trials" and before.get(name) != value:
            raise UserError(f"another search: {file} has another '{name}'; give another --dir")
    return trials[: search.space.trials]


def _facts(search: Search) -> dict[str, Any]:
    return {**to_plain(search.space), "recipe": str(search.recipe), "overrides": list(search.common)}


def _write(search: Search, trials: list[Trial]) -> None:
    """The state and the tables, each whole or as it was."""
    state = {"search": _facts(search), "trials": halving.plain(trials)}
    atomic_write(search.folder / STATE, json.dumps(state, indent=1) + "\n")
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["trial", *search.space.space, "step", "validation", "score", "state", "why"])
    for one in trials:
        last: tuple[Value, Value] = one.rows[-1] if one.rows else (None, None)
        rows.writerow([one.number, *one.values.values(), *last, one.score, one.state, one.why])
    atomic_write(search.folder / "search.csv", out.getvalue())
    atomic_write(search.folder / "search.md", "\n".join(table(search.space, trials)) + "\n")
    winner = halving.best(search.space, trials)
    if winner is not None:
        text = dump(replace(search.load(winner), run_dir=f"{search.folder}_best"))
        given = f"{HEADER}\n# {winner.name} of {search.folder.name}: {' '.join(winner.overrides)}\n"
        atomic_write(search.folder / "best.yaml", text.replace(f"{HEADER}\n", given, 1))


def table(space: SearchFile, trials: list[Trial]) -> list[str]:
    """A row a trial: its values, its last validation and score, and why it ended."""
    head = ["trial", *(key.rpartition("train.")[2] for key in space.space), "step", "validation", "score", "ended"]
    lines = []
    for one in trials:
        step, last = one.rows[-1] if one.rows else ("-", None)
        numbers = ["-" if value is None else f"{value:.4g}" for value in (last, one.score)]
        values = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in one.values.values()]
        lines.append([str(one.number), *values, str(step), *numbers, one.why.replace("|", "\\|")])
    return grid(head, lines)
