"""Preference by dropped conditions (Avatar Forcing of KAIST 2601.00664): the student's own clips that ignore a condition lose.

    w = data, or a rollout of the student under c;   l = its rollout under c without one condition
    e(D, x) = mean over generated elements of |D(x_sigma, sigma | x before, c) - x|^2 / sigma^power, one noise and sigma for both
    min E -log sigmoid(-beta ((e(D, w) - e(R, w)) - (e(D, l) - e(R, l)))) + keep beta max(0, mean (e(D, w) - e(R, w)))

Equation 14 of Diffusion-DPO (2311.12908) on chunks, each at one of the student's own denoising sigmas behind its own clip's
past and under all of c. R is the frozen role `ar_teacher`: the finished student before this stage (recipe `preference_avatar`).

`samples: ar_teacher`: R makes the rollouts, DPO on fixed pairs. With `winner: own` and exact likelihoods it ends at
p(x|c) (p(x|c) / p(x|c without it))^(1 / beta'), which is guidance. With `winner: data` it learns whatever tells data from l, the
condition among it, and the data is no fixed point: what loses stays worse. `samples: student` rolls out the student that is
trained, which can chase what it moves. `keep` (ours; 0 is off) bounds the winners' error in the batch's mean; a few-step student
may pay for that with the spread of its samples.

We differ: the paper trains a many-step diffusion model of motion latents and drops what the user says and does; its training code
is not published. Equation 14 sums over elements where we take the mean, so that our beta is as many times larger.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from distill.methods import Batch, Loss, Needs, losses
from distill.methods.rollout import draw_noise, rollout
from students.student import Student
from teachers import flow
from teachers.conditions import Conditions, known
from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """`drop`: conditions, of which each update drops one, each as often. `winner`, `samples`, `beta`, `keep`: see above."""

    winner: Literal["data", "own"] = "data"
    samples: Literal["student", "ar_teacher"] = "ar_teacher"
    drop: tuple[str, ...] = ("audio",)
    beta: float = 1000.0
    keep: float = 0.0
    loss_power: float = 1.0
    loss_floor: float = 0.15

    def __post_init__(self):
        if not self.drop:
            raise UserError("preference.drop: names no condition; without one no clip loses")
        for name in self.drop:
            if known(name).name in ("reference", "guidance"):
                raise UserError(f"preference.drop: got {name}, which no stream goes without; name audio, text or pose")
        if self.beta <= 0.0 or self.keep < 0.0:
            raise UserError(f"preference.beta, keep: got {self.beta}, {self.keep}; above 0, and from 0")


class Preference:
    """Role `student`: one masked pass over the clips that win and those that lose, against the frozen `ar_teacher`'s."""

    def __init__(self, config: Config, student: Student, ar_teacher: Student):
        self.config, self.student, self.ar_teacher = config, student, ar_teacher

    def roles_to_update(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def loss(self, role: str, batch: Batch, rng: torch.Generator, shared: torch.Generator) -> Loss:
        assert batch.x0 is not None
        config, spec, given = self.config, self.student.spec, batch.conditions
        winner, loser = self._pair(batch.x0, given, rng, shared)
        n, sigmas, shape = spec.chunk_frames, torch.tensor(spec.sigmas), winner.shape
        sigma = sigmas[torch.randint(len(sigmas), (shape[0], shape[2] // n), generator=rng)].to(winner).repeat(2, 1)
        eps = torch.randn(shape, generator=rng).to(winner).repeat(2, 1, 1, 1, 1)
        x0, both = torch.cat([winner, loser]), Conditions.join_rows([given] * 2)
        levels = sigma.repeat_interleave(n, dim=1)
        x = flow.add_noise(x0, eps, levels)

        def errors(student: Student) -> Tensor:
            x0_hat = student.denoise_clip(x, sigma, both, x0)
            return losses.denoising_errors(x0_hat, x0, levels, config.loss_power, config.loss_floor, len(given.known))

        with torch.no_grad():
            reference = errors(self.ar_teacher)
        won, lost = (errors(self.student) - reference).chunk(2)
        margin = config.beta * (lost - won)
        value = -logsigmoid(margin).mean() + config.keep * config.beta * won.mean().clamp(min=0.0)
        return Loss(value, {"loss": value.detach(), **metrics(margin.detach(), won.detach())})

    @torch.no_grad()
    def _pair(
        self, x0: Tensor, conditions: Conditions, rng: torch.Generator, shared: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Clips [B, C, F, H, W] that win and that lose; which condition is dropped is the same on every rank. Two rollouts have
        noise of their own: under one noise the condition alone tells them apart, and no beta bounds how far the loss goes."""
        drop = self.config.drop
        name = drop[int(torch.randint(len(drop), (1,), generator=shared))]
        if not conditions.has(name):
            raise UserError(f"preference.drop: these clips have no {name}; they have {', '.join(conditions.features)}")
        student = self.student if self.config.samples == "student" else self.ar_teacher
        own = [conditions.drop(name)] if self.config.winner == "data" else [conditions.drop(name), conditions]
        found = [rollout(student, given, draw_noise(student, len(x0), rng)).to(x0) for given in own]
        return (x0 if self.config.winner == "data" else found[1]), found[0]


def metrics(margin: Tensor, won: Tensor) -> dict[str, Tensor]:
    """Of margins [B] the mean and how many are above 0 (a half, where nothing is learnt), and how far the winner's error has risen
    over the frozen student's."""
    accuracy = (0.5 * (torch.sign(margin) + 1.0)).mean()
    return {"accuracy": accuracy, "margin": margin.mean(), "winner_rise": won.mean()}


def needs(config: Config) -> Needs:
    return Needs(trained=("student",), frozen=("ar_teacher",))


def build(config: Config, roles: dict, grid=None) -> Preference:
    spec = roles["student"].spec
    if spec.history.commit == "same_level" or spec.schedule.depth > 1:
        raise UserError("preference: it is for a clean history of finished chunks, one after the other")
    return Preference(config, roles["student"], roles["ar_teacher"])
