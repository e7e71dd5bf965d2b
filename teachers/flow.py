"""The noise process, and the only home of its algebra.

Rectified flow: x_sigma = (1 - sigma) x0 + sigma eps, velocity = eps - x0, x0 = x_sigma - sigma velocity.
Sigmas are numbers in [0, 1], 1 = noise; they are computed, never looked up. Differences are taken in fp32 or better.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from teachers.errors import UserError

Latents = Float[Tensor, "batch channels frames height width"]
Level = Float[Tensor, " batch"] | Float[Tensor, "batch #frames"]  # sigma of each sample, or of each of its frames
Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, sigma [B]) -> x0, of the shape of x

Sigma = TypeVar("Sigma", Tensor, float)
Grid = Literal["even", "closed", "twice", "unipc"]
CLOSED = 0.001
"""The last sigma of a `closed` grid before the shift, that of the last of 1000 training steps."""


def shift_sigma(s: Sigma, shift: float) -> Sigma:
    """Time shift of Esser et al. 2403.03206, eq. 23: sigma = shift s / (1 + (shift - 1) s)."""
    return shift * s / (1 + (shift - 1) * s)


def sigma_grid(num_steps: int, shift: float, kind: Grid = "even") -> tuple[float, ...]:
    """num_steps + 1 sigmas, going down to 0; sh(s) = shift s / (1 + (shift - 1) s), N = num_steps.

        even    sh(1 - j/N)                 ours; OmniAvatar, FantasyTalking; with N 4 and shift 5 the students FlashHead, FlashTalk
        closed  sh(1 - 0.999 j/(N-1))       MultiTalk, InfiniteTalk, FlashHead; with shift 12 LongCat; the last step is nearly empty
        twice   sh of an even grid of N points from 1 to sh(0.001)   diffusers' Euler scheduler with a static shift: EchoMimicV3,
                                            StableAvatar, LiveAvatar
        unipc   sh(0.999 (1 - j/N))         Wan's UniPC, Wan2.2-S2V, EchoMimicV3 Flash; its first sigma is below 1

    Any sigma is legal for a network, so the others than `even` are for comparison with a published sampler. UserError for no step
    at all, or for one step of a kind whose steps begin and end at different sigmas.
    """
    if kind not in get_args(Grid):
        raise UserError(f"sampler grid: got {kind!r}; choose {', '.join(get_args(Grid))}")
    least = 2 if kind in ("closed", "twice") else 1
    if num_steps < least:
        raise UserError(f"sampler steps: got {num_steps}; the grid {kind!r} has at least {least}")
    last = {"closed": CLOSED, "twice": shift_sigma(CLOSED, shift)}.get(kind)
    first = 1 - CLOSED if kind == "unipc" else 1.0
    if last is None:
        levels = [first * (1.0 - j / num_steps) for j in range(num_steps)]
    else:
        levels = [1.0 - (1.0 - last) * j / (num_steps - 1) for j in range(num_steps)]
    return (*(shift_sigma(level, shift) for level in levels), 0.0)


def on_grid(sigmas: Sequence[float], grid: Sequence[float], tolerance: float = 1e-9) -> tuple[int, ...]:
    """Index of each sigma on a grid; UserError if one lies between grid points, where there is no label for it."""
    indices = []
    for sigma in sigmas:
        index = min(range(len(grid)), key=lambda i: abs(grid[i] - sigma))
        if abs(grid[index] - sigma) > tolerance:
            near = grid[index]
            raise UserError(
                f"student sigma {sigma:.6g} is not on the teacher's grid of {len(grid) - 1} steps (nearest {near:.6g}): "
                "choose the same shift and a step count that the student's divides"
            )
        indices.append(index)
    return tuple(indices)


def expand(sigma: Level, like: Latents) -> Float[Tensor, "batch 1 #frames 1 1"]:
    """sigma [B] or per frame [B, F] -> broadcastable to like [B, C, F, H, W], on its device."""
    return sigma.view(sigma.shape[0], 1, -1, 1, 1).to(like.device)


def add_noise(x0: Latents, eps: Latents, sigma: Level | float) -> Latents:
    """x_sigma = (1 - sigma) x0 + sigma eps; sigma [B], [B, F] or one number for all."""
    level = expand(sigma, x0) if isinstance(sigma, Tensor) else sigma
    return (1 - level) * x0 + level * eps


def velocity_from_x0(x: Latents, x0: Latents, sigma: Level) -> Latents:
    """velocity = (x_sigma - x0) / sigma, in fp32; undefined at sigma 0."""
    return (x.float() - x0.float()) / expand(sigma, x).float()


def x0_from_velocity(x: Latents, velocity: Latents, sigma: Level) -> Latents:
    """x0 = x_sigma - sigma velocity, in fp32."""
    return x.float() - expand(sigma, x).float() * velocity.float()


def euler_step(x: Latents, x0: Latents, sigma: float, sigma_next: float) -> Latents:
    """One Euler step of dx/dsigma = velocity; at sigma_next 0 it returns x0."""
    return x + (sigma_next - sigma) / sigma * (x - x0)


def solve(denoise: Denoise, x: Latents, grid: Sequence[float]) -> Iterator[Latents]:
    """Euler solution of the probability-flow ODE along `grid`; yields the state at every grid point, x first."""
    yield x
    for sigma, sigma_next in itertools.pairwise(grid):
        level = torch.full((x.shape[0],), sigma, dtype=x.dtype, device=x.device)
        x = euler_step(x, denoise(x, level), sigma, sigma_next)
        yield x


def network_time(sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The time that networks are conditioned on: t = 1000 sigma."""
    return sigma * 1000.0


def keyed_generator(seed: int, *keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """torch.Generator seeded with 63 bits of blake2b over (seed, keys): stable over runs, machines and call order."""
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big") >> 1)
