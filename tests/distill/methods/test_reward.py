"""Rewards: their weights by hand, whose gradient they change, what is the same without them, ranks, and where the oracle ends."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distill.methods import Batch, dmd, dmd_reward
from distill.methods.dmd_reward import Config, RewardDMD
from distill.methods.rewards import Reward, weigh
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
from tests.distill.methods.test_dmd import a_batch, gradients
from tests.support.processes import run_ranks
from tests.support.tiny import Ranks, a_student, a_teacher, randn, rng

SYNC = Reward(metric=Sync(max_lag=4, sound="own"))


class Reader:
    """A clip reader whose reward k is slope_k . x0; NaN where `lost` says so."""

    def __init__(self, *slopes: Tensor, lost: tuple[int, ...] = (), group=None):
        self.slopes, self.lost, self.rank, self.reasons = slopes, lost, 0, {}
        self.calls = 0

    def check(self, rewards, face):
        """All is at hand."""

    def read(self, rewards, x0, conditions, batch):
        self.calls += 1
        values = torch.stack([(x0 * slope).flatten(1).sum(1) for slope in self.slopes]).double()
        values[:, list(self.lost)] = math.nan
        return values

    def of_all(self, own):
        return own


class RankReader(Reader):
    """The same on a rank of a gloo group."""

    def of_all(self, own):
        self.rank = dist.get_rank()
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return torch.cat(parts, dim=1)


def slope(seed: int = 3) -> Tensor:
    return randn(1, 4, 8, 4, 4, seed=seed)


def make(reader=None, **config) -> RewardDMD:
    roles = {"student": a_student(), "teacher": a_teacher(1).requires_grad_(False), "fake_score": a_teacher(2)}
    given = {"rewards": {"sync": SYNC}, "exit_step": "last"} | config
    return dmd_reward.build(Config(**given), roles | {"clip_reader": reader or Reader(slope())})


def grads(method, role: str, batch: Batch) -> list[Tensor]:
    method.loss(role, batch, rng(1), rng(2)).value.backward()
    return [g for g in gradients(getattr(method, role)) if g is not None]


@pytest.mark.parametrize("weighs", ["student", "fake_score"])
@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_beta_0_is_plain_dmd_bit_for_bit(role, weighs):
    batch = a_batch(3)
    roles = {"student": a_student(), "teacher": a_teacher(1).requires_grad_(False), "fake_score": a_teacher(2)}
    plain = grads(dmd.build(dmd.Config(exit_step="last"), roles), role, batch)
    ours = grads(make(beta=0.0, weighs=weighs), role, batch)
    assert plain
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def by_hand(values: list[list[float]], shares: list[float], beta: float, limit: float) -> list[float]:
    """The weights of clips, without tensors."""
    total = [0.0] * len(values[0])
    for row, share in zip(values, shares, strict=True):
        mean = sum(row) / len(row)
        spread = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row))
        total = [t + share * (x - mean) / spread for t, x in zip(total, row, strict=True)]
    weights = [math.exp(beta * max(-limit, min(limit, t))) for t in total]
    return [w * len(weights) / sum(weights) for w in weights]


def weights_of(values, shares=(1.0,), beta=1.0, limit=3.0, **more) -> Tensor:
    """What `weigh` makes of these values [K, N]."""
    rewards = {str(k): Reward(metric=SYNC.metric, weight=share, **more) for k, share in enumerate(shares)}
    reader = Reader()
    reader.read = lambda *_: torch.tensor(values, dtype=torch.float64)
    return weigh(rewards, beta, limit, reader, torch.zeros(len(values[0])), None, None).weights


def test_weights_are_those_of_the_formula():
    values = [[0.1, 0.9, 0.4, 0.4], [3.0, -1.0, 5.0, 2.0]]
    for shares, beta, limit in (((1.0, 0.5), 1.0, 3.0), ((1.0, -2.0), 0.7, 1.0), ((0.0, 1.0), 2.0, 9.0)):
        expected = torch.tensor(by_hand(values, list(shares), beta, limit), dtype=torch.float64)
        assert torch.allclose(weights_of(values, shares, beta, limit), expected, atol=1e-12)
    one = weights_of([[0.1, 0.9, 0.4, 0.4]])
    assert one.mean() == pytest.approx(1.0)
    assert one.argmax() == 1
    assert torch.equal(weights_of([[0.7, 0.7, 0.7]]), torch.ones(3, dtype=torch.float64)), "no reward tells them apart"


def test_a_limit_keeps_one_clip_from_all_the_weight():
    values = [[0.0] * 63 + [1.0]]
    assert weights_of(values, limit=100.0)[-1] > 60
    assert weights_of(values, limit=3.0)[-1] < 17


def test_a_clip_without_the_reward_counts_as_the_least_and_none_is_an_error():
    assert torch.equal(weights_of([[math.nan, 0.2, 0.8]]), weights_of([[0.2, 0.2, 0.8]])) is False
    lost = weights_of([[math.nan, 0.2, 0.8]])
    assert lost[0] == lost[1] < lost[2]
    with pytest.raises(UserError, match=r"rewards\.0: none of 2 clips has it: look at the clips; or remove"):
        weights_of([[math.nan, math.nan]])


def test_one_clip_is_refused_unless_its_scale_is_given():
    with pytest.raises(UserError, match="1 clip in an update has no standard deviation; raise"):
        weights_of([[0.5]])
    assert weights_of([[0.5]], scale=(0.4, 0.1)) == 1.0, "alone its weight is the mean"
    pair = weights_of([[0.5, 0.4]], scale=(0.4, 0.1), beta=1.0)
    assert pair[0] / pair[1] == pytest.approx(math.e)


def test_a_band_rewards_what_lies_within():
    reward = Reward(metric=Sharpness(relative=False), band=(2.0, 3.0))
    assert [reward.value({"sharpness": x}) for x in (1.5, 2.0, 2.7, 4.0)] == [-0.5, 0.0, 0.0, -1.0]


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: Reward(metric=Identity(), score="identities"), "identity gives no score 'identities'"),
        (lambda: Reward(metric=Identity(), band=(1.0, 0.0)), "band"),
        (lambda: Reward(metric=Identity(), scale=(1.0, 0.0)), "scale"),
        (lambda: Config(rewards={"sync": Reward(metric=Identity(), weight=0.0)}), "none has a weight"),
        (lambda: Config(rewards={"sync": SYNC}, beta=-1.0), "beta"),
        (lambda: Config(rewards={"sync": SYNC}, rollout_chunks=8), "rollout_chunks"),
    ],
)
def test_wrong_configs_are_refused(make_it, words):
    with pytest.raises(UserError, match=words):
        make_it()


def test_a_clips_gradient_is_plain_dmds_times_its_weight():
    """d loss / d x0 of each clip, the scores and the rollout as they are."""
    method, reader = make(beta=1.3), Reader(slope())
    method.reader = reader
    batch, eps = a_batch(4), randn(4, 4, 8, 4, 4, seed=6)
    sigma, x0 = torch.linspace(0.3, 0.9, 4), randn(4, 4, 8, 4, 4, seed=5)
    found = []
    for plain in (True, False):
        leaf = x0.clone().requires_grad_()
        step = dmd.DMD._student if plain else RewardDMD._student
        step(method, dmd.Rollouts(leaf, sigma, sigma, eps, batch.conditions, batch)).value.backward()
        found.append(leaf.grad)
    values = (x0 * slope()).flatten(1).sum(1).double().tolist()
    expected = torch.tensor(by_hand([values], [1.0], 1.3, 3.0)).view(-1, 1, 1, 1, 1) * found[0]
    assert reader.calls == 1
    assert torch.allclose(found[1], expected, rtol=1e-5, atol=1e-9)
    assert not torch.allclose(found[1], found[0], rtol=0.05)


def test_the_fake_scores_loss_is_weighed_the_other_way():
    method, batch = make(beta=1.3, weighs="fake_score"), a_batch(4)
    eps, sigma, x0 = randn(4, 4, 8, 4, 4, seed=6), torch.linspace(0.3, 0.9, 4), randn(4, 4, 8, 4, 4, seed=5)
    drawn = dmd.Rollouts(x0, sigma, sigma, eps, batch.conditions, batch)

    def alone(i):
        x0_i, sigma_i, eps_i = (value[i : i + 1] for value in (x0, sigma, eps))
        return dmd.Rollouts(x0_i, sigma_i, sigma_i, eps_i, batch.conditions.index(torch.tensor([i])), batch)

    each = [dmd.DMD._fake_score(method, alone(i)) for i in range(4)]
    values = (x0 * slope()).flatten(1).sum(1).double().tolist()
    weights = by_hand([[-x for x in values]], [1.0], 1.3, 3.0)
    expected = sum(w * float(loss.value.detach()) for w, loss in zip(weights, each, strict=True)) / 4
    assert float(method._fake_score(drawn).value.detach()) == pytest.approx(expected, rel=1e-5)


def test_frames_are_looked_at_in_the_students_update_alone():
    method, batch = make(), a_batch(3)
    for role, calls in (("fake_score", 0), ("student", 1)):
        loss = method.loss(role, batch, rng(1), rng(2))
        assert method.reader.calls == calls
    assert {"reward_sync", "spread_sync", "effective_clips"} <= set(loss.metrics)
    assert all(not value.requires_grad for value in loss.metrics.values())


def worker(folder: Path) -> None:
    """A rank of two with two of the four clips."""
    dist.init_process_group("gloo")
    rank, batch, x0 = dist.get_rank(), a_batch(4), randn(4, 4, 8, 4, 4, seed=5)
    mine = torch.arange(4)[2 * rank : 2 * rank + 2]
    given = Batch(batch.conditions.index(mine), batch.x0[mine])
    found = weigh({"sync": SYNC}, 1.0, 3.0, RankReader(slope()), x0[mine], given.conditions, given)
    torch.save((found.weights, found.metrics({"sync": 0})), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_weigh_as_one_with_the_joined_batch(tmp_path):
    run_ranks(__file__, tmp_path, 2)
    batch, x0 = a_batch(4), randn(4, 4, 8, 4, 4, seed=5)
    whole = weigh({"sync": SYNC}, 1.0, 3.0, Reader(slope()), x0, batch.conditions, batch)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.equal(torch.cat([weights for weights, _ in parts]), whole.weights)
    assert all(logged == whole.metrics({"sync": 0}) for _, logged in parts)


BETA = 0.5
LINEAR = torch.tensor([[0.0, 0.6, -0.2, 0.5], [0.0, 0.3, 0.4, -0.1]]).view(2, 4, 1, 1)


def distil(folder: Path, weighs: str, num_steps: int) -> oracle.AffineStudent:
    """The oracle's distillation with a linear reward of the clip."""
    student, fake_score = oracle.AffineStudent((1.0,)), oracle.LearnedGaussian()
    config = Config(rewards={"sync": SYNC}, beta=BETA, limit=20.0, weighs=weighs, fake_updates=3, warmup=60)
    method = RewardDMD(config, student, oracle.oracle(), fake_score)
    method.reader = Reader(LINEAR)
    settings = TrainConfig(
        num_steps=num_steps,
        batch_size=256,
        ema_decay=0.98,
        checkpoint_every=0,
        optimizers={
            "student": OptimizerConfig(lr=0.02, betas=(0.5, 0.95), final=0.02),
            "fake_score": OptimizerConfig(lr=0.02, betas=(0.5, 0.95), final=0.1),
        },
    )
    trainer = Trainer(Ranks(), settings, {"student": student, "fake_score": fake_score}, "student", folder)
    log = MetricsLog(folder / "metrics.jsonl")
    train(trainer, method, lambda i: Batch(oracle.given(256, seed=i)), stage="dmd", seed=0, log=log)
    trainer.ema.copy_to(student)
    return student


@torch.no_grad()
def tilt(student: oracle.AffineStudent, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(Mean of the rollouts for one reference, the teacher's, the teacher's tilted by exp(beta r / std r))."""
    teacher, num = oracle.oracle(), 40_000
    a = oracle.frames(LINEAR[None])[0].double()
    between = oracle.frames(teacher.expectation(oracle.given(20_000, 7))) @ a
    spread = math.sqrt(float(a @ teacher.covariance @ a + between.var()))
    one = oracle.given(1, seed)
    many = one.index(torch.zeros(num, dtype=torch.long))
    flat = oracle.frames(rollout(student, many, draw_noise(student, num, rng(seed)))).double()
    mean = oracle.frames(teacher.expectation(one))[0]
    return flat.mean(0), mean, mean + BETA / spread * teacher.covariance @ a


@pytest.mark.slow
def test_a_weighed_fake_score_ends_at_the_tilted_distribution(tmp_path):
    """p exp(beta r) of a Gaussian p with a linear r is p moved by beta Sigma a."""
    with torch.enable_grad():
        student = distil(tmp_path, "fake_score", 300)
    for seed in (1, 2):
        found, plain, tilted = tilt(student, seed)
        moved = (tilted - plain).norm()
        print(found, plain, tilted)
        assert moved > 0.3
        assert (found - tilted).norm() < 0.2 * moved


@pytest.mark.slow
def test_a_weighed_student_ends_at_the_teacher(tmp_path):
    """What can hold the teacher ends there, whatever the reward: both gradients vanish together."""
    with torch.enable_grad():
        student = distil(tmp_path, "student", 300)
    for seed in (1, 2):
        found, plain, tilted = tilt(student, seed)
        print(found, plain, tilted)
        assert (found - plain).norm() < 0.2 * (tilted - plain).norm()
