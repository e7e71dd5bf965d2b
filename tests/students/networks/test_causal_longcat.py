"""The causal student of LongCat-Video-Avatar: the machinery is Wan's, condition tokens are the backbone's own."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from students.history import History
from students.networks.causal_wan import CausalWan
from students.schedule import DiagonalStep, Schedule
from students.spec import Spec
from teachers.codecs.linear import CodecConfig
from teachers.encoders.small import AudioConfig, TextConfig
from teachers.flow import sigma_grid
from teachers.networks.kind import AvatarTeacher
from tests.support.networks.longcat import SMALL, a_longcat, longcat_conditions
from tests.support.networks.talk import (
    CHANNELS,
    HEIGHT,
    STRIDE,
    TEXT,
    WIDTH,
    audio_of,
    some_people,
    some_regions,
    stream,
    talk_latents,
)
from tests.support.tiny import randn

CHUNKS, N = 4, 2
FRAMES = CHUNKS * N


def a_longcat_student(speakers: int = 1, chunk_frames: int = N, **changes) -> CausalWan:
    schedule = changes.pop("schedule", Schedule())
    spec = Spec(
        height=HEIGHT * 4,
        width=WIDTH * 4,
        fps=Fraction(16),
        chunk_frames=chunk_frames,
        sigmas=sigma_grid(4, 12.0)[:-1],
        horizon_frames=FRAMES,
        history=History(**changes),
        network=SMALL,
        codec=CodecConfig(stride=STRIDE, patch=4, channels=CHANNELS),
        audio=AudioConfig(),
        text=TextConfig(dim=TEXT, max_tokens=5, num_layers=1, num_heads=2, vocab_size=300),
        speakers=speakers,
        schedule=schedule,
    )
    return SMALL.student(a_longcat(speakers), spec)


def inputs(speakers: int = 1):
    """(conditions, noisy latents, clean latents, a sigma for each chunk)"""
    given = longcat_conditions(some_people(2, speakers, FRAMES), some_regions() if speakers == 2 else None)
    sigma = torch.linspace(0.95, 0.2, 2 * CHUNKS).view(2, CHUNKS)
    return given, talk_latents(2, FRAMES), talk_latents(2, FRAMES, seed=1), sigma


@torch.no_grad()
@pytest.mark.parametrize("speakers", [1, 2])
@pytest.mark.parametrize("history", [{"window": 1}, {"window": 2, "level": 0.1, "positions": "absolute"}], ids=str)
def test_a_stream_equals_its_masked_forward(history, speakers):
    student, (given, x, clean, sigma) = a_longcat_student(speakers, **history), inputs(speakers)
    masked = student.denoise_clip(x, sigma, given, clean)
    assert torch.equal(masked[:, :, :1], given.reference)
    for planned, cache in ((True, "value"), (False, "value"), (True, "inplace")):
        out = stream(student, x, sigma, given, clean, planned, cache)
        assert (masked - out).abs().max() <= 1e-5 * max(1.0, float(masked.abs().max()))
    alone = stream(a_longcat_student(speakers, sinks=1, window=0), x, sigma, given, clean)
    assert (masked - alone)[:, :, 2 * N :].abs().mean() > 1e-3, "the context does nothing"


@torch.no_grad()
def test_a_diagonal_stream_equals_its_masked_forward():
    """Chunks in flight together, behind the commit of the one before them in the same forward: known frames apart in both."""
    student = a_longcat_student(schedule=Schedule(depth=2), window=2)
    given, x, clean, _ = inputs()
    n, depth = N, 2
    state = student.open(given.text)
    for k in range(CHUNKS - depth + 1):
        part = given.frames(k * n, (k + depth) * n)
        flight = x[:, :, k * n : (k + depth) * n]
        out, entry = student.denoise_diagonal(state, student.plan(state, part), flight, (0.3, 0.8), part)
        front = clean[:, :, : k * n]
        sigma = torch.tensor([[0.3, 0.8]]).expand(2, -1)
        masked = student.denoise_diagonal_train(flight, sigma, given.frames(0, (k + depth) * n), front)
        assert (out - masked).abs().max() <= 1e-5 * max(1.0, float(masked.abs().max())), k
        done, own = clean[:, :, k * n : (k + 1) * n], given.frames(k * n, (k + 1) * n)
        state = student.commit(state, done, own, DiagonalStep(flight=(), entry=entry))


@torch.no_grad()
def test_one_chunk_over_the_clip_is_the_teacher():
    student, (given, x, _, _) = a_longcat_student(chunk_frames=FRAMES), inputs()
    sigma = torch.tensor([0.9, 0.4])
    expected = AvatarTeacher(student.net).denoise(x, sigma, given)
    assert torch.allclose(student.denoise_clip(x, sigma[:, None], given), expected, atol=1e-5)


@torch.no_grad()
def test_every_row_reaches_no_further_than_the_look_ahead_of_two_rows():
    """Row r changes the chunk of the frame whose window 4 i - 5 .. 4 i + 2 has it, none before; frame 0 takes no audio at all, so
    rows that only its window would have change nothing."""
    student, (given, x, clean, sigma) = a_longcat_student(sinks=1, window=1), inputs()
    people = some_people(2, 1, FRAMES)
    before = student.denoise_clip(x, sigma, given, clean)
    for row in range(people.shape[2]):
        other = people.clone()
        other[:, :, row] += 1.0
        first = next(i for i in range(1, FRAMES) if row <= STRIDE * i + 2)
        start = first // N * N
        after = student.denoise_clip(x, sigma, replace(given, audio=audio_of(other)), clean)
        assert torch.equal(after[:, :, :start], before[:, :, :start])
        assert torch.equal(after[:, :, :1], before[:, :, :1])
        moved = (after - before)[:, :, start : start + N].abs().amax(dim=(1, 2, 3, 4))
        assert (moved > 1e-6).all(), row


@torch.no_grad()
def test_a_clean_context_takes_neither_text_nor_audio():
    """What is committed at sigma 0 is the same under another text and another sound, so a new prompt needs no new context."""
    given, _, clean, _ = inputs()
    other = replace(given, text=randn(2, 5, TEXT, seed=40), audio=audio_of(some_people(2, 1, FRAMES, seed=8)))

    def kept(conditions, level):
        student = a_longcat_student(window=2, level=level)
        state = student.open(conditions.text)
        for i in range(2):
            state = student.commit(state, clean[:, :, i * N : (i + 1) * N], conditions.frames(i * N, (i + 1) * N))
        return torch.stack([part for chunk in state.cached for part in (*chunk.keys, *chunk.values)])

    assert torch.equal(kept(given, 0.0), kept(other, 0.0))
    assert (kept(given, 0.2) - kept(other, 0.2)).abs().mean() > 1e-3


def test_the_gradient_reaches_every_layer():
    """But for the projector of frame 0's audio, which the condition token does not take."""
    student, (given, x, clean, sigma) = a_longcat_student(2, window=1), inputs(2)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            student.net.enable_gradient_checkpointing()
        student.zero_grad()
        student.denoise_clip(x, sigma, given, clean).square().mean().backward()
        grads = {name: p.grad for name, p in student.net.named_parameters() if "proj1." not in name}
        assert all(grad is not None and grad.any() for grad in grads.values())
        found.append(grads)
    assert all(torch.allclose(found[0][name], grad, atol=1e-5) for name, grad in found[1].items())
