"""Small films whose every picture says its number and whose sound has clicks at known times."""

import io
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS, BLOCK = 10, 8
WIDTH, HEIGHT = BITS * BLOCK, 64
TURNED_RIGHT = (0, 1, 0, -1, 0, 0, 0, 0, 0x4000)  # the mp4 matrix of a phone held upright, in units of 2 ** -16


def numbered(number: int, tint: int = 0) -> np.ndarray:
    """uint8 [64, 80, 3]: the Gray code of `number` in blocks along the top, a ramp below."""
    code = number ^ (number >> 1)
    pixels = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:] = (np.linspace(60, 180, WIDTH)[None, :, None] + tint).astype(np.uint8)
    for bit in range(BITS):
        pixels[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 235 if code >> bit & 1 else 16
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """The number that a picture of `numbered` says, at any size."""
    height, width = pixels.shape[:2]
    row, code = height * BLOCK // HEIGHT // 2, 0
    for bit in range(BITS):
        code |= int(pixels[row, int((bit + 0.5) * width / BITS)].mean() > 128) << bit
    number = 0
    while code:
        number, code = number ^ code, code >> 1
    return number


def clicks(seconds: float, rate: int, every: float = 0.25, first: float = 0.1) -> np.ndarray:
    """Sound float32 [S]: clicks of one sample at `first` + n * `every` seconds."""
    sound = np.zeros(round(seconds * rate), np.float32)
    sound[[round(time * rate) for time in np.arange(first, seconds, every) if round(time * rate) < len(sound)]] = 0.9
    return sound


def write_film(
    path: Path,
    pictures: Sequence[np.ndarray],
    times: Iterable[Fraction | float] | Fraction,
    sound: np.ndarray | None = None,
    rate: int = 48000,
    audio_codec: str = "pcm_s16le",
    sound_start: float = 0.0,
    sound_hole: tuple[float, float] = (0.0, 0.0),
    movflags: str = "",
    **options: str,
) -> Path:
    """A film of `pictures` at `times` (seconds, or a constant rate), H.264 with one key frame in front and B-frames; `sound` [S] or
    [S, 2]."""
    constant = isinstance(times, Fraction)
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        video = container.add_stream(
            "libx264", rate=times if constant else 30, options={"crf": "6", "preset": "veryfast", "g": "999", **options}
        )
        video.height, video.width = pictures[0].shape[:2]
        video.pix_fmt = "yuv420p"
        base = 1 / times if constant else Fraction(1, 12000)
        video.codec_context.time_base = base
        audio = None
        if sound is not None:
            sample_format = "fltp" if audio_codec in ("aac", "libopus") else "s16"
            layout, sound = "mono" if sound.ndim == 1 else "stereo", sound.reshape(len(sound), -1)
            audio = container.add_stream(audio_codec, rate=rate, layout=layout, format=sample_format)
        for number, (picture, time) in enumerate(
            zip(pictures, range(len(pictures)) if constant else list(times), strict=True)
        ):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = number if constant else round(Fraction(time) / base)
            frame.time_base = base
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            for start in range(0, len(sound), 4800):
                if sound_hole[0] <= start / rate < sound_hole[1]:
                    continue
                block = np.ascontiguousarray(sound[start : start + 4800].T)
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
                frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
                frame.pts = start + round(sound_start * rate)
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def counting_film(path: Path, seconds: float = 4.0, fps: int | Fraction = 25, rate: int = 48000, **options) -> Path:
    """Pictures 0, 1, 2, ... and clicks, of one length."""
    pictures = [numbered(number) for number in range(round(seconds * fps))]
    return write_film(path, pictures, Fraction(fps), clicks(seconds, rate), rate, **options)


def turn(path: Path) -> None:
    """Let an mp4 say that its pictures are to be turned a quarter to the right."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    for number, value in enumerate(TURNED_RIGHT):
        data[at + 4 * number : at + 4 * number + 4] = (value * 2**16).to_bytes(4, "big", signed=True)
    path.write_bytes(data)


def frames_of(film: bytes | Path) -> np.ndarray:
    """All frames uint8 [T, H, W, 3] of an mp4."""
    with av.open(io.BytesIO(film) if isinstance(film, bytes) else str(film)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def sound_of(flac: bytes) -> np.ndarray:
    """Sound float64 [S] of a FLAC file of 16 bits."""
    with av.open(io.BytesIO(flac)) as container:
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)]) / 32768


def put_film(path: Path, width: int = 64, height: int = 48, frames: int = 5, fps: int = 25, turned: int = 0) -> Path:
    """Write a grey film, for readers that look at names, sizes and lengths; `turned` degrees is the rotation that
    the file asks a player for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        codec = "libvpx" if path.suffix == ".webm" else "mpeg4"
        stream = container.add_stream(codec, rate=fps, width=width, height=height, pix_fmt="yuv420p")
        if turned:
            stream.set_display_rotation(turned)
        for _ in range(frames):
            picture = av.VideoFrame.from_ndarray(np.full((height, width, 3), 128, np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path
