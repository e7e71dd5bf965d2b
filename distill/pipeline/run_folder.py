"""A run on disk: the resolved recipe, fingerprinted stages, atomic files, the metrics log. Only rank 0 writes.

One process at a time works in a run folder (`teachers.disk.lock`). A stage's record has the digest of every file that it wrote
(`distill.pipeline.record`); they are verified whenever a stage is found done, here or where it is reused.
"""

import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from distill import __version__
from distill.pipeline import record
from distill.recipe import NO_RESULT
from teachers.config import dump, to_plain
from teachers.disk.digests import recording
from teachers.disk.lock import LOCK, FolderLock
from teachers.disk.read import read_yaml_mapping
from teachers.errors import UserError
from teachers.files import atomic_write, canonical_json, check_path, copy_folder, flatten, make_folder, remove_folder

NEVER_REUSED = ("evaluate",)  # what it makes lies at the top of the run folder, and its times are this machine's
SWEEP = "sweep.yaml"  # what makes a folder of run folders a sweep's
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "av", "numpy")


class Ranks(Protocol):
    """What a run folder needs of the engine."""

    is_main: bool
    rank: int

    def barrier(self) -> None: ...

    def from_main(self, value: Any) -> Any: ...


class Alone:
    """Ranks of a single process."""

    is_main = True
    rank = 0

    def barrier(self) -> None: ...

    def from_main(self, value: Any) -> Any:
        return value


class RunFolder:
    """`run_dir` with recipe.yaml, stages/<stage>/, metrics.jsonl; made by `RunFolder.open`. `names`: the stages that are done, in
    the order in which this process ran or skipped them."""

    def __init__(self, path: Path, reuse: tuple[Path, ...], ranks: Ranks):
        self.path = path
        self.reuse = reuse
        self.ranks = ranks
        self.names: list[str] = []
        self._done: dict[str, dict[str, Any]] = {}
        self._lock: FolderLock | None = None

    @classmethod
    def open(cls, recipe: Any, ranks: Ranks | None = None) -> "RunFolder":
        """Make or reopen `recipe.run_dir`, locked until `close` or the end of this process; UserError if another process works in
        it, it holds another recipe, or `recipe.reuse` is no run folder."""
        ranks = ranks or Alone()
        reuse = (recipe.reuse,) if isinstance(recipe.reuse, str) else recipe.reuse or ()
        run = cls(Path(recipe.run_dir), tuple(map(Path, reuse)), ranks)
        refused = None
        if ranks.is_main:
            try:
                run._take(recipe)
            except UserError as error:
                refused = str(error)
        if (refused := ranks.from_main(refused)) is not None:
            raise UserError(refused)
        return run

    def _take(self, recipe: Any) -> None:
        """Lock the folder, check whose it is, and write its recipe.yaml."""
        for path in (self.path, *self.reuse):
            check_path(path)
        for other in self.reuse:
            if not (other / "recipe.yaml").is_file() and not (other / SWEEP).is_file():
                raise UserError(f"no run folder: {other}; reuse= takes the run_dir of an earlier run, or a sweep_dir")
        file = self.path / "recipe.yaml"
        if not file.is_file() and _is_taken(self.path):
            raise UserError(f"not a run folder: {self.path} holds something else; choose another run_dir=")
        make_folder(self.path)
        self._lock = FolderLock.of(self.path, "wait for it, end it, or choose another run_dir=")
        try:
            if not file.is_file():
                facts = "".join(
                    f"# {name}: {value}\n" for name, value in {**versions(), "revision": revision()}.items()
                )
                header, _, body = dump(recipe).partition("\n")
                atomic_write(file, f"{header}\n{facts}{body}")
            check_same(file, to_plain(recipe))
            for left in self.path.rglob(".*.tmp"):  # of a killed start
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another process work in this folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def stage_dir(self, name: str) -> Path:
        """Where the stage `name` keeps its artifacts."""
        return self.path / "stages" / name

    def finished(self, name: str) -> dict[str, Any] | None:
        """The content of a finished stage's fingerprint.json, None before it is finished; of a stage that `stage` has returned what
        rank 0 read."""
        return self._done.get(name) or record.read(self.stage_dir(name))

    def fingerprint(self, name: str, config: Mapping[str, Any], inputs: tuple[str, ...]) -> str:
        """sha256 of the canonical JSON of (name, config, fingerprints of the inputs, package version)."""
        given = {}
        for stage in inputs:
            done = self.finished(stage)
            assert done is not None, f"stage {name} needs {stage}, which is not finished"
            given[stage] = done["fingerprint"]
        facts = {"stage": name, "config": to_plain(config), "inputs": given, "version": __version__}
        return hashlib.sha256(canonical_json(facts).encode()).hexdigest()

    def stage(
        self,
        name: str,
        config: Mapping[str, Any],
        inputs: tuple[str, ...],
        body: Callable[[Path], dict[str, Any]],
        beside: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """The metrics of stage `name`: stored ones if it is done with this fingerprint, else those that `body` returns.

        `body(stage_dir)` resumes from what it left in `stage_dir` itself; leftovers of another fingerprint are deleted
        before. Files that it makes at the top of the run match one of `beside`. fingerprint.json is written last; what only
        an unfinished stage needs (record.SCRATCH) is deleted then. Its seconds add up over resumes, a killed start counting
        until the last file that it wrote. Every rank calls this; what is done is rank 0's to say, for on a network disk others
        may for a while not see what it has written. UserError for a damaged file of a done stage.
        """
        folder, ranks = self.stage_dir(name), self.ranks
        self._done.pop(name, None)
        mark, done, refused = "", None, None
        if ranks.is_main:
            try:
                mark, done = self._look(name, config, inputs, bool(beside))
            except UserError as error:
                refused = str(error)
        mark, done, refused = ranks.from_main((mark, done, refused))
        if refused is not None:
            raise UserError(refused)
        if done is None:
            done = self._run(folder, mark, to_plain(config), inputs, body, beside)
        self._done[name] = done
        self.names.append(name)
        return done["metrics"]

    def _look(
        self, name: str, config: Mapping[str, Any], inputs: tuple[str, ...], again: bool
    ) -> tuple[str, dict[str, Any] | None]:
        """The stage's fingerprint, and what is stored of it; None with its folder prepared where it has to run: also, where it may
        be run `again`, for a file that it left at the top of the run and that is lost or damaged."""
        mark, folder = self.fingerprint(name, config, inputs), self.stage_dir(name)
        done = self.finished(name)
        if done is not None and done["fingerprint"] == mark:
            fault = record.fault(folder, done)
            if fault is None:
                drop_scratch(folder)  # a kill may have come before it
                return mark, done
            if not again or not fault.name.startswith(record.TOP):
                raise UserError(f"damaged stage: {folder}: {fault}; {record.fix(folder, fault)}")
            _say(f"{name}: {fault}: it is made again")
            (folder / record.FILE).unlink()
        self._prepare(folder, mark)
        return mark, self.finished(name)

    def _prepare(self, folder: Path, mark: str) -> None:
        """Leave `folder` with this fingerprint's finished copy, its leftovers, or nothing; and a started.json."""
        started = record.read_started(folder)
        if started is None or started["fingerprint"] != mark or (folder / record.FILE).exists():
            remove_folder(folder)
            started = {"fingerprint": mark, "seconds": 0.0, "began": 0.0}
            if self._reused(folder, mark):
                return
        make_folder(folder)
        for fault in record.sift(folder):
            _say(f"{folder.name}: the leftover {fault}: it is made again")
        worked = [file.stat().st_mtime for file in folder.rglob("*") if file.is_file()]
        started["seconds"] += max([0.0, *(when - started["began"] for when in worked)])
        atomic_write(folder / record.STARTED, record.sealed({**started, "began": time.time()}))

    def _reused(self, folder: Path, mark: str) -> bool:
        """Whether another run's finished stage with this fingerprint was copied to `folder`; a damaged one is passed over."""
        for other in self._reusable(folder.name):
            try:
                stored = record.read(other)
                if stored is None or stored["fingerprint"] != mark:
                    continue
                fault = record.fault(other, stored)
            except UserError as error:
                fault = error
            if fault is None:
                copy_folder(other, folder)
                return True
            _say(f"reuse: {other}: {fault}: not taken")
        return False

    def _reusable(self, name: str) -> Iterator[Path]:
        """Where other runs keep the stage `name`: those named by reuse=, and the jobs of the sweeps among them."""
        if name in NEVER_REUSED:
            return
        for other in self.reuse:
            runs = sorted(file.parent for file in other.glob("*/recipe.yaml")) if (other / SWEEP).is_file() else [other]
            yield from (run / "stages" / name for run in runs)

    def _run(
        self,
        folder: Path,
        mark: str,
        config: dict[str, Any],
        inputs: tuple[str, ...],
        body: Callable[[Path], dict[str, Any]],
        beside: tuple[str, ...],
    ) -> dict[str, Any]:
        is_main, began = self.ranks.is_main, time.perf_counter()
        before = (record.read_started(folder) or {}).get("seconds", 0.0) if is_main else 0.0
        with recording(folder, folder / f"{record.SUMS}.{self.ranks.rank}", record.belongs) as recorder:
            try:
                metrics = body(folder)
            finally:  # what is in no list is made again
                recorder.wait()
        self.ranks.barrier()
        done = None
        if is_main:
            top = [file for pattern in beside for file in self.path.glob(pattern) if file.is_file()]
            files = record.files_of(folder, recorder.known, top)
            seconds = before + time.perf_counter() - began
            done = {
                "fingerprint": mark,
                "inputs": list(inputs),
                "config": config,
                "seconds": seconds,
                "metrics": metrics,
            }
            done |= {"version": __version__, "revision": revision(), "files": files}
            atomic_write(folder / record.FILE, record.sealed(done))
            done = record.read(folder)
            drop_scratch(folder)
        return self.ranks.from_main(done)


def drop_scratch(folder: Path) -> None:
    """Delete what only an unfinished stage goes on from."""
    for pattern in record.SCRATCH:
        for left in folder.glob(pattern):
            remove_folder(left)


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that numbers depend on."""
    found = {"python": sys.version.split()[0], "avatar-distill": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def revision() -> str:
    """Git commit of the code, "+" appended when files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    answers = []
    for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return "unknown"
        answers.append(done.stdout.strip())
    return answers[0] + ("+" if answers[1] else "")


def check_same(file: Path, now: dict[str, Any]) -> None:
    """UserError that names the keys in which the recipe.yaml of a run folder differs; what is absent is null."""
    before = read_yaml_mapping(file, "choose another run_dir= or delete the folder")
    old, new = flatten(before), flatten(now)
    changed = [key for key in (*new, *(key for key in old if key not in new)) if old.get(key) != new.get(key)]
    changed = [key for key in changed if not any(key == name or key.startswith(f"{name}.") for name in NO_RESULT)]
    if changed:
        key, *others = changed
        more = f" ({', '.join(others[:8])}{', ..' if len(others) > 8 else ''} changed too)" if others else ""
        raise UserError(
            f"another recipe's run folder: {file.parent} has {key}={old.get(key, 'nothing')}, "
            f"now {key}={new.get(key, 'nothing')}{more}; choose another run_dir= or delete the folder"
        )


def _is_taken(path: Path) -> bool:
    """Whether there is more at `path` than a start killed before its recipe.yaml would leave."""
    return path.exists() and (
        not path.is_dir() or any(item.suffix != ".tmp" and item.name != LOCK for item in path.iterdir())
    )


def _say(words: str) -> None:
    tqdm.write(f"distill: {words}", file=sys.stderr)
