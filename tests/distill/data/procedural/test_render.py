"""The embedded world: seeded, random given its conditions, at rest in frame 0, and not solved by loudness."""

from dataclasses import replace

import pytest
import torch

from distill.data.procedural import render, speech
from distill.data.procedural.render import WorldConfig
from distill.data.procedural.source import DataConfig, held_out
from teachers.codecs.linear import CodecConfig
from teachers.encoders.small import AudioConfig, TextConfig
from teachers.errors import UserError
from tests.support.tiny import FRAME_LABELS, rng

WORLD = WorldConfig(num_train=8, shard_clips=4)
CONFIG = DataConfig(world=WORLD, codec=CodecConfig(), audio=AudioConfig(), text=TextConfig())


@pytest.fixture(scope="module")
def clips():
    return held_out(CONFIG, 0, "test", 24)


def test_clips_are_what_they_say(clips):
    assert clips.video.shape == (24, 3, 15, 32, 32)
    assert clips.video.dtype == torch.uint8
    assert clips.audio.shape == (24, 15 * 1280)
    assert clips.audio.abs().max() <= 1.0
    assert len(set(clips.text)) > 12
    for name in FRAME_LABELS:
        assert clips.labels[name].shape == (24, 15), name
        assert torch.isfinite(clips.labels[name]).all()
    for name in ("mouth_open", "mouth_width", "blink", "smile", "frown", "surprised"):
        assert 0 <= clips.labels[name].min() <= clips.labels[name].max() <= 1.0001, name
    assert clips.labels["identity"].shape == (24, render.IDENTITY)
    assert {*clips.labels["expression"].tolist(), *clips.labels["gesture"].tolist()} <= {0, 1, 2, 3}


def test_the_world_is_seeded(clips):
    again, state = held_out(CONFIG, 0, "test", 24), torch.random.get_rng_state()
    assert torch.equal(again.video, clips.video)
    assert torch.equal(again.audio, clips.audio)
    assert again.text == clips.text
    for other in (held_out(CONFIG, 1, "test", 24), held_out(CONFIG, 0, "train", 24)):
        assert not torch.equal(other.video, clips.video)
        assert not torch.equal(other.audio, clips.audio)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_same_conditions_leave_motion_open(clips):
    other = held_out(CONFIG, 0, "test", 24, motion=1)
    assert torch.equal(other.audio, clips.audio)
    assert other.text == clips.text
    for name in ("identity", "expression", "gesture", "mouth_open", "mouth_width"):
        assert torch.equal(other.labels[name], clips.labels[name]), name
    for name in ("head_x", "head_y", "tilt", "light", "blink", "gaze"):
        assert not torch.equal(other.labels[name], clips.labels[name]), name
    assert torch.equal(other.video[:, :, 0], clips.video[:, :, 0]), "the portrait depends on the motion"
    moved = (other.video.float() - clips.video.float()).abs().flatten(1).mean(1)
    assert (moved > 1.0).all()


def test_frame_0_is_at_rest(clips):
    labels = {name: clips.labels[name][:, 0] for name in FRAME_LABELS}
    assert all(not value.any() for name, value in labels.items() if name != "mouth_width")
    assert (labels["mouth_width"] == speech.REST[1]).all()


def test_labels_are_in_the_picture():
    """Every label moves pixels, and where it should: the mouth below, the lids above, light left against right."""
    asked = render.draw_conditions(WORLD, 6, rng(1))
    rest = {name: torch.zeros(6, 2) for name in FRAME_LABELS}
    rest["mouth_width"] += 0.5
    rest["mouth_open"] += 0.3

    def drawn(name: str, value: float):
        state = dict(rest, **{name: torch.tensor([[rest[name][0, 0], value]]).expand(6, 2)})
        frames = render.render(WORLD.size, asked.identity, state).float()
        return (frames[:, :, 1] - frames[:, :, 0]).mean(1)

    for name in FRAME_LABELS:
        assert (drawn(name, 1.0).abs().flatten(1).mean(1) > 0.03).all(), name
    mouth, lid = drawn("mouth_open", 1.0).abs(), drawn("blink", 1.0).abs()
    assert mouth[:, 16:].sum() > 5 * mouth[:, :16].sum()
    assert lid[:, :18].sum() > 5 * lid[:, 18:].sum()
    light = drawn("light", 1.0)
    assert light[:, :, 16:].mean() > 1 > -1 > light[:, :, :16].mean()


def test_people_differ_as_much_as_requested():
    spread = []
    for variety in (0.0, 0.5, 1.0):
        asked = render.draw_conditions(replace(WORLD, variety=variety), 64, rng(1))
        assert 0 <= asked.identity.min() <= asked.identity.max() <= 1
        still = {name: torch.zeros(64, 1) for name in FRAME_LABELS}
        spread.append(float(render.render(WORLD.size, asked.identity, still).float().std(dim=0).mean()))
    assert spread[0] == 0 < spread[1] < 0.8 * spread[2]
    with pytest.raises(UserError, match=r"data\.world\.variety: got 2\.0; give a number from 0 to 1"):
        replace(CONFIG, world=replace(WORLD, variety=2.0))


def test_lips_close_at_a_closure_and_round_ahead_of_the_vowel():
    """The width of the lips is found best from sound that is still to come; in a closure the mouth is shut."""
    said = speech.synthesise(200, 25 * 1280, rng(3))
    syllables = speech._syllables(200, said.opening.shape[1], rng(3))
    assert float(said.opening[speech.smooth(syllables["closure"].float(), 5) > 0.99].max()) < 0.05
    table = torch.tensor([mouth[1] for _, mouth in speech.VOWELS.values()])
    vowel = torch.where(syllables["voiced"], table[syllables["vowel"]], speech.REST[1])
    found = {
        lag: torch.corrcoef(
            torch.stack([said.width[:, 20:-20], vowel[:, 20 + lag : vowel.shape[1] - 20 + lag]]).flatten(1)
        )[0, 1]
        for lag in (-5, 0, 5, 10)
    }
    assert max(found, key=lambda lag: float(found[lag])) == 5


def test_loudness_alone_does_not_tell_the_mouth():
    said = speech.synthesise(200, 25 * 1280, rng(3))
    rms = said.audio.unfold(1, 640, 160).square().mean(2).clamp(min=1e-10).log()
    opening = said.opening[:, 2 : 2 + rms.shape[1]]
    overall = torch.corrcoef(torch.stack([rms.flatten(), opening.flatten()]))[0, 1]
    assert abs(float(overall)) < 0.6
    centred = [x - x.mean(1, keepdim=True) for x in (rms, opening)]
    within = (centred[0] * centred[1]).sum() / (centred[0].norm() * centred[1].norm())
    assert abs(float(within)) < 0.6


def test_the_spectrum_determines_the_mouth():
    """A linear map of log bands finds more of the opening than loudness does."""
    said = speech.synthesise(300, 15 * 1280, rng(4))
    spectrum = torch.stft(said.audio, 512, 160, window=torch.hann_window(512), return_complex=True).abs()
    bands = (spectrum[:, 1:].unflatten(1, (32, 8)).mean(2) + 1e-5).log().transpose(1, 2)
    opening = said.opening[:, : bands.shape[1]]
    loud = spectrum.square().mean(1).clamp(min=1e-10).log().unsqueeze(2)
    found = []
    for features in (bands, loud):
        x = torch.cat([features, torch.ones_like(features[..., :1])], dim=2).double()
        train, test = x[:200].flatten(0, 1), x[200:].flatten(0, 1)
        weights = torch.linalg.lstsq(train, opening[:200].flatten().double().unsqueeze(1)).solution
        pair = torch.stack([(test @ weights).flatten(), opening[200:].flatten().double()])
        found.append(float(torch.corrcoef(pair)[0, 1]))
    assert found[0] > found[1] + 0.1
    assert found[0] > 0.6


def test_mistakes_are_named():
    for fps in ("30", "24", "12"):
        with pytest.raises(UserError, match=rf"data\.world\.fps: {fps} does not divide 16000 Hz; use 25/2"):
            render.samples_per_frame(replace(WORLD, fps=fps))
    assert render.samples_per_frame(replace(WORLD, fps="25")) == 640
    with pytest.raises(UserError, match=r"num_frames: got 16 with codec\.stride=2; use 1 \+ stride \* n"):
        replace(CONFIG, world=replace(WORLD, num_frames=16))
    with pytest.raises(UserError, match=r"\(30, 30\) is no multiple of codec\.patch=\d+"):
        replace(CONFIG, world=replace(WORLD, resolution=30))
