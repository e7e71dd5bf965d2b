"""Decoded sound as rows of one or two channels at one rate, whatever sample format, layout and rate its frames have."""

import ctypes
import math
from collections.abc import Iterator
from functools import lru_cache

import av
import numpy as np
import torch
from av.audio.layout import AudioLayout
from av.audio.resampler import AudioResampler
from av.container import InputContainer

from teachers.errors import UserError
from teachers.media.streams import LOUDEST_SAMPLE, Resampler

RATES = range(4_000, 768_001)  # Hz
SIDE = math.sqrt(0.5)
"""Share of a centre or surround channel in each front channel, ITU-R BS.775-4, table 2."""
USUAL = {6: "5.1", 8: "7.1"}  # of channels that a file does not name
ORDER = " FL FR FC LFE BL BR FLC FRC BC SL SR TC TFL TFC TFR TBL TBC TBR DL DR WL WR SDL SDR LFE2 TSL TSR BFC BFL BFR "
"""FFmpeg's own order of channels (`libavutil/channel_layout.h`)."""
CUSTOM = 2
"""AV_CHANNEL_ORDER_CUSTOM: the order of the channels lies in memory of its own."""


class Mixer:
    """Frames of any sample format, layout and rate to rows float32 [n, channels] at one rate."""

    def __init__(self, rate: int, channels: int, where: str):
        self.rate, self.channels, self.where = rate, channels, where
        self._kind: tuple[str, tuple[str, ...], int] | None = None
        self._to_float = self._resampler = None

    def push(self, frame: av.AudioFrame, place: int) -> np.ndarray:
        """Rows of the next frame, the place of whose first sample errors name."""
        names, left = channel_names(frame.layout, self.where), np.zeros((0, self.channels), np.float32)
        if self._kind != (kind := (frame.format.name, names, frame.sample_rate)):
            left = self.finish()
            layout = "+".join(names) if _is_custom(frame.layout) else None
            self._kind, self._to_float = kind, AudioResampler(format="flt", layout=layout)
            check_rate(frame.sample_rate, self.where)
            if frame.sample_rate != self.rate:
                self._resampler = Resampler(frame.sample_rate, self.rate, (self.channels,))
        assert self._to_float is not None
        parts = [part.to_ndarray().reshape(-1, len(names)) for part in self._to_float.resample(frame)]
        rows = np.concatenate(parts) if parts else np.zeros((0, len(names)), np.float32)
        check_samples(rows, self.where, place)
        if len(names) > 2:
            rows = rows @ downmix(names)
        if rows.shape[1] != self.channels:
            rows = rows.repeat(2, axis=1) if self.channels == 2 else rows.mean(axis=1, keepdims=True)
        if self._resampler is not None:
            rows = self._resampler.push(torch.from_numpy(rows)).numpy()
        return np.concatenate([left, rows]) if len(left) else rows

    def finish(self) -> np.ndarray:
        """The last rows of frames of another rate."""
        rest = None if self._resampler is None else self._resampler.finish().numpy()
        self._kind = self._resampler = None
        return np.zeros((0, self.channels), np.float32) if rest is None else rest


def decoded_sound(container: InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame]:
    """The frames of a sound track. PyAV decodes no other way that is safe: see `keep`."""
    for packet in container.demux(stream):
        frames = packet.decode()
        for frame in frames:
            keep(frame.layout)
        yield from frames


def keep(layout: AudioLayout) -> AudioLayout:
    """A layout that PyAV has given, to be called for each of them: one whose channels have an order of their own is kept for ever,
    since PyAV frees what it shares with the frame or the codec twice, which ends the process."""
    if _is_custom(layout):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(layout))
    return layout


def _is_custom(layout: AudioLayout) -> bool:
    """Whether the order of a layout lies in memory of its own, by FFmpeg's AVChannelLayout, which follows the object's header; True
    too where it is not found there."""
    order, count = (ctypes.c_int * 2).from_address(id(layout) + object.__basicsize__)
    return order == CUSTOM or count != layout.nb_channels


def channel_names(layout: AudioLayout, where: str = "") -> tuple[str, ...]:
    """FFmpeg's names of the channels, such as FL, FR, FC, LFE, in its own order; six and eight that the file does not name are 5.1
    and 7.1, others NONE. UserError where a file names one twice, or one that is not known, in an order of its own."""
    names = tuple(channel.name for channel in layout.channels)
    if _is_custom(layout):
        if len(set(names)) < len(names) or any(f" {name} " not in ORDER for name in names):
            raise UserError(f"channels of no known layout, {' '.join(names)[:80]}: {where}; export the sound as stereo")
        return tuple(sorted(names, key=lambda name: ORDER.index(f" {name} ")))
    if set(names) == {"NONE"} and len(names) in USUAL:
        return channel_names(AudioLayout(USUAL[len(names)]))
    return names


IDENTITY = tuple(np.eye(channels, dtype=np.float32) for channels in (1, 2))


@lru_cache(maxsize=64)
def downmix(names: tuple[str, ...]) -> np.ndarray:
    """float32 [channels, 1 or 2]: the stereo mix of a layout by ITU-R BS.775-4, each side's shares divided by their sum.

    Front channels count 1, centre and surround channels sqrt(1/2), low frequency effects nothing, of ambisonic sound channel 0 (all
    directions) alone. One and two channels stay as they are; channels without names are averaged to one.
    """
    if len(names) <= 2:
        return IDENTITY[len(names) - 1]
    sides = np.zeros((len(names), 2), np.float32)
    for row, name in zip(sides, names, strict=True):
        if name == "AMBI0":
            row[:] = 1
        elif name in ("NONE", "UNK", "UNSD"):
            return np.full((len(names), 1), 1 / len(names), np.float32)
        elif name in ("FL", "FR", "DL", "DR"):
            row["LR".index(name[1])] = 1
        elif not name.startswith(("LFE", "AMBI")):
            row[:] = SIDE * np.array([not name.endswith(("R", "RC")), not name.endswith(("L", "LC"))])
    sides = sides if sides.sum(axis=0).all() else sides.sum(axis=1, keepdims=True)
    return sides / sides.sum(axis=0) if sides.any() else np.full((len(names), 1), 1 / len(names), np.float32)


def check_rate(rate: int, where: object) -> None:
    """UserError unless a sample rate in Hz is one of recorded sound."""
    if rate not in RATES:
        raise UserError(
            f"sample rate of {rate} Hz, {RATES.start} to {RATES.stop - 1} are read: {where}; export it again"
        )


def check_samples(samples: np.ndarray, where: str, start: int = 0) -> None:
    """Raises UserError unless all of [n, ...] are finite and none far outside [-1, 1]; the first row is number `start`."""
    broken = ~np.isfinite(samples)
    if broken.any():
        at = start + int(np.argwhere(broken)[0, 0])
        raise UserError(f"audio holds samples that are not finite, first at {at}: {where}; clean it first")
    peak = float(np.abs(samples).max(initial=0.0))
    if peak > LOUDEST_SAMPLE:
        raise UserError(f"audio samples must lie in [-1, 1], got a peak of {peak:.4g}: {where}; normalise it")
