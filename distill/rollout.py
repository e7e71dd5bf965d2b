"""On-policy rollouts: the student's own step folded over a clip, gradient at one exit step per chunk (Self Forcing 2506.08009)."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from students.causal_wan import CausalWan, denoise_chunk
from teachers.conditions import Conditions

Noise = Callable[[int, int], Tensor]  # (chunk, step) -> [B, C, n, H, W]


def rollout(student: CausalWan, conditions: Conditions, noise: Noise, exit_step: int | None = None) -> Tensor:
    """Generate a clip chunk by chunk -> x0 [B, C, F, H, W].

    Chunk j's gradient reaches the weights through its own exit-step call alone: earlier steps and every commit run without.
    With the last step as exit this is what the serving session computes, bit for bit.
    """
    n = student.spec.chunk_frames
    state, chunks = student.open(conditions.text), []
    count = conditions.num_frames // n
    for j in range(count):
        part = conditions.frames(j * n, (j + 1) * n)
        noises = functools.partial(noise, j)
        x0, steps = denoise_chunk(student, state, part, noises, student.spec.sigmas, exit_step)
        chunks.append(x0)
        if j + 1 < count:
            state = student.commit(state, x0, part, steps)
    return torch.cat(chunks, dim=2)


def draw_noise(student: CausalWan, batch: int, rng: torch.Generator, num_chunks: int | None = None) -> Noise:
    """Noise of every chunk and step from `rng`, drawn on its device."""
    spec = student.spec
    device = next(student.parameters()).device
    channels, height, width = spec.latent_size
    shape = (num_chunks or spec.num_chunks, len(spec.sigmas), batch, channels, spec.chunk_frames, height, width)
    table = torch.randn(shape, generator=rng, device=rng.device).to(device)
    return lambda chunk, step: table[chunk, step]
