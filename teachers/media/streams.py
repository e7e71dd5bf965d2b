"""Streams of samples or rows with one integer clock: appended at the end, read by place, forgotten at the front."""

import math
from collections import deque
from threading import Lock

import torch
from torch import Tensor
from torch.nn import functional

LOUDEST_SAMPLE = 8.0  # a peak above this is sound in other units, not loud sound
CROSSINGS, BETA, ROLLOFF = 16, 9.0, 0.95
"""Of the resampling filter: zero crossings a side, the Kaiser window's shape, the cut-off over the lower Nyquist frequency."""
SAMPLE_BITS, TAP_BITS = 23, 24
"""Binary places of samples (those of 24-bit sound) and of filter taps: products of up to LOUDEST_SAMPLE and their sums are then
exact in float64, so that no order of summation, and no split of the input, changes a bit."""
BLOCK = 32  # outputs that one matrix makes
MOST_TABLES = 2**26
"""Bytes of filters that are kept: those of odd rates, such as 47,999 to 16,000 Hz, have thousands of phases."""


class Stream:
    """Rows [n, ...] addressed by their place since the start of the stream; what lies outside reads as zeros."""

    def __init__(self, row_shape: tuple[int, ...] = (), start: int = 0, dtype: torch.dtype = torch.float32):
        self.row_shape, self.start, self.end, self.dtype = row_shape, start, start, dtype
        self.blocks: deque[Tensor] = deque()

    def push(self, rows: Tensor) -> None:
        """Append a copy of rows [n, ...]."""
        if len(rows):
            self.blocks.append(rows.detach().to("cpu", self.dtype, copy=True))
            self.end += len(rows)

    def read(self, begin: int, end: int) -> Tensor:
        """Rows begin..end-1; zeros before 0, after the end and where they are forgotten."""
        inner = [self._zeros(min(max(self.start - begin, 0), end - begin))]
        place = self.start
        for block in self.blocks:
            inner.append(block[max(begin - place, 0) : max(end - place, 0)])
            place += len(block)
        inner.append(self._zeros(min(max(end - max(self.end, begin), 0), end - begin)))
        return torch.cat(inner)

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, *self.row_shape, dtype=self.dtype)

    def forget(self, before: int) -> None:
        """Free every row before a place."""
        while self.blocks and self.start + len(self.blocks[0]) <= before:
            self.start += len(self.blocks.popleft())

    def cut(self, end: int) -> None:
        """Drop every row from place `end` on."""
        while self.blocks and self.end - len(self.blocks[-1]) >= end:
            self.end -= len(self.blocks.pop())
        if self.end > end and self.blocks:
            self.blocks[-1] = self.blocks[-1][: end - self.end]
            self.end = end


class Resampler:
    """Band-limited resampling of rows [n, ...] by a Kaiser-windowed sinc, polyphase; bit-equal however the input is cut.

    Output n lies at input time n * source / target, so an event keeps its time exactly; S rows become ceil(S * target / source),
    within [-1, 1]. (Smith, Digital Audio Resampling, CCRMA.)
    """

    def __init__(self, source_rate: int, target_rate: int, row_shape: tuple[int, ...] = ()):
        self.row_shape = row_shape
        shared = math.gcd(source_rate, target_rate)
        self.up, self.down = target_rate // shared, source_rate // shared
        self.source_rate = source_rate
        self.half = _half(self.up, self.down)
        self.tail = torch.zeros(self.half, *self.row_shape, dtype=torch.float64)  # input from place `first` on
        self.first = -self.half
        self.made = 0

    def finish(self) -> Tensor:
        """The last rows; there is no more input."""
        return self.push(self.tail.new_zeros(0, *self.row_shape), end=True)

    def push(self, samples: Tensor, end: bool = False) -> Tensor:
        """Rows at the source rate -> float32 rows of the target rate that they complete; `end` completes the last ones too."""
        scaled = (samples.detach().cpu().double() * 2**SAMPLE_BITS).round_() / 2**SAMPLE_BITS
        self.tail = torch.cat([self.tail, scaled])
        seen = self.first + len(self.tail)
        total = max(self.made, -(-(seen if end else seen - self.half) * self.up // self.down))
        out = self._filtered(self.made, total).float().clamp_(-1.0, 1.0)
        self.made = total
        keep = min(total * self.down // self.up + 1 - self.half, seen)
        self.tail, self.first = self.tail[keep - self.first :].clone(), keep
        return out

    def _filtered(self, begin: int, end: int) -> Tensor:
        """Outputs begin..end-1 [n, ...] in float64; input that is not there is zero, such as what follows the end."""
        first, last = begin // BLOCK, -(-end // BLOCK)  # whole blocks of outputs; every `kinds`-th has the same phases
        kinds = self.up // math.gcd(self.up, BLOCK)
        step = kinds * BLOCK * self.down // self.up
        out = self.tail.new_empty(last - first, *self.row_shape, BLOCK)
        for block in range(first, min(first + kinds, last)):
            taps = _tables.block(self.up, self.down, block % kinds)
            start = block * BLOCK * self.down // self.up + 1 - self.half
            count = len(range(block, last, kinds))
            windows = self._input(start, start + (count - 1) * step + len(taps)).unfold(0, len(taps), step)
            out[block - first :: kinds] = windows @ taps
        return out.movedim(-1, 1).flatten(0, 1)[begin - first * BLOCK : end - first * BLOCK]

    def _input(self, begin: int, end: int) -> Tensor:
        """Input rows begin..end-1; zeros where there are none (any more)."""
        inner = self.tail[max(begin - self.first, 0) : max(end - self.first, 0)]
        before = min(max(self.first - begin, 0), end - begin)
        if len(inner) == end - begin:
            return inner
        return functional.pad(inner, (0, 0) * len(self.row_shape) + (before, end - begin - before - len(inner)))


def resample(samples: Tensor, source_rate: int, target_rate: int) -> Tensor:
    """A whole sound [S] at another rate, float32 [ceil(S * target / source)] in [-1, 1]: a `Resampler`'s output, in any pieces."""
    if source_rate == target_rate:
        return samples
    resampler = Resampler(source_rate, target_rate)
    return torch.cat([*(resampler.push(part) for part in samples.split(4 * source_rate)), resampler.finish()])


def _half(up: int, down: int) -> int:
    """Input samples on each side of an output's filter."""
    return math.ceil(CROSSINGS / min(1.0, up / down))


class _Tables:
    """Filters that were made before, of all pairs of rates together at most `MOST_TABLES` bytes."""

    def __init__(self):
        self._kept: dict[tuple[int, int, int], Tensor] = {}
        self._bytes, self._lock = 0, Lock()

    def block(self, up: int, down: int, kind: int) -> Tensor:
        """`_block`."""
        with self._lock:
            found = self._kept.get((up, down, kind))
        if found is None:
            found = _block(up, down, kind)
            with self._lock:
                self._bytes += found.nbytes
                if self._bytes > MOST_TABLES:
                    self._kept, self._bytes = {}, found.nbytes
                self._kept[up, down, kind] = found
        return found


_tables = _Tables()


def _block(up: int, down: int, kind: int) -> Tensor:
    """The filters of BLOCK outputs side by side [input window, output]; output n has phase n * down % up, and the first is number
    kind * BLOCK."""
    n, half, band = kind * BLOCK + torch.arange(BLOCK), _half(up, down), min(1.0, up / down)
    offset = torch.arange(1 - half, half + 1, dtype=torch.float64)
    distance = offset - ((n * down % up).double() / up).unsqueeze(1)
    window = torch.special.i0(BETA * (1 - (distance / half).square()).clamp(min=0).sqrt())
    taps = torch.sinc(ROLLOFF * band * distance) * window
    taps = (taps / taps.sum(dim=1, keepdim=True) * 2**TAP_BITS).round() / 2**TAP_BITS
    base = n * down // up - n[0] * down // up
    matrix = torch.zeros(int(base[-1]) + 2 * half, BLOCK, dtype=torch.float64)
    matrix[base.unsqueeze(1) + torch.arange(2 * half), torch.arange(BLOCK).unsqueeze(1)] = taps
    return matrix
