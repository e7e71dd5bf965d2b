"""The options of `distill sample`, and what they cannot be."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from distill.commands import devices
from teachers.errors import UserError
from teachers.media.crop import CROPS

if TYPE_CHECKING:
    from students.serving.timeline import Script

LARGEST_SEED = 2**63 - 1
PIECE_MS, REALTIME_PIECE_MS = 1000, 20


def scales(words: str) -> float | dict[str, float]:
    """Guidance scales as they are written: `2`, or `text=2,audio=1.5`."""
    try:
        if "=" not in words:
            return float(words)
        pairs = [word.partition("=") for word in words.split(",")]
        found = {name.strip(): float(value) for name, _, value in pairs}
    except ValueError:
        found = {}
    if not found or len(found) < words.count("="):
        raise argparse.ArgumentTypeError(f"got {words!r}; give a number, or text=W,audio=W")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `distill sample`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--student", type=Path, metavar="DIR", help="folder of an exported student")
    source.add_argument(
        "--teacher",
        type=Path,
        metavar="RECIPE",
        help="one clip of a recipe's many-step teacher, to see that it loads right",
    )
    parser.add_argument(
        "--clips",
        type=int,
        default=1,
        metavar="N",
        help="so many clips of --teacher one behind the other, where it reads the film before (Wan2.2-S2V; default 1)",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe of --teacher")
    parser.add_argument(
        "--image", type=Path, metavar="PNG", help="portrait; scaled and cropped (default: --film's first frame)"
    )
    parser.add_argument(
        "--film",
        type=Path,
        metavar="MP4",
        help="dub it: a video that stays as it is, but for the mouth, as long as the sound",
    )
    parser.add_argument(
        "--region",
        metavar="L,T,R,B",
        help="what of --film is drawn anew, in fractions of the frame (default: the lower face, found in each frame)",
    )
    parser.add_argument(
        "--audio",
        type=Path,
        metavar="WAV",
        help="speech, or a video with sound; without it a student's video is silent and as long as --pose",
    )
    parser.add_argument(
        "--other", type=Path, metavar="WAV", help="what somebody else says meanwhile, to a student of two speakers"
    )
    parser.add_argument(
        "--pose",
        type=Path,
        metavar="FILE",
        help="directions for a steered student: a text file, a line of numbers a pixel frame (the last line holds)",
    )
    parser.add_argument(
        "--text", metavar="STR", help='what happens, such as "smiles and nods"; required unless --timeline begins at 0'
    )
    parser.add_argument(
        "--timeline",
        type=Path,
        metavar="YAML",
        help="what happens when: a list of {at: SECONDS, do: speak, listen, think, idle, gesture or a text}; --text until then",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="MP4", help="video to write")
    parser.add_argument("--seed", type=int, default=0, help="of everything that the inputs leave open (default 0)")
    parser.add_argument(
        "--guidance",
        type=scales,
        metavar="W",
        help="guidance scales, for a guidance-distilled student: one, or text=W,audio=W (default: the student's)",
    )
    parser.add_argument(
        "--crop",
        choices=CROPS,
        default="face",
        help="part of an image of another shape to keep; face without one is the top (default face)",
    )
    parser.add_argument(
        "--size", type=int, default=256, help="enlarge by a whole factor until the short side is this (default 256)"
    )
    parser.add_argument(
        "--push-ms",
        type=int,
        metavar="N",
        help=f"feed the sound in pieces of N ms, which changes no frame (default {PIECE_MS}, {REALTIME_PIECE_MS} in realtime)",
    )
    parser.add_argument(
        "--realtime",
        action="store_true",
        help="feed the sound no faster than it is spoken, and count the stalls of somebody who watches meanwhile",
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse a picture or words unlike what the student was trained on"
    )
    parser.add_argument(
        "--mark", default="", metavar="TEXT", help="words in a corner of every frame, such as AI (default: none)"
    )
    parser.add_argument(
        "--no-label", action="store_true", help="leave out of the file's metadata that it is AI-generated"
    )
    devices.add_arguments(parser)


def check(args: argparse.Namespace) -> "Script | None":
    """The timeline that is asked for. Raises UserError for values that no sample can have."""
    if args.student is not None and args.overrides:
        raise UserError(f"{args.overrides[0]} would have no effect: a student has no recipe; remove it")
    if args.teacher is not None and (args.push_ms or args.realtime):
        raise UserError(
            "--push-ms and --realtime are a student's: a bidirectional teacher does not stream; leave them out"
        )
    if args.teacher is not None and args.strict:
        raise UserError("--strict is a student's: what a teacher was trained on is not known; remove it")
    if args.teacher is not None and args.guidance is not None:
        raise UserError("--guidance is a student's: a teacher's is in its recipe, trajectories.guidance; remove it")
    if args.teacher is not None and args.timeline is not None:
        raise UserError("--timeline is a student's: a bidirectional teacher draws a clip under one text; remove it")
    if args.teacher is not None and args.film is not None:
        raise UserError("--film is a student's: a teacher draws whole clips; remove it")
    if args.film is None and args.region is not None:
        raise UserError("--region is of a film that is dubbed: give --film, or remove it")
    if args.film is None and args.image is None:
        raise UserError("--image is missing; give a portrait, or a film to dub by --film")
    if args.clips < 1 or (args.student is not None and args.clips > 1):
        raise UserError(f"--clips {args.clips}: a count from 1, of --teacher alone; remove it")
    if not 0 <= args.seed <= LARGEST_SEED:
        raise UserError(f"--seed must lie in 0..2**63-1: got {args.seed}; choose another")
    if not 1 <= args.size <= 4096:
        raise UserError(f"--size must lie in 1..4096 pixels: got {args.size}; choose another (256 is the default)")
    if args.push_ms is not None and args.push_ms < 1:
        raise UserError(f"--push-ms must be at least 1 ms: got {args.push_ms}; 20 is usual for live sound")
    if args.audio is None and (args.pose is None or args.other is not None or args.teacher is not None):
        raise UserError(
            "--audio is missing; give the sound; a student's --pose alone makes a silent video as long as it is"
        )
    for name in ("image", "film", "audio", "other", "pose"):
        if getattr(args, name) is not None and args.out.resolve() == getattr(args, name).resolve():
            raise UserError(f"--out would replace the file of --{name}: {args.out}; name another file")
    script = None
    if args.timeline is not None:
        from students.serving.timeline import read_script

        script = read_script(args.timeline)
    if args.text is None and (script is None or not script.begins):
        until = "" if script is None else f"; {args.timeline} says nothing of the beginning"
        raise UserError(f"--text is missing{until}; say what happens")
    return script
