"""Causal consistency distillation under teacher forcing, without stored trajectories: f(x_s, s | data before) is one x0 along
the autoregressive teacher's ODE dx/ds = v.

`kind: discrete` is Causal Forcing++ (2605.15141), consistency distillation (Song et al. 2303.01469, eq. 7) on a grid
s_0 = 1 > .. > s_N = 0: x_s from data, one guided Euler step of the teacher to s', then

    min E |f(x_s, s) - sg f(x_s', s')|^2

`kind: continuous` is the limit N -> inf of Causal-rCM (2606.25473), sCM of Lu & Song (2410.11081) on the linear path:

    min E |f - sg(f - g / (rms(g) + c))|^2,   g = s df/ds,   df/ds = (df/dx) v + df/ds|_x, one Jacobian-vector product

whose gradient is that of MeanFlow towards s' = 0 (2505.13447). At a solution g = 0.

We differ: each chunk draws its own s (chunks do not see each other's noise; the papers share one). Both kinds end in an anchor,
the teacher's own x0 on the last interval, so that the boundary f(x, 0) = x also holds for networks that predict x0. Targets are
the student's own, without the EMA of Causal Forcing++ (as Song & Dhariwal 2310.14189 train). Continuous: no tangent
warm-up, and forward differentiation needs the math kernel of attention, whose memory grows with the square of a clip's tokens:
for long clips use discrete.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.methods import Batch, Loss, Needs, losses
from distill.methods.forcing import Forced, strata
from students.student import Student
from teachers import flow
from teachers.conditions import Conditions
from teachers.errors import UserError
from teachers.guidance import Guidance, guided


@dataclass(frozen=True, kw_only=True)
class Config:
    """Discrete: the grid has `num_steps` of this `shift`, the student's sigmas must lie on it. Continuous: s is uniform, shifted
    by `shift`; up to `anchor` the target is the teacher's x0; `softening` is c. `guidance` is the teacher's."""

    kind: Literal["discrete", "continuous"] = "discrete"
    guidance: Guidance = field(default_factory=Guidance)
    num_steps: int = 48
    shift: float = 3.0
    anchor: float = 0.06
    softening: float = 0.1

    def __post_init__(self):
        if self.num_steps < 1:
            raise UserError(f"consistency.num_steps: got {self.num_steps}; a grid has at least 1")
        if not 0.0 < self.anchor < 1.0:
            raise UserError(f"consistency.anchor: got {self.anchor}; it is a sigma between 0 and 1")
        if self.softening <= 0.0:
            raise UserError(f"consistency.softening: got {self.softening}; it must be above 0")


class Consistency:
    """Role `student`; `ar_teacher` is frozen. A batch holds data x0."""

    def __init__(self, config: Config, student: Student, ar_teacher: Student):
        self.config, self.student, self.ar_teacher = config, student, ar_teacher
        self.grid = torch.tensor(flow.sigma_grid(config.num_steps, config.shift))

    def roles_to_update(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def loss(self, role: str, batch: Batch, rng: torch.Generator, shared: torch.Generator) -> Loss:
        clean, start = batch.x0, len(batch.conditions.known)
        assert clean is not None
        size = (clean.shape[0], clean.shape[2] // self.student.spec.chunk_frames)
        if self.config.kind == "discrete":
            index = torch.randint(self.config.num_steps, size, generator=rng)
            sigma, end = self.grid[index].to(clean), self.grid[index + 1].to(clean)
        else:
            sigma = flow.shift_sigma(strata(size, rng), self.config.shift).clamp(min=1e-3).to(clean)
            end = torch.where(sigma <= self.config.anchor, 0.0, sigma)
        x = flow.add_noise(clean, torch.randn(clean.shape, generator=rng).to(clean), self._frames(sigma))
        with torch.no_grad():
            teacher = Forced(self.ar_teacher, clean)
            teacher_x0 = guided(teacher.denoise, x, sigma, batch.conditions, self.config.guidance)
        x0_hat = self.student.denoise_clip(x, sigma, batch.conditions, clean)
        with torch.no_grad():
            velocity, inner = flow.velocity_from_x0(x, teacher_x0, self._frames(sigma)), self._wide(end) > 0
            if self.config.kind == "discrete":
                target = self._next(x, velocity, sigma, end, batch.conditions, clean)
            else:  # an anchored chunk has its own target and no part in the length of the tangent
                tangent = self._wide(sigma) * inner * self._tangent(x, velocity, sigma, batch.conditions, clean)
                target = x0_hat - losses.unit_tangent(tangent, self.config.softening, start)
            target = torch.where(inner, target, teacher_x0)
        value = losses.regression(x0_hat, target, start)
        return Loss(value, {"loss": value.detach()})

    def _frames(self, sigma: Tensor) -> Tensor:
        """Per chunk -> per frame, [B, F]."""
        return sigma.repeat_interleave(self.student.spec.chunk_frames, dim=1)

    def _wide(self, sigma: Tensor) -> Tensor:
        """Per chunk -> [B, 1, F, 1, 1], fp32."""
        return self._frames(sigma).float()[:, None, :, None, None]

    def _next(self, x, velocity, sigma, end, conditions: Conditions, clean: Tensor) -> Tensor:
        """The student's x0 from where the teacher's Euler step ends."""
        x = (x + self._wide(end - sigma) * velocity).to(x)
        return self.student.denoise_clip(x, end, conditions, clean)

    def _tangent(self, x, velocity, sigma, conditions: Conditions, clean: Tensor) -> Tensor:
        """df/ds along the teacher's ODE; every chunk's own, for a chunk sees no other chunk's x or sigma. fp32 throughout."""

        def student(x: Tensor, sigma: Tensor) -> Tensor:
            return self.student.denoise_clip(x, sigma, conditions, clean)

        direction = (velocity.to(x), torch.ones_like(sigma))
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(x.device.type, enabled=False):
            return torch.func.jvp(student, (x, sigma), direction)[1]


def needs(config: Config) -> Needs:
    return Needs(trained=("student",), frozen=("ar_teacher",))


def build(config: Config, roles: dict, grid=None) -> Consistency:
    spec = roles["student"].spec
    if spec.history.commit == "same_level":
        raise UserError("consistency: teacher forcing is not what a same_level history serves; use commit: clean")
    if config.kind == "discrete":
        flow.on_grid(spec.sigmas, flow.sigma_grid(config.num_steps, config.shift))
    return Consistency(config, roles["student"], roles["ar_teacher"])
