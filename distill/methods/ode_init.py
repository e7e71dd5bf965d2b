"""ODE initialisation: regress the end of the teacher's trajectories from their intermediate states (CausVid 2412.07772, eq. 5).

    min E |D(x_j, sigma_j | context_j) - x0_j|^2, every chunk j with its own stored sigma_j and its trajectory's end x0_j

As LiveTalk (2512.23576) from a bidirectional teacher; unlike its code the context is clean (teacher forcing, as in serving)
unless `context: noisy`, and the given reference frame carries no loss. As Causal Forcing (2602.02214) from an autoregressive
teacher with `context: data`: a bidirectional trajectory's end depends on the noise of later chunks, which a causal student does
not see, so that it learns a mean; an autoregressive one is a function of what the student sees. We differ: each chunk has its
own sigma (chunks do not see each other's noise), theirs share one.

A diagonal schedule (FlowAct-R1 2601.10103) is trained on the forwards it is served with, drawn uniformly: the chunks in flight,
each at the sigma of its place (chunkwise diffusion forcing), see each other and the clean context.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from distill.methods import Batch, Loss, Needs, losses
from distill.methods.rollout import context
from students.student import Student
from teachers import flow
from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """`context`: each chunk sees the trajectory's clean end of earlier chunks, or their noisy states (diffusion forcing), or the
    data that an autoregressive teacher's trajectory (`forcing.Forced`) was conditioned on."""

    context: Literal["clean", "noisy", "data"] = "clean"


class ODEInit:
    """Role `student`: every chunk gets a random one of the stored sigmas; MSE between its x0 and the trajectory's end."""

    def __init__(self, config: Config, student: Student, grid: tuple[float, ...]):
        self.config, self.student = config, student
        flow.on_grid(student.spec.sigmas, grid)
        if len(grid) != len(student.spec.sigmas) + 1:
            raise ValueError(f"trajectories hold sigmas {grid}, the student needs {(*student.spec.sigmas, 0.0)}")
        self.sigmas = torch.tensor(student.spec.sigmas)

    def roles_to_update(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def loss(self, role: str, batch: Batch, rng: torch.Generator, shared: torch.Generator) -> Loss:
        spec, states = self.student.spec, batch.states
        assert states is not None
        if spec.schedule.depth > 1:
            return self._in_flight(batch, shared)
        num, device = states.shape[0], states.device
        index = torch.randint(len(self.sigmas), (num, spec.num_chunks), generator=rng)
        per_frame = index.repeat_interleave(spec.chunk_frames, dim=1).to(device)
        rows = torch.arange(num, device=device).unsqueeze(1)
        frames = torch.arange(states.shape[3], device=device)
        x = states[rows, per_frame, :, frames].transpose(1, 2)  # [B, F, C, H, W] -> [B, C, F, H, W]
        x0 = states[:, -1]
        clean = {"clean": x0, "noisy": None, "data": batch.x0}[self.config.context]
        assert clean is not None or self.config.context == "noisy"
        x0_hat = self.student.denoise_clip(x, self.sigmas[index].to(states), batch.conditions, clean)
        value = losses.regression(x0_hat, x0, len(batch.conditions.known))
        return Loss(value, {"loss": value.detach()})

    def _in_flight(self, batch: Batch, shared: torch.Generator) -> Loss:
        spec, states, n = self.student.spec, batch.states, self.student.spec.chunk_frames
        assert states is not None
        forwards = list(spec.schedule.walk(spec.num_chunks, len(self.sigmas)))
        front, done = forwards[int(torch.randint(len(forwards), (1,), generator=shared))]
        start, stop = front * n, (front + len(done)) * n
        places = zip(done, range(start, stop, n), strict=True)
        x = torch.cat([states[:, i, :, first : first + n] for i, first in places], dim=2)
        clean = states[:, -1] if self.config.context == "clean" else batch.x0
        assert clean is not None
        state = context(self.student, clean, batch.conditions, front)
        levels, conditions = [spec.sigmas[i] for i in done], batch.conditions.frames(start, stop)
        x0_hat, _ = self.student.denoise_diagonal(state, None, x, levels, conditions)
        value = losses.regression(
            x0_hat, states[:, -1, :, start:stop], len(batch.conditions.known) if front == 0 else 0
        )
        return Loss(value, {"loss": value.detach()})


def needs(config: Config) -> Needs:
    return Needs(trained=("student",), batch="forced" if config.context == "data" else "trajectories")


def build(config: Config, roles: dict, grid: tuple[float, ...]) -> ODEInit:
    if config.context != "noisy" and roles["student"].spec.history.commit == "same_level":
        raise UserError(f"init.context: {config.context} is not what a same_level history serves; use context: noisy")
    if config.context == "noisy" and roles["student"].spec.schedule.depth > 1:
        raise UserError("init.context: noisy is not what a diagonal schedule is served with; use context: clean")
    return ODEInit(config, roles["student"], grid)
