"""A video read by presentation times: frames from any moment on, and any stretch of its sound at 16 kHz.

Time 0 is that of the first frame. Nothing depends on key frames: decoding starts early enough and drops what comes before.
"""

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.audio.resampler import AudioResampler
from torch import Tensor

from teachers.errors import UserError
from teachers.media.read import check_samples, mono, opened, video_stream
from teachers.media.streams import resample

SAMPLE_RATE = 16_000
SEEK_MARGIN = Fraction(1, 2)  # seconds: demuxers seek by decoding time, which is earlier than that of presentation
NEEDED = Fraction(1)  # seconds before a moment in which all frames are decoded: upper temporal layers depend on them
CONTEXT = Fraction(1, 2)  # seconds of sound decoded around a stretch, the context of codec and resampler
GAP = Fraction(1, 25)  # seconds by which an audio frame may be off its place before it counts as a gap


@dataclass(frozen=True)
class SourceFrame:
    """A decoded frame with its presentation time and duration, in seconds of the video."""

    time: Fraction
    duration: Fraction
    frame: av.VideoFrame
    rate: Fraction | None  # the video's mean one, in frames a second


def read_frames(path: Path, start: Fraction = Fraction(0)) -> Generator[SourceFrame, None, None]:
    """The frames of a video in the order of presentation, beginning with one at or before `start` (or with the first).

    Raises UserError when the file cannot be read, is damaged, or has no video track with times and square pixels.
    """
    for seek in (start > SEEK_MARGIN, False):
        with opened(path, "video file") as container:
            stream = video_stream(container)
            if stream is None:
                raise UserError(f"no video track: {path}")
            ratio = stream.codec_context.sample_aspect_ratio
            if ratio and ratio != 1:
                raise UserError(f"pixels are not square ({ratio}): {path}; convert the video")
            stream.codec_context.options = {"err_detect": "explode"}
            stream.codec_context.thread_count = 1
            if seek and not _seek(container, stream, start - SEEK_MARGIN):
                continue
            timed = _timed(container, stream, path, start)
            first = next(timed, None)
            if seek and (first is None or first.time > start):
                continue
            if first is None:
                raise UserError(f"video file has no frames: {path}")
            yield first
            yield from timed
            return


def _zero(stream: av.VideoStream | None) -> Fraction:
    """Container time of the first frame, in seconds."""
    return Fraction(0) if stream is None else (stream.start_time or 0) * Fraction(stream.time_base or 0)


def _seek(container: Any, stream: av.VideoStream | av.AudioStream, seconds: Fraction) -> bool:
    """Seek to the key frame before that time of the video; False where the container cannot."""
    zero = _zero(video_stream(container))
    try:
        container.seek(math.floor((zero + seconds) / Fraction(stream.time_base or 1)), stream=stream)
    except (av.FFmpegError, OSError):
        return False
    return True


def _timed(container: Any, stream: av.VideoStream, path: Path, start: Fraction) -> Iterator[SourceFrame]:
    """Decoded frames with their times; of those well before `start` only the ones that others are predicted from."""
    zero, base, last = _zero(stream), Fraction(stream.time_base or 1), None
    usual = 1 / Fraction(stream.average_rate) if stream.average_rate else Fraction(1, 25)
    for frame in _decoded(container, stream, math.floor((zero + start - NEEDED) / base)):
        if frame.pts is None:
            raise UserError(f"frames without presentation times: {path}; put them in an mp4")
        time = frame.pts * base - zero
        if last is None or time > last:
            yield SourceFrame(time, (frame.duration or 0) * base or usual, frame, stream.average_rate)
            last = time


def _decoded(container: Any, stream: av.VideoStream, first: int) -> Iterator[av.VideoFrame]:
    """The frames of a video, less those before `first` (in the stream's time base) that no other one is predicted from."""
    for packet in container.demux(stream):
        early = packet.pts is not None and packet.pts < first
        stream.codec_context.skip_frame = "NONREF" if early else "DEFAULT"
        yield from packet.decode()


def read_sound(path: Path, first: int, count: int) -> tuple[Tensor, int, int] | None:
    """Samples `first` to `first + count` of the video's sound at 16 kHz as float32 [count]; None without an audio track.

    They equal `teachers.media.read.read_audio` of the whole video, without decoding all of it. Also returns how many of them are
    silence that pads a track that starts late, and one that ends early. Raises UserError for damage.
    """
    for seek in (True, False):
        with opened(path, "audio track") as container:
            stream = next(iter(container.streams.audio), None)
            if stream is None:
                return None
            rate = stream.rate
            if not rate:
                raise UserError(f"audio track without a sample rate: {path}")
            exact = Fraction(stream.time_base or 1) <= Fraction(1, rate)  # if not, samples are counted from the start
            early = Fraction(first, SAMPLE_RATE) - 2 * CONTEXT
            seek = seek and exact and early > 0
            if seek and not _seek(container, stream, early):
                continue
            divisor = math.gcd(rate, SAMPLE_RATE)
            group = max(0, (first - round(CONTEXT * SAMPLE_RATE)) * divisor // SAMPLE_RATE)
            begin, skipped = group * (rate // divisor), group * (SAMPLE_RATE // divisor)
            stop = math.ceil((Fraction(first + count, SAMPLE_RATE) + CONTEXT) * rate)
            filled = _fill(container, stream, begin, stop, path)
            if filled is None and seek:
                continue
            samples, known = filled if filled is not None else (np.zeros(stop - begin, np.float32), (stop, stop))
            if seek and known[0] > begin:
                continue
            lowest, highest = (max(0, math.floor(Fraction(at * SAMPLE_RATE, rate))) for at in known)
            sound = resample(torch.from_numpy(samples), rate, SAMPLE_RATE)[first - skipped :][:count]
            late = min(count, max(0, lowest - first))
            return sound, late, min(count - late, max(0, first + count - highest))
    raise AssertionError("the second pass does not seek")


def _fill(
    container: Any, stream: av.AudioStream, begin: int, stop: int, path: Path
) -> tuple[np.ndarray, tuple[int, int]] | None:
    """Samples `begin` to `stop` of the video at the track's own rate, and the first and last+1 that the track has.

    Audio frames are contiguous unless one's time stamp is GAP off. None when the file has no more sound.
    """
    zero, rate, to_float = _zero(video_stream(container)), stream.rate, AudioResampler(format="fltp")
    samples, place, lowest, end = np.zeros(stop - begin, np.float32), None, 0, None
    if stream.duration is not None and "mp4" in container.format.name:  # the last frame of an mp4 is padded
        end = round(((stream.start_time or 0) + stream.duration) * Fraction(stream.time_base or 0) * rate - zero * rate)
    for frame in container.decode(stream):
        at = place if frame.pts is None else round((frame.pts * Fraction(frame.time_base) - zero) * rate)
        if place is None:
            place = lowest = at or 0
        elif at is not None and abs(at - place) > GAP * rate:
            place = at
        for part in to_float.resample(frame):
            values = mono(part)
            if end is not None:
                values = values[: max(0, end - place)]
            check_samples(values, str(path), place)
            low, high = max(place, begin), min(place + len(values), stop)
            if low < high:
                samples[low - begin : high - begin] = values[low - place : high - place]
            place += len(values)
        if place >= stop:
            break
    return None if place is None else (samples.clip(-1.0, 1.0), (lowest, place))
