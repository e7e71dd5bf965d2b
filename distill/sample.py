"""`distill sample`: a portrait, a sound and a text through the chunked session of a student, to an mp4 with sound."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from teachers import media
from teachers.errors import UserError

LARGEST_SEED = 2**63 - 1
CROPS = {"top": 0.0, "center": 0.5}  # anchors of media.fit_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `distill sample`."""
    parser.add_argument("--student", type=Path, required=True, metavar="DIR", help="folder of an exported student")
    parser.add_argument("--image", type=Path, required=True, metavar="PNG", help="portrait; scaled and cropped")
    parser.add_argument("--audio", type=Path, required=True, metavar="WAV", help="speech, or a film with sound")
    parser.add_argument("--text", required=True, metavar="STR", help='what happens, such as "smiles and nods"')
    parser.add_argument("--out", type=Path, required=True, metavar="MP4", help="film to write")
    parser.add_argument("--seed", type=int, default=0, help="of everything that the inputs leave open (default 0)")
    parser.add_argument(
        "--crop", choices=tuple(CROPS), default="center", help="part of a tall picture to keep (default center)"
    )
    parser.add_argument(
        "--size", type=int, default=256, help="enlarge by a whole factor until the short side is this (default 256)"
    )


def run(
    args: argparse.Namespace,
    load_student: Callable[[Path], Any] | None = None,
    open_session: Callable[..., Any] | None = None,
) -> int:
    """Write the film that `args` ask for and return 0: ceil(samples / samples_per_frame) frames, as long as the sound.

    Every input is read, and the output's folder tried, before the student loads. `load_student` and `open_session`
    default to `students.checkpoint.load_student` and `students.session.Session`. Raises UserError in one line.
    """
    _check_options(args)
    media.check_output(args.out)
    pixels = media.decode_image(args.image)
    sound, sound_rate = media.decode_audio(args.audio)
    if load_student is None or open_session is None:
        from students.checkpoint import load_student as load_student_folder
        from students.session import Session

        load_student, open_session = load_student or load_student_folder, open_session or Session
    bundle = load_student(args.student)
    spec = bundle.spec
    heard = media.resample(sound, sound_rate, spec.sample_rate)
    num_frames = math.ceil(len(heard) / spec.samples_per_frame)
    reference = media.fit_image(pixels, (spec.height, spec.width), CROPS[args.crop])
    session = open_session(bundle, reference, args.text, args.seed)
    upscale = max(1, math.ceil(args.size / min(spec.height, spec.width)))
    started = time.perf_counter()
    with (
        media.VideoWriter(args.out, spec.fps, sound, sound_rate, upscale, smooth=True) as writer,
        tqdm(total=num_frames, unit="frame", desc="sample", file=sys.stderr) as progress,
    ):
        session.push(audio=heard)
        session.close()
        first_frame_seconds = None
        for frames in _chunks(session, num_frames):
            if first_frame_seconds is None:
                first_frame_seconds = time.perf_counter() - started
                progress.set_postfix_str(f"first frame {first_frame_seconds:.2f} s")
            for frame in frames:
                writer.write(frame)
            progress.update(len(frames))
    seconds = time.perf_counter() - started
    sys.stdout.write(
        f"{args.out}: {num_frames} frames, {float(num_frames / spec.fps):.2f} s, "
        f"first frame after {first_frame_seconds:.2f} s, {num_frames / seconds:.1f} frames/s\n"
    )
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Raises UserError for values that no sample can have."""
    if not 0 <= args.seed <= LARGEST_SEED:
        raise UserError(f"--seed must lie in 0..2**63-1: got {args.seed}; choose another")
    if not 1 <= args.size <= 4096:
        raise UserError(f"--size must lie in 1..4096 pixels: got {args.size}; choose another (256 is the default)")
    for name in ("image", "audio"):
        if args.out.resolve() == getattr(args, name).resolve():
            raise UserError(f"--out would replace the file of --{name}: {args.out}; name another film")


def _chunks(session: Any, num_frames: int) -> Iterator[Tensor]:
    """The session's finished chunks uint8 [t, H, W, 3], the last one cut, until `num_frames` frames were given."""
    remaining = num_frames
    for chunk in session.frames():
        frames = chunk.frames[:remaining]
        remaining -= len(frames)
        yield frames
        if remaining == 0:
            return
    raise RuntimeError(f"the session ended {remaining} frames before its sound, of {num_frames}")
