"""`distill serve`: a page in the browser where a student listens, talks and idles."""

import argparse
import ctypes
import gc
import importlib.util
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.commands import devices
from teachers import media
from teachers.errors import UserError
from teachers.media.crop import CROPS
from teachers.media.mark import Mark
from teachers.media.picture import SUFFIXES

if TYPE_CHECKING:
    from distill.live.answering.talker import Choice

NEEDED = ("starlette", "uvicorn", "websockets")
MAX_PORTRAITS = 24
M_ARENA_MAX = -8  # of malloc.h


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `distill serve`."""
    parser.add_argument("--student", type=Path, required=True, metavar="DIR", help="folder of an exported student")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default 127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8800, help="port, 0 for any free one (default 8800)")
    parser.add_argument(
        "--viewers",
        type=int,
        help="streams at once; a later viewer is refused with the reason (default: as many as are measured to be drawn in time)",
    )
    parser.add_argument("--lead", type=int, default=2, help="chunks drawn ahead of each viewer (default 2)")
    parser.add_argument(
        "--reference",
        type=Path,
        action="append",
        default=[],
        metavar="IMG",
        help="portrait, or a folder of them, to choose on the page; may be given again (default: drawn faces)",
    )
    parser.add_argument(
        "--talker",
        default="auto",
        metavar="NAME|DIR",
        help="the voice: auto, espeak, formant, echo, 'cmd:PROGRAM ARGUMENTS' that reads a text and writes a WAV file, "
        "my_file:Thing, a local VITS model, or a local audio language model, which answers too",
    )
    answer = parser.add_argument_group(
        "conversation mode; without it the avatar repeats what is typed or said (docs/serving.md)"
    )
    answer.add_argument(
        "--answer",
        metavar="URL|DIR",
        help="OpenAI-compatible API (its token: ANSWER_TOKEN), or a local chat model's folder",
    )
    answer.add_argument("--answer-model", metavar="NAME", help="model of that API (default: the only one it has)")
    answer.add_argument("--answer-prompt", metavar="TEXT", help="the system prompt of the model")
    answer.add_argument(
        "--transcribe",
        metavar="URL|DIR",
        help="the same for speech to text (TRANSCRIBE_TOKEN); without it only what is typed is answered",
    )
    answer.add_argument("--transcribe-model", metavar="NAME", help="model of that API (default: the only one it has)")
    parser.add_argument(
        "--crop",
        choices=CROPS,
        default="face",
        help="part of a picture of another shape to keep; face without one is the top (default face)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse pictures and words unlike what the student was trained on"
    )
    parser.add_argument(
        "--livekit",
        metavar="URL",
        help="be the avatar of LiveKit agents in rooms of this server: those that POST /livekit asks for, and --room",
    )
    parser.add_argument(
        "--room",
        help="LiveKit room to wait in for an agent (LIVEKIT_API_KEY and LIVEKIT_API_SECRET in the environment)",
    )
    parser.add_argument(
        "--mark", default="", metavar="TEXT", help="words in a corner of every frame, such as AI (default: none)"
    )
    safe = parser.add_argument_group("beyond this machine (docs/security.md)")
    safe.add_argument(
        "--token",
        metavar="TOKEN",
        help="what everybody must have: auto (made and printed), @FILE, or the token itself; required beyond this machine",
    )
    safe.add_argument("--insecure", action="store_true", help="serve other hosts without a token")
    safe.add_argument("--tls-cert", type=Path, metavar="PEM", help="certificate, to serve https")
    safe.add_argument("--tls-key", type=Path, metavar="PEM", help="and its key")
    safe.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name to answer to, such as a reverse proxy's; may be given again",
    )
    safe.add_argument("--peer-viewers", type=int, default=4, help="streams of one address elsewhere (default 4)")
    devices.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM, then close every viewer and return 0. Raises UserError before anything is bound."""
    if not (
        0 <= args.port <= 65535 and min(1 if args.viewers is None else args.viewers, args.lead, args.peer_viewers) >= 1
    ):
        raise UserError("--port must lie in 0..65535, --viewers, --lead and --peer-viewers from 1; choose others")
    if (args.tls_cert is None) != (args.tls_key is None):
        raise UserError("--tls-cert and --tls-key belong together; give both")
    if not all(importlib.util.find_spec(name) for name in NEEDED):
        raise UserError(f"distill serve needs {', '.join(NEEDED)}: pip install 'avatar-distill[serve]'")
    if args.room is not None and args.livekit is None:
        raise UserError("--room is one of a LiveKit server; name it by --livekit URL")
    doors = []
    if args.livekit is not None:
        from distill.live.doors.livekit_agent import LiveKitDoor

        doors.append(LiveKitDoor(args.livekit, args.room))
    from distill.live.operations.access import Access, read_token
    from distill.live.operations.sockets import DrainingServer
    from distill.live.scheduler import Engine
    from distill.live.server import Options, build_app
    from distill.live.talkers import load_talker

    _few_arenas()
    token = read_token(args.token)
    access = Access(host=args.host, token=token, names=args.allow_host, insecure=args.insecure)
    bound = _bind(args.host, args.port)
    talker = _choice(args).join(load_talker(args.talker), os.environ)
    bundle = devices.load(args.student, args)
    spec = bundle.spec
    mark = Mark(args.mark, spec.height, spec.width) if args.mark else None
    portraits = read_portraits(args.reference, (spec.height, spec.width), args.crop)
    engine = Engine(bundle, talker, args.viewers, args.lead, mark)
    engine.warm_up(portraits[0] if spec.takes_image else None)
    options = Options(
        access=access,
        crop=args.crop,
        strict=args.strict,
        peer_viewers=args.peer_viewers,
        doors=[door.open(engine, portraits) for door in doors],
    )
    # ranks would each need the other student
    load = None if bundle.shared else lambda: devices.load(args.student, args)
    app = build_app(engine, portraits, options, load)
    server = DrainingServer(app, args.host, args.port, args.tls_cert, args.tls_key)
    if bundle.student.one_by_one:
        sys.stderr.write(f"viewers are drawn one by one, not in batches: {bundle.student.one_by_one}\n")
    for name in (signal.SIGINT, signal.SIGTERM):
        # uvicorn has its own meanwhile, and sends the signal on: a clean end here
        signal.signal(name, lambda *_: setattr(server, "should_exit", True))
    mode = f"{talker.model} answers" if talker.model else "echo mode"
    _announce(
        args, bound, token, f"student {args.student}, talker {talker.name}, {mode}, up to {engine.max_viewers} viewers"
    )
    # a full collection would stop all streams while it looks through every module's objects, and Python's end does one
    gc.collect()
    gc.freeze()
    server.run(sockets=[bound])
    return 0


def _choice(args: argparse.Namespace) -> "Choice":
    from distill.live.answering.talker import Choice

    prompt = {} if args.answer_prompt is None else {"prompt": args.answer_prompt}
    names = ("answer", "answer_model", "transcribe", "transcribe_model")
    return Choice(**{name: getattr(args, name) for name in names}, **prompt)


def _few_arenas() -> None:
    """Let all threads share glibc's memory, or a server of many short streams grows for hours with what each has freed."""
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def _announce(args: argparse.Namespace, bound: socket.socket, token: str | None, facts: str) -> None:
    """The address, on stdout, with a token that was made; one that was given is not shown."""
    from distill.live.operations.addresses import is_loopback

    host, port = bound.getsockname()[:2]
    shown, scheme = f"[{host}]" if ":" in host else host, "http" if args.tls_cert is None else "https"
    sys.stdout.write(f"{scheme}://{shown}:{port}/{f'?token={token}' if args.token == 'auto' else ''}  {facts}\n")
    sys.stdout.flush()
    if scheme == "http" and token is not None and not is_loopback(args.host):
        sys.stderr.write(
            "without TLS the token can be read on its way: give --tls-cert and --tls-key, or a proxy that has it\n"
        )


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, number)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)
    except OSError as error:
        raise UserError(f"cannot serve on {host}:{port} ({error.strerror}); give another --host or --port") from error
    return bound


def read_portraits(paths: list[Path], size: tuple[int, int], crop: str = "face") -> list[Tensor]:
    """The pictures of `paths`, files or folders, fitted to (H, W) by the rule `crop`, [3, H, W] in [-1, 1]; without any, six drawn
    faces. A line on stderr for each in which no face decided."""
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    files = [file for file in files if file.suffix.lower() in SUFFIXES or file in paths][:MAX_PORTRAITS]
    if files:
        fitted = [media.fit_portrait(media.decode_image(file), size, crop) for file in files]
        for file, (_, note) in zip(files, fitted, strict=True):
            sys.stderr.write(f"distill: {file}: {note}\n" if note else "")
        return [portrait for portrait, _ in fitted]
    if paths:
        raise UserError(f"no picture in {paths[0]}; give a folder with {', '.join(SUFFIXES)} files")
    from distill.data.procedural import render

    config = render.WorldConfig(resolution=size[0], width=size[1], num_frames=1)
    rng = torch.Generator().manual_seed(3)
    faces = render.make_clips(config, render.draw_conditions(config, 6, rng), rng)
    return list(faces.video[:, :, 0].float() / 127.5 - 1)
