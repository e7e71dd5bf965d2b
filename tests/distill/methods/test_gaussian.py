"""The exact Gaussian teacher: Tweedie, the solver's order, and a distillation that ends where theory says."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from distill.methods import Batch
from distill.methods.dmd import DMD, Config
from distill.methods.rollout import draw_noise, rollout
from distill.training.config import OptimizerConfig, TrainConfig
from distill.training.loop import train
from distill.training.metrics_log import MetricsLog
from distill.training.trainer import Trainer
from students.history import History
from students.schedule import Schedule
from teachers import flow
from teachers.conditions import Conditions
from tests.support.methods.gaussian import GaussianTeacher, OneFrameStudent, autoregressive
from tests.support.tiny import Ranks, randn, rng

C, F = 2, 4
MEAN = torch.tensor([[0.3, 0.8, -0.5, 0.4], [-0.2, -0.6, 0.5, 1.0]]).view(C, F, 1, 1)
SPATIAL = torch.tensor([[1.0, 0.5], [0.5, 0.6]])


def oracle() -> GaussianTeacher:
    return autoregressive(MEAN, SPATIAL, 0.7)


def given(batch: int, seed: int = 0) -> Conditions:
    """References drawn from the marginal of frame 0."""
    root = torch.linalg.cholesky(SPATIAL)
    reference = MEAN[:, 0].flatten() + randn(batch, C, seed=seed) @ root.T
    return Conditions(
        text=torch.zeros(batch, 1, 1), audio=torch.zeros(batch, F, 1, 1), reference=reference.view(batch, C, 1, 1, 1)
    )


def frames(x: Tensor) -> Tensor:
    """Generated frames, flat [B, C * (F - 1)]."""
    return x[:, :, 1:].flatten(1)


def test_the_closed_form_is_the_ar1_process():
    """E[x_f | reference] = mean_f + rho^f (reference - mean_0); cov(x_f, x_g) = (rho^|f-g| - rho^(f+g)) spatial."""
    teacher, conditions = oracle(), given(3)
    for f in range(1, F):
        expected = MEAN[:, f] + 0.7**f * (conditions.reference[:, :, 0] - MEAN[:, 0])
        assert torch.allclose(teacher.expectation(conditions)[:, :, f].float(), expected, atol=1e-6)
    covariance = teacher.covariance.view(C, F - 1, C, F - 1)
    for f in range(1, F):
        for g in range(1, F):
            expected = (0.7 ** abs(f - g) - 0.7 ** (f + g)) * SPATIAL
            assert torch.allclose(covariance[:, f - 1, :, g - 1].float(), expected, atol=1e-6)


def test_samples_have_the_moments():
    teacher, one = oracle(), given(1)
    many = one.index(torch.zeros(40_000, dtype=torch.long))
    x0 = teacher.sample(many, rng(1))
    assert torch.equal(x0[:, :, :1], many.reference.double())
    flat = frames(x0)
    assert torch.allclose(flat.mean(0), frames(teacher.expectation(one))[0], atol=0.02)
    assert torch.allclose(torch.cov(flat.T), teacher.covariance, atol=0.02)
    assert torch.equal(x0, teacher.sample(many, rng(1)))


def test_tweedie_by_autograd():
    """x0_hat = (x + sigma^2 grad log p_sigma(x)) / (1 - sigma), the density taken from torch.distributions."""
    teacher, conditions, size = oracle(), given(3), C * (F - 1)
    mean = frames(teacher.expectation(conditions))
    for s in (0.1, 0.5, 0.95):
        x = randn(3, C, F, 1, 1, seed=2).double().requires_grad_()
        covariance = (1 - s) ** 2 * teacher.covariance + s**2 * torch.eye(size, dtype=torch.float64)
        density = torch.distributions.MultivariateNormal((1 - s) * mean, covariance)
        (score,) = torch.autograd.grad(density.log_prob(frames(x)).sum(), x)
        x0 = teacher.denoise(x, torch.full((3,), s), conditions)
        assert torch.allclose(frames(x0), frames((x + s**2 * score) / (1 - s)), atol=1e-9 if s != 0.95 else 1e-7)
        assert torch.equal(x0[:, :, :1], conditions.reference.double())


def test_the_ends_of_the_noise():
    teacher, conditions, x = oracle(), given(2), randn(2, C, F, 1, 1, seed=3)
    assert torch.allclose(frames(teacher.denoise(x, torch.zeros(2), conditions)), frames(x), atol=1e-6)
    noise_only = teacher.denoise(x, torch.ones(2), conditions)
    assert torch.allclose(noise_only, teacher.expectation(conditions).float(), atol=1e-6)
    assert noise_only.dtype == torch.float32


def test_the_solver_has_order_one():
    teacher, conditions, noise = oracle(), given(4), randn(4, C, F, 1, 1, seed=4).double()
    exact, errors = teacher.solution(noise, 0.0, conditions), []
    for num_steps in (32, 64, 128, 256):
        grid = flow.sigma_grid(num_steps, 3.0)
        *_, end = flow.solve(lambda x, sigma: teacher.denoise(x, sigma, conditions), noise, grid)
        errors.append(float((frames(end) - frames(exact)).abs().max()))
    orders = torch.tensor(errors).log2().diff().neg().tolist()
    assert errors[-1] < 0.02
    assert orders == pytest.approx([1.0, 1.0, 1.0], abs=0.15)


def test_a_matrix_that_is_no_covariance_is_refused():
    with pytest.raises(ValueError, match="not positive definite"):
        autoregressive(MEAN, torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0.7)


class AffineStudent(OneFrameStudent):
    """The smallest causal student that can hold the teacher: per chunk and step x0 = A x + P previous + b."""

    def __init__(self, sigmas: tuple[float, ...]):
        super().__init__()
        self.spec = SimpleNamespace(
            guidance=None,
            history=History(),
            schedule=Schedule(),
            sigmas=sigmas,
            steps=lambda chunk: sigmas,
            chunk_frames=1,
            num_chunks=F,
            latent_size=(C, 1, 1),
        )
        self.own = nn.Parameter(0.3 * torch.eye(C).repeat(F, len(sigmas), 1, 1))
        self.previous = nn.Parameter(torch.zeros(F, len(sigmas), C, C))
        self.bias = nn.Parameter(torch.zeros(F, len(sigmas), C))

    def denoise(self, state, plan, x, sigma, conditions, step):
        chunk, past = state
        if chunk == 0:
            return conditions.reference, None
        seen = x.flatten(1) @ self.own[chunk, step].T + past.flatten(1) @ self.previous[chunk, step].T
        return (seen + self.bias[chunk, step]).view_as(x), None


class LearnedGaussian(nn.Module):
    """A fake score that can be exact: the closed-form denoiser of N(m + G reference, L L^T), all three learnt."""

    def __init__(self):
        super().__init__()
        size = C * (F - 1)
        self.mean, self.gain = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size, C))
        self.root = nn.Parameter(0.5 * torch.eye(size))

    def denoise(self, x, sigma, conditions):
        s, eye = sigma.view(-1, 1, 1), torch.eye(len(self.mean))
        covariance = self.root @ self.root.T + 1e-4 * eye
        mean = self.mean + conditions.reference.flatten(1) @ self.gain.T
        centred = frames(x) - (1 - s[:, 0]) * mean
        whitened = torch.linalg.solve((1 - s) ** 2 * covariance + s**2 * eye, centred.unsqueeze(2))
        x0 = mean + ((1 - s) * (covariance @ whitened)).squeeze(2)
        return torch.cat([conditions.reference, x0.view(-1, C, F - 1, 1, 1)], dim=2)


def distil(folder, num_steps: int = 400) -> AffineStudent:
    """One step a chunk: with several, exits are drawn at random and only the mixture over exits is matched."""
    student, fake_score = AffineStudent((1.0,)), LearnedGaussian()
    method = DMD(Config(fake_updates=3, warmup=60), student, oracle(), fake_score)
    config = TrainConfig(
        num_steps=num_steps,
        batch_size=256,
        ema_decay=0.98,
        checkpoint_every=0,
        optimizers={
            "student": OptimizerConfig(lr=0.02, betas=(0.5, 0.95), final=0.02),
            "fake_score": OptimizerConfig(lr=0.02, betas=(0.5, 0.95), final=0.1),
        },
    )
    trainer = Trainer(Ranks(), config, {"student": student, "fake_score": fake_score}, "student", folder)
    log = MetricsLog(folder / "metrics.jsonl")
    train(trainer, method, lambda i: Batch(given(256, seed=i)), stage="dmd", seed=0, log=log)
    trainer.ema.copy_to(student)
    return student


@torch.no_grad()
def test_dmd_converges_to_the_gaussian(tmp_path):
    """Mean, dependence on the reference and covariance of the rollouts are the teacher's (measured: 0.01, 2 %)."""
    teacher, num = oracle(), 40_000
    with torch.enable_grad():
        student = distil(tmp_path)
    for seed in (1, 2):
        one = given(1, seed)
        many = one.index(torch.zeros(num, dtype=torch.long))
        flat = frames(rollout(student, many, draw_noise(student, num, rng(seed)))).double()
        mean, covariance = frames(teacher.expectation(one))[0], teacher.covariance
        assert (flat.mean(0) - mean).abs().max() < 0.03
        assert (torch.cov(flat.T) - covariance).norm() < 0.04 * covariance.norm()
