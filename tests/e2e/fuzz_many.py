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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from teachers.errors import UserError
from tests.e2e.fuzz_cases import Case, cases
from tests.e2e.test_fuzz import SLOW
from tests.e2e.test_pipeline import words_of
from tests.support import processes
from tests.support.mutations import mutated, spoiled

SECONDS, BYTES = 5.0, 10**9
GIVEN_UP = 150.0  # seconds of CPU after which the reads of a file are ended; a film of 20 s in HD takes 40
WAITED = 120.0  # and seconds without any
TEXTS = {".json", ".yaml", ".yml", ".jsonl", ".csv", ".txt", ".svg", ""}


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
