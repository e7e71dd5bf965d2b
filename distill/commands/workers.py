"""`distill serve` in several processes: one worker for each device, and this process as their parent."""

import argparse
import asyncio
import multiprocessing
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess

import torch

from distill.live.operations.access import Access
from distill.training.lifecycle.launcher import requested_processes
from teachers.errors import UserError

METHOD = "spawn"  # CUDA may have been asked for when something was imported, and does not survive a fork
FAILED = 2  # exit status of a worker that cannot be started as the options ask


def places(args: argparse.Namespace) -> list[str | None]:
    """The device of each worker; [None] or one name where there is one process. UserError for options that contradict."""
    named = [name.strip() for name in args.device.split(",")] if args.device else []
    count = max(len(named), 1) if args.workers is None else args.workers
    if count < 1 or "" in named:
        raise UserError("--workers and --device: give one worker or more, and a device for each")
    if count == 1 and len(named) < 2:
        return [named[0] if named else None]
    if sys.platform != "linux":
        raise UserError("several workers need Linux; start one server each, and a proxy before them")
    if requested_processes(os.environ) > 1:
        raise UserError("--workers: a launcher's processes share one stream; use one or the other")
    if named in ([], ["cuda"]):
        found = torch.cuda.device_count()
        if named or found:
            if count > found:
                raise UserError(f"--workers {count}: this machine has {found} GPUs; give --workers {found} at most")
            named = [f"cuda:{i}" for i in range(count)]
        else:
            named = ["cpu"] * count
    elif named == ["cpu"]:
        named = ["cpu"] * count
    if count != len(named):
        raise UserError(f"--workers {count}, but --device names {len(named)}; leave --workers out")
    if twice := sorted({name for name in named if name != "cpu" and named.count(name) > 1}):
        raise UserError(f"--device names {twice[0]} twice; a worker needs a GPU of its own")
    if args.viewers is not None and args.viewers < count:
        raise UserError(f"--viewers {args.viewers} of {count} workers: give one for each at least")
    return list(named)


def serve(
    args: argparse.Namespace,
    access: Access,
    names: Sequence[str | None],
    bound: socket.socket,
    announce: Callable[[str, int], None],
) -> None:
    """Serve until SIGINT or SIGTERM; `announce(facts, viewers)` once the workers are ready. UserError where none can be started."""
    from distill.commands import serving
    from distill.live.workers.front import Front
    from distill.live.workers.supervisor import Supervisor

    context = multiprocessing.get_context(METHOD)
    devices = [str(name) for name in names]

    def start(index: int, end: socket.socket) -> BaseProcess:
        given = _own_arguments(args, devices, index)
        what = (given, access, len(devices), end, warnings.showwarning)
        process = context.Process(target=work, args=what, name=f"worker {index}")
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is the parent's
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return process

    async def run() -> None:
        front = Front(len(devices), args.peer_viewers, args.viewers is None)

        def ready() -> None:
            facts = next(worker.facts for worker in front.workers if worker.facts is not None)
            announce(f"{facts['facts']}, workers on {', '.join(devices)}", front.limit)

        await Supervisor(front, start, devices).run(bound, ready)

    serving.freeze()
    asyncio.run(run())


def _own_arguments(args: argparse.Namespace, devices: Sequence[str], index: int) -> argparse.Namespace:
    """A worker's: its device, its part of --viewers; one of them waits in the --room."""
    own = argparse.Namespace(**{name: value for name, value in vars(args).items() if name != "command"})
    own.device, own.workers, own.token = devices[index], None, None
    if args.viewers is not None:
        own.viewers = args.viewers // len(devices) + (index < args.viewers % len(devices))
    own.room = args.room if index == 0 else None
    return own


def work(args: argparse.Namespace, access: Access, count: int, end: socket.socket, show: Callable[..., None]) -> None:
    """A worker's process, one of `count`; `end` leads to the parent, `show` is its `warnings.showwarning`."""
    from distill.commands import serving
    from distill.live.workers.channel import send_at_once
    from distill.live.workers.worker import FedServer, OneOfMany

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it can reload
    warnings.showwarning = show
    if args.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    try:
        served = serving.prepare(args, access, serving.doors(args))
        server = FedServer(end, {"facts": served.facts}, served.app(OneOfMany), *served.place)
    except UserError as error:
        send_at_once(end, {"failed": str(error)})
        sys.exit(FAILED)
    serving.end_cleanly(server)
    serving.freeze()
    server.run()
    sys.stderr.flush()
    os._exit(0)  # Python would take its modules down for seconds
