"""`data=folder` at size: many small clips through preparing, the data stage and the training of the embedded world's teacher.

    python benchmarks/folder.py [--clips 2000] [--people 40] [--steps 300] [--threads 1] [--workers 0]
        [--dir DIR] [--json FILE] [OVERRIDE ...]

Films of the procedural world (32x32, 12.5 fps, one person each) are cut into clips of 15 frames by `distill data prepare`'s own
function; the stages `data` and `teacher` of recipes/scratch_avatar.yaml then run on all of them. A script, not a test
(`tests/benchmarks/test_folder.py` runs it small). Reported are

used       clips that are trained on and held out, out of all
prepare, data    clips a second of preparing (by `workers` processes), and of the data stage (decoded, encoded, stored)
loader     clips a second of the training set alone, batches of rows in their shuffled order
trainer    clips a second of training, and the share of its time in which it waited for a batch
resident   MiB of the training process: at its first tenth, and the most in its second half over the most in its first
"""

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from distill.compose import RECIPES
from distill.data.datasets.folder import read
from distill.data.order import Positions, batch_rows
from distill.data.prepare.cutting import CutConfig
from distill.data.prepare.prepare import prepare
from distill.data.procedural import render
from distill.pipeline.stages import Pipeline
from distill.recipe import load_recipe
from distill.training.engines.engine import Engine
from teachers import media
from teachers.flow import keyed_generator

FRAMES = 15
"""Of a clip, as in recipes/data/avatars.yaml."""


def make_films(folder: Path, clips: int, people: int) -> Path:
    """Films with sound of `people`, and metadata.csv with `clips` rows cut out of them."""
    folder.mkdir()
    each = -(-clips // people)
    world = render.WorldConfig(num_frames=FRAMES * each)
    fps = Fraction(world.fps)
    rows: list[dict[str, Any]] = []
    for person in range(people):
        drawn = render.draw_conditions(world, 1, keyed_generator(0, "film", person))
        made = render.make_clips(world, drawn, keyed_generator(1, "film", person))
        name = f"person_{person:03d}.mp4"
        media.write_video(folder / name, made.video[0].permute(1, 2, 3, 0).contiguous(), fps, made.audio[0])
        for number in range(min(each, clips - len(rows))):
            start, end = (float(FRAMES * k / fps) for k in (number, number + 1))
            row = {"id": f"{name[:-4]}_{number:04d}", "start": start, "end": end, "text": made.text[0]}
            rows.append({"file_name": name, "identity": name, **row})
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


class Watched:
    """Seconds that training waits for each batch, and resident bytes when it asks for it."""

    def __init__(self) -> None:
        self.waited: list[float] = []
        self.resident: list[int] = []
        self.began = self.ended = 0.0
        self._call = Positions.__call__

    def __enter__(self) -> "Watched":
        def call(positions: Positions, position: int) -> Any:
            began = time.perf_counter()
            self.began = self.began or began
            self.resident.append(resident())
            made = self._call(positions, position)
            self.ended = time.perf_counter()
            self.waited.append(self.ended - began)
            return made

        Positions.__call__ = call  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Positions.__call__ = self._call  # type: ignore[method-assign]


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(
    folder: Path, clips: int, people: int, steps: int, threads: int, workers: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """The figures; films, shards and the run are left in `folder`."""
    torch.set_num_threads(threads)
    films = make_films(folder / "films", clips, people)
    world = render.WorldConfig()
    began = time.perf_counter()
    config = CutConfig(fps=Fraction(world.fps), size=world.size)
    prepare(read(films / "metadata.csv", films), films, folder / "shards", "folder", config, 100, workers)
    prepared = time.perf_counter()
    words = [
        "data=folder",
        f"data.path={folder / 'shards'}",
        f"run_dir={folder / 'run'}",
        f"threads={threads}",
        f"teacher.train.num_steps={steps}",
        *overrides,
    ]
    recipe = load_recipe(RECIPES / "scratch_avatar.yaml", words)
    pipeline = Pipeline(recipe, Engine(recipe.engine, recipe.threads))
    try:
        facts, stored = pipeline.stage("data"), time.perf_counter()
        loader = loading(pipeline, recipe.teacher.train.batch_size)
        with Watched() as watched:
            pipeline.stage("teacher")
    finally:
        pipeline.close()
        pipeline.artifacts.engine.close()
    mib, half = [size / 2**20 for size in watched.resident], len(watched.resident) // 2
    warm = len(mib) // 10
    took = watched.ended - watched.began
    return {
        "clips": clips,
        "trained_on": facts["train_clips"],
        "held_out": facts["held_out_clips"],
        "prepare_clips_a_second": clips / (prepared - began),
        "data_clips_a_second": clips / (stored - prepared),
        "loader_clips_a_second": loader,
        "trainer_clips_a_second": (len(watched.waited) - 1) * recipe.teacher.train.batch_size / took,
        "waited_share": sum(watched.waited[1:]) / took,
        "resident_mib": mib[warm],
        "resident_growth_mib": max(mib[half:]) - max(mib[warm:half]),
    }


def loading(pipeline: Pipeline, size: int, seconds: float = 1.0) -> float:
    """Clips a second of the training set's batches, in their order."""
    train_set, position, began = pipeline.artifacts.train_set, 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        train_set.batch(batch_rows(len(train_set), size, position, seed=0))
        position += 1
    return position * size / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("--clips", 2000), ("--people", 40), ("--steps", 300), ("--threads", 1), ("--workers", 0)):
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--dir", type=Path, help="keeps what is made; it must not exist")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.dir or Path(temporary) / "folder"
        folder.mkdir(parents=True)
        found = measure(folder, given.clips, given.people, given.steps, given.threads, given.workers, given.overrides)
    for name, value in found.items():
        sys.stdout.write(f"{name:24} {value:.4g}\n" if isinstance(value, float) else f"{name:24} {value}\n")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
