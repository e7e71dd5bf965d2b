"""Trackers see every row of metrics.jsonl once, also over a kill and a resume; a missing one is refused before any work."""

import json
from pathlib import Path

import pytest
from accelerate.tracking import GeneralTracker
from torch import nn

from distill.cli import main
from distill.compose import RECIPES
from distill.methods import Loss
from distill.pipeline.run_folder import RunFolder
from distill.recipe import load_recipe
from distill.training import metrics_log
from distill.training.config import OptimizerConfig, TrainConfig
from distill.training.loop import train
from distill.training.metrics_log import MetricsLog
from distill.training.trainer import Trainer
from teachers.errors import UserError
from tests.support.tiny import Ranks


class Recorder(GeneralTracker):
    """accelerate's protocol over a list."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self, run_name: str, seen: list, **settings):
        super().__init__()
        self.seen = seen
        seen.append(("made", run_name, settings))

    @property
    def tracker(self):
        return self

    def start(self):
        self.seen.append(("start",))

    def store_init_configuration(self, values):
        self.seen.append(("settings", values))

    def log(self, values, step=None, **kwargs):
        self.seen.append(("log", values, step))

    def finish(self):
        self.seen.append(("finish",))

    def define_metric(self, name, step_metric):
        self.seen.append(("axis", name, step_metric))


def a_log(folder: Path, seen: list, is_main: bool = True) -> MetricsLog:
    tracker = metrics_log.Tracker(lambda name: Recorder(name, seen), folder, {"seed": 3})
    return MetricsLog(folder / "metrics.jsonl", is_main, tracker)


def logged(seen: list) -> list[tuple[int, dict]]:
    return [(step, values) for kind, values, step in (row for row in seen if row[0] == "log")]


class Killed(BaseException):
    pass


class Halving:
    """loss = w^2."""

    def __init__(self, net: nn.Linear):
        self.net = net

    def roles_to_update(self, step):
        return ("student",)

    def loss(self, role, batch, rng, shared):
        value = self.net.weight.square().sum()
        return Loss(value, {"loss": value.detach()})


def run_training(folder: Path, seen: list, dies_at: int = 99) -> MetricsLog:
    """Ten steps, a checkpoint every four, a row a step and a validation at 5 and 10."""
    net = nn.Linear(2, 1, bias=False)
    nn.init.constant_(net.weight, 1.0)
    config = TrainConfig(
        num_steps=10,
        batch_size=1,
        log_every=1,
        checkpoint_every=4,
        validate_every=5,
        optimizers={"student": OptimizerConfig(lr=0.1)},
    )
    (folder / "stages" / "dmd").mkdir(parents=True, exist_ok=True)
    trainer = Trainer(Ranks(), config, {"student": net}, "student", folder / "stages" / "dmd")
    log = a_log(folder, seen)
    method = Halving(net)

    def batch(position):
        if position >= dies_at:
            raise Killed

    def validate():
        return {"score": float(net.weight.sum())}

    try:
        train(trainer, method, batch, stage="dmd", seed=0, log=log, validate=validate)
    except Killed:
        return log
    log.close()
    return log


@pytest.mark.parametrize("dies_at", [2, 4, 6, 9])
def test_a_killed_and_resumed_training_is_tracked_as_one_never_killed(tmp_path, dies_at):
    whole: list = []
    rows = run_training(tmp_path / "whole", whole).rows()
    seen: list = []
    run_training(tmp_path / "killed", seen, dies_at)
    run_training(tmp_path / "killed", seen)
    assert logged(seen) == logged(whole)
    assert logged(seen) == [
        (row["step"], {f"dmd/{k}": v for k, v in row.items() if k not in ("stage", "step")}) for row in rows
    ]
    assert len(logged(seen)) == 12
    made = [row for row in seen if row[0] == "made"]
    assert len(made) == 2
    assert made[0] == made[1], "the same run at the tracker"
    assert [row for row in seen if row[0] == "settings"] == [("settings", {"seed": 3})], "passed once"
    assert seen[-1] == ("finish",)


def test_a_stage_that_is_made_anew_is_tracked_anew(tmp_path):
    """What was given before is counted in the stage's folder, which goes with another fingerprint."""
    recipe = load_recipe(RECIPES / "scratch_avatar.yaml", ["preset=smoke", f"run_dir={tmp_path / 'run'}"])
    seen: list = []
    for steps in (1, 1, 2):

        def body(folder):
            log = a_log(tmp_path / "run", seen)
            log.resume("init", 0)
            log.write("init", 1, {"loss": 1.0})
            return {}

        RunFolder.open(recipe).stage("init", {"steps": steps}, (), body)
    assert logged(seen) == [(1, {"init/loss": 1.0})] * 2


def test_a_finished_run_starts_no_tracker_and_other_ranks_none(tmp_path):
    seen: list = []
    a_log(tmp_path, seen).close()
    a_log(tmp_path, seen, is_main=False).write("dmd", 1, {"loss": 1.0})
    assert seen == []
    assert not (tmp_path / "tracker.json").exists()


def test_the_count_is_written_before_the_row_is_given(tmp_path):
    """So a row may be missing at the tracker, and is never there twice."""

    class Dying(Recorder):
        def log(self, values, step=None, **kwargs):
            super().log(values, step)
            raise Killed

    seen: list = []
    log = MetricsLog(
        tmp_path / "metrics.jsonl", True, metrics_log.Tracker(lambda name: Dying(name, seen), tmp_path, {})
    )
    with pytest.raises(Killed):
        log.write("dmd", 1, {"loss": 1.0})
    again = a_log(tmp_path, seen)
    again.resume("dmd", 1)
    again.write("dmd", 1, {"loss": 1.0})
    again.write("dmd", 2, {"loss": 2.0})
    assert logged(seen) == [(1, {"dmd/loss": 1.0}), (2, {"dmd/loss": 2.0})]


def test_wandb_gets_an_axis_for_each_stage(tmp_path):
    """Its own step never goes back, a stage's does: rows of `dmd` come after those of `teacher` with smaller steps."""

    class Wandb(Recorder):
        name = "wandb"

    seen: list = []
    log = MetricsLog(
        tmp_path / "metrics.jsonl", True, metrics_log.Tracker(lambda name: Wandb(name, seen), tmp_path, {})
    )
    for stage, step in (("teacher", 2300), ("dmd", 1), ("dmd", 2)):
        log.write(stage, step, {"loss": 1.0})
    axes = [row[1:] for row in seen if row[0] == "axis"]
    assert axes == [("teacher/*", "teacher/step"), ("dmd/*", "dmd/step")]
    assert [values["dmd/step"] for _, values in logged(seen)[1:]] == [1, 2]
    assert {step for step, _ in logged(seen)} == {None}


def classes(monkeypatch, seen: list) -> None:
    """Every tracker of accelerate is a recorder, and installed."""

    def make(**settings):
        return Recorder(settings.pop("run_name"), seen, **settings)

    kinds = ("tensorboard", "wandb", "trackio")
    monkeypatch.setattr(metrics_log, "LOGGER_TYPE_TO_CLASS", dict.fromkeys(kinds, make))
    monkeypatch.setattr(metrics_log, "get_available_trackers", lambda: kinds)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_a_recipe_s_tracker_gets_where_and_what(monkeypatch, tmp_path, kind):
    seen: list = []
    classes(monkeypatch, seen)
    recipe = load_recipe(RECIPES / "scratch_avatar.yaml", [f"tracker={kind}"])
    metrics_log.check(recipe.tracker)
    tracker = metrics_log.open_tracker(recipe, tmp_path)
    assert tracker is not None
    tracker.log("dmd", 4, {"student/loss": 0.5}, number=1)
    name = json.loads((tmp_path / "tracker.json").read_text())["name"]
    assert name.startswith(f"{tmp_path.name}-")
    expected = {
        "tensorboard": ("tensorboard", {"logging_dir": tmp_path}),
        "wandb": ("scratch_avatar", {"id": name, "name": name, "resume": "allow", "dir": str(tmp_path)}),
        "trackio": ("scratch_avatar", {"name": name, "resume": "allow"}),
    }
    assert seen[0] == ("made", *expected[kind])
    settings = next(row[1] for row in seen if row[0] == "settings")
    assert settings["distill.train.num_steps"] == 64
    assert settings["reuse"] == "null"
    assert all(isinstance(value, bool | int | float | str) and value == value for value in settings.values())
    assert (4, {"dmd/student/loss": 0.5}) in [(step, values) for step, values in logged(seen)]


def test_no_tracker_is_the_default():
    recipe = load_recipe(RECIPES / "scratch_avatar.yaml")
    assert recipe.tracker == "none"
    assert metrics_log.open_tracker(recipe, Path("nowhere")) is None
    with pytest.raises(UserError, match="one of 'none', 'tensorboard', 'wandb', 'trackio'"):
        load_recipe(RECIPES / "scratch_avatar.yaml", ["tracker=tensorbord"])


def test_a_tracker_that_is_not_installed_is_one_line_before_any_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(metrics_log, "get_available_trackers", lambda: ["tensorboard"])
    run_dir = tmp_path / "run"
    assert main(["run", str(RECIPES / "scratch_avatar.yaml"), "tracker=wandb", f"run_dir={run_dir}"]) == 2
    said = capsys.readouterr().err
    assert said == "distill: tracker=wandb is not installed: recipe; pip install wandb, or remove tracker=\n"
    assert not run_dir.exists()


def test_another_tracker_is_the_same_run(tmp_path):
    recipe = load_recipe(RECIPES / "scratch_avatar.yaml", [f"run_dir={tmp_path / 'run'}"])
    RunFolder.open(recipe)
    RunFolder.open(load_recipe(RECIPES / "scratch_avatar.yaml", [f"run_dir={tmp_path / 'run'}", "tracker=wandb"]))


def test_the_metrics_log_forgets_what_a_killed_run_logged_ahead(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("teacher", 9, {"loss": 0.5})
    for step in range(4):
        log.write("dmd", step, {"loss": float(step)})
    with log.path.open("a") as file:
        file.write('{"stage": "dmd", "st')
    log.resume("dmd", 2)
    assert [(row["stage"], row["step"]) for row in log.rows()] == [("teacher", 9), ("dmd", 0), ("dmd", 1)]
    log.write("dmd", 2, {"loss": 2.0})
    assert log.rows("dmd")[-1] == {"stage": "dmd", "step": 2, "loss": 2.0}
    MetricsLog(tmp_path / "none.jsonl", is_main=False).write("dmd", 0, {"loss": 1.0})
    assert not (tmp_path / "none.jsonl").exists()
