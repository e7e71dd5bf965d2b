"""What each system of the report costs: seconds of one clip alone, chunk by chunk, and of clips in a batch."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.prepare.workers import one_thread
from distill.pipeline.artifacts import Artifacts
from distill.pipeline.evaluation import clip_sets
from distill.pipeline.evaluation.clip_sets import ClipSet
from distill.pipeline.evaluation.systems import (
    SAME_NOISE,
    Generate,
    LastStudent,
    in_precision,
    student_systems,
    teacher_systems,
)
from distill.training.engines.offload import is_streamed
from eval.speed.latency import clocked, median_seconds, percentile, timed
from students.serving.session import Session
from students.weights.checkpoint import Bundle
from teachers import flow
from teachers.codecs.linear import to_float
from teachers.conditions import Conditions

COSTS_SECONDS = 60.0  # for timing systems on rank 0, while the others wait
Decode = Callable[[Tensor, Conditions], object]


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


def measure_costs(artifacts: Artifacts, test: ClipSet) -> dict[str, dict]:
    """Side by side in this process: one clip alone (TTFF, seconds per video second) and a batch (throughput). A GPU holds one
    network at a time, the others wait in the host's memory.

    A clip alone is bound by launching small kernels, which one thread does fastest; teacher and student both run so, in turn,
    so that what else the machine does hits all of them. Of a teacher that takes longer than COSTS_SECONDS for a clip as many steps
    are timed as go into them, as the other ranks wait.
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
    made = teacher_systems(artifacts, batch, settings.guidance) | student_systems(artifacts, students, batch)
    alone: dict[str, Callable[[], list[float]]] = {}
    together, steps = {}, {}

    def decode(x0: Tensor, conditions: Conditions) -> None:
        with artifacts.engine.autocast():  # as a session decodes
            artifacts.encoders.decode(x0, conditions.lead)

    for name, generate in made.items():
        if name == SAME_NOISE:
            continue
        net: Any = students.get(name) or (artifacts.ar_teacher if name == "ar_teacher" else artifacts.teacher)
        on_device, repeats = partial(resident, net, artifacts.engine.device), ()
        clips = partial(clip_seconds, generate, decode)
        if name == "teacher":
            with on_device():
                grid = flow.sigma_grid(settings.num_steps, settings.shift)
                steps[name] = steps_that_fit(generate, one, grid)
            clips = partial(solution_seconds, generate, decode, grid, steps[name])
        if name in students:
            measure = in_precision(artifacts, partial(stream_marks, artifacts.bundle(net), test))
            repeats = (1, min(5, config.latency_runs))
        else:
            measure = lambda clips=clips: [clips(one)]  # noqa: E731
        alone[name] = on_device()(measure)
        with on_device():
            together[name] = median_seconds(partial(clips, many), *repeats) if batch > 1 else 0.0
    with one_thread():
        marks = timed(alone, config.latency_warmup, config.latency_runs, COSTS_SECONDS)
    for name in alone if batch == 1 else ():
        together[name] = statistics.median(run[-1] for run in marks[name])
    found = {name: cost(marks[name], together[name] / batch, batch, nfe[name], artifacts) for name in alone}
    for name, count in steps.items():
        found[name] |= {} if count == settings.num_steps else {"timed_steps": count}
    return found


def clip_seconds(generate: Generate, decode: Decode, conditions: Conditions) -> float:
    """Seconds of these clips, decoded."""
    return clocked(lambda: decode(generate(conditions, None, 0, "cost"), conditions)).seconds


def steps_that_fit(generate: Generate, conditions: Conditions, grid: Sequence[float]) -> int:
    """How many of the solution's steps go into COSTS_SECONDS, one at least."""
    step = clocked(lambda: generate(conditions, None, 0, "cost", grid=grid[:2])).seconds
    return max(1, min(len(grid) - 1, int(COSTS_SECONDS / step)))


def solution_seconds(
    generate: Generate, decode: Decode, grid: Sequence[float], steps: int, conditions: Conditions
) -> float:
    """Seconds of these clips solved on `grid`, of which the first `steps` are timed and the others take as long each; decoded."""
    made: list[Tensor] = []
    solved = clocked(lambda: made.append(generate(conditions, None, 0, "cost", grid=grid[: steps + 1]))).seconds
    return solved * (len(grid) - 1) / steps + clocked(lambda: decode(made[0], conditions)).seconds


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
