"""Cut one clip of a video by presentation times: the nearest source frame for each frame time, and the sound exact to a sample.

A clip starts at the source frame nearest to the annotated start, so that at equal frame rates audio and video are aligned as in the
source; frame k is the source frame nearest to that start + k / fps, and the sound is the source's at 16 kHz from that start on.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from fractions import Fraction
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.data.datasets.manifest import Clip
from distill.data.prepare.framing import FaceWatch, crop_box, find_face
from teachers.errors import UserError
from teachers.media.container import converted, orientation, upright
from teachers.media.film import SourceFrame, read_frames
from teachers.media.sound import LONGEST, SAMPLE_RATE, read_sound
from teachers.media.write import BT709, LIMITED_RANGE, REPEATS

LOSSLESS = 0
SNAP = Fraction(1, 10)  # seconds from the annotated start within which a source frame becomes the clip's start
SHORT = Fraction(1, 10)  # seconds by which video or sound may end too early
ROUNDING = Fraction(1, 1000)  # seconds that times in a file may be off
HOLE = Fraction(1, 2)  # largest distance in seconds from a frame to the nearest source frame
CUT_DIFFERENCE, CUT_RATIO, CUT_NEIGHBOURS = 15.0, 3.0, 2  # the first of 255 levels; see `scene_cuts`
THUMBNAIL = 32
AT_ONCE = 2**22  # samples of sound that are held in fp64


@dataclass(frozen=True, kw_only=True)
class CutConfig:
    """Format of a cut clip, and which clips are refused.

    fps: frames a second; size: height and width, None keeps those of the crop (made even); crop: the part that is kept for the
        shape of `size` (`teachers.media.crop`)
    crf: quality of H.264, 0 is lossless; cuts: what is done with a clip that has a scene cut
    min_seconds: shorter clips are refused; max_seconds: longer ones are truncated
    silent: clips without sound, or with silence alone, are accepted
    """

    fps: Fraction = Fraction(16)
    size: tuple[int, int] | None = None
    crop: Literal["face", "top", "center"] = "face"
    crf: int = 10
    cuts: Literal["refuse", "longest", "keep"] = "refuse"
    min_seconds: float = 1.0
    max_seconds: float | None = None
    silent: bool = False

    def __post_init__(self):
        if self.fps <= 0:
            raise UserError(f"fps must be above 0: got {self.fps}; give 16 or 25")
        if self.size is not None and min(self.size) < 16:
            raise UserError(f"height and width must be 16 or more: got {self.size}; give e.g. 512x512")
        if not 0 <= self.crf <= 51:
            raise UserError(f"crf must be 0 (lossless) to 51: got {self.crf}; 10 is near the source")
        if self.max_seconds is not None and self.max_seconds < self.min_seconds:
            raise UserError(f"longest clip {self.max_seconds} s is shorter than the shortest {self.min_seconds} s")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A cut clip: its sound and metadata. The video itself is in a file.

    sound: float32 [S] at 16 kHz, S = round(16000 * num_frames / fps), None without; metadata: plain data for the sample's json
    """

    num_frames: int
    sound: Tensor | None
    metadata: dict[str, Any]


@dataclass
class _Progress:
    """Statistics that `_encode_video` accumulates over a clip's frames; times are seconds of the source."""

    num_frames: int = 0
    num_source_frames: int = 0  # different ones that became a frame
    num_skipped: int = 0  # between the first and the last of them
    origin: Fraction = Fraction(0)
    end: Fraction = Fraction(0)  # of the last source frame
    shift: Fraction = Fraction(0)  # largest distance between a frame's time and its source frame's
    shortest: Fraction = Fraction(10**6)  # least and greatest distance between two source frames
    longest: Fraction = Fraction(0)
    thumbnail: Tensor | None = None  # of the last frame
    changes: list[float] = field(default_factory=list)  # from each frame to the next, see `scene_cuts`
    faces: FaceWatch = field(default_factory=FaceWatch)
    metadata: dict[str, Any] = field(default_factory=dict)


def cut(clip: Clip, path: Path, config: CutConfig, target: Path) -> Piece:
    """Write the frames of `clip` from the source at `path` to the mp4 `target` and return the rest.

    Raises UserError with the reason why a clip is refused, OSError when `target` cannot be written.
    """
    start = _seconds(clip.start)
    end = None if clip.end is None else _seconds(clip.end)
    if config.max_seconds is not None:
        longest = start + _seconds(config.max_seconds)
        end = longest if end is None else min(end, longest)
    count = None if end is None else math.floor((end - start + ROUNDING) * config.fps)
    if count is not None:
        _check_length(count, config)
    progress = _encode_video(clip, path, config, target, start, count)
    if count is not None and clip.end is not None and (count - progress.num_frames) / config.fps > SHORT:
        raise UserError(f"video ends at {float(progress.end):.2f} s: the clip lasts until {float(end or 0):.2f} s")
    _check_length(progress.num_frames, config)
    cuts, score = scene_cuts(progress.changes)
    if cuts and config.cuts == "longest":
        first, last = max(pairwise([0, *cuts, progress.num_frames]), key=lambda shot: shot[1] - shot[0])
        shot = [float(progress.origin + number / config.fps) for number in (first, last)]
        whole = [float(progress.origin), float(progress.origin + progress.num_frames / config.fps)]
        kept = cut(replace(clip, start=shot[0], end=shot[1]), path, replace(config, cuts="refuse"), target)
        return replace(kept, metadata={**kept.metadata, "shot_of": whole})
    if cuts and config.cuts == "refuse":
        at = ", ".join(f"{float(progress.origin + number / config.fps):.2f}" for number in cuts[:3])
        raise UserError(f"scene cut at {at} s{' and more' if len(cuts) > 3 else ''}")
    sound, sound_metadata = _sound(path, progress, config)
    return Piece(
        num_frames=progress.num_frames,
        sound=sound,
        metadata={
            **_video_metadata(progress, config),
            **sound_metadata,
            "scene_cut_frames": cuts,
            "scene_change": round(score, 3),
        },
    )


def _check_length(num_frames: int, config: CutConfig) -> None:
    _check_not_longer(num_frames, config)
    if num_frames < config.min_seconds * config.fps:
        seconds = float(num_frames / config.fps)
        raise UserError(f"too short: {num_frames} frames, {seconds:.2f} s; the minimum is {config.min_seconds} s")


def _check_not_longer(num_frames: int, config: CutConfig) -> None:
    if num_frames > LONGEST * config.fps:
        raise UserError(f"longer than {LONGEST} s; cut it into clips, or keep its beginning with --max-seconds")


def _seconds(value: float) -> Fraction:
    return Fraction(value).limit_denominator(10**6)


def _video_metadata(progress: _Progress, config: CutConfig) -> dict[str, Any]:
    """Origin and resampling of the frames, as plain data."""
    variable = progress.longest - progress.shortest > Fraction(2, 1000)
    return {
        "fps": str(config.fps),
        "frames": progress.num_frames,
        "start": float(progress.origin),
        "end": float(progress.origin + progress.num_frames / config.fps),
        **progress.metadata,
        **progress.faces.metadata,
        "variable_frame_rate": variable,
        "resampling": {
            "frames_repeated": progress.num_frames - progress.num_source_frames,
            "source_frames_skipped": progress.num_skipped,
            "largest_shift_ms": round(float(progress.shift) * 1000, 3),
        },
    }


def _sound(path: Path, progress: _Progress, config: CutConfig) -> tuple[Tensor | None, dict[str, Any]]:
    """Sound [S] of the frames, padded with silence where up to SHORT seconds are missing, and its metadata."""
    count = round(progress.num_frames * SAMPLE_RATE / config.fps)
    sound = read_sound(path, round(progress.origin * SAMPLE_RATE), count)
    if sound is None:
        if config.silent:
            return None, {"sample_rate": None, "samples": 0}
        raise UserError("no audio track; --silent accepts such clips")
    for missing, message in ((sound.late, "starts {} s after the video"), (sound.early, "ends {} s before the video")):
        if missing > SHORT * SAMPLE_RATE:
            raise UserError(f"sound {message.format(round(missing / SAMPLE_RATE, 2))}")
    if sound.silent and not config.silent:
        why = ", its two channels cancel each other" if sound.cancelled else ""
        raise UserError(
            f"sound is silent throughout{why} (audio track {sound.track}); keep the track or channel that has the voice, "
            "ffmpeg -i IN -map 0:v -map 0:a:N OUT; --silent accepts such clips"
        )
    power = math.fsum(part.double().square().sum().item() for part in sound.samples.split(AT_ONCE)) / count
    return sound.samples, {
        "sample_rate": SAMPLE_RATE,
        "samples": count,
        "audio_track": sound.track,
        "silence_added": sound.late + sound.hole + sound.early,
        "loudness_dbfs": round(10 * math.log10(power), 2) if power > 0 else None,
    }


def _encode_video(
    clip: Clip, path: Path, config: CutConfig, target: Path, start: Fraction, count: int | None
) -> _Progress:
    """Encode at most `count` frames of the clip and return their statistics."""
    progress, pixels, window = _Progress(), None, None
    end = None if count is None else start + count / config.fps
    with closing(read_frames(path, start)) as source, _Encoder(target, config) as encoder:
        waiting: deque[tuple[av.VideoFrame, bool]] = deque()  # whose frame time is not covered yet

        def write_covered() -> None:
            nonlocal pixels, window
            while waiting and progress.origin + (progress.num_frames + 1) / config.fps <= progress.end + ROUNDING:
                source_frame, fresh = waiting.popleft()
                if fresh or pixels is None:
                    if source_frame.is_corrupt:
                        at = float(progress.origin + progress.num_frames / config.fps)
                        raise UserError(f"damaged frame at {at:.2f} s")
                    whole = upright(source_frame)
                    if window is None:
                        size = whole.shape[1], whole.shape[0]
                        window = crop_box(clip, size, config.size, config.crop, lambda: find_face(path, start, end))
                    progress.faces.look(whole, window, progress.num_frames / config.fps)
                    pixels = _cropped(whole, window, config, progress)
                encoder.write(pixels)
                _watch_change(pixels, progress)
                progress.num_frames += 1
                _check_not_longer(progress.num_frames, config)
                progress.num_source_frames += fresh

        for chosen in nearest(_watch(source, start, progress), start, config.fps, count, progress):
            waiting.append(chosen)
            write_covered()
        write_covered()
        if progress.num_frames == 0 and start >= progress.end:
            raise UserError(f"no frame at {float(start):.2f} s: the video ends at {float(progress.end):.2f} s")
    return progress


def _watch(source: Iterable[SourceFrame], start: Fraction, progress: _Progress) -> Iterator[SourceFrame]:
    """The same frames; the distances of those from the clip's start on are recorded."""
    last = None
    for frame in source:
        if last is not None and last.time >= start:
            distance = frame.time - last.time
            progress.shortest, progress.longest = min(progress.shortest, distance), max(progress.longest, distance)
        last = frame
        turns, mirrored = orientation(frame.frame)
        progress.metadata |= {
            "source_fps": str(frame.rate),
            "pixel_aspect": str(frame.pixel_aspect),
            "rotation": 90 * turns if turns < 3 else -90,
            "mirrored": mirrored,
        }
        progress.end = frame.time + frame.duration
        yield frame


def nearest(
    source: Iterable[SourceFrame], start: Fraction, fps: Fraction, count: int | None, progress: _Progress
) -> Iterator[tuple[av.VideoFrame, bool]]:
    """For frames 0, 1, ... the source frame nearest to the frame's time (the earlier of two), and whether it is a new one.

    Ends after `count` frames and when their time is over, or with the source. Sets origin, shift and num_skipped.
    """
    current, number, fresh, passed = None, 0, True, 0

    def wanted() -> Fraction:
        return start if number == 0 else progress.origin + number / fps

    def taken(frame: SourceFrame) -> tuple[av.VideoFrame, bool]:
        nonlocal number, fresh, passed
        if number == 0:
            progress.origin = frame.time if abs(frame.time - start) <= SNAP else start
        progress.shift = max(progress.shift, abs(progress.origin + number / fps - frame.time))
        if progress.shift > HOLE:
            raise UserError(
                f"no source frame within {float(HOLE)} s of a frame: the nearest is {float(progress.shift):.2f} s away"
            )
        progress.num_skipped += passed
        chosen = frame.frame, fresh
        number, fresh, passed = number + 1, False, 0
        return chosen

    for frame in source:
        while current is not None and number != count and wanted() - current.time <= frame.time - wanted():
            yield taken(current)
        if number == count and progress.end >= progress.origin + number / fps:
            return
        passed += current is not None and fresh and number > 0
        current, fresh = frame, True
    while current is not None and number != count and wanted() < current.time + current.duration:
        yield taken(current)


def _cropped(pixels: np.ndarray, window: tuple[int, int, int, int], config: CutConfig, progress: _Progress) -> Tensor:
    """uint8 [H, W, 3]: the window (x, y, width, height) of an upright frame [h, w, 3], resized (antialiased bicubic)."""
    source, (x, y, w, h) = [pixels.shape[1], pixels.shape[0]], window
    metadata = {"source_size": source, "crop": [x, y, w, h], "size": list(config.size or (h, w))}
    if progress.metadata.setdefault("source_size", source) != source:
        raise UserError(f"frames change their size from {progress.metadata['source_size']} to {source}")
    progress.metadata.update(metadata)
    part = torch.from_numpy(np.ascontiguousarray(pixels[y : y + h, x : x + w])).permute(2, 0, 1)[None]
    if config.size not in (None, (h, w)):
        part = F.interpolate(part, config.size, mode="bicubic", align_corners=False, antialias=True)
    return part[0].permute(1, 2, 0).contiguous()


def _thumbnail(pixels: Tensor) -> Tensor:
    """Area means [32 * 32 * 3] of a frame uint8 [H, W, 3]."""
    step = max(1, min(pixels.shape[:2]) // THUMBNAIL // 4)  # four by four pixels an area are enough
    small = F.adaptive_avg_pool2d(pixels[::step, ::step].permute(2, 0, 1).float(), THUMBNAIL)
    return small.flatten().half()


def _watch_change(pixels: Tensor, progress: _Progress) -> None:
    """Record how far the next frame uint8 [H, W, 3] is from the last one: the mean difference of their thumbnails, 0 to 255."""
    thumbnail = _thumbnail(pixels)
    if progress.thumbnail is not None:
        progress.changes.append((thumbnail.float() - progress.thumbnail.float()).abs().mean().item())
    progress.thumbnail = thumbnail


def scene_cuts(change: list[float]) -> tuple[list[int], float]:
    """Numbers of the frames that begin another shot, and the largest difference of two neighbours (0 to 255), from each frame's
    to the next one.

    A cut is a difference of at least 15 levels that is 3 times the mean of the 2 differences before and after it: the adaptive
    rule of PySceneDetect, on the RGB of thumbnails. Fades are not detected.
    """
    cuts = []
    for number, value in enumerate(change):
        around = change[max(0, number - CUT_NEIGHBOURS) : number] + change[number + 1 : number + 1 + CUT_NEIGHBOURS]
        usual = sum(around) / len(around) if around else 0.0
        if value >= CUT_DIFFERENCE and value >= CUT_RATIO * usual:
            cuts.append(number + 1)
    return cuts, max(change, default=0.0)


class _Encoder(AbstractContextManager):
    """Frames uint8 [H, W, 3] to an mp4: lossless RGB H.264, or YUV 4:4:4 (BT.709), one thread, so that bytes repeat."""

    def __init__(self, path: Path, config: CutConfig):
        self.config, self.number = config, 0
        self.stream: av.VideoStream | None = None
        self.container = av.open(f"file:{path.absolute()}", "w", format="mp4", options={"fflags": "+bitexact"})

    def write(self, pixels: Tensor) -> None:
        stream = self.stream or self._add_stream(*pixels.shape[:2])
        frame = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
        if self.config.crf != LOSSLESS:
            frame = converted(frame, format="yuv444p", dst_colorspace="ITU709", dst_color_range="MPEG")
        frame.pts, frame.time_base = self.number, 1 / self.config.fps
        self.container.mux(stream.encode(frame))
        self.number += 1

    def _add_stream(self, height: int, width: int) -> av.VideoStream:
        lossless = self.config.crf == LOSSLESS
        options = {"preset": "veryfast", **({"qp": "0"} if lossless else {"crf": str(self.config.crf)}), **REPEATS}
        codec = "libx264rgb" if lossless else "libx264"
        self.stream = stream = self.container.add_stream(codec, rate=self.config.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24" if lossless else "yuv444p"
        context = stream.codec_context
        context.time_base, context.thread_count = 1 / self.config.fps, 1
        if not lossless:
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = LIMITED_RANGE
        return stream

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.stream is not None:
            self.container.mux(self.stream.encode(None))
        try:
            self.container.close()
        except (av.FFmpegError, OSError):
            if kind is None:
                raise


def encode_flac(sound: Tensor) -> bytes:
    """Sound float32 [S] in [-1, 1] at 16 kHz as a 16-bit FLAC file: value v becomes round(32768 v), at most 32767."""
    parts = sound.split(AT_ONCE)
    values = torch.cat([(x.double() * 32768).round().clamp(-32768, 32767).to(torch.int16) for x in parts]).numpy()
    output = BytesIO()
    with av.open(output, "w", format="flac", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono", format="s16")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(values[None]), format="s16", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = SAMPLE_RATE, Fraction(1, SAMPLE_RATE), 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return output.getvalue()
