"""Score identity distillation (Zhou et al. 2404.04057) over the student's own rollouts: a method from outside the package.

    min over the student  mean (r - f) ((r - x0) - alpha (r - f)) / mean |x0 - r|        x0 a rollout, x_s = (1 - s) x0 + s eps
    r, f: x0 predictions at x_s of the guided teacher and of the fake score, which learns to denoise rollouts

In contrast to DMD the gradient runs through both scores, not through the normaliser. A method is a file with a frozen `Config`,
`needs` and `build`; a recipe names it `file:Config` (see score_identity.yaml).
"""

from dataclasses import dataclass, field

import torch

from distill.methods import Batch, Loss, Needs, losses
from distill.methods.rollout import draw_noise, rollout
from teachers import flow
from teachers.guidance import Guidance, guided


@dataclass(frozen=True, kw_only=True)
class Config:
    """`fake_updates` steps of the fake score precede each of the student; scores are compared at sigmas shifted by `shift`."""

    alpha: float = 1.0
    fake_updates: int = 4
    shift: float = 3.0
    guidance: Guidance = field(default_factory=Guidance)


class ScoreIdentity:
    """Roles: `fake_score` and `student`; `teacher` is frozen."""

    def __init__(self, config: Config, student, teacher, fake_score):
        self.config, self.student, self.teacher, self.fake_score = config, student, teacher, fake_score

    def roles_to_update(self, step: int) -> tuple[str, ...]:
        return ("fake_score",) * self.config.fake_updates + ("student",)

    def loss(self, role: str, batch: Batch, rng: torch.Generator, shared: torch.Generator) -> Loss:
        conditions = batch.conditions
        start, noise = len(conditions.known), draw_noise(self.student, conditions.num_rows, rng)
        with torch.set_grad_enabled(role == "student" and torch.is_grad_enabled()):
            x0 = rollout(self.student, conditions, noise)
        sigma = flow.shift_sigma(torch.rand(x0.shape[0], generator=rng), self.config.shift).clamp(0.02, 0.98).to(x0)
        eps = torch.randn(x0.shape, generator=rng).to(x0)
        if role == "fake_score":
            x0_hat = self.fake_score.denoise(flow.add_noise(x0, eps, sigma), sigma, conditions)
            value = losses.denoising(x0_hat, x0, sigma, 1.0, 0.02, start)
            return Loss(value, {"loss": value.detach()})

        def identity(clip: torch.Tensor) -> torch.Tensor:
            x = flow.add_noise(clip, eps, sigma)
            real = guided(self.teacher.denoise, x, sigma, conditions, self.config.guidance).float()
            gap = real - self.fake_score.denoise(x, sigma, conditions).float()
            scale = losses.frame_mean((clip - real).abs(), start).detach()
            value = losses.frame_mean(gap * ((real - clip) - self.config.alpha * gap), start)
            return (value / (scale + 1e-6)).mean()

        gradient = losses.grad_wrt_input(identity, x0)  # and none in the scores' weights
        return Loss(losses.gradient_as_loss(x0, gradient), {"sid_grad_abs": gradient.abs().mean()})


def needs(config: Config) -> Needs:
    return Needs(trained=("student", "fake_score"), frozen=("teacher",))


def build(config: Config, roles: dict, grid=None) -> ScoreIdentity:
    return ScoreIdentity(config, roles["student"], roles["teacher"], roles["fake_score"])
