"""How often the `sync` of `distill data curate` ranks a clip above copies of it with another sound.

    python benchmarks/sync.py --videos DIR [--seconds 5 10] [--hop 2.5] [--world 24]

Every film in DIR is cut into overlapping pieces of each length, and taken as a whole. A copy has the film's sound earlier or later
by 200, 360 and 600 ms, or the sound of another film (two stretches of it). Counted are the copies that score below their
original. --world does the same with that many clips of the procedural world, 5 s at 25 fps and 128 pixels, whose sound and mouth
are known to agree; their faces are given. A script, not a test; it writes nothing.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F

from distill.data.curate import scores
from distill.data.datasets.folder import Videos
from distill.data.procedural import render
from teachers.errors import UserError
from teachers.flow import keyed_generator
from teachers.media.container import upright
from teachers.media.crop import Box
from teachers.media.film import read_frames
from teachers.media.sound import SAMPLE_RATE, read_sound

SHIFTS_MS = (200, -200, 360, -360, 600, -600)
WORLD_FACE = Box(0.22, 0.32, 0.56, 0.56, 1.0)  # brow to chin
SIDE = 256  # short side of the frames that are scored: the sync looks at no larger ones


@dataclass(frozen=True)
class Film:
    """A name, frames uint8 [H, W, 3] each, frames a second, sound float32 [S] at 16 kHz, its face where that is known."""

    name: str
    frames: list[np.ndarray]
    fps: Fraction
    sound: np.ndarray
    face: Box | None = None


def read(folder: Path) -> list[Film]:
    """The films of a folder; UserError where one has no sound."""
    found = []
    for source in Videos(folder).sources:
        frames, rate = [], None
        with closing(read_frames(folder / source)) as shown:
            for picture in shown:
                rate = picture.rate
                pixels = torch.from_numpy(upright(picture.frame)).permute(2, 0, 1)[None]
                small = F.interpolate(
                    pixels, scale_factor=SIDE / min(pixels.shape[2:]), mode="bilinear", antialias=True
                )
                frames.append(small[0].permute(1, 2, 0).contiguous().numpy())
        fps = Fraction(rate or 25)
        sound = read_sound(folder / source, 0, round(len(frames) * SAMPLE_RATE / fps))
        if sound is None:
            raise UserError(f"no audio track: {folder / source}; leave the film out")
        found.append(Film(Path(source).stem, frames, fps, sound.samples.numpy()))
    return found


def draw(num: int) -> list[Film]:
    """Clips of the procedural world."""
    config = render.WorldConfig(resolution=128, fps="25", num_frames=125)
    clips = render.make_clips(
        config, render.draw_conditions(config, num, keyed_generator(0, "asked")), keyed_generator(0, "m")
    )
    return [
        Film(f"world {n}", [*video.permute(1, 2, 3, 0).numpy()], Fraction(25), audio.numpy(), WORLD_FACE)
        for n, (video, audio) in enumerate(zip(clips.video, clips.audio, strict=True))
    ]


def pieces(film: Film, seconds: float, hop: float) -> Iterator[tuple[int, int]]:
    """First frame and number of frames of the pieces of a film."""
    num = min(len(film.frames), round(seconds * film.fps))
    for first in range(0, len(film.frames) - num + 1, max(1, round(hop * film.fps))):
        yield first, num


def judged(film: Film, first: int, num: int, others: Sequence[Film]) -> tuple[float, float, dict[str, float]]:
    """The score of a piece, its delay in ms, and the scores of its copies."""
    start, stop = (round(frame * SAMPLE_RATE / film.fps) for frame in (first, first + num))
    with mock.patch.object(scores, "sync", wraps=scores.sync) as called:
        found, _ = scores.score(film.frames[first : first + num], film.fps, film.sound[start:stop], "", box=film.face)
    if found["sync"] is None:
        raise UserError(f"no face in {film.name} from frame {first} on; leave the film out")
    motion, copies = called.call_args.args[0], {}
    for shift in SHIFTS_MS:
        moved = np.roll(film.sound, round(shift * SAMPLE_RATE / 1000))[start:stop]
        copies[f"{shift:+d} ms"] = scores.sync(motion, moved, film.fps)[0]
    for other in others:
        for begin in (0, len(other.sound) // 2):
            words = np.resize(np.roll(other.sound, -begin), stop - start)
            copies[f"{other.name} {begin / SAMPLE_RATE:.0f} s"] = scores.sync(motion, words, film.fps)[0]
    return found["sync"], found["sync_offset_ms"], copies


def table(title: str, films: Sequence[Film], seconds: float, hop: float, num_others: int) -> None:
    """Print a line a piece and the counts."""
    shifts, swaps, gaps, chance = [], [], [], []
    for n, film in enumerate(films):
        others = [films[(n + k) % len(films)] for k in range(1, 1 + min(num_others, len(films) - 1))]
        for first, num in pieces(film, seconds, hop):
            own, delay, copies = judged(film, first, num, others)
            listed = ", ".join(f"{name} {value:.2f}{'' if own > value else ' above'}" for name, value in copies.items())
            print(f"    {film.name} from {float(first / film.fps):.1f} s: {own:.3f}, delay {delay:.0f} ms; {listed}")
            for name, value in copies.items():
                (shifts if name.endswith(" ms") else swaps).append(own > value)
                gaps.append(own - value)
                chance.append(value)
    print(
        f"{title}: {sum(shifts)} of {len(shifts)} shifted and {sum(swaps)} of {len(swaps)} swapped copies below their original; "
        f"original less copy {np.mean(gaps):.3f} ± {np.std(gaps):.3f}, copies {np.mean(chance):.2f} ± {np.std(chance):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--videos", type=Path, metavar="DIR")
    parser.add_argument("--seconds", type=float, nargs="+", default=[5.0, 10.0])
    parser.add_argument("--hop", type=float, default=2.5)
    parser.add_argument("--world", type=int, default=0, metavar="CLIPS")
    args = parser.parse_args()
    if args.videos is not None:
        films = read(args.videos)
        for seconds in args.seconds:
            table(f"pieces of {seconds:g} s", films, seconds, args.hop, 1)
        table("whole films", films, 1e9, 1.0, 1)
    if args.world:
        table("procedural world", draw(args.world), 1e9, 1.0, 1)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"measure_sync: {error}")
