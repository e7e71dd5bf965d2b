"""DMD's options against the Gaussian oracle: they end where theory says."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from distill.methods import Batch
from distill.methods.dmd import DMD, Config
from distill.methods.rollout import draw_noise, of_length, rollout
from students.history import History
from students.schedule import Schedule
from tests.distill.methods.test_gaussian import (
    MEAN,
    SPATIAL,
    C,
    F,
    LearnedGaussian,
    given,
)
from tests.support.methods.gaussian import OneFrameStudent, autoregressive
from tests.support.tiny import rng

pytestmark = pytest.mark.slow


def distil(method: DMD, num_steps: int, lr: float = 0.02) -> None:
    """The loop of the Gaussian test without its files: the rate falls to 2 %."""
    optimizers = {
        name: torch.optim.Adam(getattr(method, name).parameters(), lr=lr, betas=(0.5, 0.95))
        for name in ("student", "fake_score")
    }
    position = 0
    for step in range(num_steps):
        for role in method.roles_to_update(step):
            optimizer, final = optimizers[role], 0.02 if role == "student" else 0.1
            optimizer.param_groups[0]["lr"] = lr * (final + (1 - final) * (1 - step / num_steps))
            loss = method.loss(role, Batch(given(256, seed=position)), rng(position), rng(position, 1))
            loss.value.backward()
            optimizer.step()
            for each in optimizers.values():
                each.zero_grad()
            position += 1


@torch.no_grad()
def moments(student, num: int, num_frames: int = F) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and covariance of rollouts from one reference, which is the third."""
    one = given(1, seed=1)
    many = of_length(one.index(torch.zeros(num, dtype=torch.long)), num_frames)
    flat = rollout(student, many, draw_noise(student, num, rng(1), num_frames))[:, :, 1:].flatten(1).double()
    return flat.mean(0), torch.cov(flat.T), one


class SteadyStudent(OneFrameStudent):
    """x0 = A noise + P previous + b, the same for every chunk: it can stream without end."""

    def __init__(self):
        super().__init__()
        self.spec = SimpleNamespace(
            guidance=None,
            history=History(),
            schedule=Schedule(),
            sigmas=(1.0,),
            steps=lambda chunk: (1.0,),
            chunk_frames=1,
            num_chunks=F,
            latent_size=(C, 1, 1),
        )
        self.own = nn.Parameter(0.3 * torch.eye(C))
        self.previous, self.bias = nn.Parameter(torch.zeros(C, C)), nn.Parameter(torch.zeros(C))

    def denoise(self, state, plan, x, sigma, conditions, step):
        if state[0] == 0:
            return conditions.reference, None
        seen = x.flatten(1) @ self.own.T + state[1].flatten(1) @ self.previous.T + self.bias
        return seen.view_as(x), None


def test_long_rollouts_learn_a_process_without_end():
    """A stationary AR(1): streams of 12 frames have its mean and covariance after rollouts of 4 to 8 with windows of 4, whose
    scores are given the student's own frame before the window's others."""
    mean = MEAN[:, :1].expand(C, F, 1, 1)
    student, teacher = SteadyStudent(), autoregressive(mean, SPATIAL, 0.7)
    config = Config(rollout_chunks=8, fake_updates=2, warmup=60)
    distil(DMD(config, student, teacher, LearnedGaussian()), 240)
    exact = autoregressive(MEAN[:, :1].expand(C, 12, 1, 1), SPATIAL, 0.7)
    mean, covariance, one = moments(student, 30_000, 12)
    assert (mean - exact.expectation(one)[0, :, 1:].flatten()).abs().max() < 0.06
    assert (covariance - exact.covariance).norm() < 0.1 * exact.covariance.norm()
