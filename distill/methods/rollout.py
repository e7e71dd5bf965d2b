"""On-policy rollouts: the student's own step folded over a clip, gradient at one exit step per chunk (Self Forcing 2506.08009)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from students.schedule import DiagonalStep, advance, refine_context
from students.student import Student
from teachers.conditions import Conditions

Noise = Callable[[int, int], Tensor]  # (chunk, step) -> [B, C, n, H, W]


def rollout(
    student: Student,
    conditions: Conditions,
    noise: Noise,
    exit_step: int | Sequence[int] | None = None,
    *,
    sigmas: Callable[[int], Sequence[float]] | None = None,
    start: int = 0,
    corrupt: Callable[[int, Tensor], Tensor] | None = None,
    context_gradient: bool = False,
) -> Tensor:
    """Generate a clip chunk by chunk -> x0 [B, C, F, H, W] of the chunks from `start` on.

    Chunk j's gradient reaches the weights through its own exit-step call alone: earlier steps and every commit run without.
    With the last step as exit (None) this is what the serving session computes, bit for bit. exit_step may be one for each
    chunk; sigmas(chunk) are its denoising steps, by default the spec's; chunks before `start` are context, without gradient;
    corrupt(chunk, x0) is committed in the place of x0. With `context_gradient` a chunk's gradient also reaches the exit-step keys
    and values of the chunks before it, as in Self Forcing's published code.
    """
    n = student.spec.chunk_frames
    state, chunks = student.open(conditions.text), []
    count = conditions.num_frames // n
    for j in range(count):
        part, ahead = (conditions.frames(j * n, min(j + k, count) * n) for k in (1, 1 + student.spec.schedule.ahead))
        levels = student.spec.steps(j) if sigmas is None else sigmas(j)
        last = exit_step[j] if isinstance(exit_step, Sequence) else exit_step
        grad = torch.is_grad_enabled() and j >= start
        keep = context_gradient and grad
        x0, steps = advance(
            student, state, ahead, lambda k, i, j=j: noise(j + k, i), levels, last, grad=grad, keep=keep
        )
        if j >= start:
            chunks.append(x0)
        if j + 1 < count:
            kept = refine_context(student, state, x0, part, steps, lambda k, i, j=j: noise(j + k, i), len(levels))
            state = student.commit(state, kept if corrupt is None else corrupt(j, kept), part, steps)
            state = student.with_context_gradient(state, steps[-1]) if keep else state
    return torch.cat(chunks, dim=2)


@torch.no_grad()
def context(student: Student, clean: Tensor, conditions: Conditions, front: int) -> Any:
    """The student's state before chunk number `front` of a stream whose chunks were clean [B, C, F, H, W], with a diagonal
    schedule as in serving: the last of them is still pending."""
    n, state = student.spec.chunk_frames, student.open(conditions.text)
    for j in range(front):
        steps = DiagonalStep((), None) if j == front - 1 and student.spec.schedule.depth > 1 else ()
        x0 = clean[:, :, j * n : (j + 1) * n]
        state = student.commit(state, x0, conditions.frames(j * n, (j + 1) * n), steps)
    return state


def draw_noise(
    student: Student, batch: int, rng: torch.Generator, num_chunks: int | None = None, num_steps: int | None = None
) -> Noise:
    """Noise of every chunk and step from `rng`, drawn on its device."""
    spec = student.spec
    device = next(student.parameters()).device
    channels, height, width = spec.latent_size
    refined = spec.history.refine_every > 0  # one more step
    counts = (num_chunks or spec.num_chunks, (num_steps or len(spec.sigmas)) + refined)
    shape = (*counts, batch, channels, spec.chunk_frames, height, width)
    table = torch.randn(shape, generator=rng, device=rng.device).to(device)
    return lambda chunk, step: table[chunk, step]


def of_length(conditions: Conditions, num_frames: int) -> Conditions:
    """Conditions of a stream of `num_frames` latent frames: cut, or each clip goes on with what runs with the frames (sound, pose)
    of the next rows of the batch, without their frame 0, which is one pixel frame repeated. The rest stays its own."""
    frames, rows, parts = conditions.num_frames, torch.arange(conditions.num_rows), [conditions]
    while sum(part.num_frames for part in parts) < num_frames:
        parts.append(conditions.index(rows.roll(-len(parts))).frames(1, frames))
    return Conditions.join_frames(parts).frames(0, num_frames)
