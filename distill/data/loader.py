"""Clips out of prepared shards: any clip by its number, read at its place in its shard; nothing that was decoded is kept."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import torch
from torch import Tensor

from distill.data.order import made_ahead
from distill.data.prepare import shards
from distill.data.prepare.shards import Indexed
from teachers.config import fraction
from teachers.errors import UserError
from teachers.media.container import upright
from teachers.media.sound import SAMPLE_RATE


@dataclass(frozen=True)
class Sample:
    """A clip of T frames at `fps`: video uint8 [3, T, H, W], audio float32 [S] at 16 kHz or None; its metadata (id, text and all
    else); `first` frame of the clip in its sample."""

    facts: dict[str, Any]
    first: int
    fps: Fraction
    video: Tensor
    audio: Tensor | None

    @property
    def text(self) -> str:
        """What is seen and done in the clip, "" where it has no text."""
        return str(self.facts.get("text") or "")


@dataclass(frozen=True)
class Samples:
    """A batch of clips with sound: ids and texts, video [N, 3, T, H, W], audio [N, S]."""

    ids: list[str]
    text: list[str]
    video: Tensor
    audio: Tensor


def read_sample(stored: Indexed, first: int, num_frames: int) -> Sample:
    """Decode `num_frames` frames of a sample from number `first` on, and the sound under them; UserError where it is damaged."""
    members = stored.members()
    try:
        facts = json.loads(members["json"])
        fps, samples = fraction(facts["fps"]), facts["samples"]
    except (ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError) as error:
        raise UserError(f"metadata cannot be read ({error!r}): {stored}; {shards.HINT}") from error
    found: list[Tensor] = []
    with _decoding("video", stored):
        for frame in shards.frames_of(members["mp4"], first / fps):
            if round(Fraction(frame.pts or 0) * Fraction(frame.time_base or 0) * fps) == first + len(found):
                found.append(torch.from_numpy(upright(frame)).permute(2, 0, 1))
            if len(found) == num_frames:
                break
    if len(found) != num_frames:
        raise UserError(f"video ends early, frame {first + len(found)} is missing: {stored}; {shards.HINT}")
    audio = None
    if stored.has_sound:
        with _decoding("sound", stored):
            whole = shards.sound_of(members["flac"])
        begin, end = (round(number * SAMPLE_RATE / fps) for number in (first, first + num_frames))
        if len(whole) < end or len(whole) != samples:
            raise UserError(f"sound cannot be decoded (there is too little of it): {stored}; {shards.HINT}")
        audio = whole[begin:end]
    return Sample(facts, first, fps, torch.stack(found, dim=1), audio)


@contextmanager
def _decoding(what: str, stored: Indexed) -> Iterator[None]:
    try:
        yield
    except (av.FFmpegError, OSError, LookupError, ValueError) as error:
        raise UserError(f"{what} cannot be decoded ({error}): {stored}; {shards.HINT}") from error


class Windows:
    """Clips of `num_frames` frames at `fps` out of samples, one after the other in each; shorter samples have none.

    A row is a sample and the clip's first frame there.
    """

    def __init__(self, samples: Iterable[Indexed], num_frames: int, fps: Fraction):
        self.num_frames, self.fps = num_frames, fps
        self.rows = [
            (sample, first) for sample in samples for first in range(0, sample.frames - num_frames + 1, num_frames)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        """Decode one clip; UserError where its sample is damaged or of another frame rate."""
        stored, first = self.rows[row]
        sample = read_sample(stored, first, self.num_frames)
        if sample.fps != self.fps:
            raise UserError(
                f"{stored} has {sample.fps} frames a second, {self.fps} are asked for; prepare it at --fps {self.fps}"
            )
        return sample

    def batch(self, rows: Sequence[int]) -> Samples:
        """Decode rows of one size, with sound."""
        found = [self[row] for row in rows]
        audio = torch.stack([sample.audio for sample in found if sample.audio is not None])
        video = torch.stack([sample.video for sample in found])
        return Samples([str(sample.facts.get("id", "")) for sample in found], [s.text for s in found], video, audio)

    def batches(self, rows: Iterable[list[int]], workers: int = 0) -> Iterator[Samples]:
        """The batches of these rows, in their order, decoded by `workers` threads (decoding holds no lock of Python's, and threads
        need no shared memory)."""
        yield from made_ahead(self.batch, rows, workers, workers) if workers else map(self.batch, rows)
