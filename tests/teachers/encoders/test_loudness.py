"""Loudness against its closed form and the standard's loops, filters against scipy's."""

import math

import numpy as np
import pytest
import torch
from scipy import signal

from teachers.encoders.loudness import loudness, low_pass, to_loudness, with_noise
from tests.support.tiny import some_sound

RATE = 16_000


def by_loops(x: np.ndarray) -> float:
    """Of BS.1770-4, block by block; K-weighting by the cookbook's biquads, run as recursions."""
    for kind, hertz, quality, decibels in (("shelf", 1500.0, 1 / math.sqrt(2), 4.0), ("pass", 38.0, 0.5, 0.0)):
        w, a = 2 * math.pi * hertz / RATE, 10 ** (decibels / 40)
        c, alpha = math.cos(w), math.sin(w) / (2 * quality)
        if kind == "shelf":
            r = 2 * math.sqrt(a) * alpha
            top = [a * (a + 1 + (a - 1) * c + r), -2 * a * (a - 1 + (a + 1) * c), a * (a + 1 + (a - 1) * c - r)]
            bottom = [a + 1 - (a - 1) * c + r, 2 * (a - 1 - (a + 1) * c), a + 1 - (a - 1) * c - r]
        else:
            top, bottom = [(1 + c) / 2, -1 - c, (1 + c) / 2], [1 + alpha, -2 * c, 1 - alpha]
        x = signal.lfilter(top, bottom, x)
    powers = [np.mean(x[j : j + 6400] ** 2) for j in range(0, len(x) - 6400 + 1, 1600)]
    loud = [p for p in powers if -0.691 + 10 * math.log10(p) >= -70]
    edge = -0.691 + 10 * math.log10(np.mean(loud)) - 10
    return -0.691 + 10 * math.log10(np.mean([p for p in loud if -0.691 + 10 * math.log10(p) > edge]))


def test_a_sine_of_997_hertz_at_full_scale_has_minus_3_lufs():
    x = torch.sin(2 * math.pi * 997.0 / RATE * torch.arange(4 * RATE, dtype=torch.float64))
    assert abs(float(loudness(x)) + 3.01) < 0.1


def test_loudness_is_the_standards():
    x = torch.cat([some_sound(2 * RATE), 1e-5 * some_sound(RATE, 1), 0.05 * some_sound(RATE, 2)])
    assert abs(float(loudness(x)) - by_loops(x.double().numpy())) < 1e-3


def test_a_sound_is_brought_to_a_loudness():
    x = torch.stack([some_sound(2 * RATE), 0.01 * some_sound(2 * RATE, 1), torch.zeros(2 * RATE)])
    out = to_loudness(x, -23.0)
    assert torch.allclose(loudness(out)[:2], torch.tensor(-23.0), atol=1e-3)
    assert torch.equal(out[2], x[2])
    assert torch.equal(to_loudness(x[:, :6000], -23.0), x[:, :6000])


def test_the_low_pass_is_butterworths():
    x = some_sound(RATE)
    expected = signal.lfilter(*signal.butter(3, 3000 / (RATE / 2)), x.double().numpy())
    assert np.abs(low_pass(x, 3000.0).numpy() - expected).max() < 1e-6


def test_noise_belongs_to_the_samples_numbers():
    x = some_sound(RATE)
    whole = with_noise(x, -45.0, 0)
    assert torch.equal(with_noise(x[700:900], -45.0, 700), whole[700:900])
    assert float((whole - x).std()) == pytest.approx(10 ** (-45 / 20), rel=0.02)
