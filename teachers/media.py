"""Sound, pictures and films: files to tensors and back, through PyAV alone.

A person's mistake (a missing file, a text named .wav, a folder that cannot be written) raises UserError in one line.
Files are opened as streams of bytes and may only refer to other local files, so a name is never read as an address.
"""

import math
import os
import secrets
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.audio.resampler import AudioResampler
from av.container import InputContainer
from av.stream import Disposition
from torch import Tensor

from teachers.errors import UserError
from teachers.streams import LOUDEST_SAMPLE

AAC_SAMPLE_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
FALLBACK_SAMPLE_RATE = 48000  # what a rate that AAC lacks is resampled to
BT709 = 1  # of ITU-T H.273, for matrix, primaries and transfer alike
LIMITED_RANGE = 1


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[InputContainer]:
    """The container of `path`; UserError when the file is missing, empty, unreadable or damaged within the block."""
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"{kind} {'is not a file' if path.exists() else 'not found'}: {path}; check the path")
        if path.stat().st_size == 0:
            raise UserError(f"{kind} is empty (0 bytes): {path}; export or download it again")
        with path.open("rb") as stream, av.open(stream, "r", options={"protocol_whitelist": "file"}) as container:
            yield container
    except UserError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{kind} cannot be read ({reason}): {path}; give a whole file of a common format") from error


def _film_stream(container: InputContainer) -> av.VideoStream | None:
    """The first video stream that is not a cover picture."""
    return next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)


def read_audio(path: Path, sample_rate: int = 16000) -> Tensor:
    """Sound of `path` as float32 mono [S] in [-1, 1] at `sample_rate` Hz.

    Any rate, channel count (their mean is taken), sample format or container, the sound track of a film included.
    Raises UserError as `decode_audio` does.
    """
    samples, rate = decode_audio(path)
    return resample(samples, rate, sample_rate)


def decode_audio(path: Path) -> tuple[Tensor, int]:
    """The whole sound of `path` as float32 mono [S] in [-1, 1], and its own rate in Hz; raises as `AudioReader` does."""
    reader = AudioReader(path)
    return torch.cat(list(reader)), reader.rate


class AudioReader:
    """The sound of a file as it is decoded: iterate, once, for blocks float32 mono [n] in [-1, 1] at `rate` Hz.

    The track of a film starts where its pictures start: silence is put before a late one. `seconds` is the length that the
    file claims, None where it claims none. UserError when the file is missing, empty, damaged, without sound, 0 seconds long,
    or holds values not finite or far outside [-1, 1]: at once for what the first block shows, later for what comes later.
    """

    def __init__(self, path: Path):
        self.rate, self.seconds = 0, None
        self._blocks = self._decode(Path(path))
        self._all = chain([next(self._blocks)], self._blocks)

    def __iter__(self) -> Iterator[Tensor]:
        return self._all

    def close(self) -> None:
        """Let go of the file."""
        self._blocks.close()

    def _decode(self, path: Path) -> Generator[Tensor, None, None]:
        with _opened(path, "audio file") as container:
            if not container.streams.audio:
                raise UserError(f"no audio track: {path}; give a wav, mp3, m4a or a film with sound")
            stream, to_float = container.streams.audio[0], AudioResampler(format="fltp")
            place, late, end = 0, 0, sys.maxsize  # samples of the track: decoded, after the pictures' start, that count
            for frame in container.decode(stream):
                if not self.rate:
                    self.rate = frame.sample_rate
                    late, end = self._extent(container, stream, frame)
                    for start in range(0, late, self.rate):
                        yield torch.zeros(min(self.rate, late - start))
                for part in to_float.resample(frame):
                    samples = _mono(part)[: max(0, end - place)]
                    _check_samples(samples, str(path), place)
                    kept = samples[max(0, -late - place) :]
                    place += len(samples)
                    if len(kept):
                        yield torch.from_numpy(kept).clamp_(-1.0, 1.0)
            if place == 0:
                raise UserError(f"audio file holds 0 seconds of sound: {path}; record or export it again")
            if place <= -late:
                raise UserError(
                    f"audio track ends before the pictures start: {path}; give the sound as a file of its own"
                )

    def _extent(self, container: InputContainer, stream: av.AudioStream, first: av.AudioFrame) -> tuple[int, int]:
        """Samples by which the track starts after the pictures, and those of it that count: an mp4 pads its last frame."""
        film, start, end = _film_stream(container), Fraction(0), sys.maxsize
        if film is not None and film.time_base is not None and first.time is not None:
            start = Fraction(first.time) - (film.start_time or 0) * film.time_base
        if stream.duration is not None and stream.time_base is not None:
            self.seconds = float(stream.duration * stream.time_base)
            if "mp4" in container.format.name:
                end = round(stream.duration * stream.time_base * self.rate)
        elif container.duration is not None:
            self.seconds = container.duration / av.time_base
        return round(start * self.rate), end


def _mono(frame: av.AudioFrame) -> np.ndarray:
    """Mean over the channels of a planar float frame, [S] float32."""
    return frame.to_ndarray().mean(axis=0, dtype=np.float32)


def _check_samples(samples: np.ndarray, where: str, start: int = 0) -> None:
    """Raises UserError unless every sample is finite and none far outside [-1, 1]; the first one is number `start`."""
    broken = ~np.isfinite(samples)
    if broken.any():
        at = start + int(broken.argmax())
        raise UserError(f"audio holds samples that are not finite, first at {at}: {where}; mend it")
    peak = float(np.abs(samples).max(initial=0.0))
    if peak > LOUDEST_SAMPLE:
        raise UserError(f"audio samples must lie in [-1, 1], got a peak of {peak:.4g}: {where}; normalise it")


def resample(samples: Tensor, source_rate: int, target_rate: int) -> Tensor:
    """`samples` [S] at `source_rate` Hz as max(1, round(S * target_rate / source_rate)) at `target_rate` Hz."""
    if source_rate == target_rate:
        return samples
    signal, converter = samples.numpy(), _Converter(source_rate, target_rate)
    parts = [converter.push(signal[start : start + source_rate]) for start in range(0, len(signal), source_rate)]
    output = np.concatenate([*parts, converter.push(None)])
    length = max(1, round(len(signal) * Fraction(target_rate, source_rate)))
    padded = np.pad(output[:length], (0, max(0, length - len(output))))
    return torch.from_numpy(padded).clamp_(-1.0, 1.0)


class _Converter:
    """A mono signal at another rate, as it comes (libswresample)."""

    def __init__(self, source_rate: int, target_rate: int):
        self.source_rate, self.num_samples = source_rate, 0
        self.resampler = AudioResampler(format="fltp", layout="mono", rate=target_rate)

    def push(self, samples: np.ndarray | None) -> np.ndarray:
        """The next samples [n], or None at the end -> those of the target rate that they complete."""
        frame = None
        if samples is not None:
            frame = _audio_frame(samples, self.num_samples, self.source_rate)
            self.num_samples += len(samples)
        parts = [_mono(part) for part in self.resampler.resample(frame)]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _audio_frame(samples: np.ndarray, start: int, sample_rate: int) -> av.AudioFrame:
    """A mono float frame of `samples` [S] whose first sample is number `start` of the signal."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None]), format="fltp", layout="mono")
    frame.sample_rate, frame.time_base, frame.pts = sample_rate, Fraction(1, sample_rate), start
    return frame


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """Picture of `path` as float32 [3, H, W] in [-1, 1], `size` = (H, W). Raises UserError as `decode_image` does."""
    return fit_image(decode_image(path), size)


def decode_image(path: Path) -> Tensor:
    """Picture of `path` as uint8 [h, w, 3], upright (camera rotation applied), transparency laid on white.

    Raises UserError when the file is missing, empty, truncated, or no picture.
    """
    with _opened(path, "image file") as container:
        name = container.format.name
        if not container.streams.video or not (name.endswith("_pipe") or name in ("gif", "apng", "image2")):
            raise UserError(f"not a picture (found {name}): {path}; give a png, jpeg, webp or bmp file")
        stream = container.streams.video[0]
        stream.codec_context.options = {"err_detect": "explode"}
        frame = next(container.decode(stream), None)
        if frame is None:
            raise UserError(f"image file holds no picture: {path}; give a png, jpeg, webp or bmp file")
        pixels = _upright(frame, "rgba").astype(np.uint16)
    data = Path(path).read_bytes()
    if data.startswith(b"\xff\xd8") and not _jpeg_is_whole(data):
        raise UserError(f"image file is cut short: {path}; export or download it again")
    alpha = pixels[..., 3:]
    flat = (pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return torch.from_numpy(flat.astype(np.uint8))


def _jpeg_is_whole(data: bytes) -> bool:
    """Whether an end marker follows the first scan (the decoder accepts files that lack a few of their last lines)."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:
            return data.find(b"\xff\xd9", position) >= 0
        position += 1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def _upright(frame: av.VideoFrame, pixel_format: str) -> np.ndarray:
    """Pixels of `frame` [h, w, channels] after the rotation (whole quarter turns) that its file asks for."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format=pixel_format), round(frame.rotation / 90)))


def fit_image(pixels: Tensor, size: tuple[int, int], anchor: float = 0.5) -> Tensor:
    """`pixels` uint8 [h, w, 3] to [3, H, W] in [-1, 1]: scaled by max(H/h, W/w) (antialiased bicubic), then cropped.

    The crop is centred across; down the picture `anchor` is 0 for its top, 0.5 for its centre, 1 for its bottom.
    """
    height, width = pixels.shape[:2]
    ratio = max(Fraction(size[0], height), Fraction(size[1], width))
    scaled = (max(size[0], round(height * ratio)), max(size[1], round(width * ratio)))
    image = pixels.permute(2, 0, 1)[None].float()
    if scaled != (height, width):
        image = F.interpolate(image, scaled, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
    top, left = int((scaled[0] - size[0]) * anchor), (scaled[1] - size[1]) // 2
    return image[0, :, top : top + size[0], left : left + size[1]].contiguous() / 127.5 - 1


def read_video(path: Path, size: tuple[int, int] | None = None) -> tuple[Tensor, Fraction]:
    """Every frame of `path` as uint8 [T, H, W, 3], upright, and the mean frame rate.

    With `size` = (H, W) each frame is fitted as it is decoded (`fit_image`), so memory is T*H*W*3 bytes of that size.
    Raises UserError when the file is missing, empty, damaged or holds no film.
    """
    with _opened(path, "video file") as container:
        stream = _film_stream(container)
        rate = stream.average_rate if stream is not None else None
        if stream is None or not rate:
            raise UserError(f"no video track: {path}; give a film such as an mp4")
        stream.thread_type = "AUTO"
        frames = []
        for frame in container.decode(stream):
            pixels = torch.from_numpy(_upright(frame, "rgb24"))
            if size is not None:
                pixels = ((fit_image(pixels, size) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
            frames.append(pixels)
    if not frames:
        raise UserError(f"video file holds no pictures: {path}; give a whole film")
    return torch.stack(frames), Fraction(rate)


def check_output(path: Path) -> None:
    """Raises UserError unless `path` names an mp4 in a folder where a file can be made; leaves nothing behind."""
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise UserError(f"output must be an mp4 file: {path}; let the name end in .mp4")
    if path.is_dir():
        raise UserError(f"output is a folder: {path}; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"output folder not found: {path.parent}; make it first")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"output folder is not writable ({error.strerror}): {path.parent}; choose another") from error


def write_video(
    path: Path,
    frames: Iterable[Tensor | np.ndarray],
    fps: Fraction,
    audio: Tensor | None = None,
    sample_rate: int = 16000,
    upscale: int = 1,
    smooth: bool = False,
) -> int:
    """Write an mp4 and return its frame count T; `frames` gives uint8 [H, W, 3] (iterator, or a tensor [T, H, W, 3]).

    H.264 yuv420p (BT.709) at constant rate, T / fps seconds exactly; `audio` [S] in [-1, 1] becomes AAC, cut or padded
    with silence to the same length. Each pixel becomes upscale x upscale of them, nearest or (`smooth`) bicubic; an odd
    side then gets its last line twice. Frames are taken one by one and not kept. The file appears under its name only
    when it is whole; nothing is left on failure. Raises UserError for a place that cannot be written (or is full) and
    for samples that are not finite, ValueError for no frames or frames that are not uint8 [H, W, 3] of one size.
    """
    with VideoWriter(path, fps, None if audio is None else sample_rate, upscale, smooth) as writer:
        if audio is not None:
            writer.hear(audio)
        for frame in frames:
            writer.write(frame)
    return writer.num_frames


class VideoWriter:
    """The mp4 of `write_video`, a frame at a time; leaving the `with` block normally puts it in place.

    With a `sample_rate` it has sound, that of `hear`, which may come before its pictures or after them. Held are the sound
    that has no pictures yet and, by the encoders, some seconds of film; the index of the file grows by 10 to 20 MB an hour.
    """

    def __init__(
        self, path: Path, fps: Fraction, sample_rate: int | None = None, upscale: int = 1, smooth: bool = False
    ):
        check_output(path)
        self.path, self.fps, self.upscale, self.smooth = Path(path), Fraction(fps), upscale, smooth
        self.num_frames = 0
        self._size: torch.Size | None = None
        self._heard = self._num_samples = 0  # samples that came, samples that were encoded
        self._waiting: deque[np.ndarray] = deque()  # the sound between them
        self._has_sound, self._rate, self._converter = sample_rate is not None, FALLBACK_SAMPLE_RATE, None
        if sample_rate in AAC_SAMPLE_RATES:
            self._rate = sample_rate
        elif sample_rate is not None:
            self._converter = _Converter(sample_rate, self._rate)
        self._temporary = self.path.with_name(f".{self.path.name[:200]}.{secrets.token_hex(4)}.tmp")
        ticks = math.lcm(self.fps.numerator, self._rate)
        options = {"movflags": "+faststart", "movie_timescale": str(ticks if ticks < 2**31 else self._rate)}
        self._container = av.open(f"file:{self._temporary.absolute()}", "w", format="mp4", options=options)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            try:
                self._container.close()
            except (av.FFmpegError, OSError) as error:
                if kind is None:
                    raise self._failed(error) from error
            finally:
                self._temporary.unlink(missing_ok=True)

    def write(self, frame: Tensor | np.ndarray) -> None:
        """Append one frame uint8 [H, W, 3]."""
        pixels = torch.as_tensor(frame).cpu()
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"a frame must be uint8 [H, W, 3]: got {pixels.dtype} {tuple(pixels.shape)}")
        if self._size not in (None, pixels.shape):
            raise ValueError(f"frames must have one size: got {tuple(pixels.shape)} after {tuple(self._size)}")
        array = self._enlarged(pixels)
        if self._size is None:
            self._size = pixels.shape
            self._add_streams(*array.shape[:2])
        picture = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
        )
        picture.pts, picture.time_base = self.num_frames, 1 / self.fps
        self._mux(self._video.encode, picture)
        self.num_frames += 1
        self._write_audio(int(self.num_frames / self.fps * self._rate))

    def hear(self, samples: Tensor) -> None:
        """Append sound [n] in [-1, 1]; ValueError unless it is mono and a rate was given, UserError as `write_video`."""
        if samples.ndim != 1 or not self._has_sound:
            raise ValueError(f"sound must be mono [n], in a film with a sample rate: got shape {tuple(samples.shape)}")
        signal = samples.detach().float().cpu().numpy()
        _check_samples(signal, "the sound to write", self._heard)
        self._heard += len(signal)
        if not len(signal):
            return
        self._wait(signal if self._converter is None else self._converter.push(signal))

    def _enlarged(self, pixels: Tensor) -> np.ndarray:
        """`pixels` uint8 [H, W, 3] at `upscale` times the size, both sides even."""
        if self.upscale > 1:
            image = pixels.permute(2, 0, 1)[None].float()
            if self.smooth:
                image = F.interpolate(image, scale_factor=self.upscale, mode="bicubic", align_corners=False)
            else:
                image = F.interpolate(image, scale_factor=self.upscale, mode="nearest")
            pixels = image[0].round().clamp(0, 255).byte().permute(1, 2, 0)
        height, width = pixels.shape[:2]
        return np.pad(pixels.numpy(), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")

    def _add_streams(self, height: int, width: int) -> None:
        self._video = self._container.add_stream("libx264", rate=self.fps, options={"crf": "18", "preset": "veryfast"})
        self._video.width, self._video.height, self._video.pix_fmt = width, height, "yuv420p"
        context = self._video.codec_context
        context.time_base = 1 / self.fps
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        if self._has_sound:
            self._sound = self._container.add_stream("aac", rate=self._rate, layout="mono")

    def _wait(self, samples: np.ndarray) -> None:
        """Append a copy of sound at the film's own rate."""
        if len(samples):
            self._waiting.append(samples.clip(-1.0, 1.0))

    def _write_audio(self, until: int) -> None:
        """Encode the sound that came, up to sample number `until`."""
        while self._waiting and self._num_samples < until:
            block, length = self._waiting.popleft(), until - self._num_samples
            if length < len(block):
                self._waiting.appendleft(block[length:])
                block = block[:length]
            self._mux(self._sound.encode, _audio_frame(block, self._num_samples, self._rate))
            self._num_samples += len(block)

    def _mux(self, encode: Callable[[Any], list[av.Packet]], frame: av.VideoFrame | av.AudioFrame | None) -> None:
        try:
            self._container.mux(encode(frame))
        except (av.FFmpegError, OSError) as error:
            raise self._failed(error) from error

    def _finish(self) -> None:
        """Write what the encoders still hold and the index, then give the file its name."""
        if self.num_frames == 0:
            raise ValueError(f"a video needs at least one frame: got none for {self.path}")
        self._mux(self._video.encode, None)
        if self._has_sound:
            self._finish_sound()
        try:
            self._container.close()
            os.replace(self._temporary, self.path)
        except (av.FFmpegError, OSError) as error:
            raise self._failed(error) from error

    def _finish_sound(self) -> None:
        """Cut the sound to the pictures' length or pad it with silence."""
        if self._converter is not None:
            self._wait(self._converter.push(None))
        end = round(self.num_frames / self.fps * self._rate)
        self._write_audio(end)
        while self._num_samples < end:
            self._wait(np.zeros(min(self._rate, end - self._num_samples), np.float32))
            self._write_audio(end)
        self._mux(self._sound.encode, None)

    def _failed(self, error: Exception) -> UserError:
        reason = getattr(error, "strerror", None) or type(error).__name__
        return UserError(f"video cannot be written ({reason}): {self.path}; free some space or choose another place")
