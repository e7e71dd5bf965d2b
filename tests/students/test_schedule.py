"""Diagonal schedules: chunks in flight, one forward a finished chunk, a context that does not see the flight."""

from dataclasses import replace

import pytest
import torch

from distill.methods import Batch
from distill.methods.ode_init import Config, ODEInit, build
from distill.methods.rollout import context, draw_noise, rollout
from students.history import History
from students.schedule import Schedule, advance
from students.serving.session import Session
from teachers import flow
from teachers.errors import UserError
from tests.support.tiny import a_bundle, a_portrait, a_student, randn, rng, some_conditions, some_latents, some_sound

N = 2
HISTORIES = [
    History(sinks=1, window=1),
    History(sinks=0, window=2),
    History(sinks=1, window=1, memory=2, memory_every=2),
    History(sinks=1, window=(1, 3)),
]


def diagonal(history=HISTORIES[0], depth=3, **changes):
    return a_student(history, schedule=Schedule(depth=depth), **changes).eval()


def test_the_walk_of_a_stream():
    assert list(Schedule(depth=3).walk(4, 3)) == [
        *((0, (0,)), (0, (1, 0)), (0, (2, 1, 0))),  # the flight fills
        *((1, (2, 1, 0)), (2, (2, 1)), (3, (2,))),  # one forward a chunk; nothing follows the last ones
    ]
    assert list(Schedule().walk(2, 3)) == [(i, (k,)) for i in range(2) for k in range(3)]
    steps = list(Schedule(depth=2).walk(3, 4))
    assert steps[:4] == [(0, (0,)), (0, (1,)), (0, (2, 0)), (0, (3, 1))]
    assert steps[4:6] == [(1, (2, 0)), (1, (3, 1))]
    per_chunk = [sum(len(done) for _, done in Schedule(depth=d).walk(6, 6)) for d in (1, 2, 3, 6)]
    assert per_chunk == [36] * 4, "every chunk takes every step once, whatever the order"


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_a_flight_equals_the_forwards_written_out(history):
    """fp64: each forward against one plain call of the network over the flight, its context made by separate clean passes."""
    student = diagonal(history).double()
    plain = a_student(history).double().eval()  # sequential: the same weights, its own context pass
    plain.load_state_dict(student.state_dict())
    sigmas, chunks = student.spec.sigmas, 5
    given = some_conditions(2, chunks * N)
    given = replace(given, text=given.text.double(), audio=given.audio.double(), reference=given.reference.double())
    table = randn(chunks, len(sigmas), 2, *some_latents(1, N).shape[1:], seed=3).double()

    def noise(chunk, step):
        return table[chunk, step]

    with torch.no_grad():
        x0 = rollout(student, given, noise)
        flight, out, state = {}, {}, plain.open(given.text)
        for front, done in student.spec.schedule.walk(chunks, len(sigmas)):
            if front > state.chunk:  # the chunk before is finished: a clean pass of its own
                last = state.chunk
                seen = replace(plain.resume(state, state.cached, last + 1), chunk=last)
                state = plain.commit(seen, out[last], given.frames(last * N, (last + 1) * N))
            numbers = range(front, front + len(done))
            x = torch.cat([flight.setdefault(c, noise(c, 0)) for c in numbers], dim=2)
            part = given.frames(front * N, (front + len(done)) * N)
            sigma = torch.tensor([s for k in done for s in [sigmas[k]] * N], dtype=torch.float64).expand(2, -1)
            reply = _call(plain, state, x, sigma, part)
            for i, (c, k) in enumerate(zip(numbers, done, strict=True)):
                context_kv = reply[:, :, i * N : (i + 1) * N]
                if k + 1 == len(sigmas):
                    out[c] = context_kv
                else:
                    flight[c] = flow.add_noise(context_kv, noise(c, k + 1), sigmas[k + 1])
    expected = torch.cat([out[c] for c in range(chunks)], dim=2)
    assert expected.std() > 0.1
    assert (x0 - expected).abs().max() < 1e-10


def _call(student, state, x, sigma, given):
    """One call of the network over a flight with the state's context."""
    from teachers.networks.kind import to_x0
    from teachers.networks.spans import BlockSpans, Span
    from teachers.networks.wan import with_reference

    known = given.known if state.chunk == 0 else ()
    x, inputs = with_reference(x, given, known)
    past, whole = student.past(state, 0), Span(0, x.shape[2])
    seen = [sum(entry.part == part for entry in state.cached) * N for part in range(2)]
    behind = {"past_frames": seen[0]}
    if len(student.spec.history.parts) > 1:
        behind = {"spans": BlockSpans(tuple(([whole], frames) for frames in seen), (0, 1))}
    out, _ = student.net(inputs, sigma, given.text, given.audio, past=past, **behind)
    return to_x0(out, x, sigma, given, student.net.prediction, known)


@pytest.mark.parametrize("depth", [1, 3])
def test_steps_along_the_ode_are_euler_s(depth):
    """Without fresh noise: x + (next - sigma) (x - x0) / sigma, so noise of later steps is never read."""
    student = a_student(HISTORIES[0], schedule=Schedule(depth=depth), step="ode").eval()
    given, first = some_conditions(1, N), some_latents(1, N, seed=5)
    sigmas = student.spec.sigmas

    def noise(place, step):
        return first if step == 0 else torch.full_like(first, float("nan"))

    with torch.no_grad():
        x0, _ = advance(student, student.open(given.text), given, noise, sigmas)
        state, x = student.open(given.text), first
        for sigma, lower in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
            level = torch.full((1, N), sigma)
            x = x + (lower - sigma) * (x - _call(student, state, x, level, given)) / sigma
    assert (x0 - x).abs().max() < 1e-5


def test_one_forward_a_chunk_and_three_to_the_first_frame():
    bundle, counts = a_bundle(HISTORIES[0], schedule=Schedule(depth=3)), []
    bundle.student.net.register_forward_pre_hook(lambda *_: counts.append(1))
    session = Session(bundle, a_portrait(), "a person nods")
    session.push(some_sound(60 * 1280))
    forwards = []
    for _ in range(8):
        before = len(counts)
        session.step()
        session.settle()
        forwards.append(len(counts) - before)
    assert forwards == [3, *[1] * 7]
    assert bundle.spec.nfe_per_chunk == 1


def test_a_chunk_s_gradient_reaches_the_weights_through_its_last_forward_alone():
    student = diagonal()
    leaves = [randn(2, *some_latents(1, N).shape[1:], seed=i).requires_grad_() for i in range(12)]
    x0 = rollout(student, some_conditions(), lambda chunk, step: leaves[3 * chunk + step])
    x0[:, :, 2 * N : 3 * N].square().mean().backward()
    reached = {divmod(i, 3) for i, leaf in enumerate(leaves) if leaf.grad is not None and leaf.grad.abs().sum()}
    assert reached == {(2, 2), (3, 1)}, "its own last noise, and that of the chunk that it sees in flight"
    assert student.net.proj_out.weight.grad.abs().sum() > 0


def trajectories_of(student, batch=3):
    states = randn(batch, len(student.spec.sigmas) + 1, *some_latents(1).shape[1:], seed=5)
    return Batch(some_conditions(batch), states=states)


def test_ode_init_trains_the_forwards_that_are_served():
    student = diagonal()
    method = ODEInit(Config(), student, (*student.spec.sigmas, 0.0))
    batch, seen = trajectories_of(student), set()
    keep = student.denoise_diagonal

    def spy(state, plan, x, sigmas, conditions):
        assert plan is None, "a step with gradient reads its conditions itself"
        assert (state.pending is None) == (state.chunk == 0), "the chunk before is pending, as in serving"
        done, first = tuple(student.spec.sigmas.index(sigma) for sigma in sigmas), state.chunk * N
        assert torch.equal(batch.states[:, done[0], :, first : first + N], x[:, :, :N])
        seen.add((state.chunk, done))
        return keep(state, plan, x, sigmas, conditions)

    student.denoise_diagonal = spy
    for seed in range(60):
        loss = method.loss("student", batch, rng(0), rng(seed))
        assert torch.isfinite(loss.value)
    assert seen == set(student.spec.schedule.walk(student.spec.num_chunks, len(student.spec.sigmas)))
    loss.value.backward()
    assert student.net.patch_embedding.weight.grad.abs().sum() > 0


def test_the_context_of_training_is_that_of_a_stream():
    student, given, clean = diagonal(HISTORIES[2]), some_conditions(), some_latents()
    state = context(student, clean, given, 3)
    assert state.chunk == 3
    assert state.pending.chunk == 2
    assert [entry.chunk for entry in state.cached] == [0]
    noise = draw_noise(student, 2, rng(0))
    x0 = rollout(student, given, noise)
    assert x0.shape == clean.shape


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: diagonal(depth=2), r"3 denoising steps are no multiple of 2 chunks in flight"),
        (lambda: Schedule(depth=0), r"student\.schedule\.depth: got 0"),
        (lambda: diagonal(History(sinks=1, window=2, commit="same_level")), r"want commit: clean"),
        (lambda: diagonal(History(sinks=1, window=0)), r"a window from 1"),
        (
            lambda: build(Config(context="noisy"), {"student": diagonal()}, (*diagonal().spec.sigmas, 0.0)),
            r"use context: clean",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(build_it, message):
    with pytest.raises(UserError, match=message) as error:
        build_it()
    assert "\n" not in str(error.value)
