"""A many-step teacher that samples whole clips, and how its weights are loaded from any published layout."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from teachers import flow
from teachers.checkpoints import layouts
from teachers.checkpoints.convert import fill_network, plan
from teachers.conditions import Conditions
from teachers.guidance import Guidance, guided
from teachers.networks.kind import AvatarTeacher


class Teacher:
    """A frozen bidirectional denoiser, `denoiser.denoise(x, sigma, conditions) -> x0`, and the sampler over it."""

    def __init__(self, denoiser: Any):
        self.denoiser = denoiser.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where its weights are, and conditions and noise have to be."""
        return next(self.denoiser.parameters()).device

    def states(
        self,
        conditions: Conditions,
        noise: Tensor,
        *,
        num_steps: int,
        shift: float,
        guidance: Guidance,
        grid: flow.Grid = "even",
    ) -> Iterator[Tensor]:
        """The num_steps + 1 states [B, C, F, h, w] of the Euler solution, `noise` first, x0 last."""

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return guided(self.denoiser.denoise, x, sigma, conditions, guidance)

        return flow.solve(denoise, noise, flow.sigma_grid(num_steps, shift, grid))

    @torch.inference_mode()
    def sample(
        self,
        conditions: Conditions,
        noise: Tensor,
        *,
        num_steps: int = 50,
        shift: float = 5.0,
        guidance: Guidance | None = None,
        grid: flow.Grid = "even",
    ) -> Tensor:
        """Clean latents x0 [B, C, F, h, w] of whole clips from standard normal `noise` [B, C, F, h, w], by Euler's method on the
        shifted grid sigma' = shift sigma / (1 + (shift - 1) sigma) of `num_steps` steps (the defaults are Wan 2.1's).

        `guidance` None is off; `grid`: another one (`flow.sigma_grid`). A codec's `decode` makes pixels of x0.
        """
        given = {"num_steps": num_steps, "shift": shift, "grid": grid}
        states = self.states(conditions, noise, guidance=guidance or Guidance(), **given)
        return deque(states, maxlen=1).pop()


def load_teacher(
    path: Path | str,
    *,
    base: Path | str | None = None,
    widen: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Teacher:
    """The teacher whose weights `path` holds: a file or folder in any layout of `distill convert` (Wan 2.1, diffusers, OmniAvatar's
    LoRA, Self Forcing, ours), its size read from the tensors.

    `base`: the Wan weights that a LoRA at `path` was trained over, or that what is at `path` replaces a part of.
    `widen`: consent to new input channels, from zero, for the reference and its mask. `dtype` of the weights, but for norms,
    time embedding and modulation, which are fp32. UserError that lists what is missing, unexpected or of another shape.
    """
    path, base = Path(path), None if base is None else Path(base)
    architecture = plan(path, "ours", base=base, widen=widen).architecture
    config: Any = layouts.make_config(architecture, "ours")
    with init_empty_weights():
        net: Any = layouts.network_class(architecture).from_config(config)
    allocate(net, dtype, torch.device(device))
    fill_network(net, path, base=base, widen=widen)
    return Teacher(AvatarTeacher(net.to(device)))


def allocate(net: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give the parameters of a network on the meta device memory: `dtype`, or fp32 where the network wants that; no values yet."""
    kept = set(getattr(net, "_keep_in_fp32_modules", None) or ())
    for name, parameter in list(net.named_parameters()):
        wide = kept & set(name.split("."))
        made = torch.empty(parameter.shape, dtype=torch.float32 if wide else dtype, device=device)
        module, _, own = name.rpartition(".")
        setattr(net.get_submodule(module), own, nn.Parameter(made))
