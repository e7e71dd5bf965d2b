"""Sound as published audio encoders take it: brought to a loudness (ITU-R BS.1770-4, one channel), with noise, low-passed.

S = samples at 16 kHz. Filters are of the recursive kind, from rest, computed by their frequency response.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from teachers.encoders.small import SAMPLE_RATE

BLOCK, HOP = SAMPLE_RATE * 4 // 10, SAMPLE_RATE // 10
"""Samples of a gating block, and between the beginnings of two."""
SILENT, BELOW = -70.0, 10.0
"""LUFS that a block has to have, and LU below the mean of these that it may be."""
OFFSET = -0.691
TAIL = 8192
"""Samples after which a filter's answer is nothing."""
Response = Callable[[Tensor], Tensor]
"""Of complex numbers z on the unit circle."""


def biquad(b: Sequence[float], a: Sequence[float]) -> Response:
    """(b0 + b1 / z + b2 / z^2) / (a0 + a1 / z + a2 / z^2)."""
    return lambda z: (b[0] + b[1] / z + b[2] / z**2) / (a[0] + a[1] / z + a[2] / z**2)


def filtered(x: Float[Tensor, "*batch samples"], response: Response) -> Float[Tensor, "*batch samples"]:
    """x through a causal filter that is at rest before."""
    size = x.shape[-1] + TAIL
    angle = 2 * math.pi * torch.arange(size // 2 + 1, dtype=torch.float64, device=x.device) / size
    spectrum = torch.fft.rfft(x.double(), size) * response(torch.polar(torch.ones_like(angle), angle))
    return torch.fft.irfft(spectrum, size)[..., : x.shape[-1]].to(x)


@lru_cache
def weighting() -> tuple[Response, Response]:
    """The shelf and the high-pass of K-weighting, as pyloudnorm designs them: 4 dB from 1500 Hz on, Q 1/sqrt 2; 38 Hz, Q 1/2."""
    gain, angle = 10 ** (4.0 / 40), 2 * math.pi * 1500.0 / SAMPLE_RATE
    cos, root = math.cos(angle), 2 * math.sqrt(gain) * math.sin(angle) / math.sqrt(2)
    plus, minus = gain + 1, gain - 1
    shelf = biquad(
        [gain * (plus + minus * cos + root), -2 * gain * (minus + plus * cos), gain * (plus + minus * cos - root)],
        [plus - minus * cos + root, 2 * (minus - plus * cos), plus - minus * cos - root],
    )
    angle = 2 * math.pi * 38.0 / SAMPLE_RATE
    cos, sin = math.cos(angle), math.sin(angle)
    return shelf, biquad([(1 + cos) / 2, -1 - cos, (1 + cos) / 2], [1 + sin, -2 * cos, 1 - sin])


def loudness(x: Float[Tensor, "*batch samples"]) -> Float[Tensor, "*batch"]:
    """Integrated loudness in LUFS; -inf where no block is louder than -70."""
    for response in weighting():
        x = filtered(x, response)
    count = max(1, round((x.shape[-1] - BLOCK) / HOP) + 1)
    x = torch.nn.functional.pad(x, (0, max(0, (count - 1) * HOP + BLOCK - x.shape[-1])))
    power = x.double().square().unfold(-1, BLOCK, HOP)[..., :count, :].mean(dim=-1)
    level = OFFSET + 10 * power.log10()

    def mean(kept: Tensor) -> Tensor:
        return OFFSET + 10 * ((power * kept).sum(dim=-1) / kept.sum(dim=-1)).log10()

    loud = level >= SILENT
    found = mean(loud & (level > (mean(loud) - BELOW).unsqueeze(-1)))
    return found.nan_to_num(-math.inf, neginf=-math.inf).to(x)


def to_loudness(x: Float[Tensor, "*batch samples"], lufs: float) -> Float[Tensor, "*batch samples"]:
    """x at that loudness; silence, and what is shorter than a block, as it is."""
    if x.shape[-1] < BLOCK:
        return x
    gain = 10 ** ((lufs - loudness(x)) / 20)
    return x * torch.where(gain.isfinite(), gain, 1.0).unsqueeze(-1)


def low_pass(x: Float[Tensor, "*batch samples"], hertz: float) -> Float[Tensor, "*batch samples"]:
    """x through Butterworth's low-pass of order 3, by the bilinear transform."""
    edge = math.tan(math.pi * hertz / SAMPLE_RATE)

    def response(z: Tensor) -> Tensor:
        s = (1 - 1 / z) / (1 + 1 / z) / edge
        return torch.where((z + 1).abs() < 1e-12, 0.0, 1 / ((s + 1) * (s**2 + s + 1)))

    return filtered(x, response)


@lru_cache
def _floor() -> Tensor:
    return torch.randn(2**18, generator=torch.Generator().manual_seed(0))


def with_noise(x: Float[Tensor, "*batch samples"], decibels: float, start: int) -> Float[Tensor, "*batch samples"]:
    """x with white noise at that level of full scale. The noise is a fixed one of the samples' numbers in their sound, from `start`
    on, so that any cut of a sound has the same."""
    index = (start + torch.arange(x.shape[-1])) % len(_floor())
    return x + 10 ** (decibels / 20) * _floor()[index].to(x)
