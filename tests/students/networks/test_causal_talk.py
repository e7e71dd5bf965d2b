"""The causal student of InfiniteTalk: its look-ahead row by row, a stream equals its masked forward, speakers, context."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from students.history import History
from students.networks.causal_wan import CausalWan
from students.spec import Spec
from teachers.codecs.linear import CodecConfig
from teachers.encoders.image import WanImageConfig
from teachers.encoders.small import AudioConfig, TextConfig
from teachers.errors import UserError
from teachers.flow import sigma_grid
from tests.support.networks.talk import (
    CHANNELS,
    HEIGHT,
    SMALL,
    STRIDE,
    TEXT,
    WIDTH,
    a_talk_net,
    audio_of,
    some_people,
    some_regions,
    stream,
    talk_conditions,
    talk_latents,
)

CHUNKS, N = 4, 2
FRAMES = CHUNKS * N


def a_talk_student(speakers: int = 1, **history) -> CausalWan:
    spec = Spec(
        height=HEIGHT * 4,
        width=WIDTH * 4,
        fps=Fraction(25),
        chunk_frames=N,
        sigmas=sigma_grid(3, 7.0)[:-1],
        horizon_frames=FRAMES,
        history=History(**history),
        network=SMALL,
        codec=CodecConfig(stride=STRIDE, patch=4, channels=CHANNELS),
        audio=AudioConfig(),
        text=TextConfig(dim=TEXT, max_tokens=5, num_layers=1, num_heads=2, vocab_size=300),
        image=WanImageConfig(),
        speakers=speakers,
    )
    return SMALL.student(a_talk_net(speakers), spec)


def inputs(speakers: int = 1):
    """(conditions, noisy latents, clean latents, a sigma for each chunk)"""
    given = talk_conditions(some_people(2, speakers, FRAMES), some_regions() if speakers == 2 else None)
    sigma = torch.linspace(0.95, 0.2, 2 * CHUNKS).view(2, CHUNKS)
    return given, talk_latents(2, FRAMES), talk_latents(2, FRAMES, seed=1), sigma


@torch.no_grad()
@pytest.mark.parametrize("speakers", [1, 2])
@pytest.mark.parametrize("history", [{"sinks": 1, "window": 1}, {"sinks": 1, "window": 2, "level": 0.1}], ids=str)
def test_a_stream_equals_its_masked_forward(history, speakers):
    student, (given, x, clean, sigma) = a_talk_student(speakers, **history), inputs(speakers)
    masked = student.denoise_clip(x, sigma, given, clean)
    for planned, cache in ((True, "value"), (False, "value"), (True, "inplace")):
        out = stream(student, x, sigma, given, clean, planned, cache)
        assert (masked - out).abs().max() <= 1e-5 * max(1.0, float(masked.abs().max()))
    alone = stream(a_talk_student(speakers, sinks=1, window=0), x, sigma, given, clean)
    assert (masked - alone)[:, :, 2 * N :].abs().mean() > 1e-3, "the context does nothing"


@torch.no_grad()
def test_every_row_reaches_no_further_than_the_look_ahead_of_two_rows():
    """Row r changes the chunk of the frame whose window 4 i - 5 .. 4 i + 2 has it, none before, in a stream and a masked pass."""
    student, (given, x, clean, sigma) = a_talk_student(sinks=1, window=1), inputs()
    people = some_people(2, 1, FRAMES)
    before = student.denoise_clip(x, sigma, given, clean)
    streamed = stream(student, x, sigma, given, clean)
    for row in range(people.shape[2]):
        other = people.clone()
        other[:, :, row] += 1.0
        changed = replace(given, audio=audio_of(other))
        first = next(i for i in range(FRAMES) if row <= STRIDE * i + 2)  # the first latent frame that sees the row
        start = first // N * N
        after = student.denoise_clip(x, sigma, changed, clean)
        assert torch.equal(after[:, :, :start], before[:, :, :start])
        moved = (after - before)[:, :, start : start + N].abs().amax(dim=(1, 2, 3, 4))
        assert (moved > 1e-6).all(), row
        if row % 7 == 3:
            out = stream(student, x, sigma, changed, clean)
            assert torch.equal(out[:, :, :start], streamed[:, :, :start])


@torch.no_grad()
def test_frames_alone_have_their_window_of_rows():
    """Of a clip of one chunk, without attention between frames: frame i takes rows 4 i - 5 .. 4 i + 2, frame 0 rows 0 .. 2."""
    net, people = a_talk_net(), some_people(1, 1, 4)
    from_audio = net.read_audio(audio_of(people))[0].key
    for row in range(people.shape[2]):
        other = people.clone()
        other[:, :, row] += 1.0
        moved = (net.read_audio(audio_of(other))[0].key - from_audio).abs().amax(dim=(0, 2, 3, 4)) > 0
        expected = [(STRIDE * i - 5 <= row if i else True) and row <= STRIDE * i + 2 for i in range(4)]
        assert moved.tolist() == expected, row


@torch.no_grad()
def test_a_film_that_is_given_becomes_context():
    """The published sampler continues a film by clean motion latents; a student commits its chunks and goes on."""
    student, (given, x, film, sigma) = a_talk_student(sinks=1, window=2), inputs()
    state = student.open(given.text)
    for i in range(2):
        state = student.commit(state, film[:, :, i * N : (i + 1) * N], given.frames(i * N, (i + 1) * N))
    own = slice(2 * N, 3 * N)
    out, _ = student.denoise(state, None, x[:, :, own], sigma[:, 2], given.frames(2 * N, 3 * N))
    assert torch.allclose(out, student.denoise_clip(x, sigma, given, film)[:, :, own], atol=1e-5)
    other = student.denoise_clip(x, sigma, given, film + 0.5)[:, :, own]
    assert (out - other).abs().mean() > 1e-3


@torch.no_grad()
def test_speakers_move_what_they_are_shown_to_move():
    """The two voices in the other order, or the regions, give another film; with both in sight nothing else is needed."""
    student, (given, x, clean, sigma) = a_talk_student(2, sinks=1, window=1), inputs(2)
    out = student.denoise_clip(x, sigma, given, clean)
    people = some_people(2, 2, FRAMES)
    for changed in (
        replace(given, audio=audio_of(people.flip(1))),
        replace(given, regions=given.regions.flip(1)),
        replace(given, regions=given.regions.flip(-1)),
    ):
        assert (student.denoise_clip(x, sigma, changed, clean) - out).abs().mean() > 1e-3


def test_two_speakers_want_frame_0_in_sight():
    for history in ({"sinks": 0, "window": 2}, {"sinks": 0, "window": 2, "memory": 1}):
        with pytest.raises(UserError, match=r"student\.history\.sinks: got 0; .* frame 0, .* set it to 1"):
            a_talk_student(2, **history)
        a_talk_student(1, **history)
    a_talk_student(2, sinks=0, window=None)
    student, (given, x, clean, sigma) = a_talk_student(2, sinks=1, window=1), inputs(2)
    with pytest.raises(UserError, match=r"regions: none for 2 speakers; set data\.image\.name=wan_speakers"):
        student.denoise_clip(x, sigma, replace(given, regions=None), clean)


def test_the_gradient_reaches_every_layer_of_the_audio():
    student, (given, x, clean, sigma) = a_talk_student(2, sinks=1, window=1), inputs(2)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            student.net.enable_gradient_checkpointing()
        student.zero_grad()
        student.denoise_clip(x, sigma, given, clean).square().mean().backward()
        path = {n: p.grad for n, p in student.net.named_parameters() if "audio" in n or "norm_x" in n}
        assert len(path) == 10 + 2 * 8
        assert all(grad is not None and grad.any() for grad in path.values())
        found.append(path)
    assert all(torch.allclose(found[0][name], grad, atol=1e-6) for name, grad in found[1].items())
