"""The health panel: what a student's clips show on a few fixed held-out conditions, beside the teacher's. It needs no probe.

`Checkup` makes the clips, `panel` the numbers, `reasons` judges them: at the end of `init` by `HealthConfig.ready`, at every
validation of `dmd` by `HealthConfig.collapse`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.recipe import Limits
from eval.metrics.quality import Frames, failure_rates, measure
from eval.metrics.seam import seam_jump
from students.spec import Spec
from students.student import Student
from teachers import flow
from teachers.conditions import Conditions
from teachers.files import load_tensors, save_tensors

if TYPE_CHECKING:
    from distill.pipeline.stages import Pipeline

WORDS = {  # for people
    "black": "black frames",
    "frozen": "frozen frames",
    "clipped": "clipped pixels",
    "saturation": "colour saturation",
    "motion_energy": "motion energy",
    "seam": "seam jump",
    "noise": "change with the noise",
    "audio": "sensitivity to audio",
    "text": "sensitivity to text",
}
STILL = 1e-3
"""A teacher's number below this is no mark to compare with."""
Make = Callable[[Conditions, Tensor, int], Tensor]  # (conditions, their rows, noise seed) -> x0 of those rows


def variants(conditions: Conditions) -> dict[str, tuple[Conditions, int]]:
    """Name -> (conditions, noise seed): as asked; with the sound, then the text, of another row under the same noise; and
    another noise. Without a sound there is no "audio"."""
    out = {
        "own": (conditions, 0),
        "text": (replace(conditions, text=conditions.text.roll(1, 0)), 0),
        "noise": (conditions, 1),
    }
    if conditions.audio.numel():
        heard = {"audio": conditions.audio, "clip_audio": conditions.clip_audio}
        out["audio"] = (replace(conditions, **{k: v.roll(1, 0) for k, v in heard.items() if v is not None}), 0)
    return out


def observe(make: Make, conditions: Conditions, rows: Tensor, decode: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """What `panel` needs of these rows of the conditions, a row a clip: `eval.metrics.quality.Frames`, the share of clipped
    values, and
    how far the clip (frames 1.., in grey levels) is from the one of each other variant. decode: x0 -> uint8 [N, 3, T, H, W]."""
    own, facts = None, {}
    for name, (asked, seed) in variants(conditions).items():
        video = decode(make(asked.index(rows), rows, seed))
        if own is None:
            own, frames = video, measure(video)
            facts = dict(vars(frames)) | {"clipped": _per_clip(lambda x: (x == 0) | (x == 255), video)}
        else:
            facts[f"to_{name}"] = _per_clip(lambda x, y: (x.float() - y.float()).abs(), own, video)
    return facts


def _per_clip(function: Callable[..., Tensor], *videos: Tensor) -> Tensor:
    """Means [N] over frames 1.. of each clip, one at a time."""
    return torch.stack(
        [function(*(clip[:, 1:] for clip in clips)).double().mean() for clips in zip(*videos, strict=True)]
    )


def panel(facts: Mapping[str, Tensor], seams: list[int]) -> dict[str, float]:
    """Shares of `black` and `frozen` frames (`eval.metrics.quality.failure_rates`) and of `clipped` values (0 or 255); `saturation`
    and `motion_energy` in grey levels; `seam`, the change at the frames `seams` over that elsewhere (left out where nothing moves
    elsewhere); `noise`, the change in grey levels with another noise; `audio` and `text`, the change with another sound or text
    under the same noise over that, or over one grey level where it is less."""
    frames = Frames(**{name: facts[name] for name in Frames.__dataclass_fields__})
    noise = float(facts["to_noise"].mean())
    found = {name: float(rate.mean()) for name, rate in failure_rates(frames).items() if name != "flash"}
    found |= {
        "clipped": float(facts["clipped"].mean()),
        "saturation": float(frames.saturation.mean()),
        "motion_energy": float(frames.change.mean()),
        "seam": seam_jump(frames, seams)[0] if seams else math.nan,
        "noise": noise,
    }
    changes = {name: facts.get(f"to_{name}") for name in ("audio", "text")}
    found |= {name: float(change.mean()) / max(noise, 1.0) for name, change in changes.items() if change is not None}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def reasons(own: Mapping[str, float], teacher: Mapping[str, float], limits: Limits) -> list[str]:
    """Why a student's panel is beyond the limits, worst kinds first; empty when it is not. A number that one of the two lacks, and
    a teacher's that is next to nothing, judges nobody."""
    found = []

    def say(name: str, bound: str) -> None:
        found.append(f"{WORDS[name]} {own[name]:.3g} (the teacher's {teacher[name]:.3g}, {bound})")

    for name in ("black", "frozen", "clipped"):
        most = getattr(limits, name)
        if own[name] > teacher[name] + most:
            say(name, f"at most {most:g} more")
    bounds = {"motion_energy": limits.motion_energy, "saturation": limits.saturation}
    bounds |= {name: (getattr(limits, name), math.inf) for name in ("audio", "text", "noise")}
    bounds["seam"] = (0.0, limits.seam)
    for name, (least, most) in bounds.items():
        if name in own and teacher.get(name, 0.0) > STILL:
            over = own[name] / teacher[name]
            if over < least or over > most:
                say(name, f"at least {least:g} of it" if over < least else f"at most {most:g} times")
    return found


def verdict(own: Mapping[str, float], teacher: Mapping[str, float], limits: Limits) -> str:
    """What `init` ends with."""
    found = reasons(own, teacher, limits)
    return f"not ready for DMD: {'; '.join(found)}" if found else "ready for DMD"


def seam_frames(spec: Spec) -> list[int]:
    """The pixel frames of a training clip that begin a chunk, frame 0 left out; none where every frame does, as then no change
    lies elsewhere."""
    first = [spec.pixel_frames(chunk)[0] for chunk in range(1, spec.num_chunks)]
    return first if len(first) < spec.pixel_frames(spec.num_chunks - 1)[1] - 1 else []


class Checkup:
    """The panels of a run's networks, all on the same conditions and noises; `teacher` is the mark."""

    def __init__(self, pipeline: "Pipeline"):
        self.pipeline = pipeline
        clips = pipeline.source.draw(
            pipeline.recipe.eval.condition_seed, "health", pipeline.recipe.health.num_conditions
        )
        self.num = len(clips.text)
        self.conditions = pipeline.encoders.of_clips(clips)[1].to(pipeline.engine.device)
        self.seams = seam_frames(pipeline.spec)

    def student(self, net: Student) -> dict[str, float]:
        """A student's panel by its own rollouts; under FSDP every rank calls it."""
        from distill.pipeline.generate import stream_noise, student_clips

        pipeline, num = self.pipeline, self.num

        def make(asked: Conditions, rows: Tensor, seed: int) -> Tensor:
            noise = stream_noise(pipeline.spec, num, pipeline.recipe.eval.condition_seed, "health", seed)
            return student_clips(net, asked, lambda c, s: noise(c, s)[rows], pipeline.recipe.eval.batch_size)

        return panel(observe(make, self.conditions, torch.arange(num), pipeline.encoders.decode), self.seams)

    def teacher(self, folder: Path) -> dict[str, float]:
        """The teacher's panel: that of the stage init where it has been made, else from its guided solutions, shared out over the
        ranks and kept in `folder`, so that a killed stage goes on. Every rank calls it."""
        from distill.pipeline.generate import clip_noise, teacher_clips

        pipeline, num, engine = self.pipeline, self.num, self.pipeline.engine
        done = ((pipeline.folder.finished("init") or {}).get("metrics") or {}).get("health") or {}
        if done.get("num_conditions") == num:
            return done["teacher"]
        settings = pipeline.recipe.trajectories
        grid = flow.sigma_grid(settings.num_steps, settings.shift)

        def make(asked: Conditions, rows: Tensor, seed: int) -> Tensor:
            noise = clip_noise(pipeline.spec, num, pipeline.recipe.eval.condition_seed, "health", seed)[rows]
            batch = pipeline.recipe.eval.batch_size
            return teacher_clips(pipeline.teacher, asked, noise, grid, settings.guidance, batch)

        parts = torch.arange(num).chunk(min(num, engine.world_size))
        files = [folder / f"teacher-health-{int(rows[0])}-{len(rows)}.safetensors" for rows in parts]
        for rows, file in list(zip(parts, files, strict=True))[engine.rank :: engine.world_size]:
            if not file.is_file():
                save_tensors(file, observe(make, self.conditions, rows, pipeline.encoders.decode))
        engine.barrier()
        found = [load_tensors(file) for file in files]
        return panel({name: torch.cat([part[name] for part in found]) for name in found[0]}, self.seams)
