"""Recovery from drift (Avatar-Forever 2608.12107): a few-step student learns to go on from a perturbed past as from a clean one.

    h = perturb(x0 of the first chunks), then the student's own rollout under it
    min E |D(x_j, sigma_j | h before j) - y_j|^2 / sigma_j^power    over chunks j that come after `early` + `rolled` others

x_j is the data's chunk at one of the student's own denoising sigmas, y_j the data. Meant for a LoRA over a frozen few-step student,
which is trained apart and merged when it is exported (`lora.scale`): recipe `recovery_avatar`.

`target: ar_teacher` (ours): y_j is what that student without the adapter makes of the same x_j under the clean past. Where it
denoises exactly, both have one optimum, as E[x0 | x, h] = E[E[x0 | x, clean past] | x, h]. A few-step student does not: its step
from pure noise gives a sample, and regression on data would make that a mean.

We differ: the paper trains its adapter over the many-step foundation model, and publishes neither code nor sizes of perturbations;
ours are in latents, and leave the given reference frame as it is. A share `clean` of clips has the data as its past.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d

from distill.methods import Batch, Loss, Needs, losses
from distill.methods.rollout import draw_noise, rollout
from students.student import Student
from teachers import flow
from teachers.conditions import Conditions
from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """The first `early` chunks are perturbed, `rolled` of the student's own follow without loss. Each clip draws a sigma of noise
    up to `noise`, a share of 3x3 means up to `blur`, and for each channel a shift and a logarithm of contrast, with the standard
    deviations `shift` and `contrast`. A clip has the data as its past with probability `clean`."""

    target: Literal["data", "ar_teacher"] = "data"
    early: int = 1
    rolled: int = 1
    clean: float = 0.25
    noise: float = 0.3
    blur: float = 0.5
    shift: float = 0.3
    contrast: float = 0.2
    loss_power: float = 1.0
    loss_floor: float = 0.15

    def __post_init__(self):
        if self.early < 1 or self.rolled < 0:
            raise UserError(f"recovery.early, rolled: got {self.early}, {self.rolled}; chunks, from 1 and from 0")
        if not 0.0 <= self.clean <= 1.0 or not 0.0 <= self.noise < 1.0 or not 0.0 <= self.blur <= 1.0:
            raise UserError(
                f"recovery.clean, noise, blur: got {self.clean}, {self.noise}, {self.blur}; a probability, a sigma in [0, 1), "
                "a share"
            )
        if min(self.shift, self.contrast) < 0.0:
            raise UserError(f"recovery.shift, contrast: got {self.shift}, {self.contrast}; 0 is off")


class Recovery:
    """Role `student`: one masked pass over a clip behind a perturbed past; with `target: ar_teacher` that role is frozen."""

    def __init__(self, config: Config, student: Student, ar_teacher: Student | None = None):
        self.config, self.student, self.ar_teacher = config, student, ar_teacher

    def roles_to_update(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def loss(self, role: str, batch: Batch, rng: torch.Generator, shared: torch.Generator) -> Loss:
        x0, config, spec = batch.x0, self.config, self.student.spec
        assert x0 is not None
        n, sigmas = spec.chunk_frames, torch.tensor(spec.sigmas)
        sigma = sigmas[torch.randint(len(sigmas), (x0.shape[0], x0.shape[2] // n), generator=rng)].to(x0)
        levels = sigma.repeat_interleave(n, dim=1)
        x = flow.add_noise(x0, torch.randn(x0.shape, generator=rng).to(x0), levels)
        past = self._past(x0, batch.conditions, rng, shared)
        target = x0
        if self.ar_teacher is not None:
            with torch.no_grad():
                target = self.ar_teacher.denoise_clip(x, sigma, batch.conditions, x0)
        x0_hat = self.student.denoise_clip(x, sigma, batch.conditions, past)
        start = (config.early + config.rolled) * n
        value = losses.denoising(x0_hat, target, levels, config.loss_power, config.loss_floor, start)
        return Loss(value, {"loss": value.detach()})

    @torch.no_grad()
    def _past(self, x0: Tensor, conditions: Conditions, rng: torch.Generator, shared: torch.Generator) -> Tensor:
        """x0 [B, C, F, H, W] of the data; in all rows but the clean ones its first chunks perturbed, the others but the last, which
        nothing sees, the student's own. Which rows is the same on every rank, so that all run the same passes."""
        n, early = self.student.spec.chunk_frames, self.config.early
        rows = torch.nonzero(torch.rand(x0.shape[0], generator=shared) >= self.config.clean).flatten()
        if not len(rows):
            return x0
        given, known, stop = conditions.index(rows), len(conditions.known), x0.shape[2] - n
        perturbed, out = perturb(x0[rows, :, : early * n], self.config, rng), x0.clone()
        perturbed[:, :, :known] = x0[rows, :, :known]
        out[rows, :, : early * n] = perturbed
        if stop > early * n:

            def corrupt(j: int, own: Tensor) -> Tensor:
                return perturbed[:, :, j * n : (j + 1) * n] if j < early else own

            noise = draw_noise(self.student, len(rows), rng)
            own = rollout(self.student, given.frames(0, stop), noise, start=early, corrupt=corrupt)
            out[rows, :, early * n : stop] = own.to(out)
        return out


def perturb(x0: Tensor, config: Config, rng: torch.Generator) -> Tensor:
    """x0 [B, C, F, H, W] as drift may leave it: blurred, each channel with another contrast and mean, noisy."""
    num, channels = x0.shape[:2]
    blur, sigma = (most * torch.rand(num, generator=rng).to(x0) for most in (config.blur, config.noise))
    gain, shift = (
        size * torch.randn(num, channels, 1, 1, 1, generator=rng).to(x0) for size in (config.contrast, config.shift)
    )
    soft = x0
    if config.blur:
        means = avg_pool3d(x0, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)
        soft = torch.lerp(x0, means, blur.view(-1, 1, 1, 1, 1))
    level = soft.mean(dim=(2, 3, 4), keepdim=True)
    eps = torch.randn(x0.shape, generator=rng).to(x0)
    return flow.add_noise(level + gain.exp() * (soft - level) + shift, eps, sigma)


def needs(config: Config) -> Needs:
    return Needs(trained=("student",), frozen=("ar_teacher",) if config.target == "ar_teacher" else ())


def build(config: Config, roles: dict, grid=None) -> Recovery:
    spec = roles["student"].spec
    if spec.history.commit == "same_level" or spec.schedule.depth > 1:
        raise UserError("recovery: it is for a clean history of finished chunks, one after the other; use forcing")
    if config.early + config.rolled >= spec.num_chunks:
        raise UserError(
            f"recovery.early, rolled: got {config.early} and {config.rolled} of a clip's {spec.num_chunks} chunks; leave one "
            "for the loss"
        )
    return Recovery(config, roles["student"], roles["ar_teacher"] if config.target == "ar_teacher" else None)
