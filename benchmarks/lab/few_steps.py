"""Students of few steps beside each other: the jobs of a sweep up to their distilled student, its scores and what it costs.

    python benchmarks/lab/few_steps.py SWEEP [--recipe lab_avatar] [--seeds 0 1 2] [--jobs NAME ...] [--out DIR] [KEY=VALUE ...]

Scores are those of a report (FID, FVD, sync, diversity) on held-out conditions (`--conditions`, `--noises`, `--condition-seed`),
without the report's many-step teacher, which takes as long as the training. `--seeds` are those of the last stage alone, on one
initialisation. With `--rounds N` the first job of each number of network calls is also timed as it is served: milliseconds of CPU
to the first frame, and frames a second of CPU, the median of N interleaved streams. What is done is not done again.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from distill.commands.sweep.command import read_sweep
from distill.compose import find_recipe
from distill.pipeline.artifacts import Artifacts
from distill.pipeline.evaluation import clip_sets
from distill.pipeline.evaluation.clip_sets import ClipSet
from distill.pipeline.evaluation.evaluate import draw_spread
from distill.pipeline.evaluation.health import seam_frames
from distill.pipeline.evaluation.systems import student_systems
from eval.cards import load_card
from eval.embedded.evaluation import Evaluation
from eval.report.tables import grid
from eval.speed.latency import Scene, interleave, stream
from students.weights.checkpoint import Bundle
from teachers.codecs.linear import to_float
from teachers.encoders.small import SAMPLE_RATE
from teachers.files import atomic_write, read_json_or_none
from teachers.guidance import Scales

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from benchmarks.lab.failure_lab import LAST, trained  # noqa: E402, of a script started by its path

COLUMNS = ("fid", "fvd", "sync", "motion", "motion_energy", "sharpness", "diversity", "identity", "seam", "seconds")
COSTS = ("first_frame_ms", "fps", "nfe_per_chunk")


class Scoring:
    """The held-out clips that all jobs are scored on, of the world of the sweep's first job."""

    def __init__(self, artifacts: Artifacts, folder: Path):
        config = artifacts.recipe.eval
        self.test: ClipSet = clip_sets.draw(artifacts, folder, "test", config.num_conditions, samples=1)
        reference = clip_sets.draw(artifacts, folder, "reference", config.num_reference, encode=False)
        spread = draw_spread(artifacts, folder)
        world = torch.stack([clips.decoded for clips in spread], dim=1)
        real, card = clip_sets.as_metrics_take(artifacts, self.test.clips), load_card(config.protocol)
        probes, seams = artifacts.probes, seam_frames(artifacts.spec)
        self.evaluation = Evaluation(card, probes, real, self.test.decoded, reference.clips.video, seams, world)
        rows = torch.arange(config.diversity_conditions).repeat_interleave(config.diversity_seeds)
        self.spread = spread[0].conditions.select(rows)

    def __call__(self, artifacts: Artifacts, stage: str, scales: Scales | None = None) -> dict[str, float]:
        """Scores of the student of a stage, at guidance scales that it is conditioned on, the mean over `eval.num_seeds` noises."""
        config = artifacts.recipe.eval
        systems = student_systems(artifacts, {"student": artifacts.finished_student(stage)}, config.batch_size)

        def clips(conditions: Any, *keys: Any) -> torch.Tensor:
            if given := artifacts.spec.scales(scales):
                shared = {**conditions.shared, "guidance": torch.tensor([[*given.values()]])}
                conditions = clip_sets.StoredConditions(conditions.features, shared, conditions.rows, conditions.device)
            x0 = systems["student"](conditions, None, config.condition_seed, *keys)
            return clip_sets.scored(artifacts.encoders.decode(x0, conditions.index(torch.arange(1)).lead))

        video = torch.stack([clips(self.test.conditions, "test", seed) for seed in range(config.num_seeds)])
        spread = clips(self.spread, "diversity", 0).unflatten(0, (-1, config.diversity_seeds))
        return {name: found["mean"] for name, found in self.evaluation.score(video, spread).items()}


def costs(bundles: Mapping[str, Bundle], test: ClipSet, rounds: int) -> dict[str, dict[str, float]]:
    """What a stream of each student costs in CPU time, the streams of all interleaved; a round of them before does not count."""
    sound = pad(test.clips.voice[0], (0, SAMPLE_RATE))  # for the last chunk's look-ahead
    scene = Scene(to_float(test.samples[0, :, 0]), test.clips.text[0], sound)
    chunks = next(iter(bundles.values())).spec.num_chunks
    runs = {name: lambda bundle=bundle: stream(bundle, scene, chunks) for name, bundle in bundles.items()}
    found = {}
    for name, streams in interleave(runs, rounds + 1).items():
        spec, timed = bundles[name].spec, streams[1:]
        frames = spec.pixel_frames(chunks - 1)[1]
        found[name] = {
            "first_frame_ms": 1000 * statistics.median(run.steps[0].cpu_seconds for run in timed),
            "fps": frames / statistics.median(run.took.cpu_seconds for run in timed),
            "nfe_per_chunk": spec.nfe_per_chunk,
        }
    return found


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]], columns: Sequence[str]) -> list[str]:
    """Job -> seed -> scores as a row a job: mean and half range over the seeds."""
    lines = []
    for job, seeds in found.items():
        cells = []
        for column in columns:
            values = [row[column] for row in seeds.values() if column in row]
            half = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{half}" if values else "")
        lines.append([job, str(len(seeds)), *cells])
    return grid(["job", "seeds", *columns], lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of all jobs")
    parser.add_argument("--recipe", default="lab_avatar")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", nargs="+", help="these jobs only")
    parser.add_argument("--conditions", type=int, default=64)
    parser.add_argument("--noises", type=int, default=2)
    parser.add_argument("--condition-seed", type=int, default=555)
    parser.add_argument("--init", action="store_true", help="score the student after initialisation too")
    parser.add_argument("--rounds", type=int, default=0, help="streams timed of each number of steps")
    parser.add_argument("--out", type=Path, default=Path("runs/lab"))
    args = parser.parse_intermixed_args(words)
    recipe = find_recipe(Path(args.recipe))
    common, chosen = read_sweep(recipe, args.sweep, args.jobs)
    sweep = Path(args.sweep).stem
    file = args.out / f"{sweep}-{args.condition_seed}.json"
    counted = {"num_conditions": args.conditions, "num_seeds": args.noises, "condition_seed": args.condition_seed}
    counted |= {"num_reference": 160, "diversity_conditions": 6, "diversity_seeds": 6}
    found: dict = read_json_or_none(file) or {}
    bundles: dict[str, Bundle] = {}
    with ExitStack() as stack:

        @cache
        def scoring() -> Scoring:
            """Of the first job, whichever are chosen; drawn when it is needed."""
            first = next(iter(read_sweep(recipe, args.sweep)[1].values()))
            folder = args.out / f"{sweep}-scored-{args.condition_seed}"
            words = [*common, *first, *args.overrides]
            artifacts = stack.enter_context(trained(recipe, words, folder, [], "extractors")).artifacts
            artifacts.recipe = replace(artifacts.recipe, eval=replace(artifacts.recipe.eval, **counted))
            return Scoring(artifacts, artifacts.folder.path)

        for seed in args.seeds:
            for name, own in chosen.items():
                folder = args.out / f"{sweep}-{name}-{seed}"
                done = str(seed) in found.get(name, {})
                if done and not args.rounds:
                    continue
                others = sorted(path.parent for path in args.out.glob("*/stages") if path.is_dir())
                words = [*common, *own, *args.overrides, f"distill.train.seed={seed}"]
                pipeline = stack.enter_context(trained(recipe, words, folder, others))
                artifacts = pipeline.artifacts
                artifacts.recipe = replace(artifacts.recipe, eval=replace(artifacts.recipe.eval, **counted))
                if not done:
                    seconds = {stage: (artifacts.folder.finished(stage) or {})["seconds"] for stage in ("init", LAST)}
                    for stage, job in (*([("init", f"{name}, init")] if args.init else []), (LAST, name)):
                        scores = {**scoring()(artifacts, stage), "seconds": seconds[stage]}
                        found.setdefault(job, {})[str(seed)] = scores
                        shown = {column: round(scores[column], 3) for column in COLUMNS if column in scores}
                        print(f"{folder.name} {stage}: {shown}", flush=True)
                    atomic_write(file, json.dumps(found, indent=1) + "\n")
                key = str(artifacts.spec.nfe_per_chunk)
                if args.rounds and key not in bundles:
                    bundles[key] = artifacts.bundle(artifacts.finished_student(LAST))
        print("\n".join(table(found, COLUMNS)))
        if args.rounds:
            timed = costs(bundles, scoring().test, args.rounds)
            atomic_write(args.out / f"{sweep}-costs.json", json.dumps(timed, indent=1) + "\n")
            print("\n".join(table({name: {"0": row} for name, row in timed.items()}, COSTS)))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
