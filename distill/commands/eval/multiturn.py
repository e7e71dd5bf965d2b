"""`distill eval multiturn`: scripted conversations with a served student, or with any server that speaks the protocol, timed by a
viewer and scored turn by turn; several systems beside each other.

Response latency is from the end of the user's turn until the first talking frame is due on the viewer's clock, dead time until
the first audible sound (LiveTalk 2512.23576, sec. 5, measures the former). An avatar is interrupted too: how long it talks on, and
whether anything is heard after that. Scores are of each turn's frames: without any weights colour, luma, saturation, sharpness and
motion (`eval.metrics.quality.quality_beside`, against the portrait); with a run's extractors identity and lip sync; with DINOv2's
weights the cosine to the portrait. Their slope over the turns of a conversation is the drift.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from distill.commands import devices
from distill.commands.eval.conversing import Played, Script, Server, converse, reach
from eval.embedded.extractors import Probes
from eval.metrics.quality import quality_beside
from eval.metrics.sync import mouth_sync
from eval.networks.dino import Dino
from eval.report.conversations import page, summary
from eval.report.page import write_page
from students.weights.checkpoint import Bundle
from teachers import media
from teachers.codecs.linear import to_uint8
from teachers.config import convert
from teachers.disk.read import read_yaml
from teachers.errors import UserError
from teachers.files import make_folder

DEFAULT = Path(__file__).with_name("conversations.yaml")
NAME = "multiturn"
MIN_SYNC_FRAMES = 10
MOST_VIDEOS = 6  # on the page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `distill eval multiturn`."""
    parser.add_argument("--student", type=Path, metavar="DIR", help="an exported student, which is served here")
    parser.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="[NAME=]ws://HOST:PORT",
        help="a server that speaks the protocol (docs/serving.md); may be given more than once; its token in AVATAR_TOKEN",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for multiturn.json, .html and videos")
    parser.add_argument("--conversations", type=Path, default=DEFAULT, metavar="YAML", help="list of name, turns, ...")
    parser.add_argument("--repeat", type=int, default=1, help="go through the conversations so many times (default 1)")
    parser.add_argument(
        "--turns",
        choices=("typed", "sound"),
        default="typed",
        help="typed: the server's talker answers; sound: the same sound is sent to every system, which says it",
    )
    parser.add_argument(
        "--interrupt", type=int, default=1, metavar="N", help="times in each conversation (default 1; 0: never)"
    )
    parser.add_argument("--talker", default="auto", metavar="NAME|DIR", help="as in distill serve, with --student")
    parser.add_argument(
        "--extractors", type=Path, metavar="DIR", help="a run's stages/extractors: identity and lip sync, of --student"
    )
    parser.add_argument(
        "--reference", type=Path, action="append", default=[], metavar="IMG", help="as in distill serve, with --student"
    )
    parser.add_argument("--lead", type=int, default=2, help="as in distill serve, with --student")
    devices.add_arguments(parser, default=argparse.SUPPRESS)  # those of distill eval


def run(args: argparse.Namespace) -> int:
    """Hold the conversations in real time, with each system in turn, write the report, print its tables; 0."""
    if args.student is None and not args.server:
        raise UserError("--student or --server is missing: distill eval multiturn; give what is to be talked with")
    if args.extractors and args.student is None:
        raise UserError("--extractors reads the audio encoder of --student: give that too, or remove it")
    scripts = read_scripts(args.conversations) * max(1, args.repeat)
    probes = Probes.load(args.extractors) if args.extractors else None
    dino, voice = _dino(), _voice if args.turns == "sound" else None
    with _served(args) as (servers, bundle, facts):
        names = [server.name for server in servers]
        if len(set(names)) < len(names):
            raise UserError(f"--server: {', '.join(names)}: two of one name; give them as NAME=ws://..")
        if args.turns == "sound" and (mute := [one.name for one in servers if not one.hello.get("takes_speech")]):
            raise UserError(f"--turns sound: {mute[0]} takes no speech; leave it typed")
        played: dict[str, list[Played]] = {name: [] for name in names}
        total = len(servers) * sum(len(script.turns) for script in scripts)
        with tqdm(total=total, unit="turn") as bar:
            for script in scripts:
                for server in servers:  # in turn, so that what else the machine does hits all of them
                    own = replace(script, portrait=script.portrait % server.hello["portraits"])
                    portrait = server.portrait(own.portrait)
                    played[server.name].append(converse(server, own, bar, portrait, voice, args.interrupt))
    make_folder(args.out)
    reports = {}
    for server in servers:
        of_bundle = (bundle, probes) if server.own else (None, None)
        own = {**(facts if server.own else {"server": server.url}), "talker": server.hello.get("talker", "")}
        own |= {"lead": server.hello.get("lead"), "turns_by": args.turns}
        reports[server.name] = {**own, **report_of(played[server.name], *of_bundle, dino)}
    _write(args.out, reports, played)
    sys.stdout.write((args.out / f"{NAME}.md").read_text(encoding="utf-8"))
    return 0


@contextmanager
def _served(args: argparse.Namespace) -> Iterator[tuple[list[Server], Bundle | None, dict[str, Any]]]:
    """The systems to talk with, the student that is served here, where there is one, and what the report says of it."""
    others = [reach(word) for word in args.server]
    if args.student is None:
        yield others, None, {}
        return
    from distill.commands.serving import read_portraits
    from distill.live.scheduler import Engine
    from distill.live.server import running
    from distill.live.talkers import load_talker

    talker, bundle = load_talker(args.talker), devices.load(args.student, args)
    portraits = read_portraits(args.reference, (bundle.spec.height, bundle.spec.width))
    engine = Engine(bundle, talker, 1, args.lead)
    engine.warm_up(portraits[0] if bundle.spec.takes_image else None)
    with running(engine, portraits) as address:
        own = reach(f"student=ws://{address}")
        yield [Server(own.name, own.url, own.hello, own=True), *others], bundle, {"student": bundle.fingerprint[:16]}


def read_scripts(path: Path) -> list[Script]:
    """The conversations of a YAML file; UserError for a missing or wrong one."""
    values = read_yaml(path, "give a YAML list of conversations, each with name and turns")
    scripts = convert(tuple[Script, ...], values, "conversations", lambda _: str(path))
    if not scripts or not all(script.turns for script in scripts):
        raise UserError(f"no turns in {path}; give each conversation at least one")
    return list(scripts)


def report_of(
    played: Sequence[Played], bundle: Bundle | None, probes: Probes | None, dino: Dino | None
) -> dict[str, Any]:
    """The report of one system's conversations."""
    cut = [one for conversation in played for one in conversation.interruptions]
    return summary([rows(one, bundle, probes, dino) for one in played], [one.line for one in played], cut)


def rows(
    played: Played, bundle: Bundle | None, probes: Probes | None, dino: Dino | None = None
) -> list[dict[str, Any]]:
    """One row a turn: seconds (None: never), the server's parts in ms, and the scores of its frames; those of the probes where the
    bundle is at hand, whose audio encoder they read the sound by."""
    out = []
    video = torch.from_numpy(played.frames).permute(3, 0, 1, 2)[None]
    portrait, per_frame = to_uint8(_fitted(played)[None]), len(played.sound) // len(played.frames)
    for number, (answer, text) in enumerate(zip(played.answers, played.script.turns, strict=True)):
        first, last = answer.frame or 0, min(answer.end or 0, video.shape[2])
        part, length = video[:, :, first:last], last - first
        row: dict[str, Any] = {"conversation": played.script.name, "turn": number, "text": text, "frames": length}
        row |= {"latency": _finite(answer.latency), "dead": _finite(answer.dead), "stalled": played.stalled[number]}
        row["parts_ms"] = answer.split()
        scores = quality_beside(part, portrait) if length >= 2 else {}
        row |= {name: float(values) for name, values in scores.items()}
        if probes is not None and bundle is not None and length >= MIN_SYNC_FRAMES:
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


def _write(out: Path, reports: dict[str, dict[str, Any]], played: dict[str, list[Played]]) -> None:
    """multiturn.json, .md and .html, and a video of each conversation; of several systems in a folder each, beside those of all."""
    several, shown = len(reports) > 1, []
    for name, report in reports.items():
        folder = out / name if several else out
        make_folder(folder)
        for number, one in enumerate(played[name]):
            sound, side = torch.from_numpy(one.sound), min(one.frames.shape[1:3])
            fps = Fraction(one.fps).limit_denominator(1001)
            file = folder / f"{number:03d}.mp4"
            media.write_video(file, one.frames, fps, sound, upscale=max(1, 256 // side), synthetic=True)
            shown.append((number, one.script.name, name, file.relative_to(out)))
        write_page(page({name: report}, _videos(shown, name, folder, out), played[name][0].fps), report, folder, NAME)
    if several:
        both = {
            "systems": {name: {k: v for k, v in report.items() if k != "turns"} for name, report in reports.items()}
        }
        write_page(page(reports, _videos(shown, None, out, out), next(iter(played.values()))[0].fps), both, out, NAME)


def _videos(
    shown: Sequence[tuple[int, str, str, Path]], name: str | None, folder: Path, out: Path
) -> list[dict[str, Any]]:
    """The page's videos: a group a conversation, of one system or of all."""
    groups: dict[tuple[int, str], list[dict[str, str]]] = {}
    for number, script, system, file in shown:
        if name in (None, system) and number < MOST_VIDEOS:
            source = (out / file).relative_to(folder).as_posix()
            groups.setdefault((number, script), []).append({"name": system, "source": source})
    return [{"title": script, "videos": videos} for (_, script), videos in groups.items()]


def _fitted(played: Played) -> Tensor:
    """The portrait [3, H, W] in the size of the frames."""
    height, width = played.frames.shape[1:3]
    if played.portrait.shape[1:] == (height, width):
        return played.portrait
    return F.interpolate(played.portrait[None], (height, width), mode="bilinear", antialias=True)[0]


def _finite(seconds: float) -> float | None:
    return float(seconds) if math.isfinite(seconds) else None


def _voice(text: str) -> np.ndarray:
    """The sound [n] of a text at 16 kHz, the same for every system: the small formant voice's."""
    from distill.live.voice import formant_voice

    return torch.cat(list(formant_voice(text))).numpy()


def _dino() -> Dino | None:
    """With the published weights where they lie, else None."""
    try:
        return Dino.load()
    except UserError:
        return None
