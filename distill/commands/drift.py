"""`distill drift`: long streams of a run's student, scored minute by minute, with its own or another history."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from distill.commands import devices
from distill.data.procedural import speech
from distill.data.procedural.source import held_out
from eval.embedded.drift import window_scores
from eval.embedded.extractors import Probes
from eval.metrics.quality import slope
from eval.report.tables import grid
from students.history import History
from students.serving.optimize import prepare
from students.serving.session import Session
from students.weights.checkpoint import Bundle, load_student
from teachers.codecs.linear import to_float
from teachers.config import convert
from teachers.disk.read import read_yaml_mapping
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError
from teachers.flow import keyed_generator

FEWEST_STREAMS = 3  # of eval.metrics.identity
COLUMNS = ("identity", "sync", "motion", "motion_energy", "sharpness", "colour")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `distill drift`."""
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of a finished run")
    parser.add_argument("--minutes", type=int, default=10, help="length of each stream (default 10)")
    parser.add_argument("--streams", type=int, default=6, help="number of avatars, one stream each (default 6)")
    parser.add_argument("--sinks", type=int, help="number of sink chunks (default: the student's)")
    parser.add_argument("--window", type=int, help="number of window chunks (default: the student's)")
    parser.add_argument(
        "--refine-every", type=int, help="refine the memory of every N-th chunk (0: none; default: the student's)"
    )
    parser.add_argument("--refine-level", type=float, help="sigma of the refinement (default: the student's)")
    parser.add_argument("--seed", type=int, default=0, help="of the conditions and the noise (default 0)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the table there")
    devices.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print one row a minute and the change from the first to the last; 0."""
    if args.streams < FEWEST_STREAMS or args.minutes < 1:
        raise UserError(
            f"--streams must be at least {FEWEST_STREAMS}, each avatar is compared with the others, --minutes at least 1: got "
            f"{args.streams} and {args.minutes}; give more"
        )
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json cannot be written: {args.json}; name a file in a folder that exists")
    devices.alone("distill drift")
    data = data_config(args.run)
    where = devices.choose(args)
    bundle = load_student(args.run / "student")
    names = ("sinks", "window", "refine_every", "refine_level")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    history = dataclasses.replace(bundle.spec.history, **changes)
    bundle.student.spec = dataclasses.replace(bundle.spec, history=history)
    prepare(bundle, *where)
    probes = Probes.load(args.run / "stages" / "extractors").to(where[0])
    frames_a_minute = int(60 * bundle.spec.fps)
    conditions = held_out(data, args.seed, "drift", args.streams)
    videos, audio = [], []
    with tqdm(total=args.streams * args.minutes, unit="min", desc="drift") as bar:
        for i in range(args.streams):
            video, rows = _stream(bundle, conditions.video[i, :, 0], conditions.text[i], args, i, bar)
            videos.append(video)
            audio.append(rows)
    clip = data.world.num_frames
    table = [
        window_scores(
            probes,
            torch.stack(videos),
            conditions.video[:, :, 0],
            torch.stack(audio),
            conditions.labels["gesture"],
            minute * frames_a_minute,
            frames_a_minute,
            clip,
        )
        for minute in range(args.minutes)
    ]
    print_table(table, history)
    if args.json:
        args.json.write_text(json.dumps({"history": dataclasses.asdict(history), "minutes": table}, indent=1) + "\n")
    return 0


def print_table(table: list[dict[str, float]], history: History) -> None:
    """Print the table as Markdown."""
    refined = f", refined every {history.refine_every} at {history.refine_level}" if history.refine_every else ""
    rows = [[str(minute), *(f"{row[name]:.3f}" for name in COLUMNS)] for minute, row in enumerate(table, start=1)]
    if len(table) > 1:
        rows.append(["change a minute", *(f"{slope([row[name] for row in table]):+.4f}" for name in COLUMNS)])
    lines = [f"sinks {history.sinks}, window {history.window}{refined}", "", *grid(["minute", *COLUMNS], rows)]
    sys.stdout.write("\n".join(lines) + "\n")


def _stream(bundle: Bundle, portrait: Tensor, text: str, args, index: int, bar: tqdm) -> tuple[Tensor, Tensor]:
    """Frames uint8 [T, H, W, 3] and audio rows [T, A] of one stream; audio is synthesised and pushed a minute at a time."""
    total = int(60 * bundle.spec.fps) * args.minutes
    session, frames, rows = Session(bundle, to_float(portrait), text, args.seed + index, drop=("pose",)), [], []
    count = 0
    for minute in range(args.minutes + 1):
        rng = keyed_generator(args.seed, "drift", index, minute)
        session.push(audio=speech.synthesise(1, 60 * SAMPLE_RATE, rng).audio[0])
        for chunk in session.frames():
            frames.append(chunk.frames)
            rows.append(bundle.audio_encoder(chunk.audio.to(session.device)).cpu())
            count += len(chunk.frames)
            if count >= total:
                break
        bar.update(min(1, args.minutes - minute))
        if count >= total:
            break
    return torch.cat(frames)[:total], torch.cat(rows)[:total]


def data_config(folder: Path):
    """The data config of a run's recipe."""
    from distill.data.procedural.source import DataConfig

    values = read_yaml_mapping(folder / "recipe.yaml", "give the folder of a finished run")
    if not isinstance(values.get("data"), dict):
        raise UserError(f"damaged recipe: {folder / 'recipe.yaml'} has no data; give the folder of a finished run")
    if values["data"].get("name", "avatars") != "avatars":
        raise UserError(
            f"drift is measured on the procedural world: {folder} was trained on other clips; give another run"
        )
    return convert(DataConfig, values["data"], "data", lambda _: str(folder / "recipe.yaml"))
