"""Small sounds and films as other programs write them: many channels, holes, changes within a stream, wrong headers."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.stream import Disposition

from teachers import media

FORMATS = {
    "pcm_s16le": "s16",
    "pcm_s16be": "s16",
    "flac": "s16",
    "aac": "fltp",
    "libopus": "flt",
    "mp3": "fltp",
    "ac3": "fltp",
}
BLOCK = 960  # samples of a packet, where the codec does not say
PLAIN = {"mp3": {"write_xing": "0", "id3v2_version": "0"}}
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1", 12: "7.1.4", 16: "hexadecagonal"}


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    """float32 [S], peak 0.5."""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def decoded(path: Path) -> tuple[torch.Tensor, int]:
    """The whole sound of a file as float32 mono [S], and its own rate in Hz."""
    reader = media.AudioReader(path)
    return torch.cat(list(reader)), reader.rate


def write_sound(
    path: Path,
    codec: str,
    rate: int,
    *tracks: np.ndarray,
    default: int | None = None,
    hole: tuple[float, float] = (0.0, 0.0),
    video: int = 0,
) -> Path:
    """Tracks float32 [S, channels] to a file; the container follows the suffix.

    default: the only track that is flagged so; hole: packets that begin in these seconds are left out; video: frames of a film
    of 25 fps beside it
    """
    with av.open(str(path), "w", options=PLAIN.get(path.suffix[1:], {})) as container:
        film = None
        if video:
            film = container.add_stream("libvpx" if path.suffix == ".webm" else "libx264", rate=25)
            film.width, film.height, film.pix_fmt = 64, 48, "yuv420p"
        streams = []
        for number, rows in enumerate(tracks):
            stream = container.add_stream(codec, rate=rate, layout=LAYOUTS[rows.shape[1]], format=FORMATS[codec])
            if default is not None:
                stream.disposition = Disposition.default if number == default else Disposition(0)
            streams.append(stream)
        for number in range(video):
            pixels = np.full((48, 64, 3), 4 * number % 200, np.uint8)
            pixels[:, : 1 + number % 64] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(film.encode(frame))
        if film is not None:
            container.mux(film.encode(None))
        for stream, rows in zip(streams, tracks, strict=True):
            layout = LAYOUTS[rows.shape[1]]
            packets = []
            for start in range(0, len(rows), BLOCK):
                packed = np.ascontiguousarray(rows[start : start + BLOCK].astype(np.float32).reshape(1, -1))
                frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
                frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
                packets += stream.encode(frame)
            for packet in [*packets, *stream.encode(None)]:
                at = 0 if packet.pts is None else packet.pts * packet.time_base
                if not hole[0] <= at < hole[1]:
                    container.mux(packet)
    return path


def joined(path: Path, *parts: Path) -> Path:
    """Files one after the other, as recorders that are started again leave them."""
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def set_sound_length(path: Path, seconds: float) -> Path:
    """Let the header of an mp4's sound say this length."""
    data = bytearray(path.read_bytes())
    at = data.index(b"soun")
    at = data.rindex(b"mdhd", 0, at) + 4
    assert data[at] == 0  # version 0: flags, two dates, rate, length, of four bytes each
    rate = int.from_bytes(data[at + 12 : at + 16], "big")
    data[at + 16 : at + 20] = round(seconds * rate).to_bytes(4, "big")
    path.write_bytes(data)
    return path


def loudest_hertz(samples: np.ndarray | Sequence[float], rate: int) -> float:
    """Frequency of the strongest part of a sound [S]."""
    windowed = np.asarray(samples, np.float64) * np.hanning(len(samples))
    return float(np.abs(np.fft.rfft(windowed)).argmax()) * rate / len(samples)
