"""One clip of a set, read as a card wants it: frames by their times, at the card's rate and size, its sound and its face box; and
clips of tensors, written.

A clip is held as a whole, at most `MOST_BYTES` of frames: 40 s of 512 x 512 at 25 fps. Beside a generated clip lies its real
one, and FVD's network takes it as floats, so a process needs up to six times that.
"""

import math
from collections.abc import Sequence
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.data.loader import read_sample
from distill.data.prepare.framing import crop_box
from distill.scoring.clip_sets import TENSORS, Entry, facts_of
from eval.cards import Card, ClipRule
from eval.metric import Clip as ScoredClip
from teachers.config import fraction
from teachers.errors import UserError
from teachers.files import save_tensors
from teachers.media.container import opened, upright, video_stream
from teachers.media.crop import fit_image
from teachers.media.film import read_frames
from teachers.media.sound import SAMPLE_RATE, read_audio, read_sound

LOSSLESS = ("ffv1", "png", "rawvideo", "huffyuv", "ffvhuff", "utvideo", "qtrle", "apng")
RGB = ("rgb", "bgr", "gbr", "0rgb", "0bgr", "argb", "abgr")
ROUNDING = Fraction(1, 1000)  # seconds that times in a file may be off
SAME_RATE = Fraction(1, 10_000)  # 30 and 29.97 are two rates
MOST_BYTES = 3 * 2**28


def read_clip(entry: Entry, card: Card, generated: bool) -> ScoredClip:
    """The clip as the card wants it.

    Raises UserError where it is damaged, too short, longer than can be held, or of another rate, size or codec.
    """
    rule, why, track = card.clips, "", ""
    if entry.sample is not None:
        if generated and rule.lossless:
            raise UserError("clips in prepared shards are H.264 and not lossless; write tensors, FFV1 or PNG in an mkv")
        _check_length(entry.sample.frames, *entry.sample.size)
        clip = read_sample(entry.sample, 0, entry.sample.frames)
        sound, (video, fps) = clip.audio, _retimed(clip.video, clip.fps, rule)
        track = str(clip.facts.get("audio_track", ""))
    elif entry.path.suffix == TENSORS:
        video, fps, sound = _tensors(entry.path)
        if sound is not None and (sound.ndim != 1 or not bool(torch.isfinite(sound.float()).all())):
            sound, why = None, "no sound: audio must be finite numbers [S] at 16 kHz"
        video, fps = _retimed(video, fps, rule)
    else:
        video, fps, start = _video(entry, rule, generated and rule.lossless)
        try:
            count = round(min(video.shape[1], rule.frames or video.shape[1]) * SAMPLE_RATE / fps)
            sound, track = _sound(entry, start, count)
        except UserError as error:  # of no account to metrics of the frames alone
            sound, why = None, str(error)
    if rule.frames is not None and video.shape[1] < rule.frames:
        raise UserError(f"{video.shape[1]} frames, {float(video.shape[1] / fps):.2f} s: {rule.frames} are wanted")
    seams = _seams(entry, fps) if entry.path.suffix == TENSORS else ()
    video, box = _fitted(video[:, : rule.frames], entry.box, rule)
    if sound is not None:
        sound = sound[: round(video.shape[1] * SAMPLE_RATE / fps)]
    return ScoredClip(
        video=video,
        fps=fps,
        sound=sound,
        no_sound=why,
        track=track,
        box=None if box is None else torch.tensor(box),
        has_box=entry.has_box,
        given=rule.given,
        seams=seams,
    )


def write_clip(path: Path, video: Tensor, fps: Fraction, sound: Tensor | None, text: str = "", **facts: str) -> None:
    """A clip uint8 [3, T, H, W] with its sound [S] as tensors, exactly; whole or absent."""
    tensors = {"video": video} | ({} if sound is None else {"audio": sound.float()})
    save_tensors(path, tensors, {"fps": str(fps), "text": text, **facts})


def _seams(entry: Entry, fps: Fraction) -> tuple[int, ...]:
    """The first frames of chunks but the first, which metadata `chunks` say ("3 15 27"), as shown at `fps`."""
    facts = facts_of(entry.path)
    try:
        return tuple(math.ceil(int(word) * fps / fraction(facts["fps"])) for word in facts.get("chunks", "").split())
    except (ValueError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"chunks must be frame numbers: {entry.path.name} ({error})") from error


def _tensors(path: Path) -> tuple[Tensor, Fraction, Tensor | None]:
    try:
        with safe_open(path, "pt") as file:
            shape = file.get_slice("video").get_shape()
            _check_length(*(shape[1:] if len(shape) == 4 else (0, 0, 0)))
            found: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = file.metadata() or {}
        video, fps = found["video"], fraction(facts["fps"])
    except UserError:
        raise
    except (OSError, SafetensorError, KeyError, ValueError, ZeroDivisionError) as error:
        what = str(error) or type(error).__name__
        raise UserError(f"no clip of tensors ({what}): {path.name}; it needs video [3, T, H, W] and fps") from error
    if video.ndim != 4 or video.shape[0] != 3 or fps <= 0:
        raise UserError(f"video must be [3, T, H, W] at an fps above 0: got {tuple(video.shape)} at {fps}")
    sound = found.get("audio")
    if video.dtype == torch.uint8:
        return video, fps, sound
    bad = ~torch.isfinite(video.float()).flatten(2).all(2).all(0)
    if bool(bad.any()):
        raise UserError(f"frames hold NaN or infinity, first frame {int(bad.int().argmax())}")
    if float(video.abs().max()) > 1.001:
        raise UserError(f"float frames lie in [-1, 1]: got {float(video.abs().max()):.3g}")
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), fps, sound


def _retimed(video: Tensor, fps: Fraction, rule: ClipRule) -> tuple[Tensor, Fraction]:
    if rule.fps is None or abs(fps / rule.fps - 1) < SAME_RATE:
        return video, fps if rule.fps is None else rule.fps
    _refuse_rate(fps, rule.fps, rule)
    count = math.floor(video.shape[1] * rule.fps / fps)
    count = count if rule.frames is None else min(count, rule.frames)
    _check_length(count, *video.shape[2:])
    places = [math.floor(number * fps / rule.fps) for number in range(count)]
    return video[:, places], rule.fps


def _check_length(frames: int, height: int, width: int) -> None:
    if 3 * frames * height * width > MOST_BYTES:
        most = MOST_BYTES // (3 * height * width)
        raise UserError(
            f"a clip is held as a whole, at most {most} frames of {width} x {height}: this one is longer; cut it into clips"
        )


def _refuse_rate(fps: Fraction, wanted: Fraction, rule: ClipRule) -> None:
    if rule.retime == "refuse":
        raise UserError(
            f"{float(fps):.5g} frames a second: the protocol wants {float(wanted):.5g} and resamples nothing"
        )


def _video(entry: Entry, rule: ClipRule, lossless: bool) -> tuple[Tensor, Fraction, Fraction]:
    """Frames by their times, from the clip's start on, their rate, and the time of the first."""
    clip = entry.clip
    if lossless:
        _check_lossless(entry.path)
    start = Fraction(clip.start).limit_denominator(10**6)
    end = None if clip.end is None else Fraction(clip.end).limit_denominator(10**6)
    with closing(read_frames(entry.path, start)) as source:
        frames, times, rate = [], [], None
        for picture in source:
            if end is not None and picture.time >= end - ROUNDING:
                break
            if picture.frame.is_corrupt:
                raise UserError(f"damaged frame at {float(picture.time):.2f} s")
            if picture.time + picture.duration > start + ROUNDING:
                pixels = upright(picture.frame)
                x, y, w, h = crop_box(clip, (pixels.shape[1], pixels.shape[0]), None) if clip.crop else (0, 0, 0, 0)
                pixels = pixels[y : y + h, x : x + w] if clip.crop else pixels
                if frames and frames[0].shape != pixels.shape:
                    raise UserError("frames change their size; convert the video")
                _check_length(len(frames) + 1, *pixels.shape[:2])
                frames.append(np.ascontiguousarray(pixels))
                times.append(picture.time)
                rate = picture.rate
            enough = rule.frames is not None and len(frames) > 0
            rates = rule.fps or rate
            if enough and rates and picture.time - times[0] > (rule.frames or 0) / rates + 1:
                break
    if not frames:
        raise UserError(f"no frame from {float(start):.2f} s on")
    places = range(len(frames))
    own = rate if rate is not None else Fraction(25)
    steady = all(abs(times[i] - times[0] - i / own) <= 2 * ROUNDING for i in range(len(times)))
    if rule.fps is None or (abs(own / rule.fps - 1) < SAME_RATE and steady):
        if not steady:
            raise UserError("the frame rate varies; convert the video to a constant one")
        fps = own if rule.fps is None else rule.fps
    else:
        _refuse_rate(own, rule.fps, rule)
        fps, last = rule.fps, times[-1] + 1 / own - times[0]
        count = math.floor((last + ROUNDING) * fps)  # without end, where times jump
        count = count if rule.frames is None else min(count, rule.frames)
        _check_length(count, *frames[0].shape[:2])
        at = torch.tensor([float(time - times[0]) for time in times], dtype=torch.float64)
        shown = torch.arange(count, dtype=torch.float64) / float(fps) + float(ROUNDING)
        places = (torch.searchsorted(at, shown, right=True) - 1).tolist()
    return _joined(frames, places), fps, times[0]


def _joined(frames: list[np.ndarray], places: Sequence[int]) -> Tensor:
    """The frames [H, W, 3] with these numbers, which never fall, as [3, T, H, W]. It empties `frames`, to hold them once."""
    video, last = torch.empty(len(places), *frames[0].shape, dtype=torch.uint8), -1
    frames.reverse()
    for number, place in enumerate(places):
        while last < place:
            frame, last = frames.pop(), last + 1
        video[number] = torch.from_numpy(frame)
    return video.permute(3, 0, 1, 2)


def _sound(entry: Entry, start: Fraction, count: int) -> tuple[Tensor | None, str]:
    """Sound [S] from `start` on, None without any, and which of a video's tracks it is; UserError where it cannot be used."""
    if entry.sound is not None:
        sound = read_audio(entry.sound)
        first = round(Fraction(entry.clip.start).limit_denominator(10**6) * SAMPLE_RATE)
        return sound[first : first + count], ""
    track = read_sound(entry.path, round(start * SAMPLE_RATE), count)
    if track is not None and track.cancelled:
        raise UserError(f"the two channels of the sound cancel each other: {entry.path.name}; keep one")
    return (None, "") if track is None else (track.samples, track.track)


def _check_lossless(path: Path) -> None:
    with opened(path, "video file") as container:
        stream = video_stream(container)
        codec = "" if stream is None else stream.codec_context.name
        pixels = "" if stream is None else stream.codec_context.pix_fmt or ""
    if codec not in LOSSLESS or not pixels.startswith(RGB):
        raise UserError(f"{codec} with {pixels} is not lossless RGB; write tensors, FFV1 or PNG in an mkv")


def _fitted(video: Tensor, box: tuple[float, ...] | None, rule: ClipRule) -> tuple[Tensor, tuple[float, ...] | None]:
    """[3, T, H, W] at the card's size, and the box where the same scale and cut put it; None where they cut the face away."""
    have = (video.shape[2], video.shape[3])
    if rule.size is None or rule.size == have:
        return video, box
    if rule.fit == "refuse":
        raise UserError(
            f"{have[1]} x {have[0]} pixels: the protocol wants {rule.size[1]} x {rule.size[0]}, scales nothing"
        )
    frames = [((fit_image(x, rule.size) + 1) * 127.5).round().byte() for x in video.permute(1, 2, 3, 0)]
    ratio = max(rule.size[0] / have[0], rule.size[1] / have[1])
    if box is not None:
        inside = _holds(have, box)  # a box that is off the frame as given is refused where faces are cropped
        scaled = [max(rule.size[i], round(have[i] * ratio)) for i in (0, 1)]
        top, left = (scaled[0] - rule.size[0]) // 2, (scaled[1] - rule.size[1]) // 2
        across, down = scaled[1] / have[1], scaled[0] / have[0]
        box = (box[0] * across - left, box[1] * down - top, box[2] * across - left, box[3] * down - top)
        box = None if inside and not _holds(rule.size, box) else box
    return torch.stack(frames, 1), box


def _holds(size: tuple[int, int], box: tuple[float, ...]) -> bool:
    """Whether the centre of a box lies in a frame of height and width `size`."""
    return 0 <= box[1] + box[3] <= 2 * size[0] and 0 <= box[0] + box[2] <= 2 * size[1]
