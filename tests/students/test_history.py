"""What a chunk sees, where it lies in a buffer of fixed size, and that the ring holds what training concatenates."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from distill.methods import dmd, ode_init
from students.history import History
from students.kv_cache import CycledKVCache
from students.schedule import Schedule, advance
from teachers.config import convert
from teachers.errors import UserError
from tests.students.networks import test_windowed as windowed
from tests.support.tiny import MIDAS, a_student, make_spec, some_conditions, some_latents

N = 2
HISTORIES = [
    History(sinks=1, window=2),
    History(sinks=0, window=None),
    History(sinks=3, window=1),
    History(sinks=2, window=0),
    History(sinks=1, window=2, memory=2, memory_every=3),
    History(sinks=0, window=0, memory=3, memory_every=1),
    History(sinks=2, window=1, memory=1, memory_every=2),
    History(sinks=1, window=2, commit="same_level"),
    History(sinks=1, window=2, memory=1, memory_every=2, positions="absolute"),
]

CYCLES = [
    History(sinks=1, window=(1, 3)),
    History(sinks=0, window=(0, 2)),
    History(sinks=1, window=(2, 1), memory=1, memory_every=2),
    History(sinks=1, window=(1, 2), commit="same_level"),
]


def test_what_a_chunk_sees():
    assert History(sinks=1, window=2).visible(6) == (0, 4, 5)
    assert History(sinks=1, window=2).visible(2) == (0, 1)
    assert History(sinks=0, window=None).visible(3) == (0, 1, 2)
    assert History(sinks=3, window=1).visible(2) == (0, 1)
    assert History(sinks=3, window=1).visible(9) == (0, 1, 2, 8), "LiveTalk: 9 sink frames, 3 before the current 3"
    assert History(sinks=2, window=0).visible(5) == (0, 1)
    assert History(sinks=1, window=2, memory=2, memory_every=4).visible(20) == (0, 12, 16, 18, 19)
    assert History(sinks=1, window=2, memory=2, memory_every=4).visible(6) == (0, 4, 5)
    assert all(history.visible(0) == () for history in HISTORIES)


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_slots_fill_without_a_gap_and_a_chunk_keeps_its_place(history):
    for chunk in range(40):
        seen = history.visible(chunk)
        assert list(seen) == sorted(set(seen))
        assert set(history.visible(chunk + 1)) <= {*seen, chunk}, "a chunk comes back"
        assert sorted(history.slot(i, chunk) for i in seen) == list(range(len(seen)))
        if history.capacity is not None:
            assert len(seen) <= history.capacity
        for i in set(seen) & set(history.visible(chunk + 1)):
            moved = history.slot(i, chunk) != history.slot(i, chunk + 1)
            assert not moved or (history.memory and i == chunk - history.window)
    assert history.capacity is None or len(history.visible(40)) == history.capacity


def test_a_wrong_history_is_refused():
    for wrong in (
        {"sinks": -1},
        {"window": -2},
        {"level": 1.0},
        {"memory": -1},
        {"memory_every": 0},
        {"window": ()},
        {"window": (2, -1)},
        {"commit": "same_level", "level": 0.1},
    ):
        with pytest.raises(UserError, match=r"^student\.history[^\n]*$"):
            History(**wrong)


def test_a_cycle_that_does_not_fit_is_refused():
    cycle = History(sinks=1, window=(1, 2, 3))
    with pytest.raises(UserError, match=r"^student\.history\.window: got 3 windows for a network of 2 blocks; [^\n]*$"):
        a_student(cycle)
    for make in (windowed.a_windowed, partial(a_student, network=MIDAS)):
        history = History(sinks=1, window=(1, 2))
        with pytest.raises(UserError, match=r"^student\.history\.window: got \[1, 2\]; a \w+ student has one [^\n]*$"):
            make(history)
    with pytest.raises(UserError, match=r"^wrong value of 'window': \[2, 'x'\] [^\n]* int or list of int or null$"):
        convert(History, {"window": [2, "x"]})
    assert convert(History, {"window": [2, 3]}) == History(window=(2, 3))
    with pytest.raises(UserError, match=r"^student\.history: [^\n]* window from 1$"):
        a_student(History(sinks=1, window=(0, 2)), schedule=Schedule(depth=3))


def walk(student, given, count, cache):
    """The states of a stream and the x0 of each chunk."""
    state, states, out = student.open(given.text, cache), [], []
    for i in range(count):
        states.append(state)
        x0, steps = advance(
            student, state, given, lambda _, step, i=i: some_latents(1, N, seed=9 * i + step), student.spec.sigmas
        )
        out.append(x0)
        state = student.commit(state, x0, given, steps)
    return states, out


@pytest.mark.parametrize("history", HISTORIES + CYCLES, ids=str)
def test_the_cache_holds_what_training_concatenates(history):
    """Bit for bit, in order and when earlier states are asked again in any order (rollback)."""
    student, given = a_student(history, prediction="reference"), some_conditions(1, N)
    with torch.no_grad():
        _, plain = walk(student, given, 12, "value")
    with torch.inference_mode():
        states, ringed = walk(student, given, 12, "inplace")
        assert all(state.kv_cache is not None and not state.context_kv for state in states)
        assert all(torch.equal(a, b) for a, b in zip(plain, ringed, strict=True))
        order = list(range(12)) * 2
        random.Random(0).shuffle(order)
        for i in order:
            x0, _ = advance(
                student,
                states[i],
                given,
                lambda _, step, i=i: some_latents(1, N, seed=9 * i + step),
                student.spec.sigmas,
            )
            assert torch.equal(x0, plain[i]), f"state {i} is no value"


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 1, 2, (1, 3)])
def test_same_level_is_diffusion_forcing_at_one_sigma(window):
    """Step i of a stream without a clean pass equals one masked pass over all chunks' inputs of step i."""
    student = a_student(History(sinks=1, window=window, commit="same_level"), horizon_frames=5 * N)
    given, chunks = some_conditions(1, 5 * N), 5
    inputs = {(i, step): some_latents(1, N, seed=9 * i + step) for i in range(chunks) for step in range(3)}
    state, out = student.open(given.text), {}
    for i in range(chunks):
        part, steps = given.frames(i * N, (i + 1) * N), []
        for step, sigma in enumerate(student.spec.sigmas):
            out[i, step], kv = student.denoise(state, None, inputs[i, step], sigma, part, step)
            steps.append(kv)
        state = student.commit(state, out[i, 2], part, steps)
    for step, sigma in enumerate(student.spec.sigmas):
        x = torch.cat([inputs[i, step] for i in range(chunks)], dim=2)
        masked = student.denoise_clip(x, torch.full((1, chunks), sigma), given)
        cached = torch.cat([out[i, step] for i in range(chunks)], dim=2)
        assert (masked - cached).abs().max() <= 1e-5 * max(1.0, masked.abs().max())
    assert student.spec.nfe_per_chunk == 3
    with pytest.raises(ValueError, match="got 0 of 3"):
        student.commit(state, out[0, 2], part)


@torch.no_grad()
@pytest.mark.parametrize("history", CYCLES, ids=str)
def test_a_block_keeps_what_it_sees_and_no_more(history):
    """Bytes of a stream's keys and values, un-rotated and in the buffers, are those of its blocks' windows."""
    student, given, spec = a_student(history), some_conditions(1, N), make_spec(history)
    states, _ = walk(student, given, 13, "inplace")
    entries, cache = states[-1].cached, states[-1].kv_cache
    seen = [len(part.visible(12)) for part in history.parts]
    assert [sum(entry.part == part for entry in entries) for part in range(2)] == seen
    assert spec.history.mean_visible(12, 2) == sum(seen) / 2
    passes = 1 if history.commit == "clean" else len(spec.sigmas)
    token = 4 * passes * spec.network.kv_per_token // 2 * N * spec.token_grid[0] * spec.token_grid[1]  # of a block
    kept = [t for entry in entries for t in (*entry.keys, *entry.values)]
    assert sum(t.untyped_storage().nbytes() for t in kept) == sum(seen) * token
    assert isinstance(cache, CycledKVCache)
    buffers = [t for part in cache.parts for pair in part.buffers for t in pair]
    assert sum(t.numel() * 4 for t in buffers) == sum(part.capacity or 0 for part in history.parts) * token


def test_methods_refuse_a_history_that_they_cannot_train():
    student = a_student(History(commit="same_level"))
    with pytest.raises(UserError, match=r"^dmd\.exit_step: [^\n]*last"):
        dmd.build(dmd.Config(), {"student": student, "teacher": None, "fake_score": None})
    dmd.build(dmd.Config(exit_step="last"), {"student": student, "teacher": None, "fake_score": None})
    with pytest.raises(UserError, match=r"^init\.context: [^\n]*noisy"):
        ode_init.build(ode_init.Config(), {"student": student}, (*student.spec.sigmas, 0.0))


@torch.no_grad()
def test_a_stream_of_another_length_does_not_lose_its_sinks():
    student, given = a_student(History(sinks=1, window=1)), some_conditions(1, N)
    state = student.open(given.text)
    for i in range(30):
        state = student.commit(state, some_latents(1, N, seed=i), given)
    assert [entry.chunk for entry in state.cached] == [0, 29]
    assert replace(state, chunk=5).cached[0].chunk == 0
