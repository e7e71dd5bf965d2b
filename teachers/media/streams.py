"""Streams of samples or rows with one integer clock: appended at the end, read by place, forgotten at the front."""

import math
from collections import deque

import torch
from torch import Tensor

LOUDEST_SAMPLE = 8.0  # a peak above this is sound in other units, not loud sound


class Stream:
    """Rows [n, ...] addressed by their place since the start of the stream; what lies outside reads as zeros."""

    def __init__(self, row_shape: tuple[int, ...] = (), start: int = 0):
        self.row_shape, self.start, self.end = row_shape, start, start
        self.blocks: deque[Tensor] = deque()

    def push(self, rows: Tensor) -> None:
        """Append a copy of rows [n, ...]."""
        if len(rows):
            self.blocks.append(rows.detach().to("cpu", torch.float32, copy=True))
            self.end += len(rows)

    def read(self, begin: int, end: int) -> Tensor:
        """Rows begin..end-1; zeros before 0, after the end and where they are forgotten."""
        inner = [torch.zeros(min(max(self.start - begin, 0), end - begin), *self.row_shape)]
        place = self.start
        for block in self.blocks:
            inner.append(block[max(begin - place, 0) : max(end - place, 0)])
            place += len(block)
        inner.append(torch.zeros(min(max(end - max(self.end, begin), 0), end - begin), *self.row_shape))
        return torch.cat(inner)

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
    """Band-limited resampling of rows [n, ...] by a Kaiser-windowed sinc, polyphase; the same however the input is cut.

    Output n lies at input time n * source / target, so an event keeps its time exactly. (Smith, Digital Audio Resampling, CCRMA.)
    """

    def __init__(
        self,
        source_rate: int,
        target_rate: int,
        crossings: int = 16,
        beta: float = 9.0,
        row_shape: tuple[int, ...] = (),
    ):
        self.row_shape = row_shape
        shared = math.gcd(source_rate, target_rate)
        self.up, self.down = target_rate // shared, source_rate // shared
        self.source_rate = source_rate
        band = min(1.0, self.up / self.down)
        self.half = math.ceil(crossings / band)
        offset = torch.arange(1 - self.half, self.half + 1, dtype=torch.float64)
        distance = offset - torch.arange(self.up, dtype=torch.float64).unsqueeze(1) / self.up  # [phases, taps]
        shape = torch.special.i0(beta * (1 - (distance / self.half).square()).clamp(min=0).sqrt())
        taps = torch.sinc(0.95 * band * distance) * shape
        self.taps = taps / taps.sum(dim=1, keepdim=True)
        self.reset()

    def reset(self) -> None:
        """Forget the past: the next sample is the first."""
        self.tail = torch.zeros(
            self.half, *self.row_shape, dtype=torch.float64
        )  # input before the next output's window ends
        self.first = -self.half  # place of tail[0]
        self.made = 0

    def finish(self) -> Tensor:
        """The last rows; there is no more input."""
        return self.push(self.tail.new_zeros(0, *self.row_shape), end=True)

    def push(self, samples: Tensor, end: bool = False) -> Tensor:
        """Rows at the source rate -> those of the target rate that they complete; `end` completes the last ones too."""
        self.tail = torch.cat([self.tail, samples.double()])
        seen = self.first + len(self.tail)
        if end:
            self.tail = torch.cat([self.tail, self.tail.new_zeros(self.half, *self.row_shape)])
        total = max(self.made, -(-(seen if end else seen - self.half) * self.up // self.down))
        n = torch.arange(self.made, total)
        base = n * self.down // self.up
        windows = self.tail[(base - self.first).unsqueeze(1) + torch.arange(1 - self.half, self.half + 1)]
        taps = self.taps[n * self.down % self.up]
        out = (windows * taps.view(*taps.shape, *(1 for _ in self.row_shape))).sum(dim=1).float()
        self.made = total
        keep = min(total * self.down // self.up + 1 - self.half, seen)
        self.tail, self.first = self.tail[keep - self.first :], keep
        return out
