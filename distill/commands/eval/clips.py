"""`distill eval clips`: held-out clips of a run's procedural world, the real side of `distill eval --protocol embedded`."""

import argparse
import sys
from fractions import Fraction
from pathlib import Path

from distill.commands.drift import data_config
from distill.data.procedural.source import held_out
from distill.scoring.clip_io import write_clip
from teachers.errors import UserError
from teachers.files import make_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `distill eval clips`."""
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of a finished run")
    parser.add_argument("--num", type=int, default=96, help="how many clips (default 96)")
    parser.add_argument("--world-seed", type=int, default=555, help="which clips; 555 are those of a run's own report")
    parser.add_argument("--clips-out", type=Path, required=True, metavar="DIR", help="a new folder")


def run(args: argparse.Namespace) -> int:
    """Write the clips as tensors with sound and text; 0."""
    if args.num < 1:
        raise UserError(f"--num must be at least 1: got {args.num}")
    if args.clips_out.exists() and any(args.clips_out.iterdir()):
        raise UserError(f"the folder is not empty: {args.clips_out}; choose another --clips-out")
    config = data_config(args.run)
    clips = held_out(config, args.world_seed, "test", args.num)
    make_folder(args.clips_out)
    for number, text in enumerate(clips.text):
        path = args.clips_out / f"{number:04d}.safetensors"
        write_clip(path, clips.video[number], Fraction(config.world.fps), clips.voice[number], text)
    sys.stdout.write(f"{args.clips_out}: {args.num} clips of {clips.video.shape[2]} frames\n")
    return 0
