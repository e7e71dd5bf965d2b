"""Rewards that are climbed: what is added to DMD's gradient, what is the same without them, and where the oracle ends."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from distill.methods import Batch, dmd, dmd_reward_gradient
from distill.methods.dmd_reward_gradient import Config, RewardGradientDMD, limited
from distill.methods.rewards import Reward
from distill.methods.rollout import draw_noise, rollout
from distill.training.config import OptimizerConfig, TrainConfig
from distill.training.loop import train
from distill.training.metrics_log import MetricsLog
from distill.training.trainer import Trainer
from eval.metrics.identity import Identity
from eval.metrics.sharpness import Sharpness
from eval.metrics.sync import Sync
from teachers.errors import UserError
from tests.distill.methods import test_gaussian as oracle
from tests.distill.methods import test_reward
from tests.distill.methods.test_dmd import a_batch
from tests.distill.methods.test_reward import LINEAR, grads, slope
from tests.support.tiny import Ranks, a_student, a_teacher, randn, rng

SYNC = Reward(metric=Sync(max_lag=4, sound="own"))
WATCHED = Reward(metric=Sharpness(relative=False), weight=0.0)


class Reader(test_reward.Reader):
    """A clip reader whose reward k is slope_k . x0, which has a gradient too."""

    def __init__(self, **slopes: Tensor):
        super().__init__(*slopes.values())
        self.named = slopes

    def differentiate_through(self, decoder):
        """There is none."""

    def gradient(self, rewards, x0, conditions, batch):
        return sum((factor * self.named[name] for name, (_, factor) in rewards.items()), torch.zeros_like(x0))


def make(reader=None, **config) -> RewardGradientDMD:
    roles = {"student": a_student(), "teacher": a_teacher(1).requires_grad_(False), "fake_score": a_teacher(2)}
    given = {"rewards": {"sync": SYNC}, "exit_step": "last"} | config
    return dmd_reward_gradient.build(Config(**given), roles | {"clip_reader": reader or Reader(sync=slope())})


@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_beta_0_is_plain_dmd_bit_for_bit(role):
    batch = a_batch(3)
    roles = {"student": a_student(), "teacher": a_teacher(1).requires_grad_(False), "fake_score": a_teacher(2)}
    plain = grads(dmd.build(dmd.Config(exit_step="last"), roles), role, batch)
    ours = grads(make(beta=0.0), role, batch)
    assert plain
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def slopes_of(method, batch, x0: Tensor, sigma: Tensor, eps: Tensor, plain: bool) -> tuple[Tensor, dict]:
    """d loss / d x0 of a step of the student, and what it logs; the scores and the rollout as they are."""
    leaf = x0.clone().requires_grad_()
    stepped = dmd.DMD(method.config, method.student, method.teacher, method.fake_score) if plain else method
    loss = stepped._student(dmd.Rollouts(leaf, sigma, sigma, eps, batch.conditions, batch))
    loss.value.backward()
    return leaf.grad, loss.metrics


def test_the_rewards_gradient_is_added_in_units_of_their_deviation():
    """To the generated frames, beside plain DMD's; a watched reward is logged and adds nothing."""
    others = {"sync": slope(), "clear": slope(4), "watched": slope(5)}
    rewards = {"sync": SYNC, "clear": Reward(metric=SYNC.metric, weight=-0.5), "watched": WATCHED}
    method, batch = make(Reader(**others), rewards=rewards, beta=1.3), a_batch(4)
    given = (randn(4, 4, 8, 4, 4, seed=5), torch.linspace(0.3, 0.9, 4), randn(4, 4, 8, 4, 4, seed=6))
    plain, _ = slopes_of(method, batch, *given, plain=True)
    found, metrics = slopes_of(method, batch, *given, plain=False)
    x0, expected = given[0], torch.zeros_like(plain[:1])
    for name, weight in (("sync", 1.0), ("clear", -0.5)):
        values = (x0 * others[name]).flatten(1).sum(1)
        expected = expected - 1.3 * weight * others[name] / values.std(correction=0) / x0.numel()
    expected[:, :, :1] = 0.0
    assert torch.allclose(found - plain, expected.expand_as(plain), rtol=1e-4, atol=1e-7)
    assert float(expected.abs().mean()) > 0.1 * float(plain.abs().mean())
    assert float(metrics["reward_grad_abs"]) == pytest.approx(float(expected.abs().mean()) * x0.numel(), rel=1e-4)
    assert {"reward_watched", "spread_sync", "dmd_grad_abs"} <= set(metrics)
    assert all(not value.requires_grad for value in metrics.values())


def test_a_clips_reward_gradient_is_bounded_by_its_own_of_dmd():
    """A steep reward, and two clips that are nearly equal: scaled down as a whole, to `limit` times DMD's; a small one is left."""
    method, batch = make(beta=1e4, limit=3.0), a_batch(4)
    given = (randn(4, 4, 8, 4, 4, seed=5), torch.linspace(0.3, 0.9, 4), randn(4, 4, 8, 4, 4, seed=6))
    plain, _ = slopes_of(method, batch, *given, plain=True)
    found, _ = slopes_of(method, batch, *given, plain=False)
    uphill = (plain - found)[:, :, 1:].flatten(1)
    ratio = uphill.abs().mean(1) / plain[:, :, 1:].flatten(1).abs().mean(1)
    assert torch.allclose(ratio, torch.full((4,), 3.0), rtol=1e-3)
    towards = torch.nn.functional.cosine_similarity(uphill, slope()[:, :, 1:].flatten(1), dim=1)
    assert (towards > 0.999).all()
    small = randn(2, 4, 8, 4, 4, seed=7)
    assert torch.equal(limited(small, torch.full((2,), 5.0), 1), small)
    assert torch.equal(limited(torch.zeros_like(small), torch.zeros(2), 1), torch.zeros_like(small))


def test_the_deviation_is_that_of_all_ranks():
    method, values = make(), torch.tensor([[0.1, 0.5, 0.9, 0.2]], dtype=torch.float64)
    assert method._factors(values)["sync"][1] == pytest.approx(1 / float(values.std(correction=0)))
    assert method._factors(torch.full((1, 4), 0.5, dtype=torch.float64)) == {}
    with pytest.raises(UserError, match=r"rewards\.sync: none of 4 clips has it"):
        method._factors(torch.full((1, 4), math.nan, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (
            lambda: Config(rewards={"face": Reward(metric=Identity())}),
            r"rewards\.face: identity of identity has no gradient",
        ),
        (
            lambda: Config(rewards={"late": Reward(metric=SYNC.metric, score="sync_offset_frames")}),
            "sync_offset_frames of sync has no gradient; its scores with one: sync, sync_width",
        ),
        (lambda: Config(rewards={"sync": SYNC}, limit=0.0), "limit"),
        (lambda: Config(rewards={"sync": SYNC}, decoder=SimpleNamespace(fitted=True)), "a fitted codec"),
        (lambda: Config(rewards={"watched": WATCHED}), r"dmd_reward_gradient\.rewards: none has a weight"),
        (lambda: Config(rewards={"sync": SYNC}, beta=-1.0), "beta"),
        (lambda: Config(rewards={"sync": SYNC}, rollout_chunks=8), "rollout_chunks"),
    ],
)
def test_wrong_configs_are_refused(make_it, words):
    with pytest.raises(UserError, match=words):
        make_it()


BETA = 0.5


def distil(folder: Path, beta: float) -> oracle.AffineStudent:
    """The oracle's distillation with a linear reward of the clip."""
    student, fake_score = oracle.AffineStudent((1.0,)), oracle.LearnedGaussian()
    config = Config(rewards={"sync": SYNC}, beta=beta, fake_updates=3, warmup=60)
    method = RewardGradientDMD(config, student, oracle.oracle(), fake_score)
    method.reader = Reader(sync=LINEAR)
    rates = {"student": 0.02, "fake_score": 0.1}
    optimizers = {role: OptimizerConfig(lr=0.02, betas=(0.5, 0.95), final=final) for role, final in rates.items()}
    settings = TrainConfig(num_steps=300, batch_size=256, ema_decay=0.98, checkpoint_every=0, optimizers=optimizers)
    trainer = Trainer(Ranks(), settings, {"student": student, "fake_score": fake_score}, "student", folder)
    log = MetricsLog(folder / "metrics.jsonl")
    train(trainer, method, lambda i: Batch(oracle.given(256, seed=i)), stage="dmd", seed=0, log=log)
    trainer.ema.copy_to(student)
    return student


def balance(beta: float, seed: int) -> Tensor:
    """The shift d of a Gaussian student at which both gradients cancel: E[(I - K_sigma) / |x0 - real|] d = beta a / std(a . x0),
    where (I - K_sigma) d is the difference of the two denoisers, K = (1 - s)^2 Sigma ((1 - s)^2 Sigma + s^2 I)^-1."""
    teacher, one = oracle.oracle(), oracle.given(1, seed)
    a = oracle.frames(LINEAR[None])[0].double()
    between = oracle.frames(teacher.expectation(oracle.given(20_000, 7))).double() @ a
    spread = math.sqrt(float(a @ teacher.covariance @ a + between.var()))
    many = one.index(torch.zeros(4_000, dtype=torch.long))
    x0, eye = teacher.sample(many, rng(seed + 1)), torch.eye(len(a), dtype=torch.float64)
    shift = torch.zeros_like(a)
    for _ in range(4):
        moved, total = x0.clone(), torch.zeros_like(eye)
        moved[:, :, 1:] += shift.view(1, oracle.C, oracle.F - 1, 1, 1)
        levels = torch.linspace(0.01, 0.99, 50).clamp(0.02, 0.98)
        for s in levels.tolist():
            noisy = (1 - s) * moved + s * randn(*moved.shape, seed=9).double()
            real = oracle.frames(teacher.denoise(noisy, torch.full((len(moved),), s), many)).double()
            norm = (oracle.frames(moved) - real).abs().mean(1)
            covariance = (1 - s) ** 2 * teacher.covariance
            gain = covariance @ torch.linalg.inv(covariance + s**2 * eye)
            total += (eye - gain) * (1 / norm).mean() / len(levels)
        shift = torch.linalg.solve(total, beta * a / spread)
    return shift


@pytest.mark.slow
def test_the_student_ends_where_the_two_gradients_cancel(tmp_path):
    with torch.enable_grad():
        student = distil(tmp_path, BETA)
    teacher, num = oracle.oracle(), 40_000
    for seed in (1, 2):
        one = oracle.given(1, seed)
        many = one.index(torch.zeros(num, dtype=torch.long))
        with torch.no_grad():
            flat = oracle.frames(rollout(student, many, draw_noise(student, num, rng(seed)))).double()
        found, expected = flat.mean(0) - oracle.frames(teacher.expectation(one))[0], balance(BETA, seed)
        print(found, expected)
        assert expected.norm() > 0.3
        assert (found - expected).norm() < 0.2 * expected.norm()
