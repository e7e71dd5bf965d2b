"""Flow matching of a causal network on data, each chunk at its own sigma: teacher forcing or chunkwise diffusion forcing.

    min E |D(x_j, sigma_j | context_j) - x0_j|^2 / sigma_j^power over chunks j

context: clean is teacher forcing, chunk j sees the data before it (the first stage of Causal Forcing, 2602.02214); noisy is
Diffusion Forcing (2407.01392) with a sigma per chunk, chunk j sees the other chunks' own noisy states. It is an initialisation
of the student, and with clean context it trains the autoregressive teacher that `ode_init` (context: data) and `consistency` ask
for: `Forced` makes it a denoiser of whole clips.

We differ: sigmas are stratified over the batch's chunks, the loss is `losses.denoising` (power 2 is flow matching's), modalities
are dropped for guidance as for the bidirectional teacher, and the given reference frame carries no loss.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill import losses
from distill.methods import Batch, Loss, Needs
from students.student import Student
from teachers import flow
from teachers.conditions import Conditions
from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sigmas are shifted by `shift`; each modality of a clip is dropped with its probability."""

    context: Literal["clean", "noisy"] = "clean"
    shift: float = 3.0
    loss_power: float = 1.0
    loss_floor: float = 0.15
    drop_text: float = 0.1
    drop_audio: float = 0.1
    drop_pose: float = 0.0


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
        sigma = flow.shift_sigma(strata((num, x0.shape[2] // n), rng), config.shift).to(x0)
        dropped = {
            "text": torch.rand(num, generator=rng) < config.drop_text,
            "audio": torch.rand(num, generator=rng) < config.drop_audio,
        }
        if config.drop_pose and batch.conditions.pose is not None:
            dropped["pose"] = torch.rand(num, generator=rng) < config.drop_pose
        conditions = batch.conditions.drop_rows(**dropped)
        levels = sigma.repeat_interleave(n, dim=1)
        x = flow.add_noise(x0, torch.randn(x0.shape, generator=rng).to(x0), levels)
        clean, told = self._history(x0, rng) if config.context == "clean" else (None, None)
        x0_hat = self.student.denoise_clip(x, sigma, conditions, clean, told)
        value = losses.denoising(x0_hat, x0, levels, config.loss_power, config.loss_floor, len(conditions.known))
        return Loss(value, {"loss": value.detach()})

    def _history(self, x0: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """What each chunk is told of the past: the data, with the spec's history noise, and its levels [B, num_chunks]."""
        spec = self.student.spec
        if spec.history_noise is None:
            return x0, None
        level = spec.history_noise.draw((x0.shape[0], x0.shape[2] // spec.chunk_frames), rng).to(x0)
        eps = torch.randn(x0.shape, generator=rng).to(x0)
        return flow.add_noise(x0, eps, level.repeat_interleave(spec.chunk_frames, dim=1)), level


@dataclass(frozen=True)
class Forced:
    """An autoregressive teacher over whole clips: every chunk is told the `clean` [B, C, F, H, W] chunks before it.

    It has the verb of a bidirectional teacher, so `trajectories.solve_states` solves its chunks' ODEs side by side.
    """

    net: Student
    clean: Tensor

    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """x [B, C, F, H, W] at sigma [B], or [B, num_chunks] -> x0."""
        chunks = x.shape[2] // self.net.spec.chunk_frames
        levels = sigma if sigma.ndim == 2 else sigma.unsqueeze(1).expand(-1, chunks)
        return self.net.denoise_clip(x, levels, conditions, self.clean)


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
    return Forcing(config, roles["student"])
