"""Many viewers of one student: batches against one by one, viewers who talk over the network, and one who floods the server.

    python benchmarks/serving/viewers.py --student runs/dmd_avatar/student [--viewers 16] [--seconds 20] [--repeat 3] [--json OUT]

1. Sessions in this process, turn about one by one and together: chunks a second of both, and how far their frames differ.
2. `distill serve` in a process of its own: so many viewers talk, listen and interrupt, the next one is refused.
3. The same while one of them asks for all that its limits allow, and while one ignores them, turn about and again and again: what
   the others lose, with its standard error.

A script, not a test; it writes nothing but OUT.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from benchmarks.serving.live import SENTENCES, TEXT_ENCODERS
from distill.live import protocol
from distill.live.operations import limits
from eval.speed.latency import percentile
from students import Chunk, Session, load_student, step_together

BUFFER = 0.03  # seconds between a first chunk's arrival and its sound, as on the page
REPORT = 0.05  # between two reports of the playhead, as the protocol asks


class Talker:
    """A viewer without a screen: plays what comes, talks, and counts stalls and seconds until an answer is seen."""

    def __init__(self, url: str, number: int, seed: int):
        self.url, self.number, self.rng = url, number, random.Random(1000 * seed + number)
        self.origin: float | None = None
        self.last, self.end, self.epoch, self.stalls, self.stalled = -1, 0, 0, 0, 0.0
        self.asked: dict[int, float] = {}
        self.begins: dict[int, int] = {}
        self.latencies: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.done, self.asking, self.refused = asyncio.Event(), 0.0, 0

    def place(self) -> float:
        return -1.0 if self.origin is None else (time.monotonic() - self.origin) * self.fps

    async def run(self, until: float) -> None:
        async with connect(self.url, max_size=2**26, compression=None, proxy=None) as self.socket:
            hello = json.loads(await self.socket.recv())
            if hello["type"] != "hello":
                raise ConnectionError(hello.get("message", "refused"))
            self.fps, version = hello["fps"], hello.get("version")
            if version is not None:
                await self.send(type="hello", version=version)
            await self.send(
                type="open", portrait=self.number % hello["portraits"], text="a person talks", seed=self.number
            )
            tasks = [asyncio.create_task(part) for part in (self.read(), self.report(), self.act(until))]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                faults = await asyncio.gather(*tasks, return_exceptions=True)
            for fault in faults:
                if isinstance(fault, Exception):
                    raise fault

    async def send(self, **message: Any) -> None:
        await self.socket.send(json.dumps(message))

    async def read(self) -> None:
        async for data in self.socket:
            now = time.monotonic()
            if isinstance(data, bytes):
                self.play(data, now)
                continue
            message = json.loads(data)
            kind, turn = message["type"], message.get("turn")
            if kind == "opened":
                self.epoch, self.origin, self.last = message["epoch"], None, -1
            elif kind == "rewind":
                self.epoch, self.last = message["epoch"], message["frame"] - 1
                self.end = self.end if message["speech"] else min(self.end, message["frame"])
            elif kind == "thinking":
                self.asked[turn] = self.asking
            elif kind == "turn":
                self.begins[turn] = message["frame"]
            elif kind == "answer":
                self.parts.append(message["parts_ms"])
            elif kind == "done":
                self.begins.pop(turn, None)
                self.end = message["frame"]
                self.done.set()
            elif kind == "error":
                self.refused += 1

    def play(self, data: bytes, now: float) -> None:
        _, _, count, first, epoch, _ = protocol.HEADER.unpack_from(data)
        if epoch != self.epoch:
            return
        if self.origin is None:
            self.origin = now + BUFFER - first / self.fps
        elif (late := now - self.origin - first / self.fps) > 0:
            self.stalls, self.stalled, self.origin = self.stalls + 1, self.stalled + late, now - first / self.fps
        self.last = first + count - 1
        for turn, frame in list(self.begins.items()):
            if first <= frame <= self.last:
                self.latencies.append(max(now, self.origin + frame / self.fps) - self.asked[turn])
                del self.begins[turn]

    async def report(self) -> None:
        while True:
            if self.origin is not None:
                seen = min(int(self.place()) + 1, self.last + 1)
                await self.send(type="played", frame=max(seen, 0), epoch=self.epoch)
            await asyncio.sleep(REPORT)

    async def act(self, until: float) -> None:
        await asyncio.sleep(self.rng.uniform(0.5, 3.0))
        while time.monotonic() < until:
            self.done.clear()
            self.asking = time.monotonic()
            await self.send(type="say", text=self.rng.choice(SENTENCES))
            if self.rng.random() < 0.2:
                await asyncio.sleep(self.rng.uniform(0.2, 1.5))
                await self.send(type="interrupt")
            await self.done.wait()
            while self.place() < self.end:
                await asyncio.sleep(0.05)
            if self.rng.random() < 0.1:
                await self.send(type="text", text=self.rng.choice(TEXT_ENCODERS))
            await asyncio.sleep(self.rng.uniform(0.5, 3.0))


class Flooder(Talker):
    """One who asks for all that the limits allow, or, `wild`, for all it can, and comes back when it is shut out."""

    def __init__(self, url: str, number: int, seed: int, wild: bool):
        super().__init__(url, number, seed)
        self.wild, self.sent, self.closed = wild, 0, 0

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            try:
                await super().run(until)
            except (ConnectionClosed, OSError):
                self.closed += 1
                await asyncio.sleep(0.05)

    async def act(self, until: float) -> None:
        asked = {kind: limits.RATES[kind].each for kind in ("say", "text", "interrupt", "open")}  # a second
        due = dict.fromkeys(asked, 0.0)
        while time.monotonic() < until:
            for kind, each in asked.items():
                if self.wild or time.monotonic() >= due[kind]:
                    due[kind] = time.monotonic() + 1 / each
                    given = {"text": self.rng.choice(SENTENCES)} if kind in ("say", "text") else {}
                    await self.send(type=kind, **given)
                    self.sent += 1
            await asyncio.sleep(0 if self.wild else 0.05)


def throughput(student: Path, viewers: int, rounds: int) -> dict[str, float]:
    """Chunks a second of sessions of different ages, one by one and together, the two turn about; the same chunks in both."""
    bundle = load_student(student)
    spec, rng = bundle.spec, torch.Generator().manual_seed(0)
    faces = torch.rand(viewers, 3, spec.height, spec.width, generator=rng) * 2 - 1

    def opened() -> list[Session]:
        texts = TEXT_ENCODERS * viewers
        made = [Session(bundle, faces[i], texts[i], i, lead=10**6, idle="live") for i in range(viewers)]
        for i, session in enumerate(made):
            for _ in range(i % 5):
                session.step()
        return made

    alone, together, gap = opened(), opened(), 0
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}  # other work on the machine weighs on the first
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in clocks}
    for _ in range(rounds + 1):
        marks = [{name: clock() for name, clock in clocks.items()}]
        one = [session.step() for session in alone]
        for session in alone:
            session.settle()
        marks.append({name: clock() for name, clock in clocks.items()})
        both = step_together(together)
        for session in together:
            session.settle()
        marks.append({name: clock() for name, clock in clocks.items()})
        for name in clocks:
            spent[name].append((marks[1][name] - marks[0][name], marks[2][name] - marks[1][name]))
        for a, b in zip(one, both, strict=True):
            assert isinstance(a, Chunk) and isinstance(b, Chunk)  # noqa: PT018
            gap = max(gap, int((a.frames.int() - b.frames.int()).abs().max()))
    found: dict[str, float] = {"largest_gap_grey_levels": gap}
    for name, pairs in spent.items():  # but for the first round, which makes what is made once
        ratios = sorted(a / b for a, b in pairs[1:])
        found |= {
            f"chunks_per_{name}_second_alone": round(viewers / statistics.median(a for a, _ in pairs[1:]), 1),
            f"chunks_per_{name}_second_together": round(viewers / statistics.median(b for _, b in pairs[1:]), 1),
            f"{name}_ratio": round(statistics.median(ratios), 2),
            f"{name}_ratio_least": round(ratios[0], 2),
            f"{name}_ratio_most": round(ratios[-1], 2),
        }
    return found


def summary(viewers: list[Talker], seconds: float) -> dict[str, Any]:
    """Of viewers who talked for so long."""
    latencies = [latency for viewer in viewers for latency in viewer.latencies]
    parts = [part for viewer in viewers for part in viewer.parts]
    return {
        "viewers": len(viewers),
        "parts_ms": {name: round(statistics.mean(part[name] for part in parts)) for name in parts[0]},
        "turns": len(latencies),
        "p50_s": round(percentile(latencies, 50), 3),
        "p95_s": round(percentile(latencies, 95), 3),
        "mean_s": round(statistics.mean(latencies), 3),
        "stalls": sum(viewer.stalls for viewer in viewers),
        "stalled_s": round(sum(viewer.stalled for viewer in viewers), 3),
        "smooth": round(1 - sum(viewer.stalled for viewer in viewers) / len(viewers) / seconds, 4),
    }


async def talk(url: str, viewers: int, seconds: float, seed: int, last: str) -> dict[str, Any]:
    """So many viewers at once, the `last` of whom talks, or floods from a process of its own; one more tries to get in."""
    until, flood = time.monotonic() + seconds, last != "talks"
    talkers = [Talker(url, i, seed) for i in range(viewers - flood)]
    tasks = [asyncio.create_task(one.run(until)) for one in talkers]
    command = [sys.executable, __file__, "--flood", last, "--url", url, "--seconds", str(seconds), "--seed", str(seed)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE) if flood else None
    while await asyncio.to_thread(counted, url, "distill_viewers") < viewers and time.monotonic() < until:
        await asyncio.sleep(0.5)
    async with connect(url, proxy=None) as socket:
        first = json.loads(await socket.recv())
    await asyncio.gather(*tasks)
    found = summary(talkers[: viewers - 1], seconds) | {"last": last, "one_more": first.get("message", "was let in")}
    found["latencies"] = [round(latency, 3) for one in talkers[: viewers - 1] for latency in one.latencies]
    if process is not None:
        found |= json.loads((await process.communicate())[0])
    return found


def lost(phases: list[dict[str, Any]], last: str) -> dict[str, float]:
    """What the others lose while one floods, against the phases in which all talk, in per cent: of their mean latency, with the
    standard error of the difference, and of the time in which their picture moves."""
    all_of = {
        name: [x for phase in phases if phase["last"] == name for x in phase["latencies"]] for name in ("talks", last)
    }
    mean = {name: statistics.mean(values) for name, values in all_of.items()}
    error = sum(statistics.variance(values) / len(values) for values in all_of.values()) ** 0.5
    smooth = {name: statistics.mean(phase["smooth"] for phase in phases if phase["last"] == name) for name in all_of}
    return {
        "latency_percent": round(100 * (mean[last] / mean["talks"] - 1), 1),
        "standard_error": round(100 * error / mean["talks"], 1),
        "smooth_percent": round(100 * (smooth["talks"] - smooth[last]), 2),
    }


def counted(url: str, name: str) -> float:
    """A number of the server's /metrics."""
    with urllib.request.urlopen(url.replace("ws", "http", 1).replace("/live", "/metrics"), timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


async def flood(url: str, seconds: float, seed: int, wild: bool) -> None:
    """One flooder for so long; what it did, on stdout."""
    one = Flooder(url, 99, seed, wild)
    await one.run(time.monotonic() + seconds)
    print(json.dumps({"flood_messages": one.sent, "flood_refused": one.refused, "flood_shut_out": one.closed}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--student", type=Path)
    parser.add_argument("--viewers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12, help="of one by one and together (default 12; 0: none)")
    parser.add_argument("--seconds", type=float, default=20, help="of a phase (default 20)")
    parser.add_argument("--repeat", type=int, default=3, help="how often each phase comes (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--measured", action="store_true", help="let the server choose how many viewers it lets in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--flood", choices=("limits", "wild"), help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.flood:
        asyncio.run(flood(args.url, args.seconds, args.seed, args.flood == "wild"))
        return
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"torch": torch.__version__, "threads": args.threads, "load": os.getloadavg()[0]}
    if args.rounds:
        report["throughput"] = throughput(args.student, args.viewers, args.rounds)
    print(json.dumps(report), flush=True)
    words = [] if args.measured else ["--viewers", str(args.viewers)]
    with server(args.student, args.threads, *words) as (address, _):
        report["phases"] = phases = []
        for i, last in enumerate(("talks", "limits", "wild") * args.repeat):
            url = address.replace("http", "ws") + "live"
            phases.append(asyncio.run(talk(url, args.viewers, args.seconds, args.seed + i // 3, last)))
            print(json.dumps({name: value for name, value in phases[-1].items() if name != "latencies"}), flush=True)
    latencies = [x for phase in phases if phase["last"] == "talks" for x in phase["latencies"]]
    report["all"] = {
        "turns": len(latencies),
        **{f"p{q}_s": round(percentile(latencies, q), 3) for q in (50, 95, 99)},
        "stalls": sum(phase["stalls"] for phase in phases if phase["last"] == "talks"),
        **{f"lost_to_{last}": lost(phases, last) for last in ("limits", "wild")},
    }
    print(json.dumps(report["all"]))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


@contextmanager
def server(student: Path, threads: int, *words: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """`distill serve` in a process of its own: its address and the process."""
    command = [sys.executable, "-m", "distill", "serve", "--student", student, "--port", "0", "--talker", "formant"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen([*command, *words], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            print(line.strip(), flush=True)
            yield line.split()[0], process
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
