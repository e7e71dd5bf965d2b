"""`distill eval multiturn`: scripted conversations with a served student, timed by a viewer and scored turn by turn.

Response latency is from the end of the user's turn until the first talking frame is due on the viewer's clock, dead time until
the first audible sound (LiveTalk 2512.23576, sec. 5, measures the former). Scores are of each turn's frames: without any weights
colour, luma, saturation, sharpness and motion (`eval.metrics.quality.quality_beside`, against the portrait); with a run's
extractors identity and lip sync; with DINOv2's weights the cosine to the portrait. Their slope over the turns of a conversation is
the drift.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from distill.commands import devices
from eval.embedded.extractors import Probes
from eval.metrics.quality import quality_beside, slope
from eval.metrics.sync import mouth_sync
from eval.networks.dino import Dino
from eval.report.tables import grid
from eval.speed.latency import percentile
from students.weights.checkpoint import Bundle
from teachers import media
from teachers.codecs.linear import to_uint8
from teachers.config import convert
from teachers.disk.read import read_yaml
from teachers.errors import UserError
from teachers.files import atomic_write

if TYPE_CHECKING:
    from distill.live.client import Answer

DEFAULT = Path(__file__).with_name("conversations.yaml")
PAUSE, MORE = 0.6, 0.5  # seconds between an answer's end and the next turn: at least, and spread over so many more
TIMES = ("latency", "dead", "stalled")  # seconds
MIN_SYNC_FRAMES = 10


@dataclass(frozen=True)
class Script:
    """One conversation: what the user types."""

    name: str
    turns: tuple[str, ...]
    portrait: int = 0
    condition: str = "a person talks"
    seed: int = 0


@dataclass
class Played:
    """A conversation as the viewer had it: frames uint8 [T, H, W, 3], sound [T * samples], and its answers."""

    script: Script
    portrait: Tensor
    frames: np.ndarray
    sound: np.ndarray
    answers: "list[Answer]"
    stalled: list[float]  # seconds that the video stood still, turn by turn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `distill eval multiturn`."""
    parser.add_argument("--student", type=Path, required=True, metavar="DIR", help="folder of an exported student")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for multiturn.json and videos")
    parser.add_argument("--conversations", type=Path, default=DEFAULT, metavar="YAML", help="list of name, turns, ...")
    parser.add_argument("--repeat", type=int, default=1, help="go through the conversations so many times (default 1)")
    parser.add_argument("--talker", default="auto", metavar="NAME|DIR", help="as in distill serve")
    parser.add_argument(
        "--extractors", type=Path, metavar="DIR", help="a run's stages/extractors: identity and lip sync"
    )
    parser.add_argument(
        "--reference", type=Path, action="append", default=[], metavar="IMG", help="as in distill serve"
    )
    parser.add_argument("--lead", type=int, default=2, help="as in distill serve")
    devices.add_arguments(parser, default=argparse.SUPPRESS)  # those of distill eval


def run(args: argparse.Namespace) -> int:
    """Hold the conversations in real time, write the report, print its table; 0."""
    from distill.commands.serve import read_portraits
    from distill.live.scheduler import Engine
    from distill.live.server import running
    from distill.live.talkers import load_talker

    scripts = read_scripts(args.conversations) * max(1, args.repeat)
    talker, bundle = load_talker(args.talker), devices.load(args.student, args)
    probes = Probes.load(args.extractors) if args.extractors else None
    dino = _dino()
    portraits = read_portraits(args.reference, (bundle.spec.height, bundle.spec.width))
    engine = Engine(bundle, talker, 1, args.lead)
    engine.warm_up(portraits[0] if bundle.spec.takes_image else None)
    with running(engine, portraits) as address, tqdm(total=sum(len(s.turns) for s in scripts), unit="turn") as bar:
        played = [converse(address, script, portraits, bar) for script in scripts]
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {"student": bundle.fingerprint[:16], "talker": talker.name, "lead": args.lead}
    report = {**facts, **summary([rows(one, bundle, probes, dino) for one in played])}
    upscale = max(1, 256 // min(bundle.spec.height, bundle.spec.width))
    for number, one in enumerate(played):
        sound = torch.from_numpy(one.sound)
        media.write_video(
            args.out / f"{number:03d}.mp4", one.frames, bundle.spec.fps, sound, upscale=upscale, synthetic=True
        )
    atomic_write(args.out / "multiturn.json", json.dumps(report, indent=1) + "\n")
    sys.stdout.write(table(report))
    return 0


def read_scripts(path: Path) -> list[Script]:
    """The conversations of a YAML file; UserError for a missing or wrong one."""
    values = read_yaml(path, "give a YAML list of conversations, each with name and turns")
    scripts = convert(tuple[Script, ...], values, "conversations", lambda _: str(path))
    if not scripts or not all(script.turns for script in scripts):
        raise UserError(f"no turns in {path}; give each conversation at least one")
    return list(scripts)


def converse(address: str, script: Script, portraits: list[Tensor], bar: tqdm) -> Played:
    """One conversation in real time, each turn after the answer to the last one."""
    from distill.live.client import Client

    client = Client(f"ws://{address}/live", strict=True)
    try:
        client.open(script.portrait, script.condition, script.seed)
        client.pump(PAUSE)
        answers, stalled = [], []
        for number, text in enumerate(script.turns, start=1):
            before = client.stalled
            answers.append(client.converse(text))
            stalled.append(client.stalled - before)
            bar.update()
            bar.set_postfix_str(f"answer after {answers[-1].latency:.2f} s")
            client.pump(PAUSE + MORE * (0.618 * number % 1))
    finally:
        client.close()
    numbers = range(client.last + 1)
    frames, sound = np.stack([client.frames[n] for n in numbers]), np.concatenate([client.sound[n] for n in numbers])
    return Played(script, portraits[script.portrait], frames, sound, answers, stalled)


def rows(played: Played, bundle: Bundle, probes: Probes | None, dino: Dino | None = None) -> list[dict[str, Any]]:
    """One row a turn: seconds, the server's parts in ms, and the scores of its frames."""
    out = []
    video = torch.from_numpy(played.frames).permute(3, 0, 1, 2)[None]
    portrait, per_frame = to_uint8(played.portrait[None]), bundle.spec.samples_per_frame
    for number, (answer, text) in enumerate(zip(played.answers, played.script.turns, strict=True)):
        assert answer.frame is not None
        first, last = answer.frame, min(answer.end or 0, video.shape[2])
        part, length = video[:, :, first:last], last - first
        row: dict[str, Any] = {"conversation": played.script.name, "turn": number, "text": text, "frames": length}
        row |= {"latency": answer.latency, "dead": answer.dead, "stalled": played.stalled[number]}
        row["parts_ms"] = answer.split()
        scores = quality_beside(part, portrait) if length >= 2 else {}
        row |= {name: float(values) for name, values in scores.items()}
        if probes is not None and length >= MIN_SYNC_FRAMES:
            sound = torch.from_numpy(played.sound[first * per_frame : last * per_frame])
            audio = bundle.audio_encoder(sound.to(next(bundle.student.parameters()).device))[None]
            reading, known = probes.read(part), probes.read(portrait[:, :, None].expand(-1, -1, 2, -1, -1))
            row["sync"] = mouth_sync(reading.mouth, probes.mouth_from_audio(audio))["sync"]
            row["identity_gap"] = float((reading.identity - known.identity[:, :1]).square().mean())
        if dino is not None:
            faces, known = dino.features(part[0].transpose(0, 1)), dino.features(portrait)
            row["dino"] = float(F.cosine_similarity(faces.double(), known.double()).mean())
        out.append(row)
    return out


def summary(conversations: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Percentiles of the times and parts over all turns, mean of each score and its mean change a turn."""
    turns = [row for rows in conversations for row in rows]
    scores = [name for name, value in turns[0].items() if isinstance(value, float) and name not in TIMES]
    out: dict[str, Any] = {"num_turns": len(turns)}
    for name in TIMES:
        values = [row[name] for row in turns]
        out[f"{name}_seconds"] = {"p50": percentile(values, 50), "p95": percentile(values, 95), "max": max(values)}
    parts = {name for row in turns for name in row["parts_ms"]}
    for name in sorted(parts):
        values = [row["parts_ms"].get(name, 0.0) for row in turns]
        out.setdefault("parts_ms", {})[name] = {"p50": percentile(values, 50), "p95": percentile(values, 95)}
    for name in scores:
        series = [[row[name] for row in rows if name in row] for rows in conversations]
        slopes = [slope(values) for values in series if len(values) > 1]
        mean = statistics.fmean(value for values in series for value in values)
        out[name] = {"mean": mean, "change_a_turn": statistics.fmean(slopes) if slopes else 0.0}
    return {**out, "turns": turns}


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    times = [[name, *(f"{x:.3f}" for x in report[f"{name}_seconds"].values())] for name in TIMES]
    parts = [[name, f"{x['p50']:.1f}", f"{x['p95']:.1f}"] for name, x in report.get("parts_ms", {}).items()]
    scored = [(name, value) for name, value in report.items() if isinstance(value, dict) and "change_a_turn" in value]
    scores = [[name, f"{value['mean']:.4f}", f"{value['change_a_turn']:+.4f}"] for name, value in scored]
    lines = [f"{report['num_turns']} turns", "", *grid(["seconds", "p50", "p95", "max"], times), ""]
    lines += [*grid(["part, ms", "p50", "p95"], parts), "", *grid(["score", "mean", "change a turn"], scores)]
    return "\n".join(lines) + "\n"


def _dino() -> Dino | None:
    """With the published weights where they lie, else None."""
    try:
        return Dino.load()
    except UserError:
        return None
