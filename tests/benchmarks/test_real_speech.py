"""What follows a sound is found to follow it, and how late."""

import math

import pytest
import torch

from benchmarks.lab.real_speech import Normalised, follows, loudness, moments, padded
from teachers.encoders.small import AudioConfig
from tests.support.tiny import randn


@pytest.mark.parametrize("late", [-2, 0, 3])
def test_a_late_mouth_is_late(late):
    signal = randn(90, seed=1)
    mouth = 2 * signal.roll(late) + 1
    r, offset = follows(mouth, signal)
    assert offset == late
    assert r == pytest.approx(1) if late == 0 else abs(r) < 0.5


def test_a_still_mouth_follows_nothing():
    assert follows(torch.ones(60), randn(60, seed=1)) == (0.0, 0)


def test_loudness_is_that_of_each_frame():
    tone = 0.1 * torch.sin(2 * math.pi * 1000 * torch.arange(1280) / 16_000)
    found = loudness(padded(tone, 3 * 1280).unflatten(0, (3, -1)))
    assert found.tolist() == pytest.approx([20 * math.log10(0.1) - 10 * math.log10(2), -50, -50], abs=1e-3)


def test_normalised_bands_have_the_wanted_moments_and_no_gain_of_the_recording_is_left():
    encoder, sound = AudioConfig(num_mels=4, hop=320, window=512).load(1280), 0.1 * randn(1280 * 20, seed=1)
    wanted = (randn(4, seed=2), randn(4, seed=3).abs() + 0.1)
    found = [Normalised(encoder, moments(encoder(x), 4), wanted)(x) for x in (sound, 3 * sound)]
    for one, other in zip(moments(found[0], 4), wanted, strict=True):
        assert (one - other).abs().max() < 1e-4
    assert (found[0] - found[1]).abs().max() < 1e-3
