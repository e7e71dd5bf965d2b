"""`distill serve`: a page in the browser where a student listens, talks and idles."""

import argparse
import importlib.util
import socket
import sys
from pathlib import Path

from distill.commands import devices
from teachers.errors import UserError
from teachers.media.crop import CROPS

NEEDED = ("starlette", "uvicorn", "websockets")


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
    several = parser.add_argument_group("several GPUs behind one port (Linux)")
    several.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes with a copy of the weights each, on cuda:0 .. cuda:N-1, or all on the CPU where there is no GPU; "
        "the same as --device cuda:0,cuda:1,.. (default: one process on one device)",
    )


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
    from distill.commands import serving, workers
    from distill.live.operations.access import Access, read_token

    places = workers.places(args)
    open_doors = serving.doors(args)
    token = read_token(args.token)
    access = Access(host=args.host, token=token, names=args.allow_host, insecure=args.insecure)
    bound = _bind(args.host, args.port)

    def announce(facts: str, viewers: int) -> None:
        _announce(args, bound, token, f"student {args.student}, {facts}, up to {viewers} viewers")

    if len(places) > 1:
        workers.serve(args, access, places, bound, announce)
        return 0
    args.device = places[0]
    served = serving.prepare(args, access, open_doors)
    server = served.server()
    serving.end_cleanly(server)
    announce(served.facts, served.engine.max_viewers)
    serving.freeze()
    server.run(sockets=[bound])
    return 0


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
