"""SIGKILL a smoke run at random moments, resume it until it ends, and compare it with one that was not disturbed.

    python -m tests.e2e.kill_many --dir DIR [--kills 50] [--seed 0] [--aimed 0.4] [OVERRIDE ...]

A share of the kills, `--aimed`, waits for a file or folder that is being written (its temporary name, a checkpoint's above all)
and strikes within a few milliseconds; a tenth comes while the process starts; the others come at a random time after it has first
touched the run folder. One run takes several kills; when it has ended it is compared, and another begins. A script, not a test:
`test_pipeline.py` kills once a stage. Exit status 1 when anything differs.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.e2e.test_pipeline import STAGES, results, words_of

TEMPORARY = "stages/*/.*.tmp"
DISTILL = (sys.executable, "-m", "distill")


def writing(folder: Path) -> list[str]:
    """Temporary names in the stages: what is being written, or what a kill has left of it."""
    return [str(path.relative_to(folder / "stages")) for path in folder.glob(TEMPORARY)]


def stage(folder: Path) -> str:
    """The stage at work."""
    for name in STAGES:
        if not (folder / "stages" / name / "fingerprint.json").is_file():
            return name if (folder / "stages" / name).is_dir() else f"before {name}"
    return "after the last stage"


def touched(folder: Path) -> float:
    """When the run last began to work: a start writes recipe.yaml, a resumed stage its started.json."""
    marks = [folder / "recipe.yaml", *folder.glob("stages/*/started.json")]
    return max((mark.stat().st_mtime for mark in marks if mark.exists()), default=0.0)


def strike(
    folder: Path, limit: float, early: bool, aimed: bool, rng: random.Random, words: list[str]
) -> tuple[float, bool]:
    """Start the run and kill it `limit` seconds after it began to work (early: after the start of the process), or sooner if a
    file is aimed at -> seconds that the process lived, whether it was alive until then."""
    with (folder.parent / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [*DISTILL, *words_of(folder, *words)], stdout=log, stderr=log, start_new_session=True
        )
        began = at_work = time.perf_counter()
        stale, before = set(writing(folder)), touched(folder)
        working = early
        while process.poll() is None and (not working or time.perf_counter() - at_work < limit):
            if not working and touched(folder) > before:
                working, at_work = True, time.perf_counter()
            if aimed and (fresh := set(writing(folder)) - stale):
                if any("checkpoint" in name for name in fresh) or rng.random() < 0.1:
                    time.sleep(rng.uniform(0, 0.01))
                    break
                stale |= fresh
            time.sleep(0.0005 if aimed else 0.005)
        alive = process.poll() is None
        if alive:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    if not alive and code:
        sys.exit(f"kill_many: the resumed run failed with status {code}: see {folder.parent / 'log.txt'}")
    return time.perf_counter() - began, alive


def differences(folder: Path, whole: Path) -> list[str]:
    """What is not bit for bit the same: tensor files, scores, the metrics log."""
    ours, theirs = results(folder), results(whole)
    found = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (folder, whole)]
    return found + (["metrics.jsonl"] if logs[0] != logs[1] else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--aimed", type=float, default=0.4)
    asked, words = parser.parse_known_args()
    rng, whole = random.Random(asked.seed), asked.dir / "whole"
    asked.dir.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    subprocess.run([*DISTILL, *words_of(whole, *words)], check=True, capture_output=True)
    seconds = time.perf_counter() - began
    print(f"undisturbed: {seconds:.0f} s", flush=True)

    kills, torn, runs, wrong = collections.Counter(), 0, 0, []
    while kills.total() < asked.kills:
        folder = asked.dir / f"run-{runs}"
        shutil.rmtree(folder, ignore_errors=True)
        alive, known = True, set()
        while alive:
            more = kills.total() < asked.kills
            draw = rng.random()
            aimed, early = draw < asked.aimed, draw > 0.9
            limit = seconds * rng.random() ** 2 * (0.3 if early else 1.0) if more else float("inf")
            lived, alive = strike(folder, limit, early, aimed and more, rng, words)
            if alive:
                left = writing(folder)
                where, torn = stage(folder), torn + bool(set(left) - known)
                known = set(left)
                kills[where] += 1
                print(f"{kills.total():3} run {runs} {lived:5.1f} s {where:22} {' '.join(left)}", flush=True)
        found = differences(folder, whole)
        left = writing(folder)
        print(f"run {runs}: {'bit-equal' if not found else f'DIFFERENT: {found}'} {' '.join(left)}", flush=True)
        wrong += found
        runs += 1
        if not found:
            shutil.rmtree(folder)
    print(f"{kills.total()} kills over {runs} runs, {torn} at least with a file half-written: {dict(kills)}")
    print("result: " + ("every run ended bit-equal to the undisturbed one" if not wrong else f"DIFFERENT: {wrong}"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
