"""Sound, images and video: files to tensors, through PyAV alone.

A person's mistake (a missing file, a text named .wav, a folder that cannot be written) raises UserError in one line.
Files are opened as streams of bytes and may only refer to other local files, so a name is never read as an address.
"""

import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.audio.resampler import AudioResampler
from av.container import InputContainer
from av.stream import Disposition
from torch import Tensor

from teachers.errors import UserError
from teachers.media.streams import LOUDEST_SAMPLE, resample


@contextmanager
def opened(path: Path, kind: str) -> Iterator[InputContainer]:
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


def video_stream(container: InputContainer) -> av.VideoStream | None:
    """The first video stream that is not a cover image."""
    return next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)


def read_audio(path: Path, sample_rate: int = 16000) -> Tensor:
    """Sound of `path` as float32 mono [S] in [-1, 1] at `sample_rate` Hz.

    Any rate, channel count (their mean is taken), sample format or container, the sound track of a video included.
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

    The track of a video starts where its frames start: silence is put before a late one. `seconds` is the length that the
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
        with opened(path, "audio file") as container:
            if not container.streams.audio:
                raise UserError(f"no audio track: {path}; give a wav, mp3, m4a or a video with sound")
            stream, to_float = container.streams.audio[0], AudioResampler(format="fltp")
            place, late, end = 0, 0, sys.maxsize  # samples of the track: decoded, after the video's start, that count
            for frame in container.decode(stream):
                if not self.rate:
                    self.rate = frame.sample_rate
                    late, end = self._extent(container, stream, frame)
                    for start in range(0, late, self.rate):
                        yield torch.zeros(min(self.rate, late - start))
                for part in to_float.resample(frame):
                    samples = mono(part)[: max(0, end - place)]
                    check_samples(samples, str(path), place)
                    kept = samples[max(0, -late - place) :]
                    place += len(samples)
                    if len(kept):
                        yield torch.from_numpy(kept).clamp_(-1.0, 1.0)
            if place == 0:
                raise UserError(f"audio file holds 0 seconds of sound: {path}; record or export it again")
            if place <= -late:
                raise UserError(
                    f"audio track ends before the video starts: {path}; give the sound as a file of its own"
                )

    def _extent(self, container: InputContainer, stream: av.AudioStream, first: av.AudioFrame) -> tuple[int, int]:
        """Samples by which the track starts after the video, and those of it that count: an mp4 pads its last frame."""
        video, start, end = video_stream(container), Fraction(0), sys.maxsize
        if video is not None and video.time_base is not None and first.time is not None:
            start = Fraction(first.time) - (video.start_time or 0) * video.time_base
        if stream.duration is not None and stream.time_base is not None:
            self.seconds = float(stream.duration * stream.time_base)
            if "mp4" in container.format.name:
                end = round(stream.duration * stream.time_base * self.rate)
        elif container.duration is not None:
            self.seconds = container.duration / av.time_base
        return round(start * self.rate), end


def mono(frame: av.AudioFrame) -> np.ndarray:
    """Mean over the channels of a planar float frame, [S] float32."""
    return frame.to_ndarray().mean(axis=0, dtype=np.float32)


def check_samples(samples: np.ndarray, where: str, start: int = 0) -> None:
    """Raises UserError unless every sample is finite and none far outside [-1, 1]; the first one is number `start`."""
    broken = ~np.isfinite(samples)
    if broken.any():
        at = start + int(broken.argmax())
        raise UserError(f"audio holds samples that are not finite, first at {at}: {where}; clean it first")
    peak = float(np.abs(samples).max(initial=0.0))
    if peak > LOUDEST_SAMPLE:
        raise UserError(f"audio samples must lie in [-1, 1], got a peak of {peak:.4g}: {where}; normalise it")


def audio_frame(samples: np.ndarray, start: int, sample_rate: int) -> av.AudioFrame:
    """A mono float frame of `samples` [S] whose first sample is number `start` of the signal."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None]), format="fltp", layout="mono")
    frame.sample_rate, frame.time_base, frame.pts = sample_rate, Fraction(1, sample_rate), start
    return frame


def decode_image(path: Path) -> Tensor:
    """Image of `path` as uint8 [h, w, 3], upright (camera rotation applied), transparency laid on white.

    Raises UserError when the file is missing, empty, truncated, or no image.
    """
    with opened(path, "image file") as container:
        name = container.format.name
        if not container.streams.video or not (name.endswith("_pipe") or name in ("gif", "apng", "image2")):
            raise UserError(f"not an image (found {name}): {path}; give a png, jpeg, webp or bmp file")
        stream = container.streams.video[0]
        stream.codec_context.options = {"err_detect": "explode"}
        frame = next(container.decode(stream), None)
        if frame is None:
            raise UserError(f"image file holds no image: {path}; give a png, jpeg, webp or bmp file")
        pixels = upright(frame, "rgba").astype(np.uint16)
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


def upright(frame: av.VideoFrame, pixel_format: str) -> np.ndarray:
    """Pixels of `frame` [h, w, channels] after the rotation (whole quarter turns) that its file asks for."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format=pixel_format), round(frame.rotation / 90)))


def fit_image(pixels: Tensor, size: tuple[int, int], anchor: float = 0.5) -> Tensor:
    """`pixels` uint8 [h, w, 3] to [3, H, W] in [-1, 1]: scaled by max(H/h, W/w) (antialiased bicubic), then cropped.

    The crop is centred across; down the image `anchor` is 0 for its top, 0.5 for its centre, 1 for its bottom.
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
    Raises UserError when the file is missing, empty, damaged or holds no video.
    """
    with opened(path, "video file") as container:
        stream = video_stream(container)
        rate = stream.average_rate if stream is not None else None
        if stream is None or not rate:
            raise UserError(f"no video track: {path}; give a video such as an mp4")
        stream.thread_type = "AUTO"
        frames = []
        for frame in container.decode(stream):
            pixels = torch.from_numpy(upright(frame, "rgb24"))
            if size is not None:
                pixels = ((fit_image(pixels, size) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
            frames.append(pixels)
    if not frames:
        raise UserError(f"video file holds no frames: {path}; give a whole video")
    return torch.stack(frames), Fraction(rate)
