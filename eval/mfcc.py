"""Mel-frequency cepstra as SyncNet was trained on: those of python_speech_features 0.6 with its defaults at 16 kHz.

Pre-emphasis 0.97; frames of 25 ms every 10 ms without a window, the last one padded with zeros; power spectrum of 512
points over 512; 26 triangles on the mel scale 2595 log10(1 + f / 700) between whole bins; log; orthonormal DCT-II, 13
kept; lifter 22; the first coefficient replaced by the log of the frame's energy. Zeros become 2^-52 before a log.
"""

import functools
import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from teachers.errors import UserError

SAMPLE_RATE = 16_000
NUM_CEPSTRA, NUM_FILTERS = 13, 26
WINDOW, HOP, NUM_FFT = 400, 160, 512
PREEMPHASIS, LIFTER = 0.97, 22


def to_int16(samples: Float[Tensor, " s"]) -> Shaped[Tensor, " s"]:
    """Sound in [-1, 1] -> the int16 samples that a 16-bit wav file of it holds, as SyncNet's cepstra want it."""
    return samples.detach().double().mul(32768).round().clamp(-32768, 32767).to(torch.int16)


def mfcc(samples: Shaped[Tensor, " s"]) -> Float[Tensor, "f 13"]:
    """Cepstra of mono sound at 16 kHz in int16 units (not scaled to [-1, 1]), a row every 10 ms, in fp64.

    F = 1 + ceil((S - 400) / 160), at least 1. Raises UserError when there is no sound or it is not mono.
    """
    if samples.ndim != 1 or len(samples) == 0:
        raise UserError(f"cepstra need mono sound of at least one sample: got {tuple(samples.shape)}; give one channel")
    signal = samples.detach().double()
    emphasised = torch.cat((signal[:1], signal[1:] - PREEMPHASIS * signal[:-1]))
    num_frames = 1 + max(0, -(-(len(signal) - WINDOW) // HOP))
    padded = F.pad(emphasised, (0, (num_frames - 1) * HOP + WINDOW - len(signal)))
    power = torch.fft.rfft(padded.unfold(0, WINDOW, HOP), NUM_FFT).abs().square() / NUM_FFT
    filters, transform = (x.to(power) for x in (_filters(), _transform()))
    cepstra = _log(power @ filters.mT) @ transform.mT
    cepstra[:, 0] = _log(power.sum(1))
    return cepstra


def _log(values: Tensor) -> Tensor:
    return torch.where(values == 0, torch.finfo(torch.float64).eps, values).log()


@functools.cache
def _filters() -> Tensor:
    """Triangles [26, 257] on the bins of the spectrum; edges are whole bins floor((512 + 1) f / 16000)."""
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    mels = torch.linspace(0, top, NUM_FILTERS + 2, dtype=torch.float64)
    edges = ((NUM_FFT + 1) * 700 * (10 ** (mels / 2595) - 1) / SAMPLE_RATE).floor()
    left, centre, right = (edges[i : i + NUM_FILTERS, None] for i in range(3))
    bins = torch.arange(NUM_FFT // 2 + 1, dtype=torch.float64)
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    zero = torch.zeros(())
    return torch.where((bins >= left) & (bins < centre), rising, zero) + torch.where(
        (bins >= centre) & (bins < right), falling, zero
    )


@functools.cache
def _transform() -> Tensor:
    """Orthonormal DCT-II [13, 26] but for row 0, which the energy replaces; row n times its lifter 1 + 11 sin(pi n / 22)."""
    order = torch.arange(NUM_CEPSTRA, dtype=torch.float64)[:, None]
    filters = torch.arange(NUM_FILTERS, dtype=torch.float64)
    cosines = torch.cos(math.pi * order * (filters + 0.5) / NUM_FILTERS) * (2 / NUM_FILTERS) ** 0.5
    return cosines * (1 + LIFTER / 2 * torch.sin(math.pi * order / LIFTER))
