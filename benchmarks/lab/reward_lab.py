"""Reward-weighted DMD in the failure laboratory: the jobs of `lab_reward` from one initialisation, scored as a report scores.

    python benchmarks/lab/reward_lab.py [--seeds 0 1 2] [--jobs NAME ...] [--conditions 48] [--out runs/lab] [--base RUN]

All jobs train in this process from the initialisation of `base` (made first, where it is not there), the last stage alone, and
their students generate the same held-out conditions and noises; so do the initialisation and the teacher. A row a job, mean and
half range over `--seeds`, those of the last stage: FID, FVD, sync, identity, diversity (the spread over noises), motion, its
energy, sharpness, the alarm; and, in the file, each reward in the first and the last quarter of the updates. What is done is not
done again. `--judge`: extractors of another seed are trained on other clips (OUT/judge), and read the lip sync as well (`judged`):
what was rewarded by one network should be seen by another.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.commands.sweep.command import read_sweep
from distill.compose import find_recipe, quoted
from distill.pipeline import train_stages
from distill.pipeline.evaluation import clip_sets
from distill.pipeline.evaluation.reward_watch import hacked
from distill.pipeline.generate import clip_noise, stream_noise, student_clips, teacher_clips
from distill.pipeline.stages import Pipeline
from distill.recipe import Recipe, load_recipe
from distill.training.engines.engine import Engine
from distill.training.metrics_log import MetricsLog
from eval.cards import load_card
from eval.embedded import probe_training
from eval.embedded.evaluation import Evaluation
from eval.embedded.extractors import Probes
from eval.metrics.sync import mouth_sync
from eval.report.tables import grid
from students.weights.adapter import HINT
from teachers import flow
from teachers.checkpoints.strict import load_strict
from teachers.files import atomic_write, load_tensors, read_json_or_none, save_tensors

COLUMNS = ("fid", "fvd", "sync", "identity", "diversity", "motion", "motion_energy", "sharpness")
NOISES = (4, 4)  # conditions, and noises of each, of the diversity
REFERENCE, JUDGED, KEPT, SEED = 96, 768, 4, 4711


class Lab:
    """A finished initialisation, and the clips that all students are compared on."""

    def __init__(self, recipe: Recipe, conditions: int, judge: Path | None):
        self.pipeline = Pipeline(recipe, Engine(recipe.engine, recipe.threads))
        names = list(self.pipeline.stages)
        for name in names[: names.index("distill")]:
            self.pipeline.stage(name)
        self.artifacts = artifacts = self.pipeline.artifacts
        clips, other = (
            artifacts.source.draw(SEED, name, num) for name, num in (("test", conditions), ("reference", REFERENCE))
        )
        x0, self.conditions = artifacts.encoders.of_clips(clips)
        several = [artifacts.source.draw(SEED, "diversity", NOISES[0], motion) for motion in range(NOISES[1])]
        spread = [artifacts.encoders.of_clips(own) for own in several]
        world = torch.stack([artifacts.encoders.decode(own) for own, _ in spread], dim=1)
        self.spread = spread[0][1].index(torch.arange(NOISES[0]).repeat_interleave(NOISES[1]))
        real = clip_sets.as_metrics_take(artifacts, clips)
        card, ceiling = load_card(recipe.eval.protocol), artifacts.encoders.decode(x0)
        self.evaluation = Evaluation(card, artifacts.probes, real, ceiling, other.video, world=world)
        self.columns = (*COLUMNS, "judged") if judge else COLUMNS
        self.judge = trained_judge(artifacts, judge) if judge else None
        self.voices = self.judge.mouth_from_audio(clip_sets.log_mel(artifacts, clips)) if self.judge else None
        self.real = self.scores(clips.video, world.flatten(0, 1))

    def scores(self, video: Tensor, several: Tensor) -> dict[str, float]:
        """The columns of clips uint8 [N, 3, T, H, W] of the conditions and of those of the diversity."""
        found = self.evaluation.score(video[None], several.unflatten(0, NOISES), only=COLUMNS)
        scores = {name: found[name]["mean"] for name in COLUMNS}
        if self.judge is not None and self.voices is not None:
            scores["judged"] = mouth_sync(self.judge.read(video).mouth, self.voices)["sync"]
        return scores

    def of_student(self, file: Path) -> tuple[dict[str, float], Tensor]:
        """(Scores, the first clips) of the student in a file of weights."""
        artifacts = self.artifacts
        student = artifacts.student("init").eval().requires_grad_(False)
        load_strict(student.net, load_tensors(file), file, HINT)
        videos = []
        for name, given in (("test", self.conditions), ("diversity", self.spread)):
            noise = stream_noise(artifacts.spec, SEED, name)
            with artifacts.engine.autocast():
                x0 = student_clips(student, given, noise, 32)
            videos.append(artifacts.encoders.decode(x0))
        return self.scores(videos[0], videos[1]), videos[0][:KEPT].clone()

    def of_teacher(self) -> tuple[dict[str, float], Tensor]:
        """The same of the teacher's guided solutions."""
        artifacts, videos = self.artifacts, []
        settings = artifacts.recipe.trajectories
        steps = flow.sigma_grid(settings.num_steps, settings.shift)
        for name, given in (("test", self.conditions), ("diversity", self.spread)):
            noise = clip_noise(artifacts.spec, SEED, name)
            with artifacts.engine.autocast():
                x0 = teacher_clips(artifacts.teacher, given, noise, steps, settings.guidance, 32)
            videos.append(artifacts.encoders.decode(x0))
        return self.scores(videos[0], videos[1]), videos[0][:KEPT].clone()

    def train(self, job: Recipe, folder: Path) -> list[dict[str, Any]]:
        """Train the last stage of a job; what it logged."""
        artifacts, config, data = self.artifacts, job.distill, self.artifacts.student_train_set
        folder.mkdir(parents=True, exist_ok=True)
        artifacts.log = MetricsLog(folder / "metrics.jsonl")
        roles = {"student": artifacts.trainee("init"), "fake_score": artifacts.fake_score()}
        frozen, sigmas = job.needs("distill").frozen, (*artifacts.spec.sigmas, 0.0)
        train_stages.run_training(artifacts, "distill", config, folder, roles, frozen, data.batch, len(data), sigmas)
        return artifacts.log.rows("distill")


def trained_judge(artifacts: Any, folder: Path) -> Probes:
    """Extractors of another seed and other clips than the recipe's, from `folder` or trained into it."""
    if not (folder / "probes.json").is_file():
        clips, config = artifacts.source.draw(SEED, "judge", JUDGED), artifacts.recipe.eval
        decoded = artifacts.encoders.decode(artifacts.encoders.encode(clips.video))
        rows, rng = clip_sets.log_mel(artifacts, clips), torch.Generator().manual_seed(SEED)
        probe_training.fit(clips.video, clips.labels, rows, config, rng, None, decoded).save(folder)
    return Probes.load(folder)


def change(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float] | None:
    """A reward's mean in the first and the last quarter of the updates."""
    values = [row[f"student/reward_{name}"] for row in rows if f"student/reward_{name}" in row]
    quarter = len(values) // 4
    return (statistics.mean(values[:quarter]), statistics.mean(values[-quarter:])) if quarter else None


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]], columns: Sequence[str] = COLUMNS) -> list[str]:
    """Job -> seed -> scores, as mean and half range over the seeds."""
    lines = []
    for job, seeds in found.items():
        cells = []
        for column in columns:
            values = [row.get(column, math.nan) for row in seeds.values()]  # judged: not of rows from before
            half = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{half}")
        alarms = sum(bool(row.get("alarms")) for row in seeds.values())
        lines.append([job, str(len(seeds)), *cells, f"{alarms} of {len(seeds)}"])
    return grid(["job", "seeds", *columns, "alarm"], lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweep", default="lab_reward")
    parser.add_argument("--recipe", default="lab_avatar")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", nargs="+", help="these jobs only")
    parser.add_argument("--conditions", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("runs/lab"))
    parser.add_argument("--base", type=Path, help="the run with the initialisation (default: OUT/base)")
    parser.add_argument("--judge", action="store_true", help="lip sync as extractors of another seed read it, too")
    args = parser.parse_args(words)
    base, recipe = args.base or args.out / "base", find_recipe(Path(args.recipe))
    common, chosen = read_sweep(recipe, args.sweep, args.jobs)
    file = args.out / f"{args.sweep}-scores.json"
    (args.out / "streams").mkdir(parents=True, exist_ok=True)
    found: dict = read_json_or_none(file) or {}
    judge = args.out / "judge" if args.judge else None
    lab = Lab(load_recipe(recipe, [*common, f"run_dir={quoted(str(base))}"]), args.conditions, judge)

    def keep(name: str, seed: int, row: dict[str, Any], video: Tensor) -> None:
        found.setdefault(name, {})[str(seed)] = row
        atomic_write(file, json.dumps(found, indent=1) + "\n")
        save_tensors(args.out / "streams" / f"{args.sweep}-{name}-{seed}.safetensors", {"video": video})
        print(name, seed, json.dumps(row), flush=True)

    found.setdefault("real", {"0": lab.real})
    if "init" not in found:
        keep("init", 0, *lab.of_student(base / "stages" / "init" / "model.safetensors"))
    for seed in args.seeds:
        for name, own in chosen.items():
            if str(seed) in found.get(name, {}):
                continue
            began, folder = time.process_time(), args.out / f"{args.sweep}-{name}-{seed}"
            job = load_recipe(recipe, [*common, *own, f"distill.train.seed={seed}"])
            rows = lab.train(job, folder)
            row: dict[str, Any]
            row, video = lab.of_student(folder / "model.safetensors")
            rewards = getattr(job.distill.method, "rewards", {})
            row |= {"cpu_seconds": round(time.process_time() - began, 1)}
            row |= {"rewards": {key: change(rows, key) for key in rewards}}
            row |= {"alarms": hacked(rewards, rows, found["init"]["0"], row, ())}
            keep(name, seed, row, video)
    if "teacher" not in found:
        keep("teacher", 0, *lab.of_teacher())
    print("\n".join(table(found, lab.columns)))
    lab.pipeline.close()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
