"""Which validation is kept and when a stage ends: beyond the paired error, alike after a kill and on every rank."""

import json
import math
from typing import Any

import pytest
import torch

from distill.training import checkpoint
from distill.training.config import TrainConfig
from distill.training.lifecycle.selection import LEFT, Selection, StopConfig, validations
from distill.training.loop import train
from distill.training.metrics_log import MetricsLog
from distill.training.trainer import Trainer
from eval.frechet import jackknife_error
from teachers.errors import UserError
from tests.distill.training.test_loop import Regression, batches_of, config, nets
from tests.support.tiny import Ranks, rng

CLIPS = 40


def scored(clips: torch.Tensor) -> dict[str, Any]:
    """A validation whose score is the mean over clips [N]."""
    left = (clips.sum() - clips) / (len(clips) - 1)
    return {"score": float(clips.mean()), LEFT: left.tolist()}


def chosen(*rows: dict[str, Any], sure: float = 1.0, stop: StopConfig | None = None) -> Selection:
    selection = Selection()
    for step, values in enumerate(rows, start=1):
        selection.take(values, step, sure, stop)
    return selection


def test_the_error_of_a_gain_is_that_of_paired_clips():
    """Clips that differ by 3 and gain 0.1 each, 0.05 more or less: the error is of the gains alone, by the textbook's formula."""
    own = 3 * torch.randn(CLIPS, generator=rng(1)).double()
    gains = 0.1 + 0.05 * torch.randn(CLIPS, generator=rng(2)).double()
    kept = chosen(scored(own))
    gain, error = kept.gain(scored(own - gains))
    assert gain == pytest.approx(float(gains.mean()), abs=1e-9)
    assert error == pytest.approx(float(gains.std()) / math.sqrt(CLIPS), rel=1e-6)
    assert jackknife_error(torch.tensor(scored(own)[LEFT])) > 30 * error, "unpaired it would be lost"
    assert kept.take(scored(own - gains), 2, 1.0)


@pytest.mark.parametrize(("sure", "kept"), [(0.0, 2), (1.0, 1)])
def test_a_gain_within_its_error_keeps_the_earlier(sure, kept):
    own, noise = torch.randn(2, CLIPS, generator=rng(3)).double()
    gain = noise - noise.mean() + 0.5 * noise.std() / math.sqrt(CLIPS)
    assert chosen(scored(own), scored(own - gain), sure=sure).best["step"] == kept  # type: ignore[index]


@pytest.mark.parametrize(
    ("noise", "gain", "stale"), [(0.01, 0.0, 1), (0.01, 0.02, 1), (1.0, 0.0, 0), (1.0, -0.3, 0), (1.0, -9.0, 1)]
)
def test_what_is_not_known_ends_no_stage(noise, gain, stale):
    """A gain of 0 with a small error counts, with a large one not; nor does one of 0.02 that 3 % of the score hide."""
    own, other = torch.randn(2, CLIPS, generator=rng(6)).double()
    clips = own - own.mean() + 1.0
    change = noise * (other - other.mean()) / other.std() + gain
    selection = chosen(scored(clips))
    assert not selection.take(scored(clips - change), 2, 1e9, StopConfig(worth=0.03, sure=4.0))
    assert selection.stale == stale, "4 errors are 0.63 noises"


def test_small_gains_are_kept_and_counted():
    """Each of 1 % is kept, for nothing; two of them end the stage all the same, and one of 10 % begins the count anew."""
    own = 1 + torch.rand(CLIPS, generator=rng(7)).double()
    rows = [scored(own * factor) for factor in (1.0, 0.99, 0.89, 0.88, 0.87)]
    selection = chosen(*rows[:2], sure=0.0, stop=StopConfig())
    assert (selection.best["step"], selection.stale) == (2, 1)  # type: ignore[index]
    selection = chosen(*rows, sure=0.0, stop=StopConfig())
    assert (selection.best["step"], selection.stale, selection.is_over(StopConfig())) == (5, 2, True)  # type: ignore[index]


def test_small_gains_add_up():
    """Each within the error of its difference from the one before: what is kept moves on all the same."""
    own, noise = torch.randn(2, CLIPS, generator=rng(4)).double()
    unit = noise.std() / math.sqrt(CLIPS)
    rows = [scored(own - 0.4 * unit * k - (noise - noise.mean()) * (k % 2)) for k in range(8)]
    assert chosen(*rows).best["step"] > 3  # type: ignore[index]


def test_a_score_that_is_not_finite_is_none_and_without_errors_less_is_better():
    rows = ({"score": math.nan}, {"score": 2.0}, {"score": 1.9}, {"score": math.nan}, {"score": math.inf})
    selection = chosen(*rows, stop=StopConfig())
    assert (selection.best, selection.stale) == ({"score": 1.9, "step": 3}, 2)


@pytest.mark.parametrize(
    ("every", "num", "stop", "steps"),
    [
        (16, 48, None, [16, 32, 48]),
        (16, 40, None, [16, 32, 40]),
        (0, 40, None, [40]),
        (16, 256, StopConfig(), [16, 32, 48, 80, 128, 192, 256]),
        (16, 64, StopConfig(growth=1.0), [16, 32, 48, 64]),
        (50, 1000, StopConfig(growth=2.0), [50, 100, 200, 400, 800, 1000]),
    ],
)
def test_validations_are_due(every, num, stop, steps):
    assert list(validations(every, num, stop)) == steps


def test_bad_values_are_refused_by_name():
    for make, words in (
        (lambda: StopConfig(patience=0), "train.stop.patience: got 0"),
        (lambda: StopConfig(growth=0.9), "train.stop.growth: got 0.9"),
        (lambda: StopConfig(worth=1.0), "train.stop.worth: got 1"),
        (lambda: StopConfig(sure=-1.0), "train.stop.sure: got -1"),
        (lambda: TrainConfig(num_steps=1, batch_size=1, stop=StopConfig()), "set train.validate_every"),
        (lambda: TrainConfig(num_steps=1, batch_size=1, sure=-1.0), "train.sure: got -1"),
    ):
        with pytest.raises(UserError, match=words):
            make()


SCORES = {1: 5.0, 2: 3.0, 3: 3.5, 5: 3.2, 8: 1.0, 10: 0.5}
"""By step: with patience 2 the rule ends at 5 and never sees what comes later."""


class KilledError(Exception):
    pass


def run(folder, scores=SCORES, die_at: int = 0, alarm=None, engine: Any = None, **changes) -> Trainer:
    """A stage of 10 steps that ends by its rule; `die_at`: the step in whose validation it is killed."""
    folder.mkdir(exist_ok=True)
    roles = nets()
    settings = {"num_steps": 10, "validate_every": 1, "stop": StopConfig(), "checkpoint_every": 2} | changes
    trainer = Trainer(engine or Ranks(), config(**settings), roles, "a", folder)

    def validate():
        if trainer.step == die_at:
            raise KilledError
        return {"score": scores[trainer.step], LEFT: [scores[trainer.step] + 0.01 * k for k in range(3)]}

    log = MetricsLog(folder / "metrics.jsonl")
    method = Regression(roles, 0.3)
    train(trainer, method, batches_of(4), stage="s", seed=0, log=log, validate=validate, alarm=alarm)
    return trainer


def test_the_rule_ends_a_stage_and_keeps_the_best(tmp_path):
    trainer = run(tmp_path / "run")
    assert (trainer.step, trainer.best["step"], trainer.selection.stale) == (5, 2, 2)  # type: ignore[index]
    assert trainer.selection.ended == "2 validations were not better by 0.03 of the score; kept is that of step 2"
    rows = MetricsLog(tmp_path / "run/metrics.jsonl").rows("s")
    assert [row["step"] for row in rows if "validate/score" in row] == [1, 2, 3, 5]
    assert [row["validate/gain"] for row in rows if "validate/gain" in row] == pytest.approx([2.0, -0.5, -0.2])
    assert not any(LEFT in name for row in rows for name in row)
    kept = checkpoint.Reader(checkpoint.best_in(tmp_path / "run", trainer.best or {})).tensors("ema/")
    fixed = run(tmp_path / "fixed", num_steps=2, stop=None).averaged()
    fixed_of_ten = run(tmp_path / "ten", stop=None, scores=dict.fromkeys(range(1, 11), 1.0) | {2: 0.5}).averaged()
    assert all(torch.equal(kept[name], x) for name, x in fixed_of_ten.items())
    assert fixed.keys() == kept.keys()
    again = run(tmp_path / "run", die_at=5)
    assert again.step == 5, "a stage that has ended does not go on"


@pytest.mark.parametrize("die_at", [1, 3, 5])
def test_killed_and_resumed_decides_alike(tmp_path, die_at):
    """In every validation, also in the one that ends the stage: its numbers, what is kept, the reason and the weights."""
    never = run(tmp_path / "never")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", die_at=die_at)
    resumed = run(tmp_path / "killed")
    assert vars(resumed.selection) == vars(never.selection)
    assert all(torch.equal(x, never.averaged()[name]) for name, x in resumed.averaged().items())
    rows = [MetricsLog(tmp_path / name / "metrics.jsonl").rows("s") for name in ("never", "killed")]
    assert rows[0] == rows[1]


def test_the_count_of_a_checkpoint_is_used(tmp_path):
    """Killed after a validation that was not better and a checkpoint: the next one that is not better ends the stage."""
    never = run(tmp_path / "never", checkpoint_every=1)
    with pytest.raises(KilledError):
        run(tmp_path / "killed", die_at=5, checkpoint_every=1)
    facts = json.loads((checkpoint.saved(tmp_path / "killed")[-1] / checkpoint.MANIFEST).read_bytes())
    assert (facts["step"], facts["stale"], facts["ended"]) == (4, 1, "")
    assert vars(run(tmp_path / "killed", checkpoint_every=1).selection) == vars(never.selection)


def test_a_collapse_ends_the_stage_with_what_is_kept(tmp_path):
    """With the rule and something kept; with nothing kept, or no rule, it is an error."""

    def alarm(values):
        return "black frames 1" if values["score"] == 3.5 else None

    trainer = run(tmp_path / "run", alarm=alarm)
    assert (trainer.step, trainer.best["step"]) == (3, 2)  # type: ignore[index]
    assert trainer.selection.ended == "the student has collapsed: black frames 1"
    assert vars(run(tmp_path / "run", alarm=alarm).selection) == vars(trainer.selection)
    with pytest.raises(UserError, match=r"s collapsed at step 3: black frames 1; the best weights, of step 2"):
        run(tmp_path / "without", alarm=alarm, stop=None)
    with pytest.raises(UserError, match=r"s collapsed at step 1: .*this was the first validation"):
        run(tmp_path / "first", scores={1: 3.5}, alarm=alarm)


class SecondRank(Ranks):
    """One of two ranks, whose own scores are others than those of the first."""

    def from_main(self, value):
        if isinstance(value, list):  # of checkpoints
            return value
        score = SCORES[self.trainer.step]
        return value | {"score": score, LEFT: [score + 0.01 * k for k in range(3)]}


def test_what_rank_0_measured_decides(tmp_path):
    engine: Any = SecondRank()
    roles = nets()
    settings = {"num_steps": 10, "validate_every": 1, "stop": StopConfig()}
    engine.trainer = trainer = Trainer(engine, config(**settings), roles, "a", tmp_path)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    validate = lambda: {"score": -float(trainer.step)}  # noqa: E731
    train(trainer, Regression(roles), batches_of(4), stage="s", seed=0, log=log, validate=validate)
    assert (trainer.step, trainer.best["step"]) == (5, 2)  # type: ignore[index]
