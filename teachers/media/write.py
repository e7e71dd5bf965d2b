"""H.264 mp4 files with AAC sound, frame by frame, in place only when whole."""

import math
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from teachers.errors import UserError
from teachers.files import replacing
from teachers.media.channels import check_samples
from teachers.media.container import converted
from teachers.media.mark import COMMENT, state_synthetic
from teachers.media.streams import Resampler

AAC_SAMPLE_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
FALLBACK_SAMPLE_RATE = 48000  # what a rate that AAC lacks is resampled to
LAYOUTS = {1: "mono", 2: "stereo"}
REPEATS = {"x264-params": "mbtree=0"}
"""Without its macroblock tree: that of x264's assembler gives other bytes for equal frames from call to call."""
X264 = {"crf": "18", "preset": "veryfast", **REPEATS}
BT709 = 1  # of ITU-T H.273, for matrix, primaries and transfer alike
LIMITED_RANGE = 1


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
    synthetic: bool = False,
) -> int:
    """Write an mp4 and return its frame count T; `frames` gives uint8 [H, W, 3] (iterator, or a tensor [T, H, W, 3]).

    H.264 yuv420p (BT.709) at constant rate, T / fps seconds exactly; `audio` [S], or [S, 2] of two channels, in [-1, 1]
    becomes AAC, cut or padded with silence to the same length. Each pixel becomes upscale x upscale of them, nearest or
    (`smooth`) bicubic; an odd side then gets its last line twice. A `synthetic` one says so in its metadata
    (`teachers.media.mark`). Frames are taken one by one and not kept. The file appears
    under its name only when it is whole; nothing is left on failure. Raises UserError for a place that cannot be written (or
    is full) and for samples that are not finite, ValueError for no frames or frames that are not uint8 [H, W, 3] of one size.
    """
    channels = 1 if audio is None or audio.ndim == 1 else 2
    with VideoWriter(path, fps, None if audio is None else sample_rate, upscale, smooth, channels, synthetic) as writer:
        if audio is not None:
            writer.write_audio(audio)
        for frame in frames:
            writer.write(frame)
    return writer.num_frames


class VideoWriter:
    """The mp4 of `write_video`, a frame at a time; leaving the `with` block normally puts it in place.

    With a `sample_rate` it has sound of 1 or 2 `channels`, that of `write_audio`, which may come before its frames or after
    them. Held are the sound that has no frames yet and, by the encoders, some seconds of video; the index of the file grows by
    10 to 20 MB an hour. A `synthetic` one says so in its metadata.
    """

    def __init__(
        self,
        path: Path,
        fps: Fraction,
        sample_rate: int | None = None,
        upscale: int = 1,
        smooth: bool = False,
        channels: int = 1,
        synthetic: bool = False,
    ):
        check_output(path)
        self.path, self.fps, self.upscale, self.smooth = Path(path), Fraction(fps), upscale, smooth
        self.num_frames, self.channels = 0, channels
        self._row = () if channels == 1 else (channels,)
        self._size: torch.Size | None = None
        self._heard = self._num_samples = 0  # samples that came, samples that were encoded
        self._waiting: deque[np.ndarray] = deque()  # the sound between them
        self._has_sound, self._rate, self._resampler = sample_rate is not None, FALLBACK_SAMPLE_RATE, None
        if sample_rate in AAC_SAMPLE_RATES:
            self._rate = sample_rate
        elif sample_rate is not None:
            self._resampler = Resampler(sample_rate, self._rate, self._row)
        self._place = ExitStack()
        temporary = self._place.enter_context(replacing(self.path))
        ticks = math.lcm(self.fps.numerator, self._rate)
        options = {"movflags": "+faststart", "movie_timescale": str(ticks if ticks < 2**31 else self._rate)}
        self._container = av.open(f"file:{temporary.absolute()}", "w", format="mp4", options=options)
        if synthetic:
            self._container.metadata["comment"] = COMMENT
        self._temporary = temporary if synthetic else None
        self._place.push(self._close)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *failure: Any) -> None:
        self._place.__exit__(*failure)

    def _close(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the file whole, or, after a failure, at least closed, so that `replacing` can rename or remove it."""
        try:
            if kind is None:
                self._finish()
        finally:
            try:
                self._container.close()
                if self._temporary is not None:
                    state_synthetic(self._temporary)
            except (av.FFmpegError, OSError) as error:
                if kind is None:
                    raise self._failed(error) from error

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
        rgb = av.VideoFrame.from_ndarray(array, format="rgb24")
        shown = converted(rgb, format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        shown.pts, shown.time_base = self.num_frames, 1 / self.fps
        self._mux(self._video.encode, shown)
        self.num_frames += 1
        self._write_audio(int(self.num_frames / self.fps * self._rate))

    def write_audio(self, samples: Tensor) -> None:
        """Append sound [n], of several channels [n, channels], in [-1, 1]; ValueError for another shape and in a video without a
        rate, UserError as `write_video`."""
        if samples.shape[1:] != self._row or samples.ndim == 0 or not self._has_sound:
            raise ValueError(
                f"sound must be {['n', *self._row]}, in a video with a sample rate: got shape {tuple(samples.shape)}"
            )
        signal = samples.detach().float().cpu().numpy()
        check_samples(signal, "the sound to write", self._heard)
        self._heard += len(signal)
        if not len(signal):
            return
        self._wait(signal if self._resampler is None else self._resampler.push(samples).numpy())

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
        self._video = self._container.add_stream("libx264", rate=self.fps, options=X264)
        self._video.width, self._video.height, self._video.pix_fmt = width, height, "yuv420p"
        context = self._video.codec_context
        context.time_base = 1 / self.fps
        context.thread_count = 1  # the bytes must not depend on the machine
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        if self._has_sound:
            self._sound = self._container.add_stream("aac", rate=self._rate, layout=LAYOUTS[self.channels])

    def _wait(self, samples: np.ndarray) -> None:
        """Append a copy of sound at the video's own rate."""
        if len(samples):
            self._waiting.append(samples.clip(-1.0, 1.0))

    def _write_audio(self, until: int) -> None:
        """Encode the sound that came, up to sample number `until`."""
        while self._waiting and self._num_samples < until:
            block, length = self._waiting.popleft(), until - self._num_samples
            if length < len(block):
                self._waiting.appendleft(block[length:])
                block = block[:length]
            self._mux(self._sound.encode, audio_frame(block, self._num_samples, self._rate))
            self._num_samples += len(block)

    def _mux(self, encode: Callable[[Any], list[av.Packet]], frame: av.VideoFrame | av.AudioFrame | None) -> None:
        try:
            self._container.mux(encode(frame))
        except (av.FFmpegError, OSError) as error:
            raise self._failed(error) from error

    def _finish(self) -> None:
        """Write what the encoders still hold."""
        if self.num_frames == 0:
            raise ValueError(f"a video needs at least one frame: got none for {self.path}")
        self._mux(self._video.encode, None)
        if self._has_sound:
            self._finish_sound()

    def _finish_sound(self) -> None:
        """Cut the sound to the frames' length or pad it with silence."""
        if self._resampler is not None:
            self._wait(self._resampler.finish().numpy())
        end = round(self.num_frames / self.fps * self._rate)
        self._write_audio(end)
        while self._num_samples < end:
            self._wait(np.zeros((min(self._rate, end - self._num_samples), *self._row), np.float32))
            self._write_audio(end)
        self._mux(self._sound.encode, None)

    def _failed(self, error: Exception) -> UserError:
        reason = getattr(error, "strerror", None) or type(error).__name__
        return UserError(f"video cannot be written ({reason}): {self.path}; free some space or choose another place")


def audio_frame(samples: np.ndarray, start: int, sample_rate: int) -> av.AudioFrame:
    """A float frame of `samples` [S], of two channels [S, 2], whose first sample is number `start` of the signal."""
    rows = samples.reshape(len(samples), -1)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(rows.T), format="fltp", layout=LAYOUTS[rows.shape[1]])
    frame.sample_rate, frame.time_base, frame.pts = sample_rate, Fraction(1, sample_rate), start
    return frame
