"""A run on disk: the resolved recipe, fingerprinted stages, atomic files, the metrics log. Only rank 0 writes."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import yaml

from distill import __version__
from distill.recipe import NO_RESULT
from teachers.config import dump, to_plain
from teachers.errors import UserError
from teachers.files import (
    atomic_write,
    canonical_json,
    copy_folder,
    flatten,
    make_folder,
    read_json_or_none,
    remove_folder,
)

NEVER_REUSED = ("evaluate",)  # what it makes lies at the top of the run folder, and its times are this machine's
SWEEP = "sweep.yaml"  # what makes a folder of run folders a sweep's
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "av", "numpy")


class Ranks(Protocol):
    """What a run folder needs of the engine."""

    is_main: bool

    def barrier(self) -> None: ...

    def from_main(self, value: Any) -> Any: ...


class Alone:
    """Ranks of a single process."""

    is_main = True

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

    @classmethod
    def open(cls, recipe: Any, ranks: Ranks | None = None) -> "RunFolder":
        """Make or reopen `recipe.run_dir`; UserError if it holds another recipe, or `recipe.reuse` is no run folder."""
        ranks = ranks or Alone()
        reuse = (recipe.reuse,) if isinstance(recipe.reuse, str) else recipe.reuse or ()
        run = cls(Path(recipe.run_dir), tuple(map(Path, reuse)), ranks)
        for other in run.reuse:
            if not (other / "recipe.yaml").is_file() and not (other / SWEEP).is_file():
                raise UserError(f"no run folder: {other}; reuse= takes the run_dir of an earlier run, or a sweep_dir")
        file = run.path / "recipe.yaml"
        if file.is_file():
            check_same(file, to_plain(recipe))
        elif ranks.is_main and _is_taken(run.path):
            raise UserError(f"not a run folder: {run.path} holds something else; choose another run_dir=")
        if ranks.is_main and file.is_file():
            for left in run.path.rglob(".*.tmp"):  # of a killed start
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)
        ranks.barrier()
        if ranks.is_main and not file.is_file():
            make_folder(run.path)
            facts = "".join(f"# {name}: {value}\n" for name, value in {**versions(), "revision": revision()}.items())
            header, _, body = dump(recipe).partition("\n")
            atomic_write(file, f"{header}\n{facts}{body}")
        ranks.barrier()
        return run

    def stage_dir(self, name: str) -> Path:
        """Where the stage `name` keeps its artifacts."""
        return self.path / "stages" / name

    def finished(self, name: str) -> dict[str, Any] | None:
        """The content of a finished stage's fingerprint.json, None before it is finished; of a stage that `stage` has returned what
        rank 0 read."""
        return self._done.get(name) or read_json_or_none(self.stage_dir(name) / "fingerprint.json")

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
        self, name: str, config: Mapping[str, Any], inputs: tuple[str, ...], body: Callable[[Path], dict[str, Any]]
    ) -> dict[str, Any]:
        """The metrics of stage `name`: stored ones if it is done with this fingerprint, else those that `body` returns.

        `body(stage_dir)` resumes from what it left in `stage_dir` itself; leftovers of another fingerprint are deleted
        before. fingerprint.json is written last. Its seconds add up over resumes, a killed start counting until
        the last file that it wrote. Every rank calls this; what is done is rank 0's to say, for on a network disk others may for
        a while not see what it has written.
        """
        folder, ranks = self.stage_dir(name), self.ranks
        self._done.pop(name, None)
        mark, done = ranks.from_main(self._look(name, config, inputs) if ranks.is_main else None)
        if done is None:
            done = self._run(folder, mark, to_plain(config), inputs, body)
        self._done[name] = done
        self.names.append(name)
        return done["metrics"]

    def _look(self, name: str, config: Mapping[str, Any], inputs: tuple[str, ...]) -> tuple[str, dict[str, Any] | None]:
        """The stage's fingerprint, and what is stored of it; None with its folder prepared where it has to run."""
        mark = self.fingerprint(name, config, inputs)
        done = self.finished(name)
        if done is None or done["fingerprint"] != mark:
            self._prepare(self.stage_dir(name), mark)
            done = self.finished(name)
        return mark, done

    def _prepare(self, folder: Path, mark: str) -> None:
        """Leave `folder` with this fingerprint's finished copy, its leftovers, or nothing; and a started.json."""
        started = read_json_or_none(folder / "started.json")
        if started is None or started["fingerprint"] != mark or (folder / "fingerprint.json").exists():
            remove_folder(folder)
            started = {"fingerprint": mark, "seconds": 0.0, "began": 0.0}
            for other in self._reusable(folder.name):
                stored = read_json_or_none(other / "fingerprint.json")
                if stored and stored["fingerprint"] == mark:
                    copy_folder(other, folder)
                    return
        make_folder(folder)
        worked = [file.stat().st_mtime for file in folder.rglob("*") if file.is_file()]
        started["seconds"] += max([0.0, *(when - started["began"] for when in worked)])
        atomic_write(folder / "started.json", json.dumps({**started, "began": time.time()}))

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
    ) -> dict[str, Any]:
        before = json.loads((folder / "started.json").read_text())["seconds"] if self.ranks.is_main else 0.0
        began = time.perf_counter()
        metrics = body(folder)
        self.ranks.barrier()
        seconds = before + time.perf_counter() - began
        done = {"fingerprint": mark, "inputs": list(inputs), "config": config, "seconds": seconds, "metrics": metrics}
        text = json.dumps(done | {"version": __version__, "revision": revision()}, indent=1, allow_nan=False) + "\n"
        if self.ranks.is_main:
            atomic_write(folder / "fingerprint.json", text)
        return self.ranks.from_main(json.loads(text))


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
    try:
        before = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"damaged recipe: {file}; choose another run_dir= or delete the folder") from error
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
    return path.exists() and (not path.is_dir() or any(item.suffix != ".tmp" for item in path.iterdir()))
