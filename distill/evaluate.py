"""The last stage: every system on the same held-out conditions, what each costs, report.json and report.html."""

import itertools
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill import judging
from distill.data import avatars
from distill.run_folder import load_tensors, versions
from eval import benchmark
from eval.latency import measure
from eval.protocol import Geometry, protocol_card
from eval.report import target, write_report
from students.session import Session
from teachers import flow, media
from teachers.codecs import to_float, to_uint8

if TYPE_CHECKING:
    from distill.stages import Pipeline

THROUGHPUT_BATCH = 96
SYSTEMS = ("teacher", "teacher_few_step", "zero_shot", "init", "student")


def evaluate(pipeline: "Pipeline", folder: Path) -> dict:
    """Score floor, codec and the five systems, measure costs, write the report; returns the scores."""
    config = pipeline.recipe.eval
    test = judging.HeldOut.draw(pipeline, "test", config.num_conditions)
    sets = {"test": (test.conditions, config.num_seeds), "diversity": (spread_conditions(pipeline), 1)}
    judging.generate_all(pipeline, folder, sets)
    if not pipeline.engine.is_main:
        return {}
    world = world_spread(pipeline)
    real = avatars.held_out(pipeline.recipe.data, config.condition_seed, "reference", config.num_reference)
    reference = benchmark.prepare_reference(pipeline.probes, real.video, test.decoded)

    def score(videos: Tensor, spread: Tensor | None = None) -> dict:
        own = world if spread is not None else None
        return benchmark.evaluate_videos(pipeline.probes, videos, reference, test.asked, spread, own, config.max_lag)

    floor = {"real": score(test.clips.video[None]), "codec": score(test.decoded[None], world)}
    scores, sheets = {}, {"real": test.clips.video, "codec": test.decoded}

    def clips(name: str, system: str, seed: int) -> Tensor:
        return load_tensors(judging.clips_file(folder, name, system, seed))["video"]

    for name in SYSTEMS:
        seeds = [clips("test", name, seed) for seed in range(config.num_seeds)]
        spread = clips("diversity", name, 0)
        scores[name] = score(torch.stack(seeds), spread.unflatten(0, (-1, config.diversity_seeds)))
        sheets[name] = seeds[0]
    costs = measure_costs(pipeline, test)
    systems = {name: {"metrics": scores[name], "cost": costs[name]} for name in scores}
    report = assemble(pipeline, systems, floor)
    samples = write_samples(pipeline, test)
    curves = read_curves(pipeline.log.rows())
    shown = {name: video[: config.sheet_conditions] for name, video in sheets.items()}
    captions = test.clips.text[: config.sheet_conditions]
    write_report(report, curves, shown, samples, pipeline.folder.path, captions, config.sheet_frames)
    flat = {name: {k: v["mean"] for k, v in metrics.items()} for name, metrics in scores.items()}
    return {"scores": flat, "ratios": report["ratios"]}


def world_spread(pipeline: "Pipeline") -> Tensor:
    """The world's own clips for the diversity conditions, other nuisance each, through the codec: uint8 [C, K, 3, T, H, W]."""
    config, codec = pipeline.recipe.eval, pipeline.senses.codec
    out = []
    for motion in range(config.diversity_seeds):
        clips = avatars.held_out(
            pipeline.recipe.data, config.condition_seed, "diversity", config.diversity_conditions, motion
        )
        out.append(to_uint8(codec.decode(codec.encode(to_float(clips.video)))))
    return torch.stack(out, dim=1)


def spread_conditions(pipeline: "Pipeline"):
    """Each diversity condition `diversity_seeds` times in a row."""
    config = pipeline.recipe.eval
    test = judging.HeldOut.draw(pipeline, "diversity", config.diversity_conditions)
    rows = torch.arange(config.diversity_conditions).repeat_interleave(config.diversity_seeds)
    return test.conditions.index(rows)


def measure_costs(pipeline: "Pipeline", test: judging.HeldOut) -> dict[str, dict]:
    """Side by side in this process: one clip alone (TTFF, seconds per video second) and a batch (throughput).

    A clip alone is bound by launching small kernels, which one thread does fastest; teacher and student both run so.
    """
    spec, recipe, codec = pipeline.spec, pipeline.recipe, pipeline.senses.codec
    clip_seconds = recipe.data.world.num_frames / float(spec.fps)
    settings, frames = recipe.trajectories, recipe.data.world.num_frames
    runs, warmup = recipe.eval.latency_runs, recipe.eval.latency_warmup
    batch = min(THROUGHPUT_BATCH, len(test.clips.text))
    one, many = test.conditions.index(slice(0, 1)), test.conditions.index(slice(0, batch))
    grids = {
        "teacher": flow.sigma_grid(settings.num_steps, settings.shift),
        "teacher_few_step": (*spec.sigmas, 0.0),
    }
    costs = {}
    for name, grid in grids.items():

        def clips(conditions, grid=grid):
            noise = judging.clip_noise(spec, conditions.text.shape[0], 0, "cost")
            codec.decode(
                judging.teacher_clips(pipeline.teacher, conditions, noise, grid, settings.guidance, batch).cpu()
            )

        with one_thread():
            alone = measure(lambda: clips(one), min(warmup, 1), max(3, runs // 3))
        together = measure(lambda: clips(many), 0, 1)
        nfe = (len(grid) - 1) * settings.guidance.passes
        costs[name] = cost(alone["median"], alone["median"], together["median"], nfe, clip_seconds, frames, batch)
    for name, stage in {"zero_shot": "teacher", "init": "init", "student": "dmd"}.items():
        student = pipeline.student(stage).eval().requires_grad_(False)
        with one_thread():
            alone = stream_cost(pipeline, student, test, runs, warmup)
        noise = judging.stream_noise(spec, batch, 0, "cost")

        def streams(student=student, noise=noise):
            codec.decode(judging.student_clips(student, many, noise, batch).cpu())

        together = measure(streams, 1, 5)
        values = cost(
            alone["first"], alone["clip"], together["median"], spec.nfe_per_chunk, clip_seconds, frames, batch
        )
        costs[name] = values | {"p95_chunk_seconds": alone["p95"]}
    return costs


@contextmanager
def one_thread() -> Iterator[None]:
    """Run with one torch thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cost(first: float, clip: float, together: float, nfe: int, clip_seconds: float, frames: int, batch: int) -> dict:
    """Cost numbers of one system from seconds to the first frame, for one clip alone, and for a batch of clips."""
    return {
        "nfe_per_chunk": nfe,
        "ttff_seconds": first,
        "seconds_per_video_second": clip / clip_seconds,
        "fps": frames / clip,
        "batch": batch,
        "batch_seconds_per_video_second": together / batch / clip_seconds,
        "batch_fps": batch * frames / together,
    }


def stream_cost(pipeline: "Pipeline", student, test: judging.HeldOut, runs: int, warmup: int) -> dict[str, float]:
    """Median seconds to the first frames and for a clip's frames through the serving session, and the 95th percentile chunk."""
    bundle = pipeline.bundle(student)
    portrait = to_float(test.clips.video[0, :, 0])
    first, clip, chunks = [], [], []
    for run in range(warmup + runs):
        session = Session(bundle, portrait, test.clips.text[0], seed=run)
        session.push(audio=test.clips.audio[0])
        session.close()
        began = time.perf_counter()
        marks = [time.perf_counter() - began for _ in session.frames()]
        if run >= warmup:
            first.append(marks[0])
            clip.append(marks[-1])
            chunks += [b - a for a, b in itertools.pairwise(marks)]
    return {
        "first": sorted(first)[len(first) // 2],
        "clip": sorted(clip)[len(clip) // 2],
        "p95": sorted(chunks)[int(0.95 * (len(chunks) - 1))],
    }


def assemble(pipeline: "Pipeline", systems: dict, floor: dict) -> dict:
    """report.json as design section 6 has it."""
    recipe, done = pipeline.recipe, pipeline.folder.finished
    stages = {}
    for name in ("data", "extractors", "teacher", "trajectories", "init", "dmd", "export"):
        facts = done(name) or {}
        stages[name] = {key: facts.get(key) for key in ("seconds", "fingerprint", "metrics")}
    extractors = stages["extractors"]["metrics"]
    world = recipe.data.world
    card = protocol_card(
        recipe.eval,
        Geometry(frames=world.num_frames, height=world.resolution, width=world.resolution, fps=pipeline.spec.fps),
        extractors["sha256"],
        extractors["admitted"],
        {"conditions": recipe.eval.condition_seed, "training": recipe.seed},
    )
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "versions": versions(),
        "device": {
            "kind": str(pipeline.engine.device),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processes": pipeline.engine.world_size,
        },
        "stages": stages,
        "systems": systems,
        "floor": floor["real"],
        "codec": floor["codec"],
        "ratios": ratios(systems),
        "targets": targets(systems),
        "protocol": card,
    }


def ratios(systems: dict) -> dict[str, float]:
    """Student against teacher and against init, and what the student saves."""

    def mean(system: str, name: str) -> float:
        return systems[system]["metrics"][name]["mean"]

    out = {
        f"{name}_student_over_teacher": mean("student", name) / mean("teacher", name)
        for name in ("fid", "fvd", "sync", "motion")
    }
    out |= {f"{name}_student_over_init": mean("student", name) / mean("init", name) for name in ("fid", "fvd")}
    out |= {f"{name}_student_minus_init": mean("student", name) - mean("init", name) for name in ("diversity", "sync")}
    out |= {f"{name}_init_over_zero_shot": mean("init", name) / mean("zero_shot", name) for name in ("fid", "fvd")}
    out["diversity_init_minus_zero_shot"] = mean("init", "diversity") - mean("zero_shot", "diversity")
    teacher, student = systems["teacher"]["cost"], systems["student"]["cost"]
    out["cost_teacher_over_student"] = teacher["seconds_per_video_second"] / student["seconds_per_video_second"]
    out["batch_cost_teacher_over_student"] = (
        teacher["batch_seconds_per_video_second"] / student["batch_seconds_per_video_second"]
    )
    out["ttff_teacher_over_student"] = teacher["ttff_seconds"] / student["ttff_seconds"]
    return out


TARGETS = {  # what the recipe promises; least and most
    "fid_student_over_teacher": (None, 1.10),
    "fvd_student_over_teacher": (None, 1.10),
    "sync_student_over_teacher": (0.97, None),
    "motion_student_over_teacher": (0.85, None),
    "fid_student_over_init": (None, 0.95),
    "fvd_student_over_init": (None, 0.97),
    "diversity_student_minus_init": (0.05, None),
    "sync_student_minus_init": (-0.01, None),
    "fid_init_over_zero_shot": (None, 1.0),
    "fvd_init_over_zero_shot": (None, 1.0),
    "diversity_init_minus_zero_shot": (0.0, None),
    "batch_cost_teacher_over_student": (15.0, None),
    "ttff_teacher_over_student": (40.0, None),
}


def targets(systems: dict) -> dict[str, dict]:
    """Each promise with its value and whether it is kept."""
    found = ratios(systems)
    out = {name: target(found[name], at_least=low, at_most=high) for name, (low, high) in TARGETS.items()}
    out["teacher_sync"] = target(systems["teacher"]["metrics"]["sync"]["mean"], at_least=0.88)
    for name in ("motion_energy", "sharpness"):
        out[f"student_{name}"] = target(systems["student"]["metrics"][name]["mean"], at_least=0.88, at_most=1.15)
    return out


def write_samples(pipeline: "Pipeline", test: judging.HeldOut) -> dict[str, Path]:
    """Playable samples with sound, label -> file: real, teacher, init and student on the same conditions."""
    folder = pipeline.folder.path / "samples"
    folder.mkdir(exist_ok=True)
    stage = pipeline.folder.stage_dir("evaluate")
    samples = {}
    for i in range(min(pipeline.recipe.eval.num_samples, len(test.clips.text))):
        for name in ("real", "teacher", "init", "student"):
            if name == "real":
                video = test.clips.video[i]
            else:
                video = load_tensors(judging.clips_file(stage, "test", name, 0))["video"][i]
            path = folder / f"{i}-{name}.mp4"
            frames = video.permute(1, 2, 3, 0).contiguous()
            media.write_video(path, frames, pipeline.spec.fps, test.clips.audio[i], upscale=6, smooth=True)
            samples[f"{name}: {test.clips.text[i]}"] = path
    return samples


def read_curves(rows: list[dict]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Rows of metrics.jsonl as curves: "stage: quantity" -> role -> (step, value) pairs."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("stage", "step"):
                role, _, quantity = name.rpartition("/")
                title = f"{row['stage']}: {role} {quantity}" if role == "validate" else f"{row['stage']}: {quantity}"
                curves.setdefault(title, {}).setdefault(role, []).append((row["step"], value))
    return curves
