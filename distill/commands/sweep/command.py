"""`distill run RECIPE -m a=1,2 b=x,y`: many runs of one recipe, each a process and a run folder of its own.

The jobs are the product of the values, in Hydra's sweep syntax and order, or the named rows of recipes/sweep/NAME.yaml. Every
recipe is read before the first job starts. A job takes over the finished stages of all others whose fingerprints are equal (their
`reuse` is the sweep's folder), and one that fails leaves the rest alone. The same command again runs what is missing: finished
jobs are passed over, others continue where they were. Of its own words, `launcher=` starts the jobs (default: this Python).
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from tqdm import tqdm

from distill import __version__
from distill.commands.sweep.table import Row, read_row, write_tables
from distill.compose import RECIPES, find_recipe, quoted
from distill.pipeline import record
from distill.pipeline.run_folder import SWEEP, check_same
from distill.recipe import Recipe, load_recipe, spec_of, to_dict
from distill.training import metrics_log
from distill.training.lifecycle.launcher import requested_processes
from distill.training.lifecycle.signals import end_with_parent, terminations
from teachers.config import convert, nearest
from teachers.disk.lock import LOCK, FolderLock
from teachers.disk.read import read_yaml
from teachers.errors import UserError
from teachers.files import atomic_write, make_folder, read_json_or_none

OWN_WORDS = ("sweep", "sweep_dir", "launcher")
LOGS = "logs"
POLL_SECONDS = 0.5
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher of one process leaves in the environment; its jobs make their own group or none."""


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """What recipes/sweep/NAME.yaml holds: the overrides of each job by its name, and those that all share."""

    jobs: dict[str, tuple[str, ...]]
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One run: its name, which is its folder's, the overrides that set it apart and those that all jobs share."""

    name: str
    own: tuple[str, ...]
    common: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """What is run where."""

    recipe: Path
    folder: Path
    jobs: tuple[Job, ...]
    recipes: dict[str, Recipe]
    launcher: tuple[str, ...]


def run(recipe: Path, words: Sequence[str]) -> int:
    """Run every job that is not done and write the tables; 0 when all are done, else 1. UserError before the first job starts."""
    if (processes := requested_processes(os.environ)) > 1:
        raise UserError(
            f"a sweep of {processes} processes: launcher; start it once, with launcher='accelerate launch --num_processes "
            f"{processes}' for jobs of several processes"
        )
    sweep = plan(recipe, words)
    lock = open_folder(sweep)
    try:
        return _run_all(sweep)
    finally:
        lock.release()


def plan(recipe: Path, words: Sequence[str]) -> Sweep:
    """Read the command line and every job's recipe; UserError that names the job."""
    recipe = find_recipe(recipe)
    own = {key: value for key, _, value in (word.partition("=") for word in words) if key in OWN_WORDS}
    common, varied = _overrides([word for word in words if word.partition("=")[0] not in OWN_WORDS])
    rows: dict[str, list[str]] = {"": []}
    if "sweep" in own:
        shared, rows = read_sweep(recipe, own["sweep"])
        common = [*shared, *common]
    if len(rows) * len(varied) < 2:
        raise UserError("nothing varies: -m; give a key several values, such as seed=0,1, or sweep=NAME")
    named = [([name] if name else [], row, values) for name, row in rows.items() for values in varied]
    jobs = _jobs([([*name, *values], [*row, *values]) for name, row, values in named], common)
    first = load_job(recipe, jobs[0], Path("-"))
    folder = Path(own.get("sweep_dir") or f"runs/{first.name}_{Path(own['sweep']).stem if 'sweep' in own else 'sweep'}")
    recipes = {job.name: load_job(recipe, job, folder / job.name) for job in jobs}
    for job in jobs:
        file = folder / job.name / "recipe.yaml"
        if file.is_file():
            check_same(file, to_dict(recipes[job.name]))
    return Sweep(recipe, folder, tuple(jobs), recipes, tuple(shlex.split(own.get("launcher", ""))))


def find_file(recipe: Path, name: str, kind: str) -> Path:
    """A file of recipes/KIND by name: beside the recipe or shipped; or a path. UserError."""
    places = [Path(name)] if name.endswith(".yaml") else [f / kind / f"{name}.yaml" for f in (recipe.parent, RECIPES)]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        known = [other.stem for place in places for other in place.parent.glob("*.yaml")]
        raise UserError(f"no {kind} file: {places[0]}; {nearest(name, known)}")
    return file


def read_sweep(recipe: Path, name: str, only: Sequence[str] | None = None) -> tuple[list[str], dict[str, list[str]]]:
    """A sweep file as (overrides that all jobs share, job -> its overrides, of `only` these); beside the recipe, shipped, or a
    path. UserError."""
    file = find_file(recipe, name, "sweep")
    content = read_yaml(file)
    if not isinstance(content, dict) or not content.get("jobs"):
        raise UserError(
            f"not a sweep: {file}; it is 'jobs: {{NAME: [KEY=VALUE, ...]}}' and 'overrides: [KEY=VALUE, ...]'"
        )
    given = convert(SweepFile, content, locate=lambda _: str(file))
    for name in given.jobs:
        if name == LOGS or name != _safe(name):
            raise UserError(
                f"not a job's name: '{name}' in {file}; letters, digits and ._=,@+- make the name of a folder"
            )
    unknown = [name for name in only or () if name not in given.jobs]
    if unknown:
        raise UserError(f"no job of {file}: {', '.join(unknown)}; it has {', '.join(given.jobs)}")
    chosen = given.jobs if only is None else [name for name in given.jobs if name in only]
    return list(given.overrides), {name: list(given.jobs[name]) for name in chosen}


def _overrides(words: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """(Overrides with one value, the product of the others) in Hydra's syntax and order; UserError."""
    common: list[str] = []
    swept: list[Override] = []
    for word in words:
        if word.startswith(("hydra/", "hydra.")):
            raise UserError(
                f"'{word}' would have no effect: -m; jobs are started by launcher=, e.g. launcher='srun python'"
            )
        try:
            override = OverridesParser.create().parse_overrides([word])[0]
            BasicSweeper.split_arguments([override], None)
        except (HydraException, AssertionError, ValueError) as error:
            why = " ".join(str(error).split())[:200] or "glob"
            raise UserError(
                f"no values to run: '{word}' on the command line ({why}); write key=a,b or key=range(1,4)"
            ) from error
        if override.key_or_group == "run_dir":
            raise UserError(f"'{word}': -m; every job has its own run folder in sweep_dir=")
        if override.is_sweep_override():
            swept.append(override)
        else:
            common.append(word)
    return common, BasicSweeper.split_arguments(swept, None)[0]


def _jobs(rows: Sequence[tuple[list[str], list[str]]], common: Sequence[str]) -> list[Job]:
    """Jobs of (words of the name, overrides) pairs; names that are equal as folders differ by a digest."""
    names = [_folder_name(words) for words, _ in rows]
    times, jobs = Counter(names), []
    for name, (_, own) in zip(names, rows, strict=True):
        job = Job(f"{name}-{_digest(own)}" if times[name] > 1 else name, tuple(own), tuple(common))
        if job in jobs:
            raise UserError(f"the same job twice: '{name}' on the command line; remove one")
        jobs.append(job)
    return jobs


def _folder_name(words: Sequence[str]) -> str:
    whole = _safe(",".join(word.lstrip("+") for word in words))
    return whole if len(whole) <= 120 else f"{whole[:110]}-{_digest(words)}"


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=,@+-]+", "_", name).lstrip(".") or "_"


def _digest(words: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]


def load_job(recipe: Path, job: Job, run_dir: Path) -> Recipe:
    """A job's recipe, read strictly, with what would stop it before its first stage; UserError that names the job."""
    try:
        found = load_recipe(recipe, [*job.common, *job.own, f"run_dir={quoted(str(run_dir))}"])
        spec_of(found)
        metrics_log.check(found.tracker)
    except UserError as error:
        raise UserError(f"job '{job.name}': {error}") from error
    return found


def open_folder(sweep: Sweep) -> FolderLock:
    """Make or reopen the sweep's folder; UserError where another process is at work in it."""
    folder = sweep.folder
    others = [file for file in folder.iterdir() if file.name != LOCK] if folder.is_dir() else []
    if others and not (folder / SWEEP).is_file():
        raise UserError(f"not a sweep's folder: {folder} holds something else; choose another sweep_dir=")
    make_folder(folder / LOGS)
    lock = FolderLock.of(folder, "wait for it, end it, or choose another sweep_dir=")
    jobs = {job.name: list(job.own) for job in sweep.jobs}
    content = {"recipe": str(sweep.recipe), "overrides": list(sweep.jobs[0].common), "jobs": jobs}
    atomic_write(folder / SWEEP, yaml.safe_dump(content, sort_keys=False, width=120))
    return lock


def _run_all(sweep: Sweep) -> int:
    for job in sweep.jobs:
        refuse_alive(sweep, job)
    failed = 0
    redraw = 1 if sys.stderr.isatty() else 30  # seconds
    with tqdm(total=len(sweep.jobs), desc="sweep", unit="job", miniters=0, mininterval=redraw) as bar:
        for job in sweep.jobs:
            bar.set_postfix_str(job.name)
            before = is_finished(sweep.folder / job.name)
            if not before:
                run_job(sweep, job, bar)
            row = _row(sweep, job)
            failed += row.status != "done"
            words = f"{row}{', done before' if before else ''}"
            bar.write(f"distill: [{bar.n + 1}/{len(sweep.jobs)}] {words}", file=sys.stderr)
            bar.update(1)
            write_tables(sweep.folder, [_row(sweep, job) for job in sweep.jobs])
        bar.set_postfix_str("")
    done = len(sweep.jobs) - failed
    tqdm.write(f"distill: {done} of {len(sweep.jobs)} jobs are done: {sweep.folder / 'sweep.md'}", file=sys.stderr)
    return 1 if failed else 0


def is_finished(run: Path) -> bool:
    """Whether a run folder has its last stage, made by this version, its report and its student."""
    try:
        last = record.read(run / "stages" / "evaluate") or {}
    except UserError:
        return False
    left = [run / "report.json", run / "student" / "spec.json"]
    return last.get("version") == __version__ and all(file.is_file() for file in left)


def command(sweep: Sweep, job: Job) -> list[str]:
    """The command line of a job; a launcher is given the recipe, which is a program (distill/hook)."""
    given = sweep.recipes[job.name].reuse
    reuse = [str(sweep.folder), *((given,) if isinstance(given, str) else given or ())]
    places = [f"run_dir={quoted(str(sweep.folder / job.name))}", f"reuse=[{','.join(quoted(p) for p in reuse)}]"]
    start = sweep.launcher or (sys.executable, "-m", "distill", "run")
    own = [word for word in job.common if word.partition("=")[0].lstrip("+") != "reuse"]
    return [*start, str(sweep.recipe), *own, *job.own, *places]


def run_job(sweep: Sweep, job: Job, bar: tqdm, is_over: Callable[[], bool] = lambda: False) -> None:
    """Run a job to its end, or until it `is_over` (asked every POLL_SECONDS) and saves, its output in logs/NAME.log; what it took
    and how it ended is in logs/NAME.json."""
    log, state = _files(sweep, job)
    before, began, over = _seconds(sweep, job), time.time(), False
    with log.open("ab") as output, terminations() as received:
        start = output.tell()
        process = _start(command(sweep, job), output)
        try:
            facts = {"began": began, "seconds": before, "process": process.pid, "created": _created(process.pid)}
            atomic_write(state, json.dumps({"status": "running", **facts}))
            while process.poll() is None and not received and not (over := is_over()):
                last = (_lines(log, start) or ["starting"])[-1].strip()
                bar.set_postfix_str(f"{job.name}: {last}"[:100], refresh=False)
                bar.update(0)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
        finally:  # however this ends, the process has ended too: by SIGTERM, on which it saves
            if process.poll() is None:
                process.terminate()
            process.wait()
    done = process.returncode == 0 and is_finished(sweep.folder / job.name)
    error = None if done else _error(log, start, process.returncode)
    status = "done" if done else "stopped" if received or over else "failed"
    seconds = before + time.time() - began
    atomic_write(state, json.dumps({"status": status, "seconds": seconds, "error": error}))
    if received:
        tqdm.write(f"distill: SIGTERM: {job.name} is stopped; the same command continues", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)


def _start(words: Sequence[str], output: BinaryIO) -> subprocess.Popen:
    """A process of its own that ends with this one, without what a launcher of the sweep left in the environment; UserError where
    there is no program."""
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHED and not k.startswith("TORCHELASTIC_")}
    try:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=partial(end_with_parent, os.getpid()),  # noqa: PLW1509, it makes system calls alone
        )
    except OSError as error:
        raise UserError(f"cannot start {words[0]}: {error.strerror}; give another launcher=") from error


def _files(sweep: Sweep, job: Job) -> tuple[Path, Path]:
    return sweep.folder / LOGS / f"{job.name}.log", sweep.folder / LOGS / f"{job.name}.json"


def state_of(sweep: Sweep, job: Job) -> dict[str, Any]:
    return read_json_or_none(_files(sweep, job)[1]) or {}


def _seconds(sweep: Sweep, job: Job) -> float:
    """What a job took until now; one whose sweep was killed counts until it last wrote."""
    log, state = _files(sweep, job)[0], state_of(sweep, job)
    lost = log.stat().st_mtime - state.get("began", 0.0) if state.get("status") == "running" and log.is_file() else 0.0
    return state.get("seconds", 0.0) + max(0.0, lost)


def refuse_alive(sweep: Sweep, job: Job) -> None:
    """UserError where a killed sweep's job still runs: two would write to one folder."""
    state = state_of(sweep, job)
    pid = state.get("process")
    if state.get("status") == "running" and pid and _created(pid) == state.get("created"):
        raise UserError(f"job '{job.name}' still runs: process {pid}; wait for it or end it")


def _created(pid: int) -> float | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _lines(log: Path, start: int) -> list[str]:
    """What was written since `start`, its last 64 KiB; a bar's redrawing ends a line."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 2**16))
        text = file.read().decode("utf-8", "replace")
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def _error(log: Path, start: int, code: int) -> str:
    """Why a job failed, in one line: the signal, its own one line, the exception of its traceback, or its last line."""
    if code < 0:
        hint = ", perhaps for memory" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    lines = _lines(log, start)
    own = [line.removeprefix("distill: ") for line in lines if line.startswith("distill: ")]
    begun = max((i for i, line in enumerate(lines) if line.startswith("Traceback ")), default=None)
    raised = [line for line in lines[begun + 1 :] if not line.startswith(" ")] if begun is not None else []
    found = (raised[:1] or own[-1:] or lines[-1:] or ["it printed nothing"])[0]
    return f"{found} (exit {code})"


def _row(sweep: Sweep, job: Job) -> Row:
    state, finished = state_of(sweep, job), is_finished(sweep.folder / job.name)
    status = "done" if finished else state.get("status", "waiting")
    seconds = _seconds(sweep, job) if state else None
    return read_row(sweep.folder / job.name, job.name, job.own, seconds, status, state.get("error"))
