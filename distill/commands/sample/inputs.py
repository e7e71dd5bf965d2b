"""What `distill sample` reads beside portrait and sound: a second speaker's sound, and a file of directions."""

import argparse
import math
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from students.spec import Spec
from students.weights.checkpoint import Bundle
from teachers import media
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError
from teachers.media.sound import SILENT
from teachers.media.streams import Resampler


class Duet:
    """The sound of two files side by side, blocks [n, 2] at the first one's rate; the shorter one ends in silence.

    It stands in the place of a media.AudioReader.
    """

    channels = 1  # of the video

    def __init__(self, own: media.AudioReader, other: media.AudioReader):
        self.own, self.other, self.rate = own, other, own.rate
        known = [reader.seconds for reader in (own, other) if reader.seconds is not None]
        self.seconds = max(known) if len(known) == 2 else None

    def __iter__(self) -> Iterator[Tensor]:
        sources, held, ended = (iter(self.own), self._at_our_rate()), [torch.zeros(0), torch.zeros(0)], [False, False]
        while True:
            for i, source in enumerate(sources):
                while not ended[i] and not len(held[i]):
                    block = next(source, None)
                    ended[i] = block is None
                    held[i] = torch.zeros(0) if block is None else block
            lengths = [len(part) for part in held if len(part)]
            if not lengths:
                return
            count = min(lengths)
            yield torch.stack([part[:count] if len(part) else torch.zeros(count) for part in held], dim=1)
            held = [part[count:] for part in held]

    def _at_our_rate(self) -> Iterator[Tensor]:
        if self.other.rate == self.rate:
            yield from self.other
            return
        resampler = Resampler(self.other.rate, self.rate)
        for block in self.other:
            yield resampler.push(block)
        yield resampler.finish()


class Silence:
    """No sound for so many seconds, blocks of zeros [n, 1] at 16 kHz, where the directions alone say how long a video is.

    It stands in the place of a media.AudioReader.
    """

    rate, channels = SAMPLE_RATE, 1

    def __init__(self, seconds: Fraction):
        self.seconds = float(seconds)
        self.samples = math.floor(seconds * SAMPLE_RATE)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.samples, SAMPLE_RATE):
            yield torch.zeros(min(SAMPLE_RATE, self.samples - start), 1)


def sound_of(
    own: media.AudioReader | None, other: media.AudioReader | None, steering: "Steering | None", fps: Fraction
) -> media.AudioReader | Duet | Silence:
    """What plays with the video: a file's sound, two of them, or without any silence as long as the directions."""
    if own is None:
        assert steering is not None
        return Silence(len(steering.rows) / fps)
    return own if other is None else Duet(own, other)


def report_track(reader: media.AudioReader) -> None:
    """Print which of several sound tracks was taken, and whether it is silent."""
    several = reader.track not in ("", "1 of 1")
    if several:
        sys.stderr.write(f"distill: sound: audio track {reader.track} was taken, the default one: {reader.path}\n")
    if reader.peak < SILENT:
        hint = "; another track may have the voice, ffmpeg -i IN -map 0:a:N OUT.wav takes it out" if several else ""
        sys.stderr.write(f"distill: sound: it is silent: {reader.path}{hint}\n")


def read_pose(path: Path, dim: int) -> Tensor:
    """Pose rows [T, dim] of a text file: a line a pixel frame, its numbers divided by commas or blanks, `#` begins a remark.

    UserError that names the line where it is not so.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"no file of directions: {path}; give a text file, a line of {dim} numbers a frame") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"directions cannot be read ({error}): {path}; give a text file") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        try:
            row = [float(word) for word in words]
        except ValueError as error:
            raise UserError(f"directions: line {number} has a word that is no number ({error}): {path}") from error
        if len(row) != dim or not all(abs(value) <= 1 for value in row):
            raise UserError(
                f"directions: line {number} has {line.strip()[:60]!r}, a frame has {dim} numbers from -1 to 1: {path}"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"directions: no line with numbers: {path}; write {dim} of them a frame")
    return torch.tensor(rows)


class Steering:
    """Pose rows [T, P] handed out as the video goes on; the last one holds to its end."""

    def __init__(self, rows: Tensor):
        self.rows, self.given = rows, 0

    def until(self, frame: int) -> Tensor:
        """The rows before pixel frame number `frame` that were not handed out yet, [n, P]."""
        places = torch.arange(self.given, max(self.given, frame)).clamp(max=len(self.rows) - 1)
        self.given = max(self.given, frame)
        return self.rows[places]


def portrait(pixels: Tensor, spec: Spec, args: argparse.Namespace) -> Tensor:
    """The picture uint8 [h, w, 3] in the student's shape, [3, H, W] in [-1, 1]; a line on stderr where no face decided the crop."""
    fitted, note = media.fit_portrait(pixels, (spec.height, spec.width), args.crop)
    if note:
        sys.stderr.write(f"distill: {args.image}: {note}\n")
    return fitted


def check_coverage(bundle: Bundle, reference: Tensor, texts: list[str], args: argparse.Namespace) -> None:
    """A line on stderr for a picture and texts outside what the student was trained on; UserError with --strict."""
    for line in bundle.unlike(reference, *texts):
        if args.strict:
            raise UserError(f"{args.image or args.film}: {line}; another one, or no --strict")
        sys.stderr.write(f"distill: warning: {line}\n")


def check(spec: Spec, other: Path | None, pose: Path | None) -> None:
    """UserError where a network of this spec takes no second speaker or no directions."""
    if other is not None and spec.speakers == 1:
        raise UserError("--other: this student takes one speaker; remove it, or give one of recipes/midas_duplex.yaml")
    if pose is not None and not spec.pose_dim:
        raise UserError("--pose: this student takes none; remove it, or give one of midas_duplex or midas_world")
