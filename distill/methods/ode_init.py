"""ODE initialisation: regress the end of the teacher's trajectories from their intermediate states (CausVid 2412.07772, eq. 5).

As LiveTalk (2512.23576) from a bidirectional teacher; unlike its code the context is clean (teacher forcing, as in serving)
unless `context: noisy`, and the given reference frame carries no loss.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from distill import losses
from distill.methods import Batch, Loss
from students.causal_wan import CausalWan
from teachers import flow
from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """`context`: each chunk sees the trajectory's clean end of earlier chunks, or their noisy states (diffusion forcing)."""

    context: Literal["clean", "noisy"] = "clean"


class ODEInit:
    """Role `student`: every chunk gets a random one of the stored sigmas; MSE between its x0 and the trajectory's end."""

    def __init__(self, config: Config, student: CausalWan, grid: tuple[float, ...]):
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
        num, device = states.shape[0], states.device
        index = torch.randint(len(self.sigmas), (num, spec.num_chunks), generator=rng)
        per_frame = index.repeat_interleave(spec.chunk_frames, dim=1).to(device)
        rows = torch.arange(num, device=device).unsqueeze(1)
        frames = torch.arange(states.shape[3], device=device)
        x = states[rows, per_frame, :, frames].transpose(1, 2)  # [B, F, C, H, W] -> [B, C, F, H, W]
        x0 = states[:, -1]
        clean = x0 if self.config.context == "clean" else None
        x0_hat = self.student.denoise_clip(x, self.sigmas[index].to(states), batch.conditions, clean)
        value = losses.regression(x0_hat, x0)
        return Loss(value, {"loss": value.detach()})


def build(config: Config, roles: dict, grid: tuple[float, ...]) -> ODEInit:
    if config.context == "clean" and roles["student"].spec.history.commit == "same_level":
        raise UserError("init.context: clean is not what a same_level history serves; use context: noisy")
    return ODEInit(config, roles["student"], grid)
