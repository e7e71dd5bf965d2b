"""Clips from networks: guided Euler solutions of a teacher, rollouts of a student, and the noise that both start from."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.methods.rollout import Noise, rollout
from students.student import Student
from teachers import flow
from teachers.conditions import Conditions
from teachers.flow import keyed_generator
from teachers.guidance import AnyGuidance, guided, repeat_rows, runs, split_rows


class Rows(Protocol):
    """Conditions of a set of clips, in memory or on the disk."""

    @property
    def num_rows(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def index(self, rows: Tensor, /) -> Conditions: ...


@torch.no_grad()
def solve_states(teacher, conditions, noise: Tensor, grid, keep: Sequence[int], guidance: AnyGuidance) -> Tensor:
    """States [B, len(keep), C, F, h, w] of one guided Euler solution from noise [B, C, F, h, w] along `grid`, fp32."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return guided(teacher.denoise, x, sigma, conditions, guidance)

    states = {i: x for i, x in enumerate(flow.solve(denoise, noise, grid)) if i in keep}
    return torch.stack([states[i] for i in keep], dim=1)


def clip_noise(spec, seed: int, *keys: int | str) -> Callable[[Tensor], Tensor]:
    """Rows [n] of a set of clips -> the initial noise [n, C, F, h, w] of these, the same whichever others are drawn with them."""
    channels, height, width = spec.latent_size
    shape = (channels, spec.horizon_frames, height, width)
    return lambda rows: _noise_of(rows, shape, seed, "clip noise", *keys)


def stream_noise(spec, seed: int, *keys: int | str) -> Callable[[Tensor], Noise]:
    """Rows [n] of a set of streams -> the noise of every (chunk, step) of these, drawn when asked for."""
    channels, height, width = spec.latent_size
    shape = (channels, spec.chunk_frames, height, width)
    return lambda rows: lambda chunk, step: _noise_of(rows, shape, seed, "stream noise", *keys, chunk, step)


def _noise_of(rows: Tensor, shape: tuple[int, ...], *keys: Any) -> Tensor:
    return torch.stack([torch.randn(shape, generator=keyed_generator(*keys, row)) for row in rows.tolist()])


@torch.inference_mode()
def student_clips(
    student: Student,
    conditions: Rows,
    noise: Callable[[Tensor], Noise],
    batch: int,
    rows: Tensor | None = None,
) -> Tensor:
    """x0 [N, C, F, h, w] of whole clips, or of these `rows` of them, by the student's own rollout, the function that serving
    runs, from the `stream_noise` of the rows."""

    def make(rows: Tensor) -> Tensor:
        own = noise(rows)
        return rollout(student, conditions.index(rows), lambda c, s: own(c, s).to(conditions.device))

    return _in_batches(make, conditions, rows, batch)


@torch.inference_mode()
def many_step_clips(
    student: Student,
    conditions: Rows,
    noise: Callable[[Tensor], Noise],
    grid,
    guidance: AnyGuidance,
    batch: int,
    rows: Tensor | None = None,
) -> Tensor:
    """x0 [N, C, F, h, w] of whole clips, or of these `rows`, as an autoregressive teacher draws them: each chunk by the guided
    Euler solution on `grid`, every branch of the guidance with a context of its own."""

    def make(rows: Tensor) -> Tensor:
        own, start = conditions.index(rows), noise(rows)
        return solve_stream(student, own, lambda chunk: start(chunk, 0).to(own.device), grid, guidance)

    return _in_batches(make, conditions, rows, batch)


def solve_stream(student: Student, conditions: Conditions, noise, grid, guidance: AnyGuidance) -> Tensor:
    """x0 [B, C, F, h, w] as `many_step_clips` makes them; noise: chunk -> [B, C, n, h, w]."""
    given, copies = runs(guidance, conditions)
    n, states, done = student.spec.chunk_frames, [student.open(c.text) for c in given], []
    for j in range(conditions.num_frames // n):
        parts = [c.frames(j * n, (j + 1) * n) for c in given]
        plans = [student.plan(state, c) for state, c in zip(states, parts, strict=True)]

        def denoise(x: Tensor, level: Tensor, states=states, plans=plans, parts=parts) -> Tensor:
            x, level = repeat_rows(x, copies), repeat_rows(level, copies)
            outputs = [
                student.denoise(state, plan, x, level, c)[0]
                for state, plan, c in zip(states, plans, parts, strict=True)
            ]
            return guidance.combine(split_rows(outputs, copies))

        *_, x0 = flow.solve(denoise, noise(j), grid)
        finished = repeat_rows(x0, copies)
        states = [student.commit(s, finished, c, plan=p) for s, c, p in zip(states, parts, plans, strict=True)]
        done.append(x0)
    return torch.cat(done, dim=2)


@torch.inference_mode()
def teacher_clips(
    teacher,
    conditions: Rows,
    noise: Callable[[Tensor], Tensor],
    grid,
    guidance: AnyGuidance,
    batch: int,
    rows: Tensor | None = None,
    progress=None,
) -> Tensor:
    """x0 [N, C, F, h, w] of whole clips, or of these `rows` of them, by the guided Euler solution from the `clip_noise` of the rows
    along `grid`, `batch` at a time."""

    def make(rows: Tensor) -> Tensor:
        part = noise(rows).to(conditions.device)
        made = solve_states(teacher, conditions.index(rows), part, grid, (len(grid) - 1,), guidance)[:, 0]
        if progress is not None:
            progress.update(len(part))
        return made

    return _in_batches(make, conditions, rows, batch)


def _in_batches(make: Callable[[Tensor], Tensor], conditions: Rows, rows: Tensor | None, batch: int) -> Tensor:
    """What `make` gives of the rows, of all where they are None, `batch` at a time."""
    chosen = torch.arange(conditions.num_rows) if rows is None else rows
    return torch.cat([make(part) for part in chosen.split(batch)])
