"""Cepstra against a plain-loop reference written from the published definition."""

import math

import numpy as np
import pytest
import scipy.fft
import torch

from eval.mfcc import mfcc, to_int16
from teachers.errors import UserError


def reference_triangles() -> np.ndarray:
    """26 triangles whose corners are floor(513 f / 16000) of points evenly spaced in mel from 0 to 8 kHz."""
    to_mel = lambda f: 2595 * math.log10(1 + f / 700)  # noqa: E731
    points = [700 * (10 ** (to_mel(8000) * i / 27 / 2595) - 1) for i in range(28)]
    corners = [math.floor(513 * f / 16000) for f in points]
    bank = np.zeros((26, 257))
    for j in range(26):
        low, mid, high = corners[j : j + 3]
        for i in range(low, mid):
            bank[j, i] = (i - low) / (mid - low)
        for i in range(mid, high):
            bank[j, i] = (high - i) / (high - mid)
    return bank


def reference(samples: np.ndarray) -> np.ndarray:
    signal = [float(x) for x in samples]
    emphasised = [signal[0]] + [signal[i] - 0.97 * signal[i - 1] for i in range(1, len(signal))]
    rows, start, bank = [], 0, reference_triangles()
    while True:
        piece = emphasised[start : start + 400]
        spectrum = np.fft.rfft(np.array(piece + [0.0] * (512 - len(piece))))
        power = (spectrum.real**2 + spectrum.imag**2) / 512
        energies, energy = bank @ power, power.sum()
        logs = [math.log(e) if e != 0 else math.log(np.finfo(float).eps) for e in energies]
        row = scipy.fft.dct(np.array(logs), type=2, norm="ortho")[:13]
        row = np.array([c * (1 + 11 * math.sin(math.pi * n / 22)) for n, c in enumerate(row)])
        row[0] = math.log(energy if energy != 0 else np.finfo(float).eps)
        rows.append(row)
        if start + 400 >= len(signal):
            return np.stack(rows)
        start += 160


def chirp(num: int) -> np.ndarray:
    time = np.arange(num) / 16000
    return np.round(9000 * np.sin(2 * math.pi * (80 * time + 1500 * time**2))).astype(np.int16)


def noise(num: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-32768, 32768, num, dtype=np.int16)


def half_silent(num: int) -> np.ndarray:
    return np.concatenate((chirp(num // 2), np.zeros(num - num // 2, np.int16)))


def square(num: int) -> np.ndarray:
    return np.where(np.arange(num) % 80 < 40, 32767, -32768).astype(np.int16)


@pytest.mark.parametrize("sound", [chirp, noise, half_silent, square], ids=lambda f: f.__name__)
@pytest.mark.parametrize("num", [1, 399, 400, 401, 559, 560, 561, 3200])
def test_equals_the_definition(sound, num: int):
    samples = sound(num)
    ours = mfcc(torch.from_numpy(samples))
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours.numpy(), reference(samples), rtol=1e-9, atol=1e-8)


def test_silence_is_the_log_of_the_smallest_step():
    rows = mfcc(torch.zeros(1000, dtype=torch.int16))
    assert torch.equal(rows[:, 0], torch.full((5,), math.log(2**-52), dtype=torch.float64))
    torch.testing.assert_close(rows[:, 1:], torch.zeros(5, 12, dtype=torch.float64), rtol=0, atol=1e-9)


def test_five_seconds_have_four_rows_a_frame_but_one():
    assert mfcc(torch.zeros(80_000)).shape == (499, 13)  # 125 frames at 25 fps
    assert mfcc(torch.zeros(80_001)).shape == (499, 13)
    assert mfcc(torch.zeros(80_081)).shape == (500, 13)


def test_gain_moves_only_the_energy_of_voiced_sound():
    """The scale matters: sound in [-1, 1] is not the scale that SyncNet reads."""
    loud, soft = (mfcc(torch.from_numpy(noise(1600)).double() * gain) for gain in (1, 1 / 32768))
    torch.testing.assert_close(loud[:, 0] - soft[:, 0], torch.full((9,), 2 * math.log(32768), dtype=torch.float64))
    torch.testing.assert_close(loud[:, 1:], soft[:, 1:], rtol=1e-6, atol=1e-6)


def test_sound_becomes_the_samples_of_a_wav_file():
    samples = torch.tensor([-1.0, -0.5, 0.0, 0.25, 1.0, 1.5 / 32768])
    assert to_int16(samples).tolist() == [-32768, -16384, 0, 8192, 32767, 2]
    whole = torch.arange(-32768, 32768, 7)
    assert torch.equal(to_int16(whole / 32768).long(), whole)


@pytest.mark.parametrize("shape", [(0,), (2, 800)])
@pytest.mark.usefixtures("unchecked_shapes")
def test_no_sound_or_two_channels_is_refused(shape):
    with pytest.raises(UserError, match=r"^cepstra need mono sound of at least one sample"):
        mfcc(torch.zeros(shape))
