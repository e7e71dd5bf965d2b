"""What the report draws: the systems, and the gap between a student and its teacher on one noise; the score of a validation."""

import json
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from distill.pipeline.evaluation import systems
from distill.pipeline.evaluation.validation import score_of, score_without_each, worse_than_start
from distill.recipe import TrajectoriesConfig
from distill.training.lifecycle.selection import LEFT
from eval.cards import load_card
from eval.metric import Score
from teachers.conditions import Conditions
from teachers.guidance import Guidance
from tests.support.tiny import Ranks, make_spec, rng


def some_artifacts() -> Any:
    settings = TrajectoriesConfig(num_pairs=1, num_steps=4, shift=3.0, guidance=Guidance(), batch_size=2)
    recipe = SimpleNamespace(
        trajectories=settings,
        has_custom_network=False,
        zero_shot_stage="init",
    )
    return SimpleNamespace(
        recipe=recipe, spec=make_spec(), teacher="teacher", student=lambda _: "student", engine=Ranks()
    )


def test_the_teacher_for_the_gap_starts_from_the_students_noise(monkeypatch):
    """Each chunk's first noise is the teacher's there; its own clips start from another."""
    artifacts, seen = some_artifacts(), {}
    spec = artifacts.spec
    monkeypatch.setattr(
        systems, "teacher_clips", lambda _, __, noise, *___: seen.setdefault("teacher", []).append(noise)
    )
    monkeypatch.setattr(
        systems, "student_clips", lambda _, __, noise, *___: seen.setdefault("student", []).append(noise)
    )
    conditions = Conditions(text=torch.zeros(3, 1, 1), audio=torch.zeros(3, spec.horizon_frames, 1, 1))
    found = systems.teacher_systems(artifacts, 2, artifacts.recipe.trajectories.guidance)
    found |= systems.student_systems(artifacts, {"student": artifacts.student("distill")}, 2)
    for name in (systems.SAME_NOISE, "teacher", "student"):
        found[name](conditions, None, 5, "test", 1)
    rows = torch.tensor([2, 0])
    same, own = (noise(rows) for noise in seen["teacher"])
    noise, n = seen["student"][0](rows), spec.chunk_frames
    assert same.shape == own.shape
    for chunk in range(spec.num_chunks):
        assert torch.equal(same[:, :, chunk * n : (chunk + 1) * n], noise(chunk, 0))
    assert not torch.equal(same, own)
    for drawn in seen["teacher"]:
        assert torch.equal(drawn(rows)[1:], drawn(torch.tensor([0]))), "whichever rows are drawn with it"
    assert torch.equal(noise(1, 1)[1:], seen["student"][0](torch.tensor([0]))(1, 1))
    assert not torch.equal(noise(1, 1), noise(1, 0))


def test_a_gap_is_a_score_that_needs_no_extractor(tmp_path):
    from eval.report.run_report import write_report

    value = {"mean": 0.4, "spread": 0.0, "error": 0.01, "seeds": [0.4]}
    report = {
        "systems": {"student": {"metrics": {"gap": value, "fid": value}, "cost": {}}},
        "columns": {name: column.plain() for name, column in load_card("embedded").columns.items()},
        "protocol": load_card("embedded").resolved("a", {"admitted": {"fid": False}}).plain(),
    }
    write_report(report, {}, {}, {}, tmp_path)
    student = json.loads((tmp_path / "report.json").read_text())["systems"]["student"]
    assert list(student["metrics"]) == ["gap"]
    assert list(student["not_admitted"]) == ["fid"]
    assert "another draw" in (tmp_path / "report.html").read_text()


def test_one_student_is_held_while_clips_are_generated():
    """Asking whether a name is a student's loads none; asking for another lets go of the one before."""
    loaded = []

    class Finished:
        recipe = SimpleNamespace(zero_shot_stage="base")

        def finished_student(self, stage: str) -> nn.Module:
            loaded.append(stage)
            return nn.Linear(1, 1)

    artifacts: Any = Finished()
    students = systems.LastStudent(artifacts)
    assert [name in students for name in ("student", "teacher")] == [True, False]
    assert not loaded
    first = weakref.ref(students["zero_shot"])
    assert students["zero_shot"] is first()
    assert students["student"] is not None
    assert first() is None
    assert loaded == ["base", "distill"]
    assert list(students) == ["zero_shot", "init", "student"]


def features(seed: int, num: int = 9) -> dict[str, list[dict[str, torch.Tensor]]]:
    """What the metrics of a validation keep of clips, at random."""
    names = {"fid": {"frames": (4, 5)}, "fvd": {"clip": (5,)}, "sync": {"mouth": (20, 2), "audio": (20, 2)}}
    names |= {"motion_energy": {"energy": ()}, "sharpness": {"energy": ()}}
    draws = rng(seed)
    return {
        key: [{name: torch.rand(shape, generator=draws).double() for name, shape in own.items()} for _ in range(num)]
        for key, own in names.items()
    }


def scores(system, ceiling, keep=range(9)) -> dict[str, Score]:
    """Of the clips `keep` of a system, beside 30 random real ones."""
    card, real, found = load_card("embedded"), features(3, 30), {}
    for key, rows in system.items():
        paired = key in ("motion_energy", "sharpness")
        others = [ceiling[key][i] for i in keep] if paired else real[key]
        found[key] = card.metrics[key].score([rows[i] for i in keep], others)[key]
    return found


def test_the_score_without_each_clip_is_that_of_the_other_clips():
    """Of two systems on nine clips: each part is measured again on the eight others, which the energies' ceiling is of too."""
    now, then, ceiling, everyone = features(1), features(2), features(4), list(range(9))
    left = score_without_each(scores(now, ceiling, everyone), scores(then, ceiling, everyone))
    for index in everyone:
        others = [i for i in everyone if i != index]
        ours, start = ({k: s.mean for k, s in scores(of, ceiling, others).items()} for of in (now, then))
        assert float(left[index]) == pytest.approx(score_of(ours, start), rel=1e-6)  # type: ignore[index]
    parts = {"fid": 3.0, "fvd": 8.0, "sync": 0.5, "motion_energy": 0.7, "sharpness": 1.2}
    assert score_of(parts, {"fid": 2.0, "fvd": 4.0, "sync": 0.9}) == pytest.approx(1.5 + 2 + 0.3 + 0.2 + 2 * 0.4)
    assert score_of({"fvd": 8.0, "sync": 0.95}, {"fvd": 4.0, "sync": 0.9}) == pytest.approx(2.0)
    assert score_without_each({"fid": Score(1.0, 0.1)}, {"fid": Score(1.0, left=[1.0])}) is None


def test_a_student_that_is_surely_worse_than_it_began_is_named():
    """Every frame's features moved away from the real ones; two draws of the same distribution differ within the error."""
    ceiling, start = features(4), scores(features(2), features(4))

    def alarms(system, kept=True) -> list[str]:
        now = scores(system, ceiling)
        values: dict[str, Any] = {"score": score_of(*({k: s.mean for k, s in of.items()} for of in (now, start)))}
        left = score_without_each(now, start)
        assert left is not None
        return worse_than_start(values | ({LEFT: left.tolist()} if kept else {}), start)

    def moved(by: float) -> dict[str, list[dict[str, torch.Tensor]]]:
        clips = features(2)
        return clips | {"fid": [{"frames": row["frames"] + by} for row in clips["fid"]]}

    assert alarms(moved(0.0)) == []
    (line,) = alarms(moved(1.0))
    assert line.startswith("score of the validation ")
    assert "(of the student before training 2." in line
    assert alarms(moved(1.0), kept=False) == [], "an error that is not known is not sure"
    assert alarms(features(5)) == []
    real = features(3)
    assert alarms(features(2) | {"fid": real["fid"], "fvd": real["fvd"]}) == [], "better"
