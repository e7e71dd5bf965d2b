"""The causal student of Wan2.2-S2V, and LiveAvatar's history: anchors, audio that begins anew with a chunk, a stream equals its
masked forward, no look-ahead row by row."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from distill.methods.rollout import draw_noise, rollout
from students.history import History
from students.networks.causal_wan import CausalWan
from students.networks.windowed import WindowedConfig
from students.spec import Spec
from teachers.codecs.linear import CodecConfig
from teachers.encoders.anchors import AnchorsConfig
from teachers.encoders.small import AudioConfig, TextConfig
from teachers.flow import sigma_grid
from teachers.networks.s2v import S2V
from tests.support.networks.s2v import (
    AFTER,
    CHANNELS,
    HEIGHT,
    SMALL,
    STRIDE,
    TEXT,
    WIDTH,
    an_s2v_net,
    s2v_conditions,
    s2v_latents,
    some_rows,
)
from tests.teachers.reference.s2v import S2VReference

CHUNKS, N = 4, 3
FRAMES = CHUNKS * N
LIVE = {"sinks": 0, "window": 3, "commit": "same_level"}


def a_spec(network=SMALL, ahead: int = 27, **history) -> Spec:
    return Spec(
        height=HEIGHT * 4,
        width=WIDTH * 4,
        fps=Fraction(16),
        chunk_frames=N,
        sigmas=sigma_grid(4, 3.0, "twice")[:-1],
        horizon_frames=FRAMES,
        history=History(anchors_ahead=ahead, **history),
        network=network,
        codec=CodecConfig(stride=STRIDE, patch=4, channels=CHANNELS),
        audio=AudioConfig(),
        text=TextConfig(dim=TEXT, max_tokens=5, num_layers=1, num_heads=2, vocab_size=300),
        image=AnchorsConfig(),
        step="ode",
    )


def an_s2v_student(ahead: int = 27, **history) -> CausalWan:
    return SMALL.student(an_s2v_net(), a_spec(ahead=ahead, **history))


def inputs(motion: int = 19):
    """(conditions, noisy latents, clean latents, a sigma for each chunk)"""
    given = s2v_conditions(some_rows(1, FRAMES), motion, pose=True)
    return given, s2v_latents(1, FRAMES), s2v_latents(1, FRAMES, seed=1), torch.linspace(0.95, 0.2, CHUNKS)[None]


def stream(student, x, sigma, given, clean, planned: bool = True, cache: str = "value"):
    state, out = student.open(given.text, cache), []
    for i in range(x.shape[2] // N):
        part, frames = given.frames(i * N, (i + 1) * N), slice(i * N, (i + 1) * N)
        plan = student.plan(state, part) if planned else None
        x0, kept = student.denoise(state, plan, x[:, :, frames], sigma[:, i], part)
        out.append(x0)
        steps = [kept] * 4 if student.spec.history.commit == "same_level" else ()
        state = student.commit(state, clean[:, :, frames], part, steps, plan=plan)
    return torch.cat(out, dim=2)


@torch.no_grad()
@pytest.mark.parametrize("motion", [0, 19])
@pytest.mark.parametrize("ahead", [12, 27])
def test_a_stream_equals_its_masked_forward(ahead, motion):
    student, (given, x, clean, sigma) = an_s2v_student(ahead, sinks=1, window=1), inputs(motion)
    masked = student.denoise_clip(x, sigma, given, clean)
    for planned, cache in ((True, "value"), (False, "value"), (True, "inplace")):
        out = stream(student, x, sigma, given, clean, planned, cache)
        assert (masked - out).abs().max() <= 1e-5 * max(1.0, float(masked.abs().max()))
    alone = stream(an_s2v_student(ahead, sinks=0, window=0), x, sigma, given, clean)
    assert (masked - alone)[:, :, N:].abs().mean() > 1e-3, "the context does nothing"


@torch.no_grad()
def test_liveavatar_s_stream_equals_the_published_masks():
    """Every chunk sees the last three at its own level and the anchors, which see one another; these keep their place until the
    stream has passed 30 - r frames, then lie r ahead of its chunk. By the independent forward, at positions of the stream."""
    student, (given, x, _, _) = an_s2v_student(ahead=25, **LIVE), inputs()
    sigma = torch.full((1, CHUNKS), 0.6)
    groups = [
        (range(i * N, (i + 1) * N), range(max(0, i - 3) * N, i * N), max(0, i * N - (30 - 25))) for i in range(CHUNKS)
    ]
    assert [moved for *_, moved in groups] == [0, 0, 1, 4]
    reference = S2VReference(student.net.state_dict(), 2, AFTER, joint=False)
    clips = [range(i * N, (i + 1) * N) for i in range(CHUNKS)]
    rows = some_rows(1, FRAMES)
    velocity = reference.run(
        x, sigma.repeat_interleave(N, dim=1), given.text, rows, given.anchors, given.pose_latents, groups, clips
    )
    expected = x - 0.6 * velocity
    for out in (student.denoise_clip(x, sigma, given), stream(student, x, sigma, given, x)):
        assert (out - expected).abs().max() <= 1e-5 * float(expected.abs().max())


@torch.no_grad()
def test_one_chunk_differs_from_the_teacher_by_what_the_anchors_see_alone():
    """The teacher's anchors see the noise; of one block, whose anchors have seen nothing yet, both are the same."""
    one = replace(SMALL, num_layers=1, inject_after=(0,))
    net = S2V(4, 1, 2, 24, 48, TEXT, 15, STRIDE, 32, inject_after=(0,), audio_states=3).eval()
    net.load_state_dict({name: x for name, x in an_s2v_net().state_dict().items() if name in net.state_dict()})
    spec = replace(a_spec(one), chunk_frames=FRAMES)
    student, (given, x, _, _) = one.student(net, spec), inputs()
    sigma = torch.tensor([0.7])
    out = student.denoise(student.open(given.text), None, x, sigma, given)[0]
    assert torch.allclose(out, one.denoise(net, x, sigma, given, ()), atol=1e-5)
    student, net = SMALL.student(an_s2v_net(), replace(spec, network=SMALL)), an_s2v_net()
    out = student.denoise(student.open(given.text), None, x, sigma, given)[0]
    assert (out - SMALL.denoise(net, x, sigma, given, ())).abs().max() > 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_no_row_changes_a_chunk_before_its_own():
    student, (given, x, clean, sigma) = an_s2v_student(sinks=0, window=1), inputs(0)
    rows = some_rows(1, FRAMES)
    before = student.denoise_clip(x, sigma, given, clean)
    for row in range(rows.shape[1]):
        other = rows.clone()
        other[:, row] += 1.0
        changed = replace(given, audio=other.flatten(2).unflatten(1, (FRAMES, STRIDE)))
        own = row // (STRIDE * N)
        moved = (student.denoise_clip(x, sigma, changed, clean) - before).abs().amax(dim=(0, 1, 3, 4)) > 1e-6
        chunks = moved.unflatten(0, (CHUNKS, N)).any(dim=1).tolist()
        assert chunks[: own + 1] == [False] * own + [True], row


@torch.no_grad()
def test_a_frame_reads_five_rows_before_its_own_and_none_after():
    """Of one clip: latent frame i takes rows 4 i - 5 .. 4 i + 3; in chunks of 3 none before the chunk."""
    net, rows = an_s2v_net(), some_rows(1, FRAMES)

    def tokens(rows, numbers=None):
        return net.read_audio(rows.flatten(2).unflatten(1, (FRAMES, STRIDE)), numbers)[0]

    numbers = SMALL.numbered(range(FRAMES), N)
    assert numbers == (0, 1, 2) * CHUNKS
    whole, cut = tokens(rows), tokens(rows, numbers)
    for row in range(rows.shape[1]):
        other = rows.clone()
        other[:, row] += 1.0
        for numbers_, before, start in ((None, whole, 0), (numbers, cut, row // 12 * 12)):
            after = tokens(other, numbers_)
            expected = [(i >= start // 4 and 4 * i - 5 <= row <= 4 * i + 3 and i // N == start // 12) or
                        (numbers_ is None and 4 * i - 5 <= row <= 4 * i + 3) for i in range(FRAMES)]  # fmt: skip
            for one, two in ((after.key, before.key), (after.scale, before.scale)):
                assert ((one - two).flatten(2).abs().amax(dim=(0, 2)) > 0).tolist() == expected, row


@torch.no_grad()
def test_anchors_are_read_once_and_again_for_another_text():
    student, (given, x, clean, sigma) = an_s2v_student(sinks=0, window=1), inputs()
    calls, read = [], student.net.read_anchors
    student.net.read_anchors = lambda *args: (calls.append(1), read(*args))[1]
    out = stream(student, x, sigma, given, clean)
    assert len(calls) == 1
    state = student.open(given.text)
    plan = student.plan(state, given.frames(0, N))
    state = student.commit(state, clean[:, :, :N], given.frames(0, N), plan=plan)
    assert student.plan(state, given.frames(N, 2 * N)).anchors is plan.anchors
    other = student.set_text(state, given.text + 1.0)
    assert student.plan(other, given.frames(N, 2 * N)).anchors is not plan.anchors
    moved = student.plan(state, replace(given, anchors=given.anchors + 1.0).frames(N, 2 * N))
    assert moved.anchors is not plan.anchors
    assert len(calls) == 4
    shifted = stream(student, x, sigma, replace(given, anchors=given.anchors + 1.0), clean)
    assert (shifted - out).abs().mean() > 1e-3


def test_the_gradient_reaches_every_layer_beyond_wan():
    student, (given, x, clean, sigma) = an_s2v_student(sinks=1, window=1), inputs()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            student.net.enable_gradient_checkpointing()
        student.zero_grad()
        student.denoise_clip(x, sigma, given, clean).square().mean().backward()
        parts = ("audio_", "token_kind", "pose_embedding", "motion_embedding", "patch_embedding")
        path = {n: p.grad for n, p in student.net.named_parameters() if n.startswith(parts)}
        assert all(grad is not None and grad.any() for grad in path.values())
        found.append(path)
    assert all(torch.allclose(found[0][name], grad, atol=1e-5) for name, grad in found[1].items())


@torch.no_grad()
def test_a_windowed_student_of_it_reads_its_window_like_a_clip():
    spec = a_spec(WindowedConfig(network=SMALL), sinks=0, window=1)
    student, (given, x, clean, sigma) = WindowedConfig(network=SMALL).student(an_s2v_net(), spec), inputs()
    masked = student.denoise_clip(x, sigma, given, clean)
    out = stream(student, x, sigma, given, clean)
    assert (masked - out).abs().max() <= 1e-5 * float(masked.abs().max())


def test_pixel_frames_of_a_clip_with_a_lead():
    spec = a_spec()
    assert [spec.pixel_frames(k) for k in range(3)] == [(0, 13), (13, 25), (25, 37)]
    assert spec.takes_image
    assert not spec.network.reference


def test_a_rollout_with_gradient_is_the_one_without_also_behind_anchors_of_its_own():
    """The step with gradient reads the anchors that were made again, as the steps without and serving do."""
    spec = a_spec(ahead=18, **LIVE)
    spec = replace(spec, horizon_frames=2 * N, history=replace(spec.history, anchors_roll=2 * N))
    student, given = SMALL.student(an_s2v_net(), spec), inputs()[0]
    noise = draw_noise(student, 1, torch.Generator().manual_seed(0), CHUNKS)
    with torch.no_grad():
        expected = rollout(student, given, noise)
    assert torch.equal(rollout(student, given, noise).detach(), expected)
