"""Wrong files for minutes: mutated media, pictures, checkpoints, students and a run folder, through whatever reads them.

    python -m tests.e2e.fuzz_many [--minutes 10] [--seed 0] [--inputs DIR ..] [--run DIR] [--only WORD ..] [--keep DIR]

The minutes are CPU time of the reads. They happen in a process of their own; a fault is one that ends it, a traceback, more than
5 s of CPU (and twice what the file takes as it was), 5 s of waiting or 1 GB for one read. What the reads take is printed for each
kind, and every fault with the number that makes it again (`--only KIND --first NUMBER`). A script, not a test: `test_fuzz.py` does
some of it. Exit status 1 with a fault.
"""

import argparse
import collections
import itertools
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from distill.commands.report import read_runs
from distill.data.datasets.manifest import Clip
from distill.data.prepare.cutting import CutConfig, cut
from distill.live import uploads
from distill.pipeline.export import publish
from distill.pipeline.run_folder import RunFolder
from distill.pipeline.stages import Pipeline
from distill.recipe import load_recipe
from distill.scoring.clip_io import read_clip
from distill.scoring.clip_sets import Entry
from distill.training.engine import Engine
from eval.cards import load_card
from students.weights.checkpoint import load_student
from teachers import media
from teachers.checkpoints.convert import read_checkpoint
from teachers.errors import UserError
from teachers.files import load_tensors
from teachers.media.picture import FORMATS, SUFFIXES
from tests.e2e.test_fuzz import READ, SLOW
from tests.e2e.test_pipeline import RECIPE, words_of
from tests.support import processes
from tests.support.media import films, sounds
from tests.support.mutations import mutated, spoiled

SECONDS, BYTES = 5.0, 10**9
GIVEN_UP = 150.0  # seconds of CPU after which the reads of a file are ended; a film of 20 s in HD takes 40
WAITED = 120.0  # and seconds without any
TEXTS = {".json", ".yaml", ".yml", ".jsonl", ".csv", ".txt", ".svg", ""}
Readers = Mapping[str, Callable[[], Any]]


class Case(NamedTuple):
    """Readers and the files that they read."""

    files: list[Path]
    readers: Readers
    restore: Callable[[], None] = lambda: None


@dataclass
class Found:
    """What one wrong file led to: CPU seconds of all reads; CPU seconds, seconds of waiting and bytes of the worst; `fault` is ""
    where it was right."""

    file: str
    total: float = 0.0
    cpu: float = 0.0
    waited: float = 0.0
    size: int = 0
    fault: str = ""


def of_sound(path: Path) -> Readers:
    """As `sample`, `serve` and `eval` read it."""
    return {
        "sample": lambda: [*media.AudioReader(path, mono=False)],
        "serve": lambda: uploads.decode_file(path.read_bytes()),
        "eval": lambda: media.read_audio(path),
    }


def of_film(path: Path) -> Readers:
    """As all commands read its sound, and `prepare`, `eval` and Python its frames."""
    clip, target = Clip(dataset="d", id="a", source=path.name), path.parent / "out.mp4"
    entry = Entry(clip=clip, path=path, sound=None, text="")
    config = CutConfig(size=(32, 32), min_seconds=0.1, cuts="keep", silent=True)
    return {
        **of_sound(path),
        "prepare": lambda: cut(clip, path, config, target),
        "set": lambda: read_clip(entry, load_card("syncnet_v2"), generated=False),
        "Python": lambda: media.read_video(path, (32, 32)),
    }


def of_picture(path: Path) -> Readers:
    return {
        "sample": lambda: media.fit_portrait(media.decode_image(path), (64, 64)),
        "serve": lambda: uploads.decode_picture(path.read_bytes(), (64, 64)),
    }


def some_media(folder: Path) -> Iterator[tuple[Path, Readers]]:
    """Small films, sounds and pictures of many containers and codecs, each with its readers."""
    from PIL import Image

    from tests.teachers.media.test_film import write

    two = sounds.tone(0.5, 48_000)[:, None].repeat(2, axis=1)
    for suffix, codec in {"mp4": "aac", "mov": "pcm_s16le", "mkv": "flac", "webm": "libopus", "ts": "aac"}.items():
        path = sounds.write_sound(folder / f"film a.{suffix}", codec, 48_000, two, video=12)
        yield path, of_film(path)
    codecs = {
        "mov": "mpeg4",
        "mp4": "libvpx-vp9",
        "mxf": "mpeg2video",
        "avi": "mjpeg",
        "mkv": "libx265",
        "webm": "libvpx",
    }
    for suffix, codec in codecs.items():
        path = write(folder / f"film b.{suffix}", codec, pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p")
        yield path, of_film(path)
    codecs = {
        "wav": "pcm_s16le",
        "flac": "flac",
        "mp3": "mp3",
        "ogg": "libopus",
        "m4a": "aac",
        "aac": "aac",
        "ac3": "ac3",
    }
    for suffix, codec in codecs.items():
        path = sounds.write_sound(folder / f"sound.{suffix}", codec, 48_000, two)
        yield path, of_sound(path)
    for kind in FORMATS:
        path = folder / f"picture.{kind.lower()}"
        Image.fromarray(films.numbered(7)).save(path, kind)
        yield path, of_picture(path)


def given(folder: Path, inputs: list[Path]) -> Iterator[tuple[str, Path, Readers]]:
    """Copies of a user's files, media by their suffixes and folders of weights, each with its readers."""
    for top in inputs:
        for source in sorted(file for file in top.rglob("*") if file.is_file() and file.suffix not in (".md", ".txt")):
            path = folder / top.name / source.relative_to(top)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
            if source.suffix in SUFFIXES:
                yield "given pictures", path, of_picture(path)
            elif source.suffix in (".wav", ".mp3", ".m4a", ".flac", ".ogg", ".aac"):
                yield "given sounds", path, of_sound(path)
            elif source.suffix in (".json", ".pt", ".safetensors"):
                yield "given weights", path, {"convert": lambda path=path: read_checkpoint(path.parent)}
            else:
                yield "given films", path, of_film(path)


def a_run(folder: Path, source: Path) -> Case:
    """A finished run: every file in it, through the start that finds it done, and through what reads a finished run."""
    run = folder / "run"
    shutil.copytree(source, run)
    recipe = load_recipe(RECIPE, ["preset=smoke", "threads=1", f"run_dir={run}"])
    files = [file for file in sorted(run.rglob("*")) if file.is_file() and file.name != ".lock"]

    def start() -> None:
        """The stages are looked at, not run again."""
        pipeline = Pipeline(recipe, Engine(recipe.engine, recipe.threads))
        try:
            for name in pipeline.stages:
                pipeline.stage(name)
            publish(pipeline.artifacts)
        finally:
            pipeline.close()

    def made_again(self: RunFolder, stage: Path, *_: Any) -> dict[str, Any]:
        raise UserError(f"{stage.name} is made again")

    def restore() -> None:
        for file in run.rglob("*"):
            if file.is_file() and not (source / file.relative_to(run)).is_file():
                file.unlink()
        for file in files:
            whole = source / file.relative_to(run)
            now, was = (file.stat() if file.is_file() else None), whole.stat()
            if now is None or (now.st_size, now.st_mtime_ns) != (was.st_size, was.st_mtime_ns):
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(whole, file)

    RunFolder._run = made_again  # pyright: ignore  # in this process alone
    tensors = [file for file in files if file.suffix == ".safetensors"]
    readers = {
        "run": start,
        "report compare": lambda: read_runs([run, source]),
        "student": lambda: load_student(run / "student"),
        "tensors": lambda: [
            load_tensors(file) for file in tensors if file.stat().st_mtime_ns > time.time_ns() - 10**10
        ],
    }
    return Case(files, readers, restore)


def cases(folder: Path, inputs: list[Path], run: Path) -> dict[str, list[Case]]:
    """Kind -> cases of it."""
    found: dict[str, list[Case]] = collections.defaultdict(list)
    for name, make in READ.items():
        (place := folder / name).mkdir(parents=True)
        files, read = make(place)
        found[name].append(Case(files, {name: read}))
    (folder / "media").mkdir()
    for path, readers in some_media(folder / "media"):
        found[f"{path.stem.split()[0]}s"].append(Case([path], readers))
    for kind, path, readers in given(folder / "given", inputs):
        found[kind].append(Case([path], readers))
    found["run folder"].append(a_run(folder / "a run", run))
    return dict(found)


def one(case: Case, others: list[Case], rng: random.Random) -> tuple[Found, bytes]:
    """Read a wrong file in all ways; what came of it, and the file."""
    file = rng.choice(case.files)
    whole, other = file.read_bytes(), rng.choice(rng.choice(others).files)
    if file.suffix in TEXTS or rng.random() < 0.3:
        wrong = mutated(whole, rng)
    else:
        wrong = spoiled(whole, other.read_bytes() if other.is_file() else b"", rng)
    file.write_bytes(wrong)
    found = Found(file.name)
    errors = os.lseek(2, 0, os.SEEK_END)
    for name, read in case.readers.items():
        reset_peak()
        before, queue = psutil.Process().memory_info().rss, queued()
        wall, cpu = time.monotonic(), time.process_time()
        try:
            with warnings.catch_warnings(), suppress(UserError, SystemExit):
                warnings.simplefilter("ignore")
                read()
        except BaseException:
            found.fault += f"{name}: {traceback.format_exc()}\n"
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        size, waited = peak() - before, wall - cpu - (queued() - queue)
        most_cpu = SECONDS
        if cpu > SECONDS:  # a long film may
            file.write_bytes(whole)
            most_cpu = max(SECONDS, 2 * cpu_of(read))
            file.write_bytes(wrong)
        for what, much, most in (
            ("s of CPU", cpu, most_cpu),
            ("s of waiting", waited, SECONDS),
            ("bytes", size, BYTES),
        ):
            if much > most:
                found.fault += f"{name}: {much:.3g} {what}\n"
        found.total += cpu
        found.cpu, found.waited, found.size = (max(found.cpu, cpu), max(found.waited, waited), max(found.size, size))
    said = os.pread(2, 2**20, errors).decode("utf-8", "replace")
    if "Traceback" in said:
        found.fault += f"printed: {said}\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(whole)
    case.restore()
    return found, wrong


def cpu_of(read: Callable[[], Any]) -> float:
    """Seconds of CPU that one read takes."""
    began = time.process_time()
    with suppress(UserError, SystemExit):
        read()
    return time.process_time() - began


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def queued(process: int | str = "self") -> float:
    """Seconds for which the main thread of a process was ready, and a core was not."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9


def peak() -> int:
    """The most bytes that were resident since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def work(pipe: Any, folder: Path, errors: Path, inputs: list[Path], run: Path, seed: int) -> None:
    """Answer (kind, number) with what came of that wrong file, a function of the seed and the two."""
    os.setsid()
    processes.hand_back()
    torch.set_num_threads(1)
    os.dup2(os.open(errors, os.O_RDWR | os.O_CREAT | os.O_APPEND), 2)
    made = cases(folder, inputs, run)
    pipe.send({kind: len(of_kind) for kind, of_kind in made.items()})
    while True:
        kind, number = pipe.recv()
        rng = random.Random(f"{seed} {kind} {number}")
        pipe.send(one(rng.choice(made[kind]), made[kind], rng))


class Reader:
    """The process that reads; another one after it has ended."""

    def __init__(self, folder: Path, inputs: list[Path], run: Path, seed: int):
        self.given, self.folder, self.count = (inputs, run, seed), folder, 0
        self.start()

    def start(self) -> None:
        self.count += 1
        place = self.folder / str(self.count)
        place.mkdir()
        self.pipe, theirs = processes.CONTEXT.Pipe()
        self.process = processes.CONTEXT.Process(target=work, args=(theirs, place, self.folder / "stderr", *self.given))
        self.process.start()
        theirs.close()
        self.kinds = self.pipe.recv()

    def read(self, kind: str, number: int) -> tuple[Found, bytes]:
        """What comes of this file; the process may end, or be ended, over it."""
        self.pipe.send((kind, number))
        reader, began = psutil.Process(self.process.pid), time.monotonic()
        before, queue = sum(reader.cpu_times()[:2]), queued(reader.pid)
        try:
            while not self.pipe.poll(0.5):
                cpu, wall = sum(reader.cpu_times()[:2]) - before, time.monotonic() - began
                waited = wall - cpu - (queued(reader.pid) - queue)
                if cpu > GIVEN_UP or waited > WAITED:
                    self.restart()
                    return Found("", cpu, cpu, waited, 0, f"ended after {cpu:.0f} s of CPU and {waited:.0f} s"), b""
            return self.pipe.recv()
        except (EOFError, ConnectionError, psutil.Error, FileNotFoundError):
            self.process.join(5)
            fault = f"the process ended with {self.process.exitcode}"
            self.restart()
            return Found("", fault=fault), b""

    def restart(self) -> None:
        processes.kill(self.process)
        shutil.rmtree(self.folder / str(self.count), ignore_errors=True)
        self.start()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10.0, help="of CPU time (default 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file of each kind")
    parser.add_argument(
        "--inputs", type=Path, nargs="*", default=[], metavar="DIR", help="files of yours to mutate too"
    )
    parser.add_argument(
        "--run", type=Path, help="a finished run of scratch_avatar preset=smoke; without it one is made"
    )
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="kinds whose names have one of these")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where files that are a fault go")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run = asked.run
        if run is None:
            run = folder / "whole"
            assert processes.run(words_of(run), timeout=1200).returncode == 0
        return fuzz(asked, folder, run.resolve())


def fuzz(asked: argparse.Namespace, folder: Path, run: Path) -> int:
    """One file of each kind after the other, until the CPU time is over, or Ctrl-C."""
    reader = Reader(folder, [path.resolve() for path in asked.inputs], run, asked.seed)
    kinds = [kind for kind in reader.kinds if not asked.only or any(word in kind for word in asked.only)]
    found: dict[str, list[Found]] = {kind: [] for kind in kinds}
    faults: collections.Counter[str] = collections.Counter()
    with suppress(KeyboardInterrupt):
        for number in itertools.count(asked.first):
            for kind in (kind for kind in kinds if number % SLOW.get(kind, 1) == 0):
                result, wrong = reader.read(kind, number)
                found[kind].append(result)
                if result.fault:
                    tell(f"{kind} {number} {result.file}", kind, result, wrong, faults, asked.keep)
            if sum(one.total for results in found.values() for one in results) >= 60 * asked.minutes:
                break
    processes.kill(reader.process)
    summarise(found, faults)
    return 1 if faults else 0


def tell(
    name: str, kind: str, result: Found, wrong: bytes, faults: collections.Counter[str], keep: Path | None
) -> None:
    """Count a fault; print, and keep the file of, the first of its kind."""
    last = [line for line in result.fault.splitlines() if line.strip()][-1]
    faults[f"{kind}: {last}"] += 1
    if faults[f"{kind}: {last}"] == 1:
        print(f"FAULT {name}\n{result.fault}", flush=True)
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / name).write_bytes(wrong)


def summarise(found: Mapping[str, list[Found]], faults: collections.Counter[str]) -> None:
    """A line a kind, the sum, and how often each fault came."""
    print(f"{'kind':20} {'files':>6} {'most CPU':>9} {'most MB':>8} {'faults':>7}")
    for kind, results in ((kind, results) for kind, results in found.items() if results):
        cpu, size = max(one.cpu for one in results), max(one.size for one in results) / 1e6
        print(f"{kind:20} {len(results):6} {cpu:7.2f} s {size:8.0f} {sum(bool(one.fault) for one in results):7}")
    every = [one for results in found.values() for one in results]
    spent = sum(one.total for one in every)
    print(f"{len(every)} wrong files, {spent:.0f} s of CPU, {faults.total()} faults, {len(faults)} kinds of them")
    for fault, count in faults.most_common():
        print(f"{count:5} {fault}")


if __name__ == "__main__":
    sys.exit(main())
