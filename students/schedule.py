"""The order of a stream's chunks and denoising steps, and the one function that serving iterates and training folds."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teachers import flow
from teachers.conditions import Conditions
from teachers.errors import UserError

Noise = Callable[[int, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`depth` chunks are in flight at once. 1 is sequential (Self Forcing, LiveTalk, MIDAS): a chunk takes all its steps, then
    enters the context. More is diagonal (FlowAct-R1 2601.10103: 3): each forward moves every chunk in flight one step and the
    front one, which is `num_steps / depth` forwards from done, is handed over; the price is audio of depth - 1 chunks ahead.
    """

    depth: int = 1

    def __post_init__(self):
        if self.depth < 1:
            raise UserError(f"student.schedule.depth: got {self.depth}; it counts chunks in flight, from 1")

    def forwards(self, num_steps: int) -> int:
        """Forwards for one more finished chunk; UserError where the steps do not divide."""
        if num_steps % self.depth:
            raise UserError(
                f"student.schedule.depth: {num_steps} denoising steps are no multiple of {self.depth} chunks in flight"
            )
        return num_steps // self.depth

    @property
    def ahead(self) -> int:
        """Chunks behind the front one, whose audio is needed before it is finished."""
        return self.depth - 1

    def walk(self, num_chunks: int, num_steps: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Every forward of a stream of `num_chunks`: the front chunk's number, and how many steps each chunk in flight has done."""
        each, done = self.forwards(num_steps), []
        for front in range(num_chunks):
            while not done or done[0] < num_steps:
                if len(done) < self.depth and front + len(done) < num_chunks:
                    done.append(0)
                for _ in range(each):
                    yield front, tuple(done)
                    done = [count + 1 for count in done]
            done.pop(0)


@dataclass(frozen=True)
class InFlight:
    """A chunk that has done `done` steps: x [B, C, n, H, W] at the sigma of its next one."""

    x: Tensor
    done: int


@dataclass(frozen=True)
class DiagonalStep:
    """What a diagonal `commit` needs: the chunks still in flight, and the context entry of the chunk before, if made."""

    flight: tuple[InFlight, ...]
    entry: Any


def advance(
    student,
    state,
    conditions: Conditions,
    noise: Noise,
    sigmas: Sequence[float],
    exit_step: int | None = None,
    plan=None,
    grad: bool = False,
    keep: bool = False,
    kept: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Any]:
    """The state's chunk finished: its x0 [B, C, n, H, W] (of the exit step), and what `commit` needs of the steps.

    `conditions` are those of the chunk's frames and, with a diagonal schedule, of the chunks that are in flight behind it (fewer
    at the end of a clip); noise(0, i) [B, C, n, H, W] is that of its step i, noise(k, i) of the k-th behind it. x0 is re-noised to
    the next sigma with fresh noise (the stochastic few-step sampler of Self Forcing), or where the spec's `step` is ode, moved
    there along the ODE (LiveAvatar). `plan` is made where none is given.
    With `grad` the step `exit_step` (default the last; a sequential schedule may stop earlier) runs with gradient, no other does;
    `keep`: what is given of that step has its gradient (Student.with_context_gradient). `kept` is applied to the x0 of every step,
    to put in what is known of it (dubbing).
    """
    if student.spec.schedule.depth > 1:
        if exit_step not in (None, len(sigmas) - 1):
            raise ValueError(f"exit step {exit_step}: a diagonal schedule runs every chunk to its last step")
        return step_diagonal(student, state, conditions, noise, sigmas, plan, grad, kept)
    last = len(sigmas) - 1 if exit_step is None else exit_step
    own, ahead = _plans(student, state, conditions, plan, grad)
    x, steps = noise(0, 0), []
    for i in range(last + 1):
        leaving = grad and i == last
        keeping = {"keep": True} if keep and leaving else {}
        with torch.set_grad_enabled(leaving):
            x0, made = student.denoise(state, own if leaving else ahead, x, sigmas[i], conditions, i, **keeping)
        x0 = x0 if kept is None else kept(x0)
        steps.append(made)
        if i < last:
            x = _lower(student.spec, x, x0, sigmas[i : i + 2], noise, 0, i + 1)
    return x0, steps


def _plans(student, state, conditions: Conditions, plan, grad: bool) -> tuple[Any, Any]:
    """The plan of the step with gradient, and that of all others: the same one where it can be made with gradient."""
    own = student.plan(state, conditions, grad=True) if grad else None
    if own is not None:
        return own, own
    return None, student.plan(state, conditions) if plan is None else plan


def step_diagonal(
    student,
    state,
    conditions: Conditions,
    noise: Noise,
    sigmas: Sequence[float],
    plan=None,
    grad: bool = False,
    kept: Callable[[Tensor], Tensor] | None = None,
):
    """Diagonal: all chunks in flight move together until the front one is done; a new one enters behind them while there is room
    and conditions for it. The chunk that was finished before enters the context within the first of these forwards."""
    schedule, n = student.spec.schedule, student.spec.chunk_frames
    each, room = schedule.forwards(len(sigmas)), min(schedule.depth, conditions.num_frames // n)
    flight, entered = list(state.flight), None
    own, ahead = _plans(student, state, conditions, plan, grad)
    while not flight or flight[0].done < len(sigmas):
        if len(flight) < room:
            flight.append(InFlight(noise(len(flight), 0), 0))
        given = conditions.frames(0, len(flight) * n)
        for _ in range(each):
            last = flight[0].done == len(sigmas) - 1
            with torch.set_grad_enabled(grad and last):
                x, levels = torch.cat([chunk.x for chunk in flight], dim=2), [sigmas[chunk.done] for chunk in flight]
                x0, entry = student.denoise_diagonal(state, own if grad and last else ahead, x, levels, given)
            x0 = x0 if kept is None else kept(x0)
            if entry is not None:
                state, entered = student.settle(state, entry), entry
            moved = zip(x0.split(n, dim=2), flight, strict=True)
            flight = [_next(student.spec, x, chunk, noise, i, sigmas) for i, (x, chunk) in enumerate(moved)]
    return flight[0].x, DiagonalStep(tuple(flight[1:]), entered)


@torch.no_grad()
def refine_context(
    student, state, x0: Tensor, conditions: Conditions, steps, noise: Noise, num_steps: int, plan=None
) -> Tensor:
    """What the context gets of the state's chunk after its `num_steps` steps: x0, or where the history refines it, x0 noised and
    denoised once more under the context alone, chunks in flight unseen. The same for serving and training, before `commit`.

    `steps` is what `advance` gave beside x0, noise(0, num_steps) [B, C, n, H, W] the noise of this step.
    """
    history = student.spec.history
    if not history.refine_every or not history.is_refined(state.chunk):
        return x0
    if isinstance(steps, DiagonalStep) and steps.entry is not None:
        state = student.settle(state, steps.entry)
    x = flow.add_noise(x0, noise(0, num_steps), history.refine_level)
    plan = student.plan(state, conditions) if plan is None else plan
    return student.denoise(state, plan, x, history.refine_level, conditions)[0]


def _next(spec: Any, x0: Tensor, chunk: InFlight, noise: Noise, place: int, sigmas: Sequence[float]) -> InFlight:
    done = chunk.done + 1
    if done == len(sigmas):
        return InFlight(x0, done)
    return InFlight(_lower(spec, chunk.x, x0.detach(), sigmas[chunk.done : done + 1], noise, place, done), done)


def _lower(spec: Any, x: Tensor, x0: Tensor, sigmas: Sequence[float], noise: Noise, place: int, number: int) -> Tensor:
    """x [B, C, n, H, W] at the second of two sigmas, which is step `number`, from what the network made of it at the first."""
    if spec.step == "ode":
        return flow.euler_step(x, x0, *sigmas)
    return flow.add_noise(x0, noise(place, number), sigmas[1])
