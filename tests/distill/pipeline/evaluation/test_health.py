"""Health metrics: each moves the right way on a planted collapse; the quality gate, the stop and going on."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from distill.compose import RECIPES
from distill.health import HealthConfig
from distill.pipeline.evaluation import health, validation
from distill.pipeline.evaluation.evaluate import health_of, read_curves
from distill.pipeline.evaluation.health import HealthCheck, health_metrics, logged, outcome, readiness, violations
from distill.pipeline.stages import Pipeline
from distill.pipeline.train_stages import check_health
from distill.recipe import load_recipe
from distill.training import checkpoint
from distill.training.engines.engine import Engine
from distill.training.lifecycle.selection import LEFT
from distill.training.loop import train
from distill.training.metrics_log import MetricsLog
from distill.training.trainer import Trainer
from eval.cards import load_card
from eval.metrics.quality import measure
from eval.metrics.seam import seam_jump
from eval.report.run_report import write_report
from teachers.errors import UserError
from teachers.files import load_tensors
from tests.distill.training.test_loop import Regression, batches_of, config, nets
from tests.eval.report.test_report import Page, small_report
from tests.support.tiny import SIDE, Ranks, make_spec, rng, some_conditions

NUM, FRAMES, SIZE, SEAMS = 6, 15, 4 * SIDE, [3, 7, 11]
LIMITS = HealthConfig()
ASKED = some_conditions(NUM)


def healthy(asked, rows, seed):
    """Three waves, one a colour: the sound moves the first, the text the second, the noise the third."""
    t, y, x = torch.arange(FRAMES).view(-1, 1, 1), torch.arange(SIZE).view(-1, 1), torch.arange(SIZE)

    def phase(values):
        return 6 * values.view(-1, 1, 1, 1)

    noise = torch.stack([torch.randn(1, generator=rng(seed, int(row))) for row in rows])
    sound, text = asked.audio.flatten(1).std(1), asked.text.flatten(1).std(1)
    red = torch.sin(0.5 * x + 0.6 * t + 10 * phase(sound))
    green = torch.sin(0.5 * y + 0.5 * t + 10 * phase(text))
    blue = torch.sin(0.3 * x + 0.4 * t + phase(noise))
    return 128 + 60 * torch.stack(torch.broadcast_tensors(red, green, blue), dim=1)


def changed(function):
    return lambda asked, rows, seed: function(healthy(asked, rows, seed))


def stepped(video):
    """Every chunk of another brightness."""
    chunk = torch.bucketize(torch.arange(FRAMES), torch.tensor(SEAMS), right=True)
    return video + (80 * (chunk % 2 - 0.5)).view(-1, 1, 1)


def at_the_end(function):
    """The fault in the last chunk alone."""
    start = SEAMS[-1]
    return changed(lambda x: torch.cat([x[:, :, :start], function(x[:, :, start:])], dim=2))


GRID = 1.5 * (-1) ** (torch.arange(SIZE).view(-1, 1) + torch.arange(SIZE))
PLANTED = {  # what is wrong -> the system, and the numbers that have to say so
    "black": (changed(lambda x: 0.05 * x), {"black"}),
    "frozen": (changed(lambda x: x[:, :, :1].expand_as(x)), {"frozen", "motion_energy"}),
    "burnt": (changed(lambda x: 128 + 20 * (x - 128)), {"clipped"}),
    "grey": (changed(lambda x: x.mean(1, keepdim=True).expand_as(x)), {"saturation"}),
    "slow": (changed(lambda x: x[:, :, :1] + 0.1 * (x - x[:, :, :1])), {"motion_energy"}),
    "storm": (changed(lambda x: x + 150 * torch.randn(x.shape, generator=rng(0))), {"motion_energy"}),
    "stepped": (changed(stepped), {"seam"}),
    "deaf": (lambda asked, rows, seed: healthy(asked.drop("audio"), rows, seed), {"audio"}),
    "blind": (lambda asked, rows, seed: healthy(asked.drop("text"), rows, seed), {"text"}),
    "one draw": (lambda asked, rows, seed: healthy(asked, rows, 0), {"noise"}),
    "flat": (changed(lambda x: x.mean((-2, -1), keepdim=True).expand_as(x)), {"sharpness"}),
    "grid": (changed(lambda x: x + 20 * GRID), {"sharpness"}),
    "grey at the end": (at_the_end(lambda x: x.mean(1, keepdim=True).expand_as(x)), {"saturation_change"}),
    "still at the end": (at_the_end(lambda x: x[:, :, :1].expand_as(x)), {"motion_change"}),
    "grid at the end": (at_the_end(lambda x: x + GRID), {"sharpness_change"}),
}


def panel_of(make, asked=ASKED):
    facts = health.observe(make, asked, torch.arange(NUM), lambda x, lead: x.round().clamp(0, 255).byte())
    return health_metrics(facts, SEAMS)


def named(found):
    return {name for name, words in health.WORDS.items() if any(reason.startswith(f"{words} ") for reason in found)}


def test_a_student_that_changes_less_from_chunk_to_chunk_than_its_teacher_is_healthy():
    own = {"black": 0.0, "frozen": 0.0, "clipped": 0.0, "motion_energy": 5.0}
    limits = HealthConfig().healthy
    for ours, theirs, alarmed in (
        (0.0, -3.2, False),
        (-3.2, 0.0, True),
        (0.0, 3.2, False),
        (2.2, -3.2, True),
        (-5.5, -3.2, True),
    ):
        found = violations(own | {"motion_change": ours}, own | {"motion_change": theirs}, limits)
        assert bool(found) == alarmed, (ours, theirs, found)


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_collapse_is_named(fault):
    make, numbers = PLANTED[fault]
    teacher, own = panel_of(healthy), panel_of(make)
    assert named(violations(own, teacher, LIMITS.ready)) >= numbers
    if fault in ("deaf", "blind", "slow", "one draw", "still at the end", "grid at the end"):
        assert named(violations(own, teacher, LIMITS.ready)) == numbers
    assert readiness(own, teacher, LIMITS.ready).startswith("not ready for distillation: ")
    if fault in ("black", "frozen", "burnt", "slow", "deaf", "one draw"):
        assert numbers & named(violations(own, teacher, LIMITS.collapse))


def test_a_student_like_its_teacher_is_healthy():
    teacher = panel_of(healthy)
    own = panel_of(lambda asked, rows, seed: 0.9 * healthy(asked, rows, seed + 5))
    assert set(teacher) == set(health.WORDS)
    assert all(teacher[name] > 0.1 for name in ("audio", "text"))
    assert violations(own, teacher, LIMITS.collapse) == []
    assert readiness(own, teacher, LIMITS.ready) == "ready for distillation"
    assert outcome(panel_of(changed(lambda x: 0.96 * x)), teacher, LIMITS.healthy) == "no alarm"
    assert outcome(own, teacher, LIMITS.healthy).startswith("alarms, see docs/troubleshooting.md, symptoms: sharpness ")
    same = panel_of(PLANTED["one draw"][0])
    assert same["audio"] == pytest.approx(teacher["audio"] * teacher["noise"]), (
        "over one grey level, where noise does nothing"
    )


def test_the_numbers_are_what_they_say():
    """Two clips by hand: one black, one that alternates by 10 grey levels and jumps by 30 at the seams."""
    video = torch.zeros(2, 3, FRAMES, 8, 8)
    steps = torch.tensor([30.0 if t in SEAMS else 10.0 for t in range(FRAMES)])
    video[1] = (100 + torch.cumsum(steps * (-1) ** torch.arange(FRAMES), 0)).view(1, -1, 1, 1)
    video[1, :, :, 0, 0] = 255

    def make(asked, rows, seed):
        louder = (asked.audio.flatten(1)[:, 0] != ASKED.audio.flatten(1)[rows, 0]).view(-1, 1, 1, 1, 1)
        return video + 4 * seed + 2 * louder

    found = health_metrics(health.observe(make, ASKED, torch.arange(2), lambda x, lead: x.clamp(0, 255).byte()), SEAMS)
    assert found["black"] == 0.5
    assert found["frozen"] == 0.5
    assert found["clipped"] == pytest.approx((1 + 1 / 64) / 2)
    assert found["seam"] == pytest.approx(3.0)
    assert found["motion_energy"] == pytest.approx((3 * 30 + 11 * 10) / 14 * 63 / 64 / 2)
    assert found["noise"] == pytest.approx(4 * (1 + 63 / 64) / 2)
    assert found["audio"] == pytest.approx(0.5)
    assert found["text"] == 0


def test_a_metric_that_one_of_the_two_lacks_is_skipped():
    mute = replace(ASKED, audio=ASKED.audio[..., :0])
    asleep = {**panel_of(healthy), "audio": 0.0, "motion_energy": 0.0}
    assert "audio" not in panel_of(
        lambda asked, rows, seed: healthy(replace(asked, audio=ASKED.audio[rows]), rows, seed), mute
    )
    assert violations({**asleep, "audio": 5.0, "motion_energy": 9.0}, asleep, LIMITS.collapse) == []
    with pytest.raises(UserError, match=r"health.num_conditions is too small: got 1"):
        HealthConfig(num_conditions=1)


SMALL = (
    *(
        "preset=smoke",
        "threads=1",
        "seed=3",
        "data.world.shard_clips=16",
        "data.text_steps=2",
    ),
    *("teacher.train.num_steps=2", "init.train.num_steps=2", "trajectories.num_pairs=4", "trajectories.batch_size=4"),
    *(
        "eval.num_conditions=4",
        "eval.num_reference=4",
        "eval.probe_steps=2",
        "eval.admit_clips=4",
        "health.num_conditions=4",
    ),
    *(
        "distill.train.num_steps=4",
        "distill.train.checkpoint_every=1",
        "distill.train.validate_every=1",
        "distill.train.ema_decay=0.0",
    ),
    *("init.train.batch_size=4", "distill.train.batch_size=4"),
)


def pipeline(folder, *overrides: str) -> Pipeline:
    recipe = load_recipe(RECIPES / "scratch_avatar.yaml", (*SMALL, f"run_dir={folder}", *overrides))
    return Pipeline(recipe, Engine(recipe.engine, recipe.threads))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run up to init."""
    run = pipeline(tmp_path_factory.mktemp("health") / "run")
    for name in list(run.stages)[: list(run.stages).index("distill")]:
        run.stage(name)
    return run


def test_init_ends_with_health_metrics_and_a_quality_gate(ran, capsys):
    found = ran.stage("init")["health"]
    assert set(found["init"]) <= set(health.WORDS)
    assert {"black", "frozen", "motion_energy", "audio", "text"} <= set(found["init"]) & set(found["teacher"])
    assert found["readiness"] == readiness(found["init"], found["teacher"], ran.artifacts.recipe.health.ready)
    rows = [row for row in ran.artifacts.log.rows("init") if "health/black" in row]
    assert [row["step"] for row in rows] == [2]
    again = check_health(ran.artifacts, "init", ran.artifacts.folder.stage_dir("init"))
    assert again == found
    assert len(ran.artifacts.log.rows("init")) == len(set(map(str, ran.artifacts.log.rows("init")))), (
        "a resumed init logs its metrics once"
    )
    assert f"distill: init: {found['readiness']}\n" in capsys.readouterr().err


def test_teachers_clips_are_shared_and_kept(ran, tmp_path, monkeypatch):
    """Two ranks make halves of what one makes; what is there is not made again."""
    monkeypatch.setattr(ran.artifacts.folder, "finished", lambda name: None)
    check = HealthCheck(ran.artifacts)
    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
    whole = check.teacher(tmp_path / "whole")
    looked: dict[str, list[int]] = {}
    monkeypatch.setattr(ran.artifacts, "engine", Ranks(rank=1, world_size=2, looked=looked))
    with pytest.raises(UserError, match=r"no tensor file: .*teacher-health-own-0"):
        check.teacher(tmp_path / "halves")
    monkeypatch.setattr(ran.artifacts, "engine", Ranks(rank=0, world_size=2, looked=looked))
    halves = check.teacher(tmp_path / "halves")
    assert halves == pytest.approx(whole, abs=0.02)
    looked.clear()
    monkeypatch.setattr(ran.artifacts, "teacher", None)
    assert check.teacher(tmp_path / "halves") == halves


COLLAPSE = (  # a rate that grows by 0.01 a step
    "distill.train.optimizers.student.lr=0.3",
    "distill.train.optimizers.student.warmup=30",
)


def before_distill(ran, folder, *overrides: str) -> Pipeline:
    """A run up to distill that has everything before from `ran`."""
    run = pipeline(folder, f"reuse={ran.artifacts.folder.path}", *COLLAPSE, *overrides)
    for name in list(run.stages)[: list(run.stages).index("distill")]:
        run.stage(name)
    return run


@pytest.mark.slow
def test_a_collapse_stops_distill_keeps_the_best_and_can_go_on(ran, tmp_path):
    """A rate that is far too high blows up a student; with health.stop=false the run goes on to its end."""
    run, stage = before_distill(ran, tmp_path / "run", "health.stop=true"), tmp_path / "run/stages/distill"
    with pytest.raises(UserError) as caught:
        run.stage("distill")
    reason, kept, way = str(caught.value).rsplit("; ", 2)
    assert reason.startswith("distill collapsed at step 3: motion energy ")
    assert (kept, way) == (
        f"the best weights, of step 1, are in {stage / 'best-00000001'}",
        "health.stop=false goes on",
    )
    rows = [row for row in run.artifacts.log.rows("distill") if "validate/score" in row]
    assert [row["step"] for row in rows] == [1, 2, 3], "the numbers that stopped it are logged"
    assert {"health/black", "health/motion_energy", "health/audio"} <= set(rows[-1])
    best = checkpoint.Reader(stage / "best-00000001").tensors("ema/")
    assert not (stage / "fingerprint.json").exists()
    assert checkpoint.saved(stage)[-1].name == "checkpoint-00000002", "the same command stops again"
    found = before_distill(ran, tmp_path / "run", "health.stop=false").stage("distill")
    never = before_distill(ran, tmp_path / "never", "health.stop=false").stage("distill")
    assert found == never
    assert found["best"]["step"] == 1
    teacher = ran.stage("init")["health"]["teacher"]
    assert found["outcome"] == outcome(logged(found["best"]), teacher, LIMITS.healthy)
    ours, theirs = (load_tensors(tmp_path / name / "stages/distill/model.safetensors") for name in ("run", "never"))
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())
    assert all(torch.equal(ours[name.removeprefix("net.")], x) for name, x in best.items())


@pytest.mark.slow
def test_a_collapse_ends_a_stage_that_has_a_rule_with_what_is_kept(ran, tmp_path, monkeypatch):
    """The stage is finished, on the weights before; its limits are among the fields that it depends on."""
    monkeypatch.setattr(validation, "SURE", -1e9)  # whatever is kept is worse than the start
    words = ("health.stop=true", "distill.train.stop={growth: 1}")
    run = before_distill(ran, tmp_path / "run", *words)
    found = run.stage("distill")
    assert (found["steps"], found["best"]["step"]) == (3, 1)
    assert found["ended"].startswith("the student has collapsed: motion energy ")
    assert LEFT not in found["best"]
    assert f"symptoms: {validation.WORSE} " in found["outcome"]
    assert "health" in run.stages["distill"].fields
    assert "health" not in ran.stages["distill"].fields
    rows = [row for row in run.artifacts.log.rows("distill") if "validate/gain" in row]
    assert all(row["validate/gain_error"] > 0 for row in rows)
    with pytest.raises(UserError, match=r"init\.train\.stop: only distill is validated while it trains"):
        pipeline(tmp_path / "init", "init.train.validate_every=1", "init.train.stop={}")


class SecondRank(Ranks):
    """One of two ranks, of which the first has measured another score."""

    def from_main(self, value):
        if isinstance(value, list):  # of checkpoints
            return value
        return value | {"score": 9.0}


@pytest.mark.parametrize(("at", "kept"), [(2, "this was the first validation"), (4, "of step 2,")])
def test_a_collapse_with_the_best_score_is_not_the_best(tmp_path, at, kept):
    scores, roles = iter([3.0, 2.0, 1.0]), nets()
    engine: Any = Ranks()
    trainer = Trainer(engine, config(validate_every=2, checkpoint_every=1), roles, "a", tmp_path)

    def alarm(values):
        return "black frames 1" if trainer.step == at else None

    def go():
        log = MetricsLog(tmp_path / "metrics.jsonl")
        validate = lambda: {"score": next(scores), "health/black": 1.0}  # noqa: E731
        train(trainer, Regression(roles), batches_of(4), stage="s", seed=0, log=log, validate=validate, alarm=alarm)

    with pytest.raises(
        UserError, match=rf"^s collapsed at step {at}: black frames 1; .*{kept}.*; health.stop=false goes on$"
    ):
        go()
    assert trainer.best == (None if at == 2 else {"score": 3.0, "health/black": 1.0, "step": 2})
    assert (tmp_path / "best-00000002" / checkpoint.MANIFEST).exists() == (at == 4)
    assert "health/black" in MetricsLog(tmp_path / "metrics.jsonl").rows("s")[-1]
    second: Any = SecondRank()
    trainer.engine, before, at = second, trainer.best, 99
    scores = iter([0.0, 0.0, 0.0])
    go()
    assert trainer.best == (before or {"score": 9.0, "health/black": 1.0, "step": trainer.best["step"]})


def test_presets_that_learn_nothing_never_stop():
    for recipe, words, stops in (
        ("scratch_avatar", (), True),
        ("livetalk", ("teacher.path=x",), True),
        ("scratch_avatar", ("preset=smoke",), False),
        ("livetalk", ("size=tiny",), False),
    ):
        assert load_recipe(RECIPES / f"{recipe}.yaml", words).health.stop is stops


def test_the_report_shows_teacher_init_and_student(tmp_path):
    teacher, own = panel_of(healthy), panel_of(PLANTED["deaf"][0])
    stages = {
        "init": {
            "metrics": {"health": {"init": own, "teacher": teacher, "readiness": "not ready for distillation: deaf"}}
        },
        "distill": {"metrics": {"best": {"score": 1.0, **{f"health/{name}": value for name, value in own.items()}}}},
    }
    stages["distill"]["metrics"]["outcome"] = outcome(own, teacher, LIMITS.healthy)
    panels = health_of(stages)
    assert (panels["student"], panels["teacher"]) == (own, teacher)
    assert health_of({"init": {"metrics": {}}, "distill": {"metrics": {}}}) == {}, "a run from before"
    page = Page()
    write_report({**small_report(), "health": panels}, {}, {}, {}, tmp_path)
    text = (tmp_path / "report.html").read_text()
    page.feed(text)
    assert "not ready for distillation: deaf" in text
    assert "Student: alarms, see docs/troubleshooting.md, symptoms: sensitivity to audio 0 (the teacher" in text
    assert json.loads((tmp_path / "report.json").read_text())["health"]["teacher"]["seam"] == teacher["seam"]
    heads = [row for row in page.rows if "audioover noise" in row]
    assert len(heads) == 1
    rows = {row[0]: row for row in page.rows[page.rows.index(heads[0]) + 1 :][:3]}
    assert list(rows) == ["teacher", "init", "student"]
    assert rows["student"][heads[0].index("audioover noise")] == "0"
    assert float(rows["teacher"][heads[0].index("motion energygrey levels")]) == pytest.approx(
        teacher["motion_energy"], rel=0.01
    )


def test_health_metrics_have_a_table_and_no_curves():
    assert read_curves([{"stage": "distill", "step": 1, "health/seam": 1.0, "student/loss": 2.0}]) == {
        "distill: loss": {"student": [(1, 2.0)]}
    }


def test_every_system_has_a_seam_jump_and_a_still_one_none():
    video = health.observe(healthy, ASKED, torch.arange(NUM), lambda x, lead: x.byte())
    frames = measure(healthy(ASKED, torch.arange(NUM), 0).byte())
    assert seam_jump(frames, SEAMS)[0] == pytest.approx(health_metrics(video, SEAMS)["seam"])
    assert math.isnan(seam_jump(measure(torch.zeros(2, 3, FRAMES, 8, 8, dtype=torch.uint8)), SEAMS)[0])
    assert load_card("embedded").columns["seam"].admitted({"fid": False})
    assert health.seam_frames(make_spec()) == [3, 7, 11]


@pytest.mark.slow
def test_a_stage_may_have_a_seed_of_its_own(ran, tmp_path):
    """The recipe's changes nothing, another one other weights on the same clips and trajectories."""
    own = load_tensors(ran.artifacts.folder.stage_dir("init") / "model.safetensors")
    same = {}
    for seed in (ran.artifacts.recipe.seed, 7):
        run = pipeline(tmp_path / str(seed), f"reuse={ran.artifacts.folder.path}", f"init.train.seed={seed}")
        for name in list(run.stages)[: list(run.stages).index("distill")]:
            run.stage(name)
        trajectories = [r.artifacts.folder.finished("trajectories") or {} for r in (ran, run)]
        assert trajectories[0]["fingerprint"] == trajectories[1]["fingerprint"]
        weights = load_tensors(run.artifacts.folder.stage_dir("init") / "model.safetensors")
        same[seed] = all(torch.equal(own[name], x) for name, x in weights.items())
        run.close()
    assert same == {ran.artifacts.recipe.seed: True, 7: False}
