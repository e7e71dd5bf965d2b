"""A video by presentation times: its frames, upright, from any moment on.

Time 0 is that of the first frame. Nothing depends on key frames: decoding starts early enough and drops what comes before.
"""

import math
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import torch
from av.video.reformatter import Interpolation
from torch import Tensor

from teachers.errors import UserError
from teachers.media.container import (
    JUMP,
    LIMITS,
    MOST_FRAME_PIXELS,
    converted,
    opened,
    orientation,
    seek,
    upright,
    video_stream,
    zero_of,
)
from teachers.media.crop import fit_image
from teachers.media.picture import check_size

SEEK_MARGIN = Fraction(1, 2)  # seconds: demuxers seek by decoding time, which is earlier than that of presentation
NEEDED = Fraction(1)  # seconds before a moment in which all frames are decoded: upper temporal layers depend on them
HDR = {16: "PQ", 18: "HLG"}
"""Transfer characteristics of ITU-T H.273 whose levels are no grey levels of a standard screen."""


@dataclass(frozen=True)
class SourceFrame:
    """A decoded frame with its presentation time and duration, in seconds of the video."""

    time: Fraction
    duration: Fraction
    frame: av.VideoFrame
    rate: Fraction | None  # the video's mean one, in frames a second
    pixel_aspect: Fraction  # width over height of the file's pixels; those of `frame` are square


def read_frames(path: Path, start: Fraction = Fraction(0)) -> Generator[SourceFrame, None, None]:
    """The frames of a video in the order of presentation, beginning with one at or before `start` (or with the first).

    Pixels that are not square, by the container or else by the codec, are made so: the width is multiplied (bicubic).
    Raises UserError when the file cannot be read, is damaged, has no video track with times, or shows what is no plain picture:
    interlaced or HDR frames, and, with the time, a clock that starts anew.
    """
    for seeks in (start > SEEK_MARGIN, False):
        with opened(path, "video file") as container:
            stream = video_stream(container)
            if stream is None:
                raise UserError(f"no video track: {path}; give a video such as an mp4")
            if stream.codec_context is None:
                raise UserError(f"video in a format that is not known: {path}; convert it to an mp4")
            if not stream.width:
                raise UserError(
                    f"frames of no known size, or of more than {MOST_FRAME_PIXELS // 10**6} megapixels: {path}; convert it"
                )
            check_size(stream.height, stream.width, str(path), MOST_FRAME_PIXELS)
            if stream.metadata.get("alpha_mode") == "1":  # of webm; FFmpeg's own VP8 and VP9 decoders pass it over
                raise UserError(
                    f"frames are transparent: {path}; lay them on white, ffmpeg -c:v libvpx-vp9 -i IN -f lavfi -i color=white "
                    "-filter_complex [1][0]scale2ref[w][v];[w][v]overlay=shortest=1 OUT"
                )
            stream.codec_context.options = {"err_detect": "explode", **LIMITS}
            stream.codec_context.thread_count = 1
            if seeks and not seek(container, stream, start - SEEK_MARGIN):
                continue
            timed = _timed(container, stream, path, start)
            first = next(timed, None)
            if seeks and (first is None or first.time > start):
                continue
            if first is None:
                raise UserError(f"video file has no frames: {path}; give a whole video")
            yield first
            yield from timed
            return


def _timed(container: Any, stream: av.VideoStream, path: Path, start: Fraction) -> Iterator[SourceFrame]:
    """Decoded frames with their times; of those well before `start` only the ones that others are predicted from."""
    zero, base, last = zero_of(stream), Fraction(stream.time_base or 1), None
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    usual = 1 / Fraction(stream.average_rate) if stream.average_rate else Fraction(1, 25)
    for frame in _decoded(container, stream, math.floor((zero + start - NEEDED) / base)):
        if frame.pts is None:
            raise UserError(f"frames without presentation times: {path}; put them in an mp4")
        _check_frame(frame, path)
        time = frame.pts * base - zero
        if last is not None and time < last - JUMP:
            raise UserError(
                f"times jump back at {float(last):.2f} s to {float(time):.2f} s, as in two recordings in one file: {path}; "
                "cut it there"
            )
        if last is None or time > last:
            square = _square(frame, aspect, path)
            yield SourceFrame(time, (frame.duration or 0) * base or usual, square, stream.average_rate, aspect)
            last = time


def _square(frame: av.VideoFrame, aspect: Fraction, path: Path) -> av.VideoFrame:
    """The frame as it is shown: with `aspect` times its width."""
    width = round(frame.width * aspect)
    if width == frame.width:
        return frame
    check_size(frame.height, width, str(path), MOST_FRAME_PIXELS)
    return converted(frame, width=width, interpolation=Interpolation.BICUBIC)


def _check_frame(frame: av.VideoFrame, path: Path) -> None:
    """UserError unless the frame is one picture in the levels of a standard screen, and no larger than `MOST_FRAME_PIXELS`."""
    check_size(frame.height, frame.width, str(path), MOST_FRAME_PIXELS)  # it may be another than the file's header says
    if frame.interlaced_frame:
        raise UserError(f"frames are interlaced: {path}; convert it, ffmpeg -i IN -vf bwdif=mode=send_frame OUT")
    if (transfer := HDR.get(int(frame.color_trc))) is not None:
        raise UserError(
            f"frames are HDR ({transfer}): {path}; convert it to SDR, ffmpeg -i IN -vf zscale=t=linear:npl=100,format=gbrpf32le,"
            "zscale=p=bt709,tonemap=hable,zscale=t=bt709:m=bt709:r=tv,format=yuv420p OUT"
        )


def _decoded(container: Any, stream: av.VideoStream, first: int) -> Iterator[av.VideoFrame]:
    """The frames of a video, less those before `first` (in the stream's time base) that no other one is predicted from."""
    for packet in container.demux(stream):
        early = packet.pts is not None and packet.pts < first
        stream.codec_context.skip_frame = "NONREF" if early else "DEFAULT"
        yield from packet.decode()


def read_video(path: Path, size: tuple[int, int] | None = None) -> tuple[Tensor, Fraction]:
    """Every frame of `path` as uint8 [T, H, W, 3], upright, and the mean frame rate.

    With `size` = (H, W) each frame is fitted as it is decoded (`fit_image`), so memory is T*H*W*3 bytes of that size.
    Raises UserError as `read_frames` does.
    """
    frames, rate = [], None
    with closing(read_frames(path)) as source:
        for shown in source:
            pixels, rate = torch.from_numpy(upright(shown.frame)), shown.rate
            if size is not None:
                pixels = ((fit_image(pixels, size) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
            frames.append(pixels)
    if not rate:
        raise UserError(f"video without a frame rate: {path}; convert it")
    return torch.stack(frames), Fraction(rate)


def probe(path: Path) -> tuple[tuple[int, int], float]:
    """Width and height in pixels of the upright first frame, and the video's duration in seconds; UserError as `read_frames`.

    The duration is the container's, or, where its header has none, the end of the last packet.
    """
    with closing(read_frames(path)) as source:
        frame = next(source).frame
    with opened(path, "video file") as container:
        if container.duration:
            seconds = container.duration / av.time_base
        else:
            stream = video_stream(container)
            assert stream is not None  # its first frame was read above
            base, zero = Fraction(stream.time_base or 1), zero_of(stream)
            packets = ((p.pts, p.duration or 0) for p in container.demux(stream) if p.pts is not None)
            seconds = float(max((Fraction(pts + length) * base for pts, length in packets), default=zero) - zero)
    turned = orientation(frame)[0] % 2 == 1
    return ((frame.height, frame.width) if turned else (frame.width, frame.height)), seconds
