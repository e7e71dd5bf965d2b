"""Health metrics of a student's clips on a few fixed held-out conditions, beside the teacher's. They need no extractor.

`HealthCheck` generates the clips, `health_metrics` computes the numbers, `violations` compares them with limits: those of
`HealthConfig.ready` at the end of `init`, those of `HealthConfig.collapse` at every validation of `distill`, those of
`HealthConfig.healthy` at its end.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distill.health import Limits
from distill.pipeline.artifacts import Artifacts
from distill.pipeline.evaluation.clip_sets import generated_at_once, scored
from distill.pipeline.generate import clip_noise, stream_noise, student_clips, teacher_clips
from eval.metrics.motion import sharpness_energies
from eval.metrics.quality import Frames, failure_rates, measure
from eval.metrics.seam import seam_jump
from students.spec import Spec
from students.student import Student
from teachers import flow
from teachers.conditions import Conditions
from teachers.files import load_tensors, save_tensors
from teachers.guidance import AnyGuidance

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
    "sharpness": "sharpness",
    "saturation_change": "change of colour saturation from the first chunk to the last",
    "motion_change": "change of motion energy from the first chunk to the last",
    "sharpness_change": "change of sharpness from the first chunk to the last",
}
BY_CHUNK = {"saturation_change": "saturation", "motion_change": "motion_energy", "sharpness_change": "sharpness"}
"""Last chunk minus first -> what it is a change of."""
STILL = 1e-3
"""A teacher's number below this is too small to compare with."""
Make = Callable[[Conditions, Tensor, int], Tensor]  # (conditions, their rows, noise seed) -> x0 of those rows


def variants(conditions: Conditions) -> dict[str, tuple[Conditions, int]]:
    """Name -> (conditions, noise seed): its own; with the text, then the audio, of another row under the same noise, where there is
    any; and another noise."""
    given = [name for name in ("text", "audio") if conditions.has(name)]
    changed = {name: (conditions.roll_rows(name), 0) for name in given}
    return {"own": (conditions, 0), "noise": (conditions, 1)} | changed


def observe(make: Make, conditions: Conditions, rows: Tensor, decode: Callable[..., Tensor]) -> dict[str, Tensor]:
    """`compared` clips of these rows of the conditions, a row a clip. decode: x0 and its lead -> uint8 [N, 3, T, H, W]."""
    found = {}
    for name, (given, seed) in variants(conditions).items():
        found[name] = scored(decode(make(given.index(rows), rows, seed), given.index(rows).lead))
    return compared(found)


def compared(videos: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `health_metrics` needs of clips uint8 [N, 3, T, H, W] of each of the `variants`: `eval.metrics.quality.Frames`, the
    share of clipped values, the sharpness of frames 1.. [N, T - 1], and how far the clip (frames 1.., in grey levels) is from the
    one of each other variant."""
    own = videos["own"]
    facts = dict(vars(measure(own))) | {"clipped": _per_clip(lambda x: (x == 0) | (x == 255), own)}
    pairs = (own[:, :, frame - 1 : frame + 1] for frame in range(1, own.shape[2]))
    facts["sharpness"] = torch.stack([sharpness_energies(pair) for pair in pairs], dim=1).cpu()
    for name, video in videos.items():
        if name != "own":
            facts[f"to_{name}"] = _per_clip(lambda x, y: (x.float() - y.float()).abs(), own, video)
    return facts


def _per_clip(function: Callable[..., Tensor], *videos: Tensor) -> Tensor:
    """Means [N] over frames 1.. of each clip, one at a time."""
    return torch.stack(
        [function(*(clip[:, 1:] for clip in clips)).double().mean() for clips in zip(*videos, strict=True)]
    )


def health_metrics(facts: Mapping[str, Tensor], seams: list[int]) -> dict[str, float]:
    """Shares of `black` and `frozen` frames (`eval.metrics.quality.failure_rates`) and of `clipped` values (0 or 255); `saturation`
    and `motion_energy` in grey levels; `seam`, the change at the frames `seams` over that elsewhere (absent where nothing moves
    elsewhere); `noise`, the change in grey levels with another noise; `audio` and `text`, the change with another sound or text
    under the same noise over that, or over one grey level where it is less; `sharpness` as the report's, in its own unit. Those of
    BY_CHUNK are the last chunk's less the first's: a student that feeds on itself fails there first."""
    frames = Frames(**{name: facts[name] for name in Frames.__dataclass_fields__})
    noise = float(facts["to_noise"].mean())
    found = {name: float(rate.mean()) for name, rate in failure_rates(frames).items() if name != "flash"}
    found |= {
        "clipped": float(facts["clipped"].mean()),
        "saturation": float(frames.saturation.mean()),
        "motion_energy": float(frames.change.mean()),
        "seam": seam_jump(frames, seams)[0] if seams else math.nan,
        "noise": noise,
        "sharpness": float(facts["sharpness"].mean()),
    }
    if seams:
        rows = {"saturation": frames.saturation[:, 1:], "motion_energy": frames.change, "sharpness": facts["sharpness"]}
        found |= {name: _last_less_first(rows[of], seams) for name, of in BY_CHUNK.items()}
    changes = {name: facts.get(f"to_{name}") for name in ("audio", "text")}
    found |= {name: float(change.mean()) / max(noise, 1.0) for name, change in changes.items() if change is not None}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _last_less_first(values: Tensor, seams: list[int]) -> float:
    """Of values [N, T - 1] of frames 1.., the mean in the last chunk less that in the first; `seams` as in `health_metrics`."""
    return float(values[:, seams[-1] - 1 :].mean() - values[:, : seams[0] - 1].mean())


def violations(own: Mapping[str, float], teacher: Mapping[str, float], limits: Limits) -> list[str]:
    """The limits that a student's metrics exceed, in words, worst kinds first. A metric that one of the two lacks, or that is next
    to 0 for the teacher, is skipped."""
    found = []

    def say(name: str, bound: str) -> None:
        found.append(f"{WORDS[name]} {own[name]:.3g} (the teacher's {teacher[name]:.3g}, {bound})")

    for name in ("black", "frozen", "clipped"):
        most = getattr(limits, name)
        if own[name] > teacher[name] + most:
            say(name, f"at most {most:g} more")
    bounds = {name: getattr(limits, name) for name in ("motion_energy", "saturation", "sharpness")}
    bounds |= {name: (getattr(limits, name), math.inf) for name in ("audio", "text", "noise")}
    bounds["seam"] = (0.0, limits.seam)
    for name, (least, most) in bounds.items():
        if name in own and teacher.get(name, 0.0) > STILL:
            over = own[name] / teacher[name]
            if over < least or over > most:
                say(name, f"at least {least:g} of it" if over < least else f"at most {most:g} times")
    for name, of in BY_CHUNK.items():
        most = limits.motion_change if of == "motion_energy" else limits.change
        if name in own and name in teacher and teacher.get(of, 0.0) > STILL:
            low, high = (side(0.0, teacher[name]) for side in (min, max))  # to change less than the teacher is no fault
            low, high = low - most * teacher[of], high + most * teacher[of]
            if not low <= own[name] <= high:
                say(name, f"healthy from {low:.3g} to {high:.3g}")
    return found


def readiness(own: Mapping[str, float], teacher: Mapping[str, float], limits: Limits) -> str:
    """The quality gate after `init`, in words."""
    found = violations(own, teacher, limits)
    return f"not ready for distillation: {'; '.join(found)}" if found else "ready for distillation"


def logged(values: Mapping[str, float]) -> dict[str, float]:
    """The health metrics among the numbers of a validation, where they are `health/...`."""
    return {name.removeprefix("health/"): x for name, x in values.items() if name.startswith("health/")}


def outcome(own: Mapping[str, float], teacher: Mapping[str, float], limits: Limits, others: Sequence[str] = ()) -> str:
    """The alarms of a distilled student, in words, `others` first."""
    found = [*others, *violations(own, teacher, limits)]
    return f"alarms, see docs/troubleshooting.md, symptoms: {'; '.join(found)}" if found else "no alarm"


def seam_frames(spec: Spec) -> list[int]:
    """The pixel frames of a training clip that begin a chunk, without frame 0; none where every frame does, as then no change
    lies elsewhere."""
    first = [spec.pixel_frames(chunk)[0] for chunk in range(1, spec.num_chunks)]
    return first if len(first) < spec.pixel_frames(spec.num_chunks - 1)[1] - 1 else []


class HealthCheck:
    """The health metrics of a run's networks, all on the same conditions and noises; the teacher's are the reference. Each rank
    does its share of the clips."""

    def __init__(self, artifacts: Artifacts):
        self.artifacts, self.batch = artifacts, generated_at_once(artifacts.recipe, artifacts.spec)
        clips = artifacts.source.draw(
            artifacts.recipe.eval.condition_seed, "health", artifacts.recipe.health.num_conditions
        )
        self.num = len(clips.text)
        self.conditions = artifacts.encoders.of_clips(clips)[1].to(artifacts.engine.device)
        self.seams = seam_frames(artifacts.spec)

    def student(self, net: Student) -> dict[str, float]:
        """A student's metrics by its own rollouts; every rank calls it."""
        artifacts, num, engine = self.artifacts, self.num, self.artifacts.engine

        def make(given: Conditions, rows: Tensor, seed: int) -> Tensor:
            noise = stream_noise(artifacts.spec, artifacts.recipe.eval.condition_seed, "health", seed)
            with engine.autocast():
                return student_clips(net, given, lambda part: noise(rows[part]), self.batch)

        own = observe(make, self.conditions, engine.share(num), artifacts.encoders.decode)
        return health_metrics({name: engine.all_rows(values, num) for name, values in own.items()}, self.seams)

    def teacher(self, folder: Path) -> dict[str, float]:
        """The teacher's metrics: those of the stage init where they are stored, else from its guided solutions, shared out over the
        ranks clip by clip and kept in `folder`, so that a killed stage goes on. Every rank calls it."""
        artifacts, num, engine = self.artifacts, self.num, self.artifacts.engine
        done = ((artifacts.folder.finished("init") or {}).get("metrics") or {}).get("health") or {}
        if done.get("num_conditions") == num:
            return done["teacher"]
        settings = artifacts.recipe.trajectories
        grid = flow.sigma_grid(settings.num_steps, settings.shift)

        def make(given: Conditions, rows: Tensor, seed: int, guidance: AnyGuidance) -> Tensor:
            noise = clip_noise(artifacts.spec, artifacts.recipe.eval.condition_seed, "health", seed)
            return teacher_clips(artifacts.teacher, given, lambda part: noise(rows[part]), grid, guidance, self.batch)

        parts = torch.arange(num).split(self.batch)
        units = [(name, rows, folder / f"teacher-health-{name}-{int(rows[0])}-{len(rows)}.safetensors")
                 for name in variants(self.conditions) for rows in parts]  # fmt: skip
        with engine.sharing_branches(settings.guidance) as guidance:
            for name, rows, file in (units[i] for i in engine.missing([file for _, _, file in units])):
                given, seed = variants(self.conditions)[name]
                x0 = make(given.index(rows), rows, seed, guidance)
                if engine.is_group_main:
                    save_tensors(file, {"video": scored(artifacts.encoders.decode(x0, given.index(rows).lead))})
        engine.barrier()
        videos = {
            name: torch.cat([load_tensors(file)["video"] for other, _, file in units if other == name])
            for name in variants(self.conditions)
        }
        return health_metrics(compared(videos), self.seams)
