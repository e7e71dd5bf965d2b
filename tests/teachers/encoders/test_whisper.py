"""Whisper's rows: a whole clip against transformers' own front end and encoder, a stream cell by cell."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate
from transformers import WhisperFeatureExtractor, WhisperModel

from teachers.encoders.loudness import to_loudness
from teachers.encoders.whisper import BLOCK, Whisper, WhisperConfig
from teachers.errors import UserError
from tests.support.tiny import some_sound

N = 640  # samples of a frame at 25 a second
SMALL = WhisperConfig(features=2 * 3 * 5, groups=2, lookback_frames=6, lookahead_frames=2, window=(2, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        replace(SMALL, features=4 * 5 * 5, groups=4).write_random(folder)
        model = WhisperModel.from_pretrained(folder)
        nn.init.normal_(model.encoder.layer_norm.weight)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder) -> Whisper:
    return replace(SMALL, path=folder, features=4 * 3 * 5).load(N)


@torch.no_grad()
def test_a_clip_is_encoded_as_published(folder, encoder):
    """Two blocks of 30 s; the means of states 0 and 1, of 2 and 3, and state 4; 50 a second to 25; five neighbours."""
    frames = 800
    sound = some_sound(frames * N)
    waves = to_loudness(sound, -23.0)
    front, model = WhisperFeatureExtractor.from_pretrained(folder), WhisperModel.from_pretrained(folder).eval()
    states = []
    for begin in range(0, len(waves), BLOCK):
        mel = front(waves[begin : begin + BLOCK].numpy(), sampling_rate=16_000, return_tensors="pt").input_features
        out = model.encoder(mel, output_hidden_states=True)
        first, second = (torch.stack(out.hidden_states[i : i + 2]).mean(dim=0) for i in (0, 2))
        states.append(torch.cat([first, second, out.last_hidden_state], dim=2))
    states = torch.cat(states, dim=1)[:, : 2 * frames]
    rows = interpolate(states.mT, size=frames, mode="linear", align_corners=True).mT[0]
    index = (torch.arange(frames)[:, None] + torch.arange(-2, 3)).clamp(0, frames - 1)
    found = encoder.whole(sound, frames)
    assert found.shape == (frames, 60)
    assert torch.allclose(found, rows[index].flatten(1), atol=2e-4)
    assert torch.equal(encoder.of_clip(sound, 40), found[:40])


@torch.no_grad()
def test_a_stream_is_the_same_however_it_is_split(encoder):
    sound = some_sound(21 * N)
    whole = encoder(sound)
    assert torch.equal(torch.cat([encoder(sound, 0, 5), encoder(sound, 5, 13), encoder(sound, 13, 21)]), whole)
    changed = sound.clone()
    changed[15 * N :] = (
        0.3  # cells of frames -3 .. 0, 1 .. 4, ..; the one that ends with frame 12 takes frames 13 and 14 too
    )
    moved = (encoder(changed) - whole).abs().amax(dim=1) > 0
    assert not moved[:13].any()
    assert moved[13:].all()


def test_what_is_missing_or_does_not_fit_is_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"whisper: no path; give the folder of openai/whisper-large-v3"):
        SMALL.load(N)
    with pytest.raises(
        UserError, match=r"missing preprocessor_config\.json, config\.json, model\.safetensors: .*; get openai"
    ):
        replace(SMALL, path=tmp_path).load(N)
    with pytest.raises(UserError, match=r"whisper: features=30, the weights give 60"):
        replace(SMALL, path=folder).load(N)
