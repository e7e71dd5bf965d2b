"""Distribution matching distillation over the student's own rollouts (DMD2 2405.14867, Self Forcing 2506.08009).

Differences to the published recipes: the normaliser leaves out the given reference frame, the gradient is fp32 throughout, the
fake score trains before the student's first step, and guidance scales are effective ones (teachers.conditions.Guidance).
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from distill import losses
from distill.methods import Batch, Loss
from distill.rollout import draw_noise, rollout
from students.causal_wan import CausalWan
from teachers import flow
from teachers.conditions import Guidance
from teachers.errors import UserError
from teachers.wan import AvatarTeacher


@dataclass(frozen=True, kw_only=True)
class Config:
    """`fake_updates` fake-score steps precede each student step, `warmup` more come first. Scores are compared at sigma drawn
    uniformly, shifted by `shift` and clamped to [sigma_min, sigma_max]. `exit_step`: random is Self Forcing's, one for all chunks
    and ranks; last trains what is served: with random exits the fake score sees, and the student matches, their mixture."""

    guidance: Guidance = field(default_factory=Guidance)
    fake_updates: int = 5
    warmup: int = 20
    exit_step: Literal["random", "last"] = "random"
    shift: float = 1.0
    sigma_min: float = 0.02
    sigma_max: float = 0.98
    loss_power: float = 1.0
    loss_floor: float = 0.02

    def __post_init__(self):
        if not 0.0 < self.sigma_min < self.sigma_max <= 1.0:
            raise UserError(f"dmd sigmas: got {self.sigma_min}..{self.sigma_max}; need 0 < sigma_min < sigma_max <= 1")


class DMD:
    """Roles: `fake_score` (denoising loss on rollouts) and `student` (distribution-matching gradient); `teacher` is frozen."""

    def __init__(self, config: Config, student: CausalWan, teacher: AvatarTeacher, fake_score: AvatarTeacher):
        self.config, self.student, self.teacher, self.fake_score = config, student, teacher, fake_score

    def roles_to_update(self, step: int) -> tuple[str, ...]:
        """The cadence: fake_score fake_updates times (step 0: warmup more), then the student."""
        extra = self.config.warmup if step == 0 else 0
        return ("fake_score",) * (self.config.fake_updates + extra) + ("student",)

    def loss(self, role: str, batch: Batch, rng: torch.Generator, shared: torch.Generator) -> Loss:
        steps = len(self.student.spec.sigmas)
        exit_step = steps - 1 if self.config.exit_step == "last" else int(torch.randint(steps, (1,), generator=shared))
        return self._fake_score(batch, rng, exit_step) if role == "fake_score" else self._student(batch, rng, exit_step)

    def _sigma(self, like: Tensor, rng: torch.Generator) -> Tensor:
        """One score sigma per clip."""
        raw = torch.rand(like.shape[0], generator=rng)
        return flow.shift_sigma(raw, self.config.shift).clamp(self.config.sigma_min, self.config.sigma_max).to(like)

    def _fake_score(self, batch: Batch, rng: torch.Generator, exit_step: int) -> Loss:
        with torch.no_grad():
            noise = draw_noise(self.student, batch.conditions.text.shape[0], rng)
            x0 = rollout(self.student, batch.conditions, noise, exit_step)
        sigma = self._sigma(x0, rng)
        x = flow.add_noise(x0, torch.randn(x0.shape, generator=rng).to(x0), sigma)
        x0_hat = self.fake_score.denoise(x, sigma, batch.conditions)
        value = losses.denoising(x0_hat, x0, sigma, self.config.loss_power, self.config.loss_floor)
        return Loss(value, {"loss": value.detach()})

    def _student(self, batch: Batch, rng: torch.Generator, exit_step: int) -> Loss:
        noise = draw_noise(self.student, batch.conditions.text.shape[0], rng)
        x0 = rollout(self.student, batch.conditions, noise, exit_step)
        with torch.no_grad():
            sigma = self._sigma(x0, rng)
            x = flow.add_noise(x0, torch.randn(x0.shape, generator=rng).to(x0), sigma)
            real = self.config.guidance(lambda c: self.teacher.denoise(x, sigma, c), batch.conditions)
            fake = self.fake_score.denoise(x, sigma, batch.conditions)
            gradient = losses.dmd_gradient(x0, real, fake)
        value = losses.surrogate(x0, gradient)
        return Loss(value, {"dmd_grad_abs": gradient.abs().mean()})


def build(config: Config, roles: dict, grid=None) -> DMD:
    if config.exit_step == "random" and roles["student"].spec.history.commit == "same_level":
        raise UserError("dmd.exit_step: random leaves steps out that a same_level history keeps; use exit_step: last")
    return DMD(config, roles["student"], roles["teacher"], roles["fake_score"])
