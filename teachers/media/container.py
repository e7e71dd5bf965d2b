"""Media files: opened as streams of bytes, their tracks chosen, their clocks read, their frames turned upright."""

import errno
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter

from teachers.errors import UserError

TIMED = ("mov", "matroska", "ogg", "asf", "flv", "mpegts", "mpeg", "nut", "mxf")
"""Containers whose packets have times of their own; elsewhere FFmpeg counts samples or frames."""
MOST_FRAME_PIXELS = 2**24
"""Of a frame of a film, 4096 x 4096: decoders keep up to 16 frames for prediction, and of a small file too."""
LIMITS = {"max_pixels": str(MOST_FRAME_PIXELS)}  # for FFmpeg's decoders, which check it before they allocate a frame
SMALL = 16  # pixels of a side of the copy whose side data are read
JUMP = Fraction(1, 4)  # seconds by which times may go back before it counts as another clock
SPECIAL = (
    Disposition.comment
    | Disposition.hearing_impaired
    | Disposition.visual_impaired
    | Disposition.karaoke
    | Disposition.clean_effects
)


@dataclass(frozen=True)
class Content:
    """The bytes of a file that lies nowhere, and what errors call it."""

    data: bytes
    name: str

    def __str__(self) -> str:
        return self.name


class _Source:
    """A stream of bytes whose `seek` gives FFmpeg's error for a place that cannot be, such as damaged files name; PyAV prints a
    traceback of what it raises. `failed`: the error of a `read`, which FFmpeg may take for the end of the file."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self.failed: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def read(self, size: int = -1) -> bytes:
        try:
            return self._stream.read(size)
        except OSError as error:
            self.failed = error
            raise

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._stream.seek(offset, whence)
        except (OSError, ValueError):
            return -errno.EINVAL


OF_THE_MACHINE = (
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ETIMEDOUT,
    errno.EACCES,
    errno.EPERM,
)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, says nothing of the file that was read: a disk, memory or the right to read.
    What FFmpeg itself reports by the same numbers is of the file."""
    if error.__cause__ is not None and is_of_the_machine(error.__cause__):
        return True
    numbered = isinstance(error, OSError) and error.errno in OF_THE_MACHINE
    return (numbered or isinstance(error, MemoryError)) and not isinstance(error, av.FFmpegError)


@contextmanager
def opened(path: Path | Content, kind: str, formats: str | None = None) -> Iterator[InputContainer]:
    """The container of `path`; UserError when the file is missing, empty, unreadable or damaged within the block.

    It may only refer to other local files, so a name is never read as an address. `formats`: FFmpeg's names of the only
    containers that are read, divided by commas.
    """
    path = path if isinstance(path, Content) else Path(path)
    options = {"protocol_whitelist": "file", **LIMITS} | ({} if formats is None else {"format_whitelist": formats})
    source: _Source | None = None
    try:
        if isinstance(path, Path) and not path.is_file():
            raise UserError(f"{kind} {'is not a file' if path.exists() else 'not found'}: {path}; check the path")
        if not (len(path.data) if isinstance(path, Content) else path.stat().st_size):
            raise UserError(f"{kind} is empty (0 bytes): {path}; export or download it again")
        with io.BytesIO(path.data) if isinstance(path, Content) else path.open("rb") as stream:
            source = _Source(stream)
            with av.open(source, "r", options=options) as container:
                yield container
            if source.failed is not None:
                raise source.failed
    except (av.FFmpegError, OSError, ValueError, MemoryError, IndexError) as found:
        error = found if source is None or source.failed is None else source.failed
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, IndexError):  # PyAV's, of a packet of a track that was not there when it opened the file
            reason = "a track begins in its middle"
        kinds = "a common format" if formats is None else formats.replace(",", ", ")
        raise UserError(f"{kind} cannot be read ({reason}): {path}; give a whole file of {kinds}") from error


def video_stream(container: InputContainer) -> av.VideoStream | None:
    """The first video stream that is not a cover image."""
    return next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)


def audio_stream(container: InputContainer) -> tuple[av.AudioStream | None, str]:
    """The sound track that players choose, and which one that is, such as "1 of 2"; (None, "") without any.

    The first that is flagged default and is no commentary and not for the hearing or visually impaired; else the first of those
    flagged default; else the first.
    """
    streams = list(container.streams.audio)
    if not streams:
        return None, ""
    default = [stream for stream in streams if stream.disposition & Disposition.default] or streams
    chosen = next((stream for stream in default if not stream.disposition & SPECIAL), default[0])
    return chosen, f"{streams.index(chosen) + 1} of {len(streams)}"


def is_timed(container: InputContainer) -> bool:
    """Whether times are the file's own: holes and jumps in them are real."""
    return container.format.name.split(",")[0] in TIMED


def zero_of(stream: av.VideoStream | None) -> Fraction:
    """Container time of the first frame, in seconds."""
    return Fraction(0) if stream is None else (stream.start_time or 0) * Fraction(stream.time_base or 0)


def seek(container: InputContainer, stream: av.VideoStream | av.AudioStream, seconds: Fraction) -> bool:
    """Seek to the key frame before that time of the video; False where the container cannot."""
    zero = zero_of(video_stream(container))
    try:
        container.seek(math.floor((zero + seconds) / Fraction(stream.time_base or 1)), stream=stream)
    except (av.FFmpegError, OSError):
        return False
    return True


def orientation(frame: av.VideoFrame) -> tuple[int, bool]:
    """How the file asks for `frame` to be shown: quarter turns counter-clockwise (0 to 3), after a mirroring left to right if True.

    The nearest of the eight to its display matrix (FFmpeg's `libavutil/display.h`: a pixel (x, y) comes to (a x + c y, b x + d y)).
    UserError for a damaged one.
    """
    # PyAV's side data hold their frame in a cycle, which keeps its pixels until the garbage collector runs: read a small copy's
    small = converted(frame, width=SMALL, height=SMALL, format="gray", interpolation=Interpolation.POINT)
    try:
        matrix = small.side_data.get(SideData.DISPLAYMATRIX)  # pyright: ignore  # its stub knows strings alone
    except ValueError:  # beside data of a kind that PyAV does not know it gives the angle alone
        return round(small.rotation / 90) % 4, False
    if matrix is None:
        return 0, False
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(matrix), np.int32)[:5])
    mirrored = a * d - b * c < 0
    a, b = (-a, -b) if mirrored else (a, b)  # where the matrix puts the mirrored frame's x axis
    if abs(a) >= abs(b):
        return (0 if a >= 0 else 2), mirrored
    return (1 if b < 0 else 3), mirrored


def converted(frame: av.VideoFrame, **options: Any) -> av.VideoFrame:
    """`frame` as `VideoReformatter.reformat` makes it of `options`, by one thread. UserError for a damaged one.

    A frame's own `reformat` and `to_ndarray` start a pool of threads for each frame, which lives as long as the frame.
    """
    try:
        return VideoReformatter().reformat(frame, threads=1, **options)
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise UserError(f"a frame of the video cannot be converted ({error}); give a whole file") from error


def upright(frame: av.VideoFrame) -> np.ndarray:
    """RGB uint8 [h, w, 3] of `frame`, turned and mirrored as its file asks for (`orientation`), transparency laid on white.
    UserError for a damaged one."""
    turns, mirrored = orientation(frame)
    if any(component.is_alpha for component in frame.format.components):
        pixels = on_white(converted(frame, format="rgba").to_ndarray())
    else:
        pixels = converted(frame, format="rgb24").to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels[:, ::-1] if mirrored else pixels, turns))


def on_white(pixels: np.ndarray) -> np.ndarray:
    """RGB uint8 [h, w, 3] of RGBA [h, w, 4] whose colours are not multiplied by their alpha."""
    alpha = pixels[..., 3:].astype(np.uint16)
    return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
