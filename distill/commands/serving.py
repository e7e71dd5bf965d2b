"""What `distill serve` serves in one process: a student, its engine and its application, as the options ask for them."""

import argparse
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from starlette.applications import Starlette
from torch import Tensor

from distill.commands import devices
from distill.live.answering.talker import Choice
from distill.live.operations.access import Access
from distill.live.operations.sockets import DrainingServer
from distill.live.scheduler import Engine
from distill.live.server import Options, Server, build_app
from distill.live.talkers import load_talker
from students.weights.checkpoint import Bundle
from teachers import media
from teachers.errors import UserError
from teachers.media.mark import Mark
from teachers.media.picture import SUFFIXES

MAX_PORTRAITS = 24
M_ARENA_MAX = -8  # of malloc.h


@dataclass(frozen=True)
class Served:
    """`load` reads the student again; None where that cannot be."""

    args: argparse.Namespace
    engine: Engine
    portraits: list[Tensor]
    options: Options
    load: Callable[[], Bundle] | None
    facts: str

    def app(self, make: Callable[[Engine, list[Tensor], Options], Server] | None = None) -> Starlette:
        """The application; `make` as `build_app` takes it."""
        return build_app(self.engine, self.portraits, self.options, self.load, make)

    @property
    def place(self) -> tuple[str, int, Path | None, Path | None]:
        """Address, certificate and key, as `DrainingServer` takes them."""
        return self.args.host, self.args.port, self.args.tls_cert, self.args.tls_key

    def server(self) -> DrainingServer:
        """A server of its own."""
        return DrainingServer(self.app(), *self.place)


def doors(args: argparse.Namespace) -> Sequence[Any]:
    """Other ways in, that are not led to an engine yet. UserError for options that cannot be."""
    if args.livekit is None:
        return ()
    from distill.live.doors.livekit_agent import LiveKitDoor

    return (LiveKitDoor(args.livekit, args.room),)


def prepare(args: argparse.Namespace, access: Access, closed: Sequence[Any]) -> Served:
    """Load everything, and measure how many viewers the device draws; `closed` are doors. UserError for what cannot be."""
    _few_arenas()
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
        doors=[door.open(engine, portraits) for door in closed],
    )
    if bundle.student.one_by_one:
        sys.stderr.write(f"viewers are drawn one by one, not in batches: {bundle.student.one_by_one}\n")
    # ranks would each need the other student
    load = None if bundle.shared else lambda: devices.load(args.student, args)
    mode = f"{talker.model} answers" if talker.model else "echo mode"
    return Served(args, engine, portraits, options, load, f"talker {talker.name}, {mode}")


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


def end_cleanly(server: DrainingServer) -> None:
    """SIGINT and SIGTERM let it drain: uvicorn has handlers of its own meanwhile, and sends the signal on."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: setattr(server, "should_exit", True))


def freeze() -> None:
    """A full collection would stop all streams while it looks through every module's objects, and Python's end does one."""
    gc.collect()
    gc.freeze()


def _choice(args: argparse.Namespace) -> Choice:
    prompt = {} if args.answer_prompt is None else {"prompt": args.answer_prompt}
    names = ("answer", "answer_model", "transcribe", "transcribe_model")
    return Choice(**{name: getattr(args, name) for name in names}, **prompt)


def _few_arenas() -> None:
    """Let all threads share glibc's memory, or a server of many short streams grows for hours with what each has freed."""
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)
