"""The causal student: a masked pass equals the cached stream, the future is not seen, gradients stay in their chunk."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from distill.methods.rollout import draw_noise, rollout
from students.history import History
from students.schedule import Schedule, advance
from students.spec import student_sigmas
from teachers.errors import UserError
from tests.support.tiny import Ranks, a_student, randn, rng, some_conditions, some_latents

CHUNKS, N = 5, 2
LONG = {"horizon_frames": CHUNKS * N}
HISTORIES = [History(sinks=s, window=w) for s, w in [(0, None), (1, 1), (1, 2), (0, 1), (2, 0)]]
HISTORIES.append(History(sinks=1, window=1, memory=2, memory_every=1))
HISTORIES.append(History(sinks=1, window=1, positions="absolute"))
HISTORIES.append(History(sinks=1, window=1, reference_chunks=2))
HISTORIES.append(History(sinks=1, window=(1, 3)))


def level_of_each_chunk(batch: int = 2) -> torch.Tensor:
    return torch.linspace(0.95, 0.2, batch * CHUNKS).view(batch, CHUNKS)


def stream(student, x, sigma, conditions, clean):
    """The chunks one after another through the cache, each after the clean earlier ones."""
    state, out = student.open(conditions.text), []
    for i in range(CHUNKS):
        part, frames = conditions.frames(i * N, (i + 1) * N), slice(i * N, (i + 1) * N)
        out.append(student.denoise(state, None, x[:, :, frames], sigma[:, i], part)[0])
        state = student.commit(state, clean[:, :, frames], part)
    return torch.cat(out, dim=2)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["velocity", "reference"])
@pytest.mark.parametrize("level", [0.0, 0.1])
@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_one_masked_pass_equals_the_cached_stream(history, level, prediction, monkeypatch):
    history = replace(history, level=level)
    student = a_student(history, prediction=prediction, **LONG)
    given, x, clean = some_conditions(2, CHUNKS * N), some_latents(2, CHUNKS * N), some_latents(2, CHUNKS * N, seed=1)
    sigma = level_of_each_chunk()
    masked, cached = student.denoise_clip(x, sigma, given, clean), stream(student, x, sigma, given, clean)
    assert (masked - cached).abs().max() <= 1e-5 * max(1.0, masked.abs().max())
    alone = stream(a_student(History(sinks=0, window=0), prediction=prediction, **LONG), x, sigma, given, clean)
    assert (masked - alone)[:, :, 2 * N :].abs().mean() > 1e-3, "the context does nothing"
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the network's own fp32 islands
    student, given, x, clean = student.double(), given.to(torch.float64), x.double(), clean.double()
    sigma = sigma.double()
    masked, cached = student.denoise_clip(x, sigma, given, clean), stream(student, x, sigma, given, clean)
    assert masked.dtype == torch.float64
    assert (masked - cached).abs().max() <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["velocity", "reference"])
@pytest.mark.parametrize("chunks", [None, 1, 2])
def test_only_the_first_chunks_are_given_the_reference(chunks, prediction):
    student = a_student(History(sinks=0, window=0, reference_chunks=chunks), prediction=prediction, **LONG)
    given, x = some_conditions(2, CHUNKS * N), some_latents(2, CHUNKS * N)
    other = replace(given, reference=given.reference + 1)
    a, b = (student.denoise_clip(x, level_of_each_chunk(), c, x) for c in (given, other))
    changed = [not torch.equal(*pair) for pair in zip(a.split(N, dim=2), b.split(N, dim=2), strict=True)]
    assert changed == [chunks is None or j < chunks for j in range(CHUNKS)]
    with pytest.raises(UserError, match=r"student.history.reference_chunks: got 0; it counts chunks, from 1"):
        History(reference_chunks=0)


@torch.no_grad()
@pytest.mark.parametrize("context", ["clean", "noisy"])
@pytest.mark.parametrize(("sinks", "window"), [(0, None), (1, 1), (0, 1)])
def test_no_chunk_sees_what_comes_after_it(sinks, window, context):
    """Noise, audio and context of chunk j changed: earlier chunks bit-equal, chunk j itself not."""
    student = a_student(History(sinks=sinks, window=window), **LONG)
    given, x, clean = some_conditions(2, CHUNKS * N), some_latents(2, CHUNKS * N), some_latents(2, CHUNKS * N, seed=1)
    sigma = level_of_each_chunk()

    def run(x=x, given=given, clean=clean, sigma=sigma):
        return student.denoise_clip(x, sigma, given, clean if context == "clean" else None)

    out, j = run(), 3
    before, own, after = slice(0, j * N), slice(j * N, (j + 1) * N), slice((j + 1) * N, None)
    louder, noisier, other, higher = given.audio.clone(), x.clone(), clean.clone(), sigma.clone()
    louder[:, own] += 1.0
    noisier[:, :, own] += 1.0
    other[:, :, own] += 1.0
    higher[:, j] += 0.1
    for changed in (run(given=replace(given, audio=louder)), run(x=noisier), run(sigma=higher)):
        assert torch.equal(changed[:, :, before], out[:, :, before])
        assert (changed - out)[:, :, own].abs().mean() > 1e-3
    if context == "clean":
        changed = run(clean=other)
        assert torch.equal(changed[:, :, : (j + 1) * N], out[:, :, : (j + 1) * N]), "a chunk sees its own answer"
        assert (changed - out)[:, :, after].abs().mean() > 1e-3


@torch.no_grad()
def test_the_window_ends_where_it_says():
    """Without sinks and with window 1, two layers reach two chunks back and not a third."""
    student = a_student(History(sinks=0, window=1), **LONG)
    given, x, clean = some_conditions(2, CHUNKS * N), some_latents(2, CHUNKS * N), some_latents(2, CHUNKS * N, seed=1)
    out = student.denoise_clip(x, level_of_each_chunk(), given, clean)
    for chunk, reaches in [(1, False), (2, True), (3, True)]:
        other = clean.clone()
        other[:, :, chunk * N : (chunk + 1) * N] += 1.0
        changed = student.denoise_clip(x, level_of_each_chunk(), given, other)
        assert torch.equal(changed[:, :, 4 * N :], out[:, :, 4 * N :]) != reaches


@torch.no_grad()
def test_each_block_has_the_window_of_its_turn():
    """The first of two blocks sees one chunk back, the second three: together four, and in the other order."""
    given, x, clean = some_conditions(2, 12), some_latents(2, 12), some_latents(2, 12, seed=1)
    sigma, other = torch.linspace(0.95, 0.2, 12).view(2, 6), clean.clone()
    other[:, :, 2:4] += 1.0  # chunk 1, four before the last
    for window, reaches in (((1, 3), True), ((3, 1), True), (3, True), (1, False), ((1, 2), False)):
        student = a_student(History(sinks=0, window=window), horizon_frames=12)
        out, changed = (student.denoise_clip(x, sigma, given, context) for context in (clean, other))
        assert torch.equal(out[:, :, 10:], changed[:, :, 10:]) != reaches, window


@torch.no_grad()
def test_a_cycle_of_one_number_is_the_number():
    given, x, clean = some_conditions(2, CHUNKS * N), some_latents(2, CHUNKS * N), some_latents(2, CHUNKS * N, seed=1)
    sigma = level_of_each_chunk()
    for window in ((2,), (2, 2)):
        for kind in (lambda student: student.denoise_clip(x, sigma, given, clean),
                     lambda student: stream(student, x, sigma, given, clean)):  # fmt: skip
            whole, cycle = (kind(a_student(History(sinks=1, window=one), **LONG)) for one in (2, window))
            assert torch.equal(whole, cycle)


@torch.no_grad()
def test_a_stream_has_no_last_position():
    """Positions are relative to what is seen: chunk 7 of a stream equals chunk 2 where the context is the same."""
    student = a_student(History(sinks=0, window=1), prediction="reference")
    given = some_conditions(1, N)
    x = [some_latents(1, N, seed=i) for i in range(9)]
    sigma, outs = torch.tensor([0.7]), {}
    for start in (0, 5):
        state = replace(student.open(), chunk=1 + start)
        for i in range(3):
            outs[start, i] = student.denoise(state, None, x[i], sigma, given)[0]
            state = student.commit(state, x[i], given)
    assert all(torch.equal(outs[0, i], outs[5, i]) for i in range(3))


@torch.no_grad()
def test_text_is_read_once_and_is_the_same():
    student, given, x, sigma = a_student(), some_conditions(2, N), some_latents(2, N), torch.tensor([0.9, 0.3])
    outs = []
    for state in (student.open(), student.open(given.text)):
        x0, _ = student.denoise(state, student.plan(state, given), x, sigma, given)
        after = student.commit(state, x0, given)
        outs += [(x0, student.denoise(after, student.plan(after, given), x, sigma, given)[0])]
    for one, other in zip(*outs, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    state = student.open(given.drop("text").text)
    silent, _ = student.denoise(state, student.plan(state, given), x, sigma, given)
    assert not torch.equal(outs[0][0], silent)
    assert torch.equal(outs[0][0], student.denoise(state, None, x, sigma, given)[0]), "without a plan it reads its own"


@pytest.mark.parametrize("depth", [1, 3])
def test_a_rollouts_gradient_reaches_what_steps_without_gradient_read_ahead(depth):
    """Text, time and audio layers are trained: the exit step is given no plan. Without gradient the numbers are the same."""
    student, given = a_student(schedule=Schedule(depth=depth)), some_conditions(2, 4 * N)
    noise = draw_noise(student, 2, rng(1))
    x0 = rollout(student, given, noise)
    x0.square().mean().backward()
    layers = student.net.condition_embedder
    for module in (
        layers.text_embedder.linear_1,
        layers.time_proj,
        student.net.audio_proj.proj,
        student.net.blocks[0].attn2.to_k,
    ):
        assert module.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.allclose(rollout(student, given, noise), x0, atol=1e-5)


def test_a_mode_is_passed_and_never_read_from_autograd():
    """The cache kind at `open`, what was read ahead in the plan: gradient and inference mode change no number and no kind."""
    student, given, x = a_student(History(sinks=1, window=2)), some_conditions(1, 2), some_latents(1, 2)
    outs = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            state = student.open(given.text)
            assert state.kv_cache is None
            assert student.open(given.text, cache="inplace").kv_cache is not None
            plan = student.plan(state, given)
            assert not any(part.requires_grad for part in plan.audio)
            assert student.plan(state, given, grad=True) is None
            outs.append(student.denoise(state, plan, x, student.spec.sigmas[0], given)[0].detach())
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@torch.no_grad()
def test_a_commit_leaves_its_state_alone():
    student, given = a_student(History(sinks=1, window=1)), some_conditions(1, N)
    states = [student.open()]
    for i in range(4):
        states.append(student.commit(states[-1], some_latents(1, N, seed=i), given))
    assert [state.chunk for state in states] == [0, 1, 2, 3, 4]
    assert [tuple(entry.chunk for entry in state.cached) for state in states] == [(), (0,), (0, 1), (0, 2), (0, 3)]
    again = student.commit(states[1], some_latents(1, N, seed=1), given)
    for one, other in zip(again.context_kv[0], states[2].context_kv[0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_clip_needs_whole_chunks():
    with pytest.raises(ValueError, match="got 7 latent frames with chunk_frames=2"):
        a_student().denoise_clip(some_latents(1, 7), torch.ones(1, 3), some_conditions(1, 7))


def leaves(student, batch: int = 2):
    """A noise function whose tensors are leaves, and the table of them."""
    table = {}

    def noise(chunk, step):
        if (chunk, step) not in table:
            table[chunk, step] = randn(batch, *shape(student), seed=10 * chunk + step).requires_grad_()
        return table[chunk, step]

    return noise, table


def shape(student):
    channels, height, width = student.spec.latent_size
    return channels, student.spec.chunk_frames, height, width


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_a_chunk_s_gradient_stays_in_its_exit_step(exit_step):
    student = a_student(History(sinks=1, window=None))
    noise, table = leaves(student)
    calls, backwards = [], []
    student.net.patch_embedding.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    student.net.patch_embedding.register_full_backward_hook(lambda _, __, out: backwards.append(bool(out[0].any())))
    x0 = rollout(student, some_conditions(), noise, exit_step)
    chunks = student.spec.num_chunks
    assert calls.count(True) == chunks
    assert calls == ([*[False] * exit_step, True, False] * chunks)[:-1]
    x0[:, :, 2 * N : 3 * N].square().mean().backward()
    assert backwards.count(True) == 1, "the gradient of a chunk passes through another call of the network"
    reached = {key for key, leaf in table.items() if leaf.grad is not None and leaf.grad.any()}
    assert reached == {(2, exit_step)}
    assert student.net.proj_out.weight.grad.any()


def test_without_gradient_a_rollout_has_none():
    student = a_student()
    with torch.no_grad():
        x0 = rollout(student, some_conditions(), draw_noise(student, 2, torch.Generator().manual_seed(0)), 1)
    assert not x0.requires_grad


@pytest.mark.parametrize("prediction", ["velocity", "reference"])
def test_gradient_checkpointing_changes_no_gradient(prediction):
    student, grads = a_student(prediction=prediction), []
    noise, _ = leaves(student)
    for on in (False, True):
        if on:
            student.net.enable_gradient_checkpointing()
        assert student.net.gradient_checkpointing == on
        student.zero_grad()
        loss = rollout(student, some_conditions(), noise, 1)[:, :, 1:].square().mean()
        clip = student.denoise_clip(some_latents(), torch.rand(2, 4, generator=torch.Generator().manual_seed(1)),
                                    some_conditions(), some_latents(seed=1))  # fmt: skip
        (loss + clip.square().mean()).backward()
        grads.append({name: p.grad.clone() for name, p in student.named_parameters()})
    assert all(torch.allclose(grads[0][name], grads[1][name], rtol=1e-5, atol=1e-7) for name in grads[0])


def test_every_weight_learns_from_a_rollout():
    student = a_student()
    rollout(student, some_conditions(), leaves(student)[0], 1)[:, :, 1:].square().mean().backward()
    silent = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_ranks_draw_different_noise_and_the_same_exit_step():
    draws, exits = [], []
    for rank in range(3):
        engine = Ranks(rank=rank, world_size=3)
        draws.append(draw_noise(a_student(), 2, engine.generator(0, "loss", 7))(1, 0))
        shared = [engine.generator(0, "shared", i, shared=True) for i in range(9)]
        exits.append([int(torch.randint(3, (1,), generator=generator)) for generator in shared])
    assert not any(torch.equal(a, b) for a, b in pairwise(draws))
    assert exits[0] == exits[1] == exits[2]
    assert set(exits[0]) == {0, 1, 2}


def test_noise_is_fresh_for_every_chunk_and_step():
    student = a_student()
    noise = draw_noise(student, 2, torch.Generator().manual_seed(0))
    drawn = [noise(chunk, step) for chunk in range(4) for step in range(3)]
    assert drawn[0].shape == (2, *shape(student))
    assert len({float(x.sum()) for x in drawn}) == 12


@torch.no_grad()
def test_the_sampler_renoises_to_the_next_sigma():
    """The steps of a chunk see exactly the spec's sigmas, and x0 noised to them with that step's noise."""
    student, seen = a_student(), []
    sigmas = student.spec.sigmas

    class Recorder:
        spec = student.spec

        def plan(self, state, conditions, grad=False):
            return "plan"

        def denoise(self, state, plan, x, sigma, conditions, step):
            seen.append((plan, x, sigma))
            return torch.full_like(x, len(seen)), step

    noise = [randn(1, 4, 2, 4, 4, seed=i) for i in range(3)]
    out, entries = advance(Recorder(), None, some_conditions(1, 2), lambda _, i: noise[i], sigmas)
    assert (out == 3).all()
    assert entries == [0, 1, 2]
    assert [plan for plan, _, _ in seen] == ["plan"] * 3
    assert [sigma for _, _, sigma in seen] == pytest.approx(sigmas)
    assert torch.equal(seen[0][1], noise[0])
    for i in (1, 2):
        assert torch.allclose(seen[i][1], (1 - sigmas[i]) * i + sigmas[i] * noise[i], atol=1e-6)


def test_the_clock_of_a_spec():
    spec = a_student().spec
    assert [spec.pixel_frames(k) for k in range(3)] == [(0, 3), (3, 7), (7, 11)]
    assert spec.samples_per_frame == 1280
    assert spec.nfe_per_chunk == 4
    assert spec.num_chunks == 4
    assert student_sigmas(3, 3.0) == spec.sigmas
    with pytest.raises(UserError, match="got 9 latent frames with chunk_frames=2"):
        a_student(horizon_frames=9)


def test_a_number_and_a_tensor_are_the_same_sigma():
    """The time embedding that `open` read equals the one read at each step, and a step with gradient trains the time layers."""
    student, given, x = a_student(), some_conditions(1, 2), some_latents(1, 2)
    state = student.open(given.text)
    plan = student.plan(state, given)
    for sigma in (*student.spec.sigmas, student.spec.history.level, 0.321):
        with torch.no_grad():
            number, _ = student.denoise(state, plan, x, sigma, given)
            assert torch.equal(number, student.denoise(state, None, x, torch.tensor([sigma]), given)[0])
    student.denoise(state, None, x, student.spec.sigmas[0], given)[0].square().mean().backward()
    assert student.net.condition_embedder.time_proj.weight.grad.abs().sum() > 0
