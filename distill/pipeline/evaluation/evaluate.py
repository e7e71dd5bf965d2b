"""The last stage: every system on the same held-out conditions, what each costs, report.json and report.html."""

import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from distill.data.prepare.workers import one_thread
from distill.expect import SHOWN, SYSTEMS, Bounds, compare
from distill.pipeline.artifacts import Artifacts
from distill.pipeline.evaluation import clip_sets
from distill.pipeline.evaluation.clip_sets import ClipSet
from distill.pipeline.evaluation.health import seam_frames
from distill.pipeline.generate import Rows, clip_noise, many_step_clips, stream_noise, student_clips, teacher_clips
from distill.pipeline.run_folder import revision, versions
from distill.training.offload import is_streamed
from eval.cards import Card
from eval.embedded.evaluation import Evaluation
from eval.embedded.protocol import EvalConfig, Geometry, run_card
from eval.report.run_report import target, write_report
from eval.speed.latency import clocked, median_seconds, percentile, timed
from students.serving.session import Session
from students.student import Student
from students.weights.checkpoint import Bundle
from teachers import flow, media
from teachers.codecs.linear import to_float
from teachers.conditions import Conditions
from teachers.files import load_tensors, remove_folder, save_tensors

SAME_NOISE = "teacher_same_noise"
COSTS_SECONDS = 60.0  # for timing systems on rank 0, while the others wait
Generate = Callable[..., Tensor]  # (conditions, rows of them or None, seed and other keys of the noise) -> x0


def evaluate(artifacts: Artifacts, folder: Path) -> dict:
    """Score floor, codec and the systems, measure costs, write the report; returns the scores."""
    config = artifacts.recipe.eval
    test = clip_sets.draw(artifacts, folder, "test", config.num_conditions, samples=max(1, config.num_samples))
    reference = clip_sets.draw(artifacts, folder, "reference", config.num_reference, encode=False)
    sets, spread = {"test": (test.conditions, config.num_seeds)}, []
    if "diversity" not in artifacts.source.left_out:
        spread = draw_spread(artifacts, folder)
        rows = torch.arange(config.diversity_conditions).repeat_interleave(config.diversity_seeds)
        sets["diversity"] = (spread[0].conditions.select(rows), 1)
    with artifacts.codec_alone():
        generate_all(artifacts, LastStudent(artifacts), folder, sets)
    found = _report(artifacts, folder, test, reference, spread) if artifacts.engine.is_main else {}
    clip_sets.discard(artifacts, folder)
    if artifacts.engine.is_main:
        remove_folder(folder / "clips")
    return found


def _report(
    artifacts: Artifacts,
    folder: Path,
    test: ClipSet,
    reference: ClipSet,
    spread: Sequence[ClipSet],
) -> dict:
    """Scores, costs and pages of the clips that were generated."""
    config = artifacts.recipe.eval
    card = card_of(artifacts, replace(config, num_conditions=len(test), num_reference=len(reference)))
    world = torch.stack([clips.decoded for clips in spread], dim=1) if spread else None
    real = clip_sets.as_metrics_take(artifacts, test.clips)
    seams = seam_frames(artifacts.spec)
    evaluation = Evaluation(card, artifacts.probes, real, test.decoded, reference.clips.video, seams, world)
    scores, floor, sheets = score_systems(artifacts, folder, test, evaluation)
    with artifacts.engine.apart():  # the other ranks wait
        costs = measure_costs(artifacts, test)
    systems = {name: {"metrics": scores[name], "cost": costs[name]} for name in scores}
    report = assemble(artifacts, systems, floor, card, evaluation.left_out)
    videos = write_samples(artifacts, test)
    curves = read_curves(artifacts.log.rows())
    shown = {name: video[: config.sheet_conditions] for name, video in sheets.items()}
    captions = named(test.clips.text)[: config.sheet_conditions]
    write_report(report, curves, shown, videos, artifacts.folder.path, captions, config.sheet_frames)

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    flat = {name: {k: finite(v["mean"]) for k, v in metrics.items()} for name, metrics in scores.items()}
    return {"scores": flat, "ratios": {name: finite(value) for name, value in report["ratios"].items()}}


class LastStudent(Mapping[str, Student]):
    """The students of the report: zero-shot, after initialisation, after distillation. No more than the one that was last asked for
    is held."""

    def __init__(self, artifacts: Artifacts):
        self.artifacts, self.last = artifacts, ("", cast(Student, None))
        self.stages = {"zero_shot": artifacts.recipe.zero_shot_stage, "init": "init", "student": "distill"}

    def __getitem__(self, name: str) -> Student:
        if self.last[0] != name:
            self.last = ("", cast(Student, None))
            self.last = (name, self.artifacts.finished_student(self.stages[name]))
        return self.last[1]

    def __contains__(self, name: object) -> bool:
        return name in self.stages  # without loading it

    def __iter__(self) -> Iterator[str]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)


@contextmanager
def resident(net: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the network is on the device, outside it waits in the host's memory; one that is streamed stays as it is."""
    moves = device.type != "cpu" and not is_streamed(net)
    if moves:
        net.to(device)
    try:
        yield
    finally:
        if moves:
            net.to("cpu")


def systems(artifacts: Artifacts, students: Mapping[str, Student], batch: int) -> dict[str, Generate]:
    """The systems of the report: how each generates x0 for rows of conditions, `batch` at a time. A student with a network of
    its own has its own many-step teacher among them. SAME_NOISE is none, but the teacher from the noise that students start from.
    """
    recipe, spec, guidance = artifacts.recipe, artifacts.spec, artifacts.recipe.trajectories.guidance
    grid = flow.sigma_grid(recipe.trajectories.num_steps, recipe.trajectories.shift)

    def teacher(conditions: Rows, rows: Tensor | None, *keys: Any, grid: Sequence[float] = grid) -> Tensor:
        noise = clip_noise(spec, conditions.num_rows, *keys)
        return teacher_clips(artifacts.teacher, conditions, noise, grid, guidance, batch, rows)

    def same_noise(conditions: Rows, rows: Tensor | None, *keys: Any) -> Tensor:
        start = stream_noise(spec, conditions.num_rows, *keys)
        noise = torch.cat([start(chunk, 0) for chunk in range(spec.num_chunks)], dim=2)
        return teacher_clips(artifacts.teacher, conditions, noise, grid, guidance, batch, rows)

    def own_teacher(conditions: Rows, rows: Tensor | None, *keys: Any) -> Tensor:
        noise = stream_noise(spec, conditions.num_rows, *keys)
        return many_step_clips(artifacts.ar_teacher, conditions, noise, grid, guidance, batch, rows)

    def student(conditions: Rows, rows: Tensor | None, *keys: Any, name: str) -> Tensor:
        return student_clips(students[name], conditions, stream_noise(spec, conditions.num_rows, *keys), batch, rows)

    found = (
        {"teacher": teacher, "teacher_few_step": partial(teacher, grid=(*spec.sigmas, 0.0)), SAME_NOISE: same_noise}
        | ({"ar_teacher": own_teacher} if recipe.has_custom_network else {})
        | {name: partial(student, name=name) for name in students}
    )
    return {name: in_precision(artifacts, generate) for name, generate in found.items()}


def in_precision(artifacts: Artifacts, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under the engine's autocast: what is compared is computed, and timed, in one precision."""

    def run(*words: Any, **named: Any) -> Any:
        with artifacts.engine.autocast():
            return function(*words, **named)

    return run


def score_systems(
    artifacts: Artifacts, folder: Path, test: ClipSet, evaluation: Evaluation
) -> tuple[dict[str, dict], dict[str, dict], dict[str, Tensor]]:
    """(Scores of every system; of real clips and of the codec's ceiling; name -> clips uint8 [N, 3, T, H, W] of one noise seed)
    from the clips that `generate_all` stored."""
    config, world = artifacts.recipe.eval, evaluation.world
    floor = {"real": evaluation.score(test.clips.video[None]), "codec": evaluation.score(test.decoded[None], world)}
    scores, sheets = {}, {"real": test.clips.video, "codec": test.decoded}

    clips = partial(generated, folder)

    beside = {"teacher": clips("test", "teacher", 0), SAME_NOISE: clips("test", SAME_NOISE, 0)}
    for name in (name for name in SYSTEMS if name != "ar_teacher" or artifacts.recipe.has_custom_network):
        seeds = [clips("test", name, seed) for seed in range(config.num_seeds)]
        spread = None if world is None else clips("diversity", name, 0).unflatten(0, (-1, config.diversity_seeds))
        others = beside if name in ("zero_shot", "init", "student") else None
        scores[name] = evaluation.score(torch.stack(seeds), spread, others)
        sheets[name] = seeds[0]
    return scores, floor, sheets


def draw_spread(artifacts: Artifacts, folder: Path) -> list[ClipSet]:
    """The world's own clips for the diversity conditions, a set for each of other nuisance; the first has the conditions."""
    config = artifacts.recipe.eval
    num, motions = config.diversity_conditions, range(config.diversity_seeds)
    return [clip_sets.draw(artifacts, folder, "diversity", num, motion=motion) for motion in motions]


def measure_costs(artifacts: Artifacts, test: ClipSet) -> dict[str, dict]:
    """Side by side in this process: one clip alone (TTFF, seconds per video second) and a batch (throughput). A GPU holds one
    network at a time, the others wait in the host's memory.

    A clip alone is bound by launching small kernels, which one thread does fastest; teacher and student both run so, in turn,
    so that what else the machine does hits all of them.
    """
    spec, config, settings = artifacts.spec, artifacts.recipe.eval, artifacts.recipe.trajectories
    at_once = clip_sets.generated_at_once(artifacts.recipe, artifacts.spec)
    batch = min(at_once, len(test))
    one, many = test.conditions.index(slice(0, 1)), test.conditions.index(slice(0, batch))
    passes = settings.guidance.passes
    nfe = {"teacher": settings.num_steps * passes, "teacher_few_step": len(spec.sigmas) * passes}
    nfe |= {"ar_teacher": (settings.num_steps + 1) * passes}  # the plans included
    artifacts.release(())
    students = {name: student.cpu() for name, student in LastStudent(artifacts).items()}
    nfe |= dict.fromkeys(students, spec.nfe_per_chunk)
    alone: dict[str, Callable[[], list[float]]] = {}
    together = {}
    for name, generate in systems(artifacts, students, batch).items():
        net = students.get(name) or (artifacts.ar_teacher if name == "ar_teacher" else artifacts.teacher)
        on_device = partial(resident, net, artifacts.engine.device)

        def clips(conditions: Conditions, generate: Generate = generate) -> None:
            with artifacts.engine.autocast():  # as a session decodes
                artifacts.encoders.decode(generate(conditions, None, 0, "cost"))

        if name in students:
            measure = in_precision(artifacts, partial(stream_marks, artifacts.bundle(net), test))
            repeats = (1, min(5, config.latency_runs))
        elif name != SAME_NOISE:
            measure, repeats = (lambda clips=clips: [clocked(partial(clips, one)).seconds]), ()
        else:
            continue
        alone[name] = on_device()(measure)
        with on_device():
            together[name] = median_seconds(partial(clips, many), *repeats) if batch > 1 else 0.0
    with one_thread():
        marks = timed(alone, config.latency_warmup, config.latency_runs, COSTS_SECONDS)
    for name in alone if batch == 1 else ():
        together[name] = statistics.median(run[-1] for run in marks[name])
    return {name: cost(marks[name], together[name] / batch, batch, nfe[name], artifacts) for name in alone}


def stream_marks(bundle: Bundle, test: ClipSet) -> list[float]:
    """Seconds from the start to each chunk of the first clip, through the serving session.

    The second of two streams: a server's caches hold its weights, where the other systems of the round have just been.
    """
    marks: list[float] = []
    for _ in range(2):
        portrait = to_float(test.samples[0, :, 0]) if bundle.spec.takes_image else None
        outside = {name: value[0] for name, value in test.conditions.index(slice(0, 1)).outside.items()}
        session = Session(bundle, portrait, test.clips.text[0], conditions=outside)
        session.push(audio=test.clips.voice[0])
        session.close()
        began = time.perf_counter()
        marks = [time.perf_counter() - began for _ in session.frames()]
    return marks


def cost(marks: list[list[float]], together: float, batch: int, nfe: float, artifacts: Artifacts) -> dict[str, float]:
    """Cost numbers of one system from the seconds to each part of a clip alone, run by run, and a clip's seconds in a `batch`."""
    frames = artifacts.recipe.data.world.num_frames
    clip_seconds = frames / float(artifacts.spec.fps)
    clip = statistics.median(run[-1] for run in marks)
    chunks = [b - a for run in marks for a, b in itertools.pairwise(run)]
    return {
        "nfe_per_chunk": nfe,
        "ttff_seconds": statistics.median(run[0] for run in marks),
        "seconds_per_video_second": clip / clip_seconds,
        "fps": frames / clip,
        "batch": batch,
        "batch_seconds_per_video_second": together / clip_seconds,
        "batch_fps": frames / together,
    } | ({"p95_chunk_seconds": percentile(chunks, 95)} if chunks else {})


def card_of(artifacts: Artifacts, counted: EvalConfig) -> Card:
    """The run's card; `counted` states how many clips there were."""
    recipe, world = artifacts.recipe, artifacts.recipe.data.world
    extractors = (artifacts.folder.finished("extractors") or {})["metrics"]
    return run_card(
        counted,
        Geometry(frames=world.num_frames, height=world.size[0], width=world.size[1], fps=artifacts.spec.fps),
        extractors["sha256"],
        extractors["admitted"],
        {"conditions": recipe.eval.condition_seed, "training": recipe.seed},
    )


def assemble(artifacts: Artifacts, systems: dict, floor: dict, card: Card, refused: dict[str, str]) -> dict:
    """report.json as design section 6 has it; `refused`: metrics of the card that cannot be had, and why."""
    recipe, done = artifacts.recipe, artifacts.folder.finished
    stages = {}
    for name in artifacts.folder.names:
        facts = done(name) or {}
        stages[name] = {key: facts.get(key) for key in ("seconds", "fingerprint", "metrics")}
    left_out = {**artifacts.source.left_out, **refused}
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "revision": revision(),
        "versions": versions(),
        "device": {
            "kind": str(artifacts.engine.device),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processes": artifacts.engine.world_size,
        },
        "stages": stages,
        "systems": systems,
        "floor": floor["real"],
        "codec": floor["codec"],
        "health": health_of(stages),
        "ratios": ratios(systems),
        "targets": targets(systems, recipe.expect, left_out),
        "columns": {name: column.plain() for name, column in card.columns.items()},
        "protocol": card.plain(),
        **({"left_out": left_out} if left_out else {}),
        **({"notes": list(artifacts.source.notes)} if artifacts.source.notes else {}),
    }


def health_of(stages: dict) -> dict[str, Any]:
    """The health metrics that the stages stored: of teacher, ar_teacher, init and student; and the quality gate after init."""
    found: dict[str, Any] = {}
    for name in ("init", "ar_teacher"):
        found |= ((stages.get(name) or {}).get("metrics") or {}).get("health") or {}
    best = ((stages["distill"].get("metrics") or {}).get("best")) or {}
    student = {name.removeprefix("health/"): x for name, x in best.items() if name.startswith("health/")}
    return found | ({"student": student} if student else {})


def ratios(systems: dict) -> dict[str, float]:
    """Every comparison of `distill.expect.SHOWN` that is measured; NaN over a score of 0."""
    found = {name: compare(name, systems) for name in SHOWN}
    return {name: value for name, value in found.items() if value is not None}


def targets(systems: dict, expect: Mapping[str, Bounds], left_out: Collection[str]) -> dict[str, dict]:
    """Each expectation of the recipe with its value and whether it is met; one of a measure that is `left_out` is skipped."""
    out = {}
    for name, bounds in expect.items():
        value = compare(name, systems)
        if value is not None:
            out[name] = target(value, at_least=bounds.at_least, at_most=bounds.at_most)
        elif not any(name.startswith(f"{measure}_") for measure in left_out):
            shown = target(0.0, at_least=bounds.at_least, at_most=bounds.at_most)
            out[name] = {**shown, "value": None, "passed": None}
    return out


def write_samples(artifacts: Artifacts, test: ClipSet) -> dict[str, dict[str, Path]]:
    """Playable samples with sound, condition -> system -> file: real, teacher, init and student on the same conditions."""
    folder = artifacts.folder.path / "samples"
    folder.mkdir(exist_ok=True)
    stage = artifacts.folder.stage_dir("evaluate")
    samples: dict[str, dict[str, Path]] = {}
    for i in range(min(artifacts.recipe.eval.num_samples, len(test.clips.text))):
        for name in ("real", "teacher", "init", "student"):
            if name == "real":
                video = test.samples[i]
            else:
                video = generated(stage, "test", name, 0, "samples")[i]
            path = folder / f"{i}-{name}.mp4"
            frames = video.permute(1, 2, 3, 0).contiguous()
            media.write_video(
                path,
                frames,
                artifacts.spec.fps,
                test.clips.mixed[i],
                upscale=max(1, 192 // video.shape[-2]),
                smooth=True,
            )
            samples.setdefault(named(test.clips.text)[i], {})[name] = path
    return samples


def named(texts: list[str]) -> list[str]:
    """The texts themselves; numbered where two clips have the same, or none."""
    if len(set(texts)) == len(texts) and all(texts):
        return texts
    return [f"clip {i} {text}".strip() for i, text in enumerate(texts)]


def read_curves(rows: list[dict]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Rows of metrics.jsonl as curves: "stage: quantity" -> role -> (step, value) pairs; health metrics have a table."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("stage", "step") and not name.startswith("health/"):
                role, _, quantity = name.rpartition("/")
                title = f"{row['stage']}: {role} {quantity}" if role == "validate" else f"{row['stage']}: {quantity}"
                curves.setdefault(title, {}).setdefault(role, []).append((row["step"], value))
    return curves


def generate_all(
    artifacts: Artifacts, students: Mapping[str, Student], folder: Path, sets: Mapping[str, tuple[Rows, int]]
) -> None:
    """Every system's clips of every set (name -> conditions, noise seeds) at the scored size, a few clips a job, and the first
    ones at their own. Jobs are shared out over the ranks and kept in the stage, so that a killed evaluation goes on."""
    config, engine, batch = (
        artifacts.recipe.eval,
        artifacts.engine,
        clip_sets.generated_at_once(artifacts.recipe, artifacts.spec),
    )
    jobs = [
        (system, generate, conditions, rows, (name, seed), clips_file(folder, name, system, seed, int(rows[0])))
        for system, generate in systems(artifacts, students, batch).items()
        for name, (conditions, seeds) in sets.items()
        for seed in range(seeds)
        if system != SAME_NOISE or (name == "test" and seed == 0)
        for rows in torch.arange(conditions.num_rows).split(batch)
    ]
    (folder / "clips").mkdir(exist_ok=True)
    mine = [jobs[i] for i in engine.missing([job[-1] for job in jobs])]
    bar, last = tqdm(mine, desc="clips", disable=not engine.is_main, mininterval=1.0), ""
    for system, generate, conditions, rows, keys, file in bar:
        if system in students and system != last:
            artifacts.release(())
        last = system
        x0 = generate(conditions, rows, config.condition_seed, *keys)
        if engine.is_group_main:
            video = artifacts.encoders.decode(x0)
            shown = max(0, config.num_samples - int(rows[0])) if keys == ("test", 0) else 0
            save_tensors(file, {"video": clip_sets.scored(video), "samples": video[:shown].clone()})
    engine.barrier()


def clips_file(folder: Path, name: str, system: str, seed: int, start: int) -> Path:
    """Where a system's clips uint8 [n, 3, T, H, W] of one set and noise seed lie, from row `start` on."""
    return folder / "clips" / f"{name}-{system}-{seed}-{start:06d}.safetensors"


def generated(folder: Path, name: str, system: str, seed: int, what: str = "video") -> Tensor:
    """The clips of a set that `generate_all` stored at the scored size; or `samples`, at their own."""
    files = sorted((folder / "clips").glob(f"{name}-{system}-{seed}-*.safetensors"))
    return torch.cat([load_tensors(file)[what] for file in files])
