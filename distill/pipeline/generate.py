"""Clips from networks: guided Euler solutions of a teacher, rollouts of a student, and the noise that both start from."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distill.methods.rollout import Noise, rollout
from students.student import Student
from teachers import flow
from teachers.conditions import Conditions, Guidance
from teachers.flow import keyed_generator

Guide = Callable[[Callable[[Conditions], Tensor], Conditions], Tensor]  # a Guidance, or told_guidance


@torch.no_grad()
def solve_states(teacher, conditions, noise: Tensor, grid, keep: Sequence[int], guidance: Guide) -> Tensor:
    """States [B, len(keep), C, F, h, w] of one guided Euler solution, fp32."""

    def denoise(x, sigma):
        return guidance(lambda c: teacher.denoise(x, sigma, c), conditions)

    found = {i: x for i, x in enumerate(flow.solve(denoise, noise, grid)) if i in keep}
    return torch.stack([found[i] for i in keep], dim=1)


def clip_noise(spec, num: int, seed: int, *keys: int | str) -> Tensor:
    """Initial noise [N, C, F, h, w] of whole clips."""
    channels, height, width = spec.latent_size
    rng = keyed_generator(seed, "clip noise", *keys)
    return torch.randn(num, channels, spec.horizon_frames, height, width, generator=rng)


def stream_noise(spec, num: int, seed: int, *keys: int | str) -> Noise:
    """Noise of every (chunk, step) of `num` streams, drawn when asked for."""
    channels, height, width = spec.latent_size

    def noise(chunk: int, step: int) -> Tensor:
        rng = keyed_generator(seed, "stream noise", *keys, chunk, step)
        return torch.randn(num, channels, spec.chunk_frames, height, width, generator=rng)

    return noise


@torch.inference_mode()
def student_clips(student: Student, conditions: Conditions, noise: Noise, batch: int) -> Tensor:
    """x0 of whole clips by the student's own rollout, the function that serving runs."""
    num, device, parts = conditions.text.shape[0], conditions.text.device, []
    for start in range(0, num, batch):
        rows = slice(start, min(start + batch, num))
        parts.append(rollout(student, conditions.index(rows), lambda c, s, rows=rows: noise(c, s)[rows].to(device)))
    return torch.cat(parts)


@torch.inference_mode()
def many_step_clips(
    student: Student, conditions: Conditions, noise: Noise, grid, guidance: Guidance, batch: int
) -> Tensor:
    """x0 of whole clips as an autoregressive teacher draws them: each chunk by the guided Euler solution on `grid`, every branch
    of the guidance with a context of its own."""
    num, device, parts = conditions.text.shape[0], conditions.text.device, []
    for start in range(0, num, batch):
        rows = slice(start, min(start + batch, num))
        parts.append(
            _solve_stream(student, conditions.index(rows), lambda c, r=rows: noise(c, 0)[r].to(device), grid, guidance)
        )
    return torch.cat(parts)


def _solve_stream(student: Student, conditions: Conditions, noise, grid, guidance: Guidance) -> Tensor:
    branches: list[Conditions] = []
    guidance(lambda c: branches.append(c) or c.text, conditions)  # which conditions it asks for, in order
    n, states, done = student.spec.chunk_frames, [student.open(c.text) for c in branches], []
    for j in range(conditions.num_frames // n):
        told = [c.frames(j * n, (j + 1) * n) for c in branches]
        plans = [student.plan(state, c) for state, c in zip(states, told, strict=True)]

        def denoise(x, level, states=states, plans=plans, told=told):
            found = (
                student.denoise(*given[:2], x, level, given[2])[0] for given in zip(states, plans, told, strict=True)
            )
            return guidance(lambda _: next(found), told[0])

        *_, x0 = flow.solve(denoise, noise(j), grid)
        states = [student.commit(s, x0, c, plan=p) for s, c, p in zip(states, told, plans, strict=True)]
        done.append(x0)
    return torch.cat(done, dim=2)


@torch.inference_mode()
def teacher_clips(teacher, conditions: Conditions, noise: Tensor, grid, guidance, batch: int, progress=None) -> Tensor:
    """x0 of whole clips by the guided Euler solution on `grid`."""
    parts, last = [], len(grid) - 1
    for start in range(0, noise.shape[0], batch):
        rows = slice(start, min(start + batch, noise.shape[0]))
        part = noise[rows].to(conditions.text.device)
        parts.append(solve_states(teacher, conditions.index(rows), part, grid, (last,), guidance)[:, 0])
        if progress is not None:
            progress.update(len(part))
    return torch.cat(parts)
