"""The fake score's lag and the updates that it asks for, where the best fake score is known in closed form."""

import json
from typing import Any

import pytest
import torch

from distill.methods import Adaptive, Batch
from distill.methods.critics.fake_ratio import AdaptConfig, FakeRatio, lag
from distill.methods.dmd import DMD, Config
from distill.training import checkpoint
from distill.training.config import OptimizerConfig, TrainConfig, learning_rate
from distill.training.loop import train
from distill.training.metrics_log import MetricsLog
from distill.training.trainer import Trainer
from teachers import flow
from teachers.errors import UserError
from tests.distill.methods.test_gaussian import MEAN, SPATIAL, AffineStudent, LearnedGaussian, frames, given, oracle
from tests.support.methods.gaussian import GaussianTeacher, autoregressive
from tests.support.tiny import Ranks, randn, rng

BATCH = 256


def scores(fake: GaussianTeacher, now: GaussianTeacher, num: int = 8000, sigma: float = 0.6):
    """Clips of a student whose distribution is `now`, and what the teacher and a fake score say of them at one noise."""
    conditions = given(num, seed=1)
    x0 = now.sample(conditions, rng(2)).float()
    level = torch.full((num,), sigma)
    x = flow.add_noise(x0, randn(*x0.shape, seed=3), level)
    return (
        x0,
        oracle().denoise(x, level, conditions),
        fake.denoise(x, level, conditions),
        now.denoise(x, level, conditions),
    )


def moved(far: float) -> GaussianTeacher:
    """The teacher's distribution, its mean `far` away: a student on its way."""
    return autoregressive(MEAN + far, SPATIAL, 0.7)


def test_the_best_fake_score_has_no_lag_and_an_older_one_less_than_none():
    """Exact for the student of now: 0 within the error. Of where it was: its residual points along -d, to where it went."""
    for before, low, high in ((0.5, -0.02, 0.02), (0.8, -1.0, -0.08), (0.2, 0.08, 1.0)):
        x0, real, fake, _ = scores(moved(before), moved(0.5))
        assert low < float(lag(x0, real, fake).mean()) < high, before


def test_the_lag_is_a_lower_bound_of_the_gap_of_the_loss():
    """cos^2 over all clips is what the loss falls by at most along d, by search; the whole gap, known here, is no less."""
    for before in (0.7, 1.0):
        x0, real, fake, best = (frames(value).double() for value in scores(moved(before), moved(0.5)))
        residual, direction = x0 - fake, fake - real
        loss, least = (float((x0 - score).square().mean()) for score in (fake, best))
        share = float((residual * direction).mean() ** 2 / (residual.square().mean() * direction.square().mean()))
        line = [float((residual - e * direction).square().mean()) for e in torch.linspace(-3, 3, 2001)]
        assert 1 - min(line) / loss == pytest.approx(share, abs=1e-4)
        assert 0.01 < share <= (loss - least) / loss + 0.005
        assert float(lag(*scores(moved(before), moved(0.5))[:3]).mean()) < -0.05


def test_given_frames_have_no_say_and_nothing_to_compare_is_no_lag():
    x0, real, fake = (randn(2, 3, 4, 2, 2, seed=seed) for seed in (1, 2, 3))
    found = lag(x0, real, fake)
    for value in (x0, real, fake):
        value[:, :, 0] = 7.0
    assert torch.equal(lag(x0, real, fake), found)
    assert torch.equal(lag(x0, real, real), torch.zeros(2))
    assert lag(2 * fake - real, real, fake) == pytest.approx(torch.ones(2))


def test_the_number_follows_the_mean_between_its_bounds():
    ratio, seen = FakeRatio(AdaptConfig(least=1, most=4, lag=0.1, decay=0.5), 9), []
    assert ratio.updates == 4
    for value in (0.0, 0.0, 0.0, 0.0, -0.5, 0.0, 0.0, 0.0, 0.3):
        ratio.observe(value)
        seen.append(ratio.updates)
    assert seen == [3, 2, 1, 1, 2, 3, 2, 1, 2], "one late value counts for two steps at a decay of 0.5"
    other = FakeRatio(ratio.config, 1)
    other.load(json.loads(json.dumps(ratio.state())))
    assert vars(other) == vars(ratio)
    for words in ({"least": 0}, {"least": 3, "most": 2}, {"lag": 0.0}, {"lag": 1.0}, {"decay": 1.0}):
        with pytest.raises(UserError, match=r"dmd\.adapt"):
            AdaptConfig(**words)


class Run:
    """DMD to the oracle with an adapted number of updates."""

    def __init__(self, folder, student_rate: float, num_steps: int = 40, fault_at: int = 0, engine: Any = None):
        folder.mkdir(exist_ok=True)
        adapt = AdaptConfig(least=1, most=8, lag=0.06)
        roles = {"student": AffineStudent((1.0,)), "fake_score": LearnedGaussian()}
        self.method = DMD(
            Config(fake_updates=3, warmup=40, adapt=adapt), roles["student"], oracle(), roles["fake_score"]
        )
        rates = {"student": student_rate, "fake_score": 0.01}
        optimizers = {name: OptimizerConfig(lr=rate, betas=(0.5, 0.95), final=1.0) for name, rate in rates.items()}
        config = TrainConfig(
            num_steps=num_steps, batch_size=BATCH, checkpoint_every=7, log_every=1, optimizers=optimizers
        )
        self.trainer = Trainer(engine or Ranks(), config, roles, "student", folder)
        self.log, self.fault_at = MetricsLog(folder / "metrics.jsonl"), fault_at

    def go(self) -> "Run":
        def batches(position: int) -> Batch:
            if position == self.fault_at > 0:
                raise KeyboardInterrupt
            return Batch(given(BATCH, seed=position))

        train(self.trainer, self.method, batches, stage="dmd", seed=0, log=self.log)
        return self

    @property
    def updates(self) -> int:
        return self.trainer.updates["fake_score"]


@pytest.mark.slow
def test_a_fast_student_asks_for_more_and_one_at_rest_for_the_least(tmp_path):
    """Measured over 40 steps after 40 updates of warmup: 43, ?, ? updates."""
    found = {rate: Run(tmp_path / str(rate), rate).go().updates - 40 for rate in (0.0, 0.02, 0.1)}
    assert found[0.0] <= 40 + 5, "at rest one a step, once the first three are through"
    assert found[0.0] < found[0.02] < found[0.1]
    assert found[0.1] > 2 * found[0.0]


@pytest.mark.slow
def test_killed_and_resumed_makes_the_same_updates(tmp_path):
    """Also within a step, and with the number, its mean and its weight."""
    never = Run(tmp_path / "never", 0.1, 20).go()
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path / "killed", 0.1, 20, fault_at=90).go()
    facts = json.loads((checkpoint.saved(tmp_path / "killed")[-1] / checkpoint.MANIFEST).read_bytes())
    assert facts["step"] == 7
    assert set(facts["method"]) == {"updates", "mean", "weight"}
    resumed = Run(tmp_path / "killed", 0.1, 20).go()
    assert vars(resumed.method.ratio) == vars(never.method.ratio)  # type: ignore[arg-type]
    ours, theirs = ({name: x for name, _, _, x in run.trainer.pieces()} for run in (resumed, never))
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    assert resumed.log.rows() == never.log.rows()


class Halves(Ranks):
    """One of two ranks whose lags differ: each sees the mean of both, as all_reduce gives it."""

    def __init__(self, rank: int):
        super().__init__(rank=rank, world_size=2)
        self.lags = [(-0.3, 0.0), (0.05, 0.02)]

    def all_reduce_mean(self, tensors):
        for tensor in tensors:
            tensor.fill_(sum(self.lags[0]) / 2)


def test_ranks_with_other_lags_have_the_same_number():
    found = []
    for rank in range(2):
        engine: Any = Halves(rank)
        trainer = object.__new__(Trainer)
        trainer.engine = engine
        ratio = FakeRatio(AdaptConfig(lag=0.1), 3)
        ratio.observe(trainer.reduced({"student/fake_lag": torch.tensor(engine.lags[0][rank])})["student/fake_lag"])
        found.append(ratio.state())
    assert found[0] == found[1]
    assert found[0]["updates"] == 4, "rank 1 alone would have gone down"


def test_a_fixed_number_watches_nothing_and_an_adapted_rate_follows_the_steps(tmp_path):
    fixed = DMD(Config(), AffineStudent((1.0,)), oracle(), LearnedGaussian())
    assert isinstance(fixed, Adaptive)
    assert fixed.watched == ()
    assert fixed.state() == {}
    trainer = Run(tmp_path / "run", 0.0, 20).trainer
    trainer.adaptive, config = fixed, trainer.config.optimizers["student"]
    for step, updates in ((5, 13), (10, 77), (20, 81)):
        trainer.step, trainer.updates["fake_score"] = step, updates
        total = trainer._total("fake_score", {})
        assert learning_rate(config, updates, total) == pytest.approx(learning_rate(config, step, 20), rel=0.02)
