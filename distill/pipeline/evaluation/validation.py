"""The embedded extractors, and validation while training."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from distill.pipeline.artifacts import Artifacts
from distill.pipeline.evaluation import clip_sets
from distill.pipeline.evaluation.clip_sets import ClipSet
from distill.pipeline.evaluation.health import HealthCheck, logged, violations
from distill.pipeline.evaluation.reward_watch import hacked
from distill.pipeline.generate import stream_noise, student_clips
from distill.training.lifecycle.selection import LEFT
from eval.cards import load_card
from eval.embedded import admission, probe_training
from eval.embedded.evaluation import Evaluation
from eval.embedded.extractors import Probes
from eval.frechet import difference_with_error, jackknife_error
from eval.metric import Score
from students.student import Student
from teachers.flow import keyed_generator

SURE = 2.0  # paired standard errors
WORSE = "score of the validation"
"""What the alarm of a student that got worse begins with."""


def fit_probes(artifacts: Artifacts, folder: Path) -> dict:
    """The extractors stage: train the embedded probes on training clips, or take over those of `eval.probes`, and show that they
    rank known cases right. The clips are shared out over the ranks; rank 0 trains and measures, on its device."""
    config, engine = artifacts.recipe.eval, artifacts.engine
    if config.probes is None:
        _train_probes(artifacts, folder)
    elif engine.is_main:
        Probes.load(config.probes).save(folder)
    engine.barrier()
    test = clip_sets.draw(artifacts, folder, "admit", config.admit_clips)
    reference = clip_sets.draw(artifacts, folder, "reference", config.num_reference, encode=False)
    return engine.from_main(_admit(artifacts, Probes.load(folder), test, reference) if engine.is_main else None)


def _train_probes(artifacts: Artifacts, folder: Path) -> None:
    config, engine = artifacts.recipe.eval, artifacts.engine
    films = artifacts.source.num_films or artifacts.source.num_clips
    count = config.probe_clips if films is None else min(config.probe_clips, films)
    clips = clip_sets.draw(artifacts, folder, "probes", count, seed=config.probe_seed)
    if engine.is_main:
        rows = clip_sets.log_mel(artifacts, clips.clips)
        total = 3 * config.probe_steps
        with tqdm(total=total, desc="extractors", mininterval=1.0) as bar:

            def progress(step: int, loss: float) -> None:
                bar.n = step
                bar.set_postfix(loss=f"{loss:.3g}")
                bar.refresh()

            rng = keyed_generator(config.probe_seed, "fit")
            video, labels, decoded = clips.clips.video, clips.clips.labels, clips.decoded
            probes = probe_training.fit(video, labels, rows, config, rng, progress, decoded, engine.device)
            probes.save(folder)


def _admit(artifacts: Artifacts, probes: Probes, test: ClipSet, reference: ClipSet) -> dict:
    config = artifacts.recipe.eval
    probes, real = probes.to(artifacts.engine.device), clip_sets.as_metrics_take(artifacts, test.clips)
    evaluation = Evaluation(load_card(config.protocol), probes, real, test.decoded, reference.clips.video)
    result = admission.admit(evaluation, keyed_generator(config.probe_seed, "admit"))
    checks = probes.check(test.decoded, test.clips.labels, clip_sets.log_mel(artifacts, test.clips))
    return {"sha256": probes.sha256, "checks": checks, **result}


def score_of(now: Mapping[str, Any], then: Mapping[str, Any]) -> Any:
    """The score of `Validation` from its parts, numbers or tensors of one shape."""
    total = sum(now[name] / then[name] for name in ("fid", "fvd") if name in now)
    total += sum(abs(now[name] - 1) for name in ("motion_energy", "sharpness") if name in now)
    if "sync" in now:
        lost = then["sync"] - now["sync"]
        total += lost + abs(lost)  # 2 max(0, lost)
    return total


def score_without_each(now: Mapping[str, Score], then: Mapping[str, Score]) -> Tensor | None:
    """`score_of` without each clip [N]; None where a metric does not say what it is without each."""
    parts = [name for name in clip_sets.VALIDATED if name in now]
    if any(of[name].left is None for name in parts for of in (now, then)):
        return None
    ours, start = ({name: torch.tensor(of[name].left, dtype=torch.float64) for name in parts} for of in (now, then))
    return score_of(ours, start)


def worse_than_start(values: Mapping[str, Any], start: Mapping[str, Score]) -> list[str]:
    """The alarm for the kept validation of a stage that is surely worse, by SURE paired errors, than the student that the stage
    began with; [] where it is not, and where errors are not known."""
    left, began = score_without_each(start, start), {name: score.mean for name, score in start.items()}
    if left is None or LEFT not in values:
        return []
    before = score_of(began, began)
    ours = torch.tensor(values[LEFT], dtype=torch.float64)
    lost, error = difference_with_error((values["score"], ours), (before, left))
    if lost <= SURE * error:
        return []
    return [f"{WORSE} {values['score']:.3g} (of the student before training {before:.3g}, lower is better)"]


class Validation:
    """Scores of a student on validation conditions, relative to what it was when training began; lower is better.

    score = fid/fid_0 + fvd/fvd_0 + |energy - 1| + |sharpness - 1| + 2 max(0, sync_0 - sync): overshoot is a fault like
    stillness. What the card lacks, or the clips cannot have (sync without labels of the mouth), is left out. The conditions are not
    those of the report. `left` is the score without each clip, for the paired error of the difference of two validations. The
    health metrics come with them as `health/...`.
    """

    def __init__(self, artifacts: Artifacts, student: Student, folder: Path):
        self.artifacts, self.student, config = artifacts, student, artifacts.recipe.eval
        self.test = clip_sets.draw(artifacts, folder, "validate", 2 * config.num_conditions)
        other = clip_sets.draw(artifacts, folder, "validate reference", config.num_reference, encode=False)
        self.evaluation: Evaluation | None = None  # rank 0 alone scores
        if artifacts.engine.is_main:
            real = clip_sets.as_metrics_take(artifacts, self.test.clips)
            card = load_card(config.protocol)
            self.evaluation = Evaluation(card, artifacts.probes, real, self.test.decoded, other.clips.video)
        self.check = HealthCheck(artifacts)
        with artifacts.codec_alone():
            self.start = self.measure()
            self.teacher = self.check.teacher(folder)

    def measure(self) -> dict[str, Score]:
        """Every rank generates its share of the clips."""
        artifacts, engine, num = self.artifacts, self.artifacts.engine, len(self.test)
        noise = stream_noise(artifacts.spec, artifacts.recipe.eval.condition_seed, "validate")
        batch, rows = clip_sets.generated_at_once(artifacts.recipe, artifacts.spec), engine.share(num)
        with engine.autocast():
            x0 = student_clips(self.student, self.test.conditions, noise, batch, rows)
        lead = self.test.conditions.index(rows).lead
        video = engine.all_rows(clip_sets.scored(artifacts.encoders.decode(x0, lead)), num)
        wanted = (*clip_sets.VALIDATED, "motion")
        scores = None if self.evaluation is None else self.evaluation.scores(video[None], only=wanted)
        found: dict[str, list[Score]] = engine.from_main(scores)
        return {name: found[name][0] for name in wanted if name in found}

    def __call__(self) -> dict[str, Any]:
        now, health = self.measure(), self.check.student(self.student)
        values = {name: score.mean for name, score in now.items()}
        total = score_of(values, {name: score.mean for name, score in self.start.items()})
        values["score"] = total
        if (left := score_without_each(now, self.start)) is not None:
            values |= {"score_error": jackknife_error(left), LEFT: left.tolist()}
        found = {**values, **{f"health/{name}": value for name, value in health.items()}}
        for line in self.hacked(found):
            tqdm.write(f"distill: {line}", file=sys.stderr)
        return found

    def hacked(self, values: Mapping[str, float]) -> list[str]:
        """The rewards of the method that a student of these numbers has hacked (`reward_watch.hacked`); on rank 0, which logs."""
        recipe, log = self.artifacts.recipe, self.artifacts.log
        rewards = getattr(recipe.distill.method, "rewards", None)
        if not rewards or not self.artifacts.engine.is_main:
            return []
        wrong = violations(logged(values), self.teacher, recipe.health.healthy)
        start = {name: score.mean for name, score in self.start.items()}
        return hacked(rewards, log.rows("distill"), start, values, wrong)

    def alarms(self, values: Mapping[str, Any]) -> list[str]:
        """What is wrong with the kept validation beside its health."""
        return self.hacked(values) + worse_than_start(values, self.start)

    def collapse(self, values: Mapping[str, float]) -> str | None:
        """Why the student of these numbers has collapsed, or None; also None where the recipe goes on with `health.stop=false`."""
        config = self.artifacts.recipe.health
        return "; ".join(violations(logged(values), self.teacher, config.collapse)) or None if config.stop else None
