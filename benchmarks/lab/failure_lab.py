"""The failure laboratory: the jobs of a sweep up to their distilled student, and the quality by time window of each one's streams.

    python benchmarks/lab/failure_lab.py SWEEP [--seeds 0 1 2] [--clips 1] [--jobs NAME ...] [--out runs/lab] [--recipe lab_avatar]

It runs what `distill run lab_avatar -m sweep=SWEEP` runs, without each job's report, whose many-step teacher takes as long as the
training: streams are scored by `benchmarks.lab.long_streams`. Stages that are equal are made once for all sweeps of one --out.
`--seeds` are those of the last stage alone (`distill.train.seed`), `--seed` is the recipe's. It ends with a table, mean and half
range over the seeds, a row a job and window; what is done is not done again.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from distill.commands.sweep.command import read_sweep
from distill.compose import find_recipe, quoted
from distill.pipeline.stages import Pipeline
from distill.recipe import load_recipe
from distill.training.engines.engine import Engine
from eval.report.tables import grid
from teachers.files import atomic_write, read_json_or_none, save_tensors

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from benchmarks.lab.long_streams import COLUMNS, World  # noqa: E402, of a script started by its path

LAST, KEPT = "distill", 4


@contextmanager
def trained(
    recipe: Path, words: Sequence[str], folder: Path, others: Sequence[Path], last: str = LAST
) -> Iterator[Pipeline]:
    """A job whose stages up to its distilled student, or the `last`, are done; those that are to be had from others are not run."""
    reuse = ",".join(quoted(str(other)) for other in others if other != folder)
    found = load_recipe(recipe, [*words, f"run_dir={quoted(str(folder))}", f"reuse=[{reuse}]"])
    pipeline = Pipeline(found, Engine(found.engine, found.threads))
    try:
        names = list(pipeline.stages)
        for name in names[: names.index(last) + 1]:
            pipeline.stage(name)
        yield pipeline
    finally:
        pipeline.close()


def table(found: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> list[str]:
    """Job -> seed -> a row a window, as mean and half range over the seeds."""
    lines = []
    for job, seeds in found.items():
        for window, rows in enumerate(zip(*seeds.values(), strict=True)):
            cells = []
            for column in COLUMNS:
                values = [row[column] for row in rows]
                half = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{half}")
            lines.append([job, str(len(rows)), str(window), *cells])
    return grid(["job", "seeds", "window", *COLUMNS], lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep")
    parser.add_argument("--recipe", default="lab_avatar")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", help="these jobs only")
    parser.add_argument("--clips", type=int, default=1, help="length of a stream in trained clips")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("runs/lab"))
    args = parser.parse_args(words)
    recipe = find_recipe(Path(args.recipe))
    common, chosen = read_sweep(recipe, args.sweep, args.jobs)
    file = args.out / f"{args.sweep}-{args.clips}.json"
    (args.out / "streams").mkdir(parents=True, exist_ok=True)
    found: dict = read_json_or_none(file) or {}
    world = None
    for seed in args.seeds:
        for name, own in chosen.items():
            if str(seed) in found.get(name, {}):
                continue
            folder, began = args.out / f"{args.sweep}-{name}-{seed}", time.monotonic()
            others = sorted(path.parent for path in args.out.glob("*/stages") if path.is_dir())
            with trained(recipe, [*common, *own, f"seed={args.seed}", f"distill.train.seed={seed}"], folder, others):
                pass
            took = time.monotonic() - began
            world = world or World(folder, args.streams, args.clips, 0)
            video = world.stream(folder, LAST, args.streams)
            found.setdefault("real", {}).setdefault("0", world.over_real(world.real))
            found.setdefault(name, {})[str(seed)] = world.over_real(world.rows(video))
            atomic_write(file, json.dumps(found, indent=1) + "\n")
            save_tensors(args.out / "streams" / f"{folder.name}.safetensors", {"video": video[:KEPT].clone()})
            first = {column: round(found[name][str(seed)][0][column], 3) for column in COLUMNS}
            print(f"{folder.name}: trained in {took:.0f} s, window 0: {first}", flush=True)
    print("\n".join(table(found)))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
