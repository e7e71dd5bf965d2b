"""Streams addressed by place, and resampling that does not care how its input is cut."""

import math

import av
import numpy as np
import pytest
import torch
from av.audio.resampler import AudioResampler

from teachers.media import streams
from teachers.media.streams import Resampler, Stream, resample
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
        assert len(resampler.tail) <= 3 * resampler.half + 1
        out.append(resampler.push(sound[:0], end=True))
        assert torch.equal(torch.cat(out), whole)


@pytest.mark.parametrize(("source", "target"), [(44100, 16000), (11025, 16000), (12345, 16000), (16000, 44100)])
def test_every_output_is_the_windowed_sinc_at_its_own_time(source, target):
    """The definition, output by output, of outputs in many blocks and phases."""
    sound = 0.3 * randn(3 * source // 10, seed=1)
    out, band = resample(sound, source, target), min(1.0, target / source)
    assert len(out) == math.ceil(len(sound) * target / source)
    half = math.ceil(16 / band)
    for n in range(500, len(out) - 500, 97):
        time = n * source / target
        places = torch.arange(math.floor(time) + 1 - half, math.floor(time) + half + 1, dtype=torch.float64)
        taps = torch.sinc(0.95 * band * (places - time)) * torch.special.i0(
            9 * (1 - ((places - time) / half) ** 2).sqrt()
        )
        expected = (sound[places.long()].double() * taps / taps.sum()).sum()
        assert abs(out[n] - expected) < 1e-6


@pytest.mark.parametrize("rate", [22050, 44100, 48000])
def test_sums_are_exact_so_that_neither_order_nor_split_matters(rate):
    """Each output as a sum of integers, which has no order: full scale, so that any lost bit would show."""
    sound = (8 * randn(rate // 4, seed=2)).clamp(-8, 8)
    resampler = Resampler(rate, 16000)
    resampler.push(sound)
    kept = resampler.tail * 2**23
    assert torch.equal(kept, kept.round())
    assert not torch.equal(kept, sound[-len(kept) :] * 2**23), "what is finer than 24-bit sound is rounded"
    resampler = Resampler(rate, 16000)
    resampler.tail = torch.cat([resampler.tail, (sound.double() * 2**23).round() / 2**23])
    out = resampler._filtered(1000, 2000)
    block = streams._block(resampler.up, resampler.down, 1000 // 32 % (resampler.up // math.gcd(resampler.up, 32)))
    for column, value in zip(range(1000 % 32, 32), out[: 32 - 1000 % 32], strict=True):
        first = 1000 // 32 * 32 * resampler.down // resampler.up + 1
        taps = [int(tap * 2**24) for tap in block[:, column].tolist()]
        samples = [int(sample * 2**23) for sample in resampler.tail[first : first + len(taps)].tolist()]
        assert value.item() == sum(a * b for a, b in zip(taps, samples, strict=True)) / 2**47


@pytest.mark.parametrize("rate", [44100, 48000])
def test_resampling_agrees_with_libswresample(rate):
    """Another filter: a band-limited sound comes out the same to 40 dB."""
    noise = torch.fft.rfft(randn(rate, seed=5).double())
    noise[6500:] = 0
    sound = 0.2 * torch.fft.irfft(noise, n=rate).float()
    frame = av.AudioFrame.from_ndarray(sound[None].numpy(), format="fltp", layout="mono")
    frame.sample_rate, frame.pts = rate, 0
    theirs = AudioResampler(format="fltp", layout="mono", rate=16000)
    expected = [part.to_ndarray()[0] for given in (frame, None) for part in theirs.resample(given)]
    ours, expected = resample(sound, rate, 16000), torch.from_numpy(np.concatenate(expected))
    assert len(ours) == len(expected)
    assert (ours - expected)[200:-200].abs().max() < 0.02 * sound.abs().max()
