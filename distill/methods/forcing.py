"""Flow matching of a causal network on data, each chunk at its own sigma: teacher forcing or chunkwise diffusion forcing.

    min E |D(x_j, sigma_j | context_j) - x0_j|^2 / sigma_j^power over chunks j

context: clean is teacher forcing, chunk j sees the data before it (the first stage of Causal Forcing, 2602.02214); noisy is
Diffusion Forcing (2407.01392) with a sigma per chunk, chunk j sees the other chunks' own noisy states. It is an initialisation
of the student, and with clean context it trains the autoregressive teacher that `ode_init` (context: data) and `consistency` ask
for: `Forced` makes it a denoiser of whole clips. stream (FlowAct-R1 2601.10103) is what a diagonal schedule serves: clean context
and the chunks in flight behind it, which see each other, each at a sigma of the step that it is at (`denoise_diagonal_train`).

`generated` is FlowAct-R1's self-forcing variant: with that probability a clip's context is the student's own few-step rollout, with
`renoise`d latents; the loss stays on the data. As in Self Forcing the network is conditioned on the level that it is served with,
so that it becomes robust to noise that it is not conditioned on. FlowAct-R1 draws from an intermediate checkpoint; ours is the one
that is trained.

We differ: sigmas are stratified over the batch's chunks, the loss is `losses.denoising` (power 2 is flow matching's), conditions
are dropped for guidance as for the bidirectional teacher, and the given reference frame carries no loss.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from distill.methods import Batch, Loss, Needs, check_drop, drop_conditions, losses
from distill.methods.rollout import draw_noise, rollout
from students.student import Student
from teachers import flow
from teachers.conditions import Conditions
from teachers.errors import UserError
from teachers.guidance import repeat_rows


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sigmas are shifted by `shift`. `drop`: with which probability a clip goes without a condition. A clip's context is the
    student's own with probability `generated`, noised to the sigma `renoise`."""

    context: Literal["clean", "noisy", "stream"] = "clean"
    shift: float = 3.0
    loss_power: float = 1.0
    loss_floor: float = 0.15
    drop: dict[str, float] = field(default_factory=lambda: {"text": 0.1, "audio": 0.1})
    generated: float = 0.0
    renoise: float = 0.0

    def __post_init__(self):
        check_drop("forcing.drop", self.drop)
        if not 0.0 <= self.generated <= 1.0 or not 0.0 <= self.renoise < 1.0:
            raise UserError(
                f"forcing.generated, renoise: got {self.generated}, {self.renoise}; a probability and a sigma in [0, 1)"
            )
        if self.generated and self.context == "noisy":
            raise UserError("forcing.generated: context: noisy has no clean memory to generate; leave it 0")
        if self.renoise and not self.generated:
            raise UserError("forcing.renoise: it is for generated memory; give generated, or leave it 0")


class Forcing:
    """Role `student`: one masked pass over a clip of data, a sigma per chunk."""

    def __init__(self, config: Config, student: Student):
        self.config, self.student = config, student

    def roles_to_update(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def loss(self, role: str, batch: Batch, rng: torch.Generator, shared: torch.Generator) -> Loss:
        x0, config, n = batch.x0, self.config, self.student.spec.chunk_frames
        assert x0 is not None
        num = x0.shape[0]
        if config.context == "stream":
            return self._in_flight(x0, batch.conditions, rng, shared)
        sigma = flow.shift_sigma(strata((num, x0.shape[2] // n), rng), config.shift).to(x0)
        conditions = drop_conditions(batch.conditions, config.drop, rng)
        levels = sigma.repeat_interleave(n, dim=1)
        x = flow.add_noise(x0, torch.randn(x0.shape, generator=rng).to(x0), levels)
        own = self._memory(x0, batch.conditions, rng, shared)
        clean, level = self._history(own, rng) if config.context == "clean" else (None, None)
        x0_hat = self.student.denoise_clip(x, sigma, conditions, clean, level)
        value = losses.denoising(x0_hat, x0, levels, config.loss_power, config.loss_floor, len(conditions.known))
        return Loss(value, {"loss": value.detach()})

    def _in_flight(self, x0: Tensor, given: Conditions, rng: torch.Generator, shared: torch.Generator) -> Loss:
        """A forward of the walk, the same on every rank; each clip at its own sigmas between those of the steps around it."""
        spec, config = self.student.spec, self.config
        n, steps = spec.chunk_frames, spec.sigmas
        forwards = list(spec.schedule.walk(x0.shape[2] // n, len(steps)))
        front, done = forwards[int(torch.randint(len(forwards), (1,), generator=shared))]
        start, stop = front * n, (front + len(done)) * n
        within = strata((x0.shape[0], 1), rng)
        sigma = flow.shift_sigma((len(steps) - torch.tensor([done]) - within) / len(steps), config.shift).to(x0)
        conditions, target = drop_conditions(given, config.drop, rng), x0[:, :, start:stop]
        levels = sigma.repeat_interleave(n, dim=1)
        x = flow.add_noise(target, torch.randn(target.shape, generator=rng).to(x0), levels)
        clean, level = self._history(self._memory(x0, given, rng, shared), rng) if front else (x0, None)
        level = None if level is None else level[:, :front]
        x0_hat = self.student.denoise_diagonal_train(x, sigma, conditions.frames(0, stop), clean[:, :, :start], level)
        known = len(conditions.known) if front == 0 else 0
        value = losses.denoising(x0_hat, target, levels, config.loss_power, config.loss_floor, known)
        return Loss(value, {"loss": value.detach()})

    @torch.no_grad()
    def _memory(self, x0: Tensor, conditions: Conditions, rng: torch.Generator, shared: torch.Generator) -> Tensor:
        """x0 [B, C, F, H, W] of the data, in some rows of a rollout, noised. Which rows is the same on every rank, so that all run
        the same passes."""
        config = self.config
        if not config.generated:
            return x0
        rows = torch.nonzero(torch.rand(x0.shape[0], generator=shared) < config.generated).flatten()
        if not len(rows):
            return x0
        own = rollout(self.student, conditions.index(rows), draw_noise(self.student, len(rows), rng))
        eps = torch.randn(own.shape, generator=rng).to(own)
        out = x0.clone()
        out[rows] = flow.add_noise(own, eps, config.renoise).to(x0)
        return out

    def _history(self, x0: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """What each chunk sees of the past [B, C, F, H, W]: the data, with the spec's history noise, and its levels
        [B, num_chunks]."""
        spec = self.student.spec
        if spec.history_noise is None:
            return x0, None
        level = spec.history_noise.draw((x0.shape[0], x0.shape[2] // spec.chunk_frames), rng).to(x0)
        eps = torch.randn(x0.shape, generator=rng).to(x0)
        return flow.add_noise(x0, eps, level.repeat_interleave(spec.chunk_frames, dim=1)), level


@dataclass(frozen=True)
class Forced:
    """An autoregressive teacher over whole clips: every chunk sees the `clean` [B, C, F, H, W] chunks before it.

    It has the verb of a bidirectional teacher, so `generate.solve_states` solves its chunks' ODEs side by side.
    """

    net: Student
    clean: Tensor

    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """x [k B, C, F, H, W] of k branches of guidance at sigma [k B], or [k B, num_chunks] -> x0."""
        chunks = x.shape[2] // self.net.spec.chunk_frames
        levels = sigma if sigma.ndim == 2 else sigma.unsqueeze(1).expand(-1, chunks)
        clean = repeat_rows(self.clean, x.shape[0] // self.clean.shape[0])
        return self.net.denoise_clip(x, levels, conditions, clean)


def strata(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1), one in each of as many equal parts, in random order."""
    num = torch.Size(shape).numel()
    values = (torch.arange(num) + torch.rand(num, generator=rng)) / num
    return values[torch.randperm(num, generator=rng)].view(shape)


def needs(config: Config) -> Needs:
    return Needs(trained=("student",))


def build(config: Config, roles: dict, grid=None) -> Forcing:
    if config.context == "clean" and roles["student"].spec.history.commit == "same_level":
        raise UserError("forcing.context: clean is not what a same_level history serves; use context: noisy")
    if config.context == "stream" and roles["student"].spec.schedule.depth == 1:
        raise UserError("forcing.context: stream is for chunks in flight (student.schedule.depth); use context: clean")
    return Forcing(config, roles["student"])
