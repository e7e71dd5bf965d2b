"""Streams addressed by place, and resampling that does not care how its input is cut."""

import math

import pytest
import torch

from teachers.media.read import resample
from teachers.media.streams import Resampler, Stream
from tests.support.tiny import randn, rng


def test_a_stream_reads_by_place():
    stream, whole = Stream(), torch.arange(1.0, 101.0)
    for piece in whole.split([30, 1, 0, 50, 19]):
        stream.push(piece)
    assert (stream.start, stream.end) == (0, 100)
    assert torch.equal(stream.read(0, 100), whole)
    assert torch.equal(stream.read(25, 35), whole[25:35])
    assert stream.read(-3, 2).tolist() == [0, 0, 0, 1, 2]
    assert stream.read(98, 103).tolist() == [99, 100, 0, 0, 0]
    assert stream.read(-5, -2).tolist() == [0, 0, 0]
    assert stream.read(105, 108).tolist() == [0, 0, 0]
    assert len(stream.read(50, 50)) == 0


def test_a_stream_forgets_in_front_and_is_cut_behind():
    stream = Stream((2,))
    for i in range(10):
        stream.push(torch.full((10, 2), float(i)))
    stream.forget(35)
    assert stream.start == 30
    assert stream.read(28, 31)[:, 0].tolist() == [0, 0, 3]
    stream.cut(55)
    assert stream.end == 55
    stream.push(torch.full((3, 2), 7.5))
    assert stream.read(53, 60)[:, 1].tolist() == [5, 5, 7.5, 7.5, 7.5, 0, 0]
    stream.cut(40)
    assert (stream.end, len(stream.blocks)) == (40, 1)
    stream.forget(100)
    assert stream.start == stream.end == 40


def test_a_stream_keeps_no_reference_to_what_was_pushed():
    stream, rows = Stream(), torch.zeros(4)
    stream.push(rows)
    rows += 1
    assert stream.read(0, 4).sum() == 0


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_resampling_keeps_tones_and_times(rate):
    """A tone inside the band keeps amplitude and phase; the length is the sound's."""
    count = rate
    time = torch.arange(count, dtype=torch.float64) / rate
    out = Resampler(rate, 16000).push(torch.sin(2 * math.pi * 1000 * time), end=True)
    assert len(out) == 16000
    expected = torch.sin(2 * math.pi * 1000 * torch.arange(16000, dtype=torch.float64) / 16000)
    inner = slice(200, -200)
    assert (out - expected)[inner].abs().max() < 1e-4
    if rate > 16000:
        above = Resampler(rate, 16000).push(torch.sin(2 * math.pi * 9600 * time), end=True)
        assert above[inner].abs().max() < 1e-3, "what no 16 kHz sound can hold folds back"


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_any_split_resamples_the_same(rate):
    sound = 0.3 * randn(rate, seed=3)
    whole = Resampler(rate, 16000).push(sound, end=True)
    for seed in range(3):
        resampler, out = Resampler(rate, 16000), []
        cuts = torch.randint(0, rate, (40,), generator=rng(seed)).sort().values.tolist()
        for start, stop in zip([0, *cuts], [*cuts, rate], strict=True):
            out.append(resampler.push(sound[start:stop]))
        assert len(resampler.tail) < 4 * resampler.half
        out.append(resampler.push(sound[:0], end=True))
        assert torch.equal(torch.cat(out), whole)


def test_resampling_agrees_with_the_files_reader():
    """teachers.media.read resamples whole files by libswresample; a band-limited sound comes out the same."""
    rate = 48000
    noise = torch.fft.rfft(randn(rate, seed=5).double())
    noise[6500:] = 0
    sound = 0.2 * torch.fft.irfft(noise).float()
    ours, theirs = Resampler(rate, 16000).push(sound, end=True), resample(sound, rate, 16000)
    assert len(ours) == len(theirs)
    assert (ours - theirs)[200:-200].abs().max() < 0.02 * sound.abs().max()
