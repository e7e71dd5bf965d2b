"""Held-out conditions with their ceilings, the embedded extractors, and validation while training."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from distill.data.source import Clips
from distill.pipeline.artifacts import Artifacts
from distill.pipeline.generate import stream_noise, student_clips
from distill.pipeline.health import HealthCheck, violations
from eval.cards import load_card
from eval.embedded import admission, probe_training
from eval.embedded.evaluation import Evaluation, clips_of
from eval.embedded.extractors import Probes
from eval.metric import Clip
from students.student import Student
from teachers.conditions import Conditions
from teachers.encoders.small import AudioConfig, LogMel
from teachers.flow import keyed_generator


@dataclass(frozen=True)
class HeldOut:
    """Held-out clips, the same through the codec (the ceiling), their conditions, and the clips as metrics take them."""

    clips: Clips
    decoded: Tensor
    conditions: Conditions
    real: list[Clip]

    @classmethod
    def draw(cls, artifacts: Artifacts, name: str, num: int) -> "HeldOut":
        """`num` clips (or as many as there are), the same for every training seed: `eval.condition_seed` and `name` decide."""
        clips = artifacts.source.draw(artifacts.recipe.eval.condition_seed, name, num)
        x0, conditions = artifacts.encoders.of_clips(clips)
        real = clips_of(
            clips.video,
            artifacts.spec.fps,
            load_card(artifacts.recipe.eval.protocol),
            labels={name: values for name, values in clips.labels.items() if values.ndim == 1},
            audio_features=log_mel(artifacts, clips),
        )
        return cls(clips, artifacts.encoders.decode(x0), conditions.to(artifacts.engine.device), real)


def log_mel(artifacts: Artifacts, clips: Clips) -> Tensor:
    """Log-mel features for the sync metric: rows [N, T, A], whatever the student's audio encoder is."""
    samples = artifacts.spec.samples_per_frame
    return LogMel(AudioConfig(hop=samples // 4), samples)(clips.voice, 0, clips.video.shape[2])


def fit_probes(artifacts: Artifacts, folder: Path) -> dict:
    """The extractors stage: train the embedded probes on the training clips and show that they rank known cases right."""
    config, source, engine = artifacts.recipe.eval, artifacts.source, artifacts.engine
    if engine.is_main:
        clips = source.draw(config.probe_seed, "probes", source.num_train)
        decoded, rows = artifacts.encoders.decode(artifacts.encoders.encode(clips.video)), log_mel(artifacts, clips)
        total = 3 * config.probe_steps
        with tqdm(total=total, desc="extractors", mininterval=1.0) as bar:

            def progress(step: int, loss: float) -> None:
                bar.n = step
                bar.set_postfix(loss=f"{loss:.3g}")
                bar.refresh()

            rng = keyed_generator(config.probe_seed, "fit")
            probe_training.fit(clips.video, clips.labels, rows, config, rng, progress, decoded).save(folder)
    engine.barrier()
    probes = Probes.load(folder)
    test = HeldOut.draw(artifacts, "admit", config.admit_clips)
    reference = source.draw(config.condition_seed, "reference", config.num_reference)
    rng = keyed_generator(config.probe_seed, "admit")
    evaluation = Evaluation(load_card(config.protocol), probes, test.real, test.decoded, reference.video)
    result = admission.admit(evaluation, rng)
    checks = probes.check(test.decoded, test.clips.labels, log_mel(artifacts, test.clips))
    return {"sha256": probes.sha256, "checks": checks, **result}


class Validation:
    """Scores of a student on validation conditions, relative to what it was when training began; lower is better.

    score = fid/fid_0 + fvd/fvd_0 + |energy - 1| + |sharpness - 1| + 2 max(0, sync_0 - sync): overshoot is a fault like
    stillness; without labels of the mouth there is no sync. The conditions are not those of the report. The health metrics come
    with them as `health/...`.
    """

    def __init__(self, artifacts: Artifacts, student: Student, folder: Path):
        self.artifacts, self.student = artifacts, student
        self.test = HeldOut.draw(artifacts, "validate", 2 * artifacts.recipe.eval.num_conditions)
        config = artifacts.recipe.eval
        real = artifacts.source.draw(config.condition_seed, "validate reference", config.num_reference)
        self.evaluation = Evaluation(
            load_card(config.protocol), artifacts.probes, self.test.real, self.test.decoded, real.video
        )
        self.start = self._measure()
        self.check = HealthCheck(artifacts)
        self.teacher = self.check.teacher(folder)

    def _measure(self) -> dict[str, float]:
        artifacts, num = self.artifacts, len(self.test.clips.text)
        noise = stream_noise(artifacts.spec, num, artifacts.recipe.eval.condition_seed, "validate")
        x0 = student_clips(self.student, self.test.conditions, noise, artifacts.recipe.eval.batch_size)
        video = artifacts.encoders.decode(x0)
        wanted = ("fid", "fvd", "sync", "motion", "motion_energy", "sharpness")
        scores = self.evaluation.score(video[None], only=wanted)
        return {name: scores[name]["mean"] for name in wanted if name in scores}

    def __call__(self) -> dict[str, float]:
        now, then = self._measure(), self.start
        lost = max(0.0, then["sync"] - now["sync"]) if "sync" in now else 0.0
        score = now["fid"] / then["fid"] + now["fvd"] / then["fvd"] + 2 * lost
        score += abs(now["motion_energy"] - 1) + abs(now["sharpness"] - 1)
        health = self.check.student(self.student)
        return {**now, "score": score, **{f"health/{name}": value for name, value in health.items()}}

    def collapse(self, values: Mapping[str, float]) -> str | None:
        """Why the student of these numbers has collapsed, or None; also None where the recipe goes on with `health.stop=false`."""
        config = self.artifacts.recipe.health
        own = {name.removeprefix("health/"): value for name, value in values.items() if name.startswith("health/")}
        return "; ".join(violations(own, self.teacher, config.collapse)) or None if config.stop else None
