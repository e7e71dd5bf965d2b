"""Which states a row of wav2vec2 has, at which rate, and with which neighbours: MultiTalk's, EchoMimicV3's, Wan2.2-S2V's."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor

from teachers.encoders.loudness import low_pass, to_loudness, with_noise
from teachers.encoders.wav2vec import Wav2VecConfig
from teachers.errors import UserError
from tests.support.tiny import some_sound
from tests.teachers.encoders import reference_audio as reference
from tests.teachers.encoders.test_wav2vec import HEADS, LAYERS, WIDTH, N, a_model, an_encoder, published

FRAMES = 13
SOUND = (FRAMES + 3) * N
MULTITALK = Wav2VecConfig(lookback_frames=6, lookahead_frames=3, states="layers", window=(2, 2))
ECHOMIMIC = Wav2VecConfig(lookback_frames=6, lookahead_frames=4, states="last", rate=50, window=(5, 5))
S2V = Wav2VecConfig(lookback_frames=6, lookahead_frames=4, states="all", rate=30, resample="states")
KINDS = pytest.mark.parametrize("config", [MULTITALK, ECHOMIMIC], ids=["MultiTalk", "EchoMimicV3"])
STREAMS = pytest.mark.parametrize("config", [MULTITALK, ECHOMIMIC, S2V], ids=["MultiTalk", "EchoMimicV3", "S2V"])


def library(sound: torch.Tensor, **changes):
    """What transformers' own model makes of the whole sound at 50 states a second."""
    values = Wav2Vec2FeatureExtractor()(sound.numpy(), sampling_rate=16000, return_tensors="pt").input_values
    return a_model(**changes).wav2vec2(values, output_hidden_states=True)


def test_every_layer_of_five_frames_side_by_side():
    """MultiTalk: no embedding and no second last state, in the order row, layer, channel; the first and last row go on."""
    encoder, sound = an_encoder(MULTITALK), some_sound(SOUND)
    rows = encoder.of_clip(sound[None], FRAMES)[0]
    assert rows.shape == (FRAMES, 5 * LAYERS * WIDTH)
    states = reference.audio_rows(published(a_model()), sound[None], SOUND // N, N, HEADS)[0][:, 2 * WIDTH :]
    for frame in range(FRAMES):
        near = [states[min(max(frame + k, 0), SOUND // N - 1)] for k in range(-2, 3)]
        assert (rows[frame] - torch.cat(near)).abs().max() < 1e-5


def test_the_last_state_at_its_own_rate():
    """EchoMimicV3: nothing is interpolated, a frame begins with state 2 k and has five before and after it."""
    encoder, sound = an_encoder(ECHOMIMIC), some_sound(SOUND)
    rows = encoder.of_clip(sound[None], FRAMES)[0]
    states = library(sound).last_hidden_state[0]
    assert rows.shape == (FRAMES, 11 * WIDTH)
    for frame in range(FRAMES):
        near = [states[max(2 * frame + k, 0)] for k in range(-5, 6)]
        assert (rows[frame] - torch.cat(near)).abs().max() < 1e-5


def test_the_sound_is_prepared_first():
    """LongCat-Video-Avatar 1.0: a loudness, a noise floor, a low-pass; no split of a stream and no louder sound moves a row."""
    encoder = an_encoder(replace(MULTITALK, loudness=-23.0, noise=-45.0, low_pass=3000.0))
    plain, sound = an_encoder(MULTITALK), some_sound(SOUND)
    prepared = low_pass(with_noise(to_loudness(sound, -23.0), -45.0, 0), 3000.0)
    rows = encoder.of_clip(sound[None], FRAMES)
    assert torch.allclose(rows, plain.of_clip(prepared[None], FRAMES), atol=1e-5)
    assert (rows - plain.of_clip(sound[None], FRAMES)).abs().max() > 1e-2
    assert torch.allclose(encoder.of_clip(0.1 * sound[None], FRAMES), rows, atol=1e-3)
    assert torch.equal(torch.cat([encoder(sound, 0, 5), encoder(sound, 5, FRAMES)]), encoder(sound, 0, FRAMES))


@pytest.mark.parametrize("stable", [False, True])
def test_every_state_once(stable):
    """Of a model with stable layer norm (XLS-R, xlsr-53) the states are raw, and the last is normalised."""
    config = Wav2VecConfig(lookback_frames=6, lookahead_frames=3, states="all", rate=50)
    changes = {"do_stable_layer_norm": stable, "feat_extract_norm": "layer" if stable else "group", "conv_bias": stable}
    encoder, sound = an_encoder(config, **changes), some_sound(SOUND)
    rows = encoder.of_clip(sound[None], FRAMES)[0]
    out = library(sound, **changes)
    states = torch.cat([*out.hidden_states[:-1], out.last_hidden_state], dim=-1)[0]
    assert len(out.hidden_states) == LAYERS + 1
    assert encoder.dim == (LAYERS + 1) * WIDTH
    assert (rows - states[: 2 * FRAMES : 2]).abs().max() < 1e-5


@pytest.mark.parametrize("frames", [8, 13, 30])
def test_states_at_30_a_second_of_which_a_row_is_the_nearest(frames):
    """Wan2.2-S2V: the first and the last state are the first and the last row; zeros beyond the sound. 25 fps here, so 1.2 a
    frame."""
    encoder, sound = an_encoder(S2V), some_sound(SOUND)
    rows = encoder.of_clip(sound[None], frames)[0]
    out = library(sound)
    states = torch.cat([*out.hidden_states[:-1], out.last_hidden_state], dim=-1)
    count = int(states.shape[1] / 50 * 30)
    every = torch.nn.functional.interpolate(states.mT, size=count, align_corners=True, mode="linear").mT[0]
    assert rows.shape == (frames, (LAYERS + 1) * WIDTH)
    for frame in range(frames):
        number = round(frame * 1.2)
        expected = every[number] if number < count else torch.zeros(())
        assert (rows[frame] - expected).abs().max() < 1e-5, frame
    assert frames < 30 or not rows[-1].any()


def test_a_stream_s_rows_at_30_a_second_are_where_they_are_in_a_long_sound():
    """By states that are their own time: within the clip's drift of 2 states and half a step of 30 a second."""
    encoder = an_encoder(S2V)
    encoder._states = lambda features: torch.arange(features.shape[-1], dtype=torch.float32)[None, :, None]
    starts = [
        encoder._between(encoder._states(torch.zeros(1, 1, 60)), begin, range(begin, begin + 20)) for begin in (0, 7)
    ]
    times = [(begin + k) * N / 320 for begin in (0, 7) for k in range(20)]
    found = [float(row) + begin * N / 320 for begin, part in zip((0, 7), starts, strict=True) for row in part[0]]
    assert max(abs(a - b - encoder.offset) for a, b in zip(found, times, strict=True)) <= 50 / 60 + 1e-6
    assert 0 < encoder.offset < 1


@STREAMS
def test_a_stream_is_the_same_however_it_is_cut(config):
    encoder, sound = an_encoder(config), some_sound(30 * N + 77)
    together = encoder(sound)
    for cuts in ([0, 1, 14, 31], [0, 9, 21, 31]):
        assert torch.equal(torch.cat([encoder(sound, a, b) for a, b in pairwise(cuts)]), together)


@STREAMS
def test_a_stream_s_rows_hear_their_look_ahead_and_no_further(config):
    encoder, sound = an_encoder(config), some_sound(40 * N)
    rows = encoder(sound, 17, 21)
    later = sound.clone()
    later[21 * N + encoder.lookahead :] += 0.5
    assert torch.equal(encoder(later, 17, 21), rows)
    later[21 * N + encoder.lookahead - 1] += 0.5
    assert not torch.equal(encoder(later, 17, 21), rows)


@KINDS
def test_neighbours_in_a_stream_are_the_rows_beside(config):
    """A cell's window of the stream: shifted by a state, two rows of one cell have the same neighbours."""
    encoder, sound = an_encoder(config), some_sound(30 * N)
    step, (before, after) = encoder.per_frame, config.window
    rows = encoder(sound, 17, 21).unflatten(1, (before + after + 1, -1))
    assert torch.equal(rows[0, step:], rows[1, :-step])
    assert not torch.equal(rows[0, 0], rows[0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": (0, 20)}, r"20 states after a row are beyond lookahead_frames=4 of 2 each; raise it"),
        ({"window": (-1, 0)}, r"wav2vec2 window: got \[-1, 0\]"),
        ({"rate": 30}, r"wav2vec2 rate: got 30 states a second for 25 frames; give a multiple"),
        (
            {"resample": "states"},
            r"resample: states: got rate=50, window=\[5, 5\]; give a rate, published is 30, no window",
        ),
        ({"resample": "states", "rate": None, "window": (0, 0)}, r"resample: states: got rate=None, window=\[0, 0\]"),
    ],
)
def test_rows_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message):
        an_encoder(replace(ECHOMIMIC, **change))
