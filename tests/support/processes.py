"""The command line, ranks of a group and functions in processes that are forked from one with all imports done."""

import ctypes
import gc
import importlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["distill.cli", "distill.pipeline.stages", "distill.commands.sample.command"])
# The first thread that asks for torch's pool in a forked process makes it anew. Two threads of autograd that ask at once find none
# ("Invalid thread pool"), therefore the main thread asks before there are others.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


@dataclass(frozen=True)
class Done:
    returncode: int | None
    stderr: str
    cpu_seconds: float


def start(
    words: list[str], log: Path | str = os.devnull, output: Path | str = os.devnull
) -> multiprocessing.process.BaseProcess:
    """`distill WORDS` in a process group of its own, its stderr in `log`, its stdout line by line in `output`."""
    process = CONTEXT.Process(target=_main, args=(words, str(log), str(output)))
    process.start()
    return process


def run(words: list[str], timeout: float = 240.0) -> Done:
    """`distill WORDS` to its end."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "stderr"
        process = start(words, log)
        process.join(timeout)
        if process.exitcode is None:
            kill(process)
            raise TimeoutError(f"distill {' '.join(words)} took longer than {timeout} s: {log.read_text()[-2000:]}")
        used = log.with_suffix(".seconds")
        return Done(process.exitcode, log.read_text(), float(used.read_text()) if used.is_file() else 0.0)


def finish(words: list[str], timeout: float = 240.0) -> None:
    """`distill WORDS`, which has to end well. Shapes are not checked there, for which a whole run takes a third of the time."""
    done = run(words, timeout)
    assert done.returncode == 0, done.stderr[-3000:]


def call(function: Callable, *arguments: Any, timeout: float = 300.0) -> Any:
    """function(*arguments), a module's own, in a process of its own whose allocator hands back what is freed, so that resident
    memory is live memory; what it returns."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_call, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        assert receiver.poll(timeout), f"{function.__qualname__} took longer than {timeout} s"
        return receiver.recv()
    finally:
        kill(process)


class Forked:
    """`distill WORDS` with what `distill.commands.sweep` asks of a Popen; it writes to the file `output`."""

    def __init__(self, words: list[str], output: BinaryIO):
        self.process = start(words, output.name)
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> None:
        self.process.join(timeout)

    def terminate(self) -> None:
        self.process.terminate()


def kill(process: multiprocessing.process.BaseProcess) -> None:
    """SIGKILL to it and to what it started."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group yet, or no life any more
        process.kill()
    process.join()


def _own() -> None:
    """A process of its own: a group to kill, one thread, no garbage collector that visits what was imported before."""
    os.setsid()
    gc.freeze()
    torch.set_num_threads(1)  # the process was forked before this module was imported


def hand_back() -> None:
    """From here on this process's allocator hands back what is freed."""
    for option, value in ((-1, 0), (-3, 32 << 10), (-8, 1)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX
        ctypes.CDLL(None).mallopt(option, value)


def _call(sender: Any, function: Callable, arguments: tuple) -> None:
    _own()
    hand_back()
    sender.send(function(*arguments))


def _main(words: list[str], log: str, output: str) -> None:
    _own()
    errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    sys.stdout.reconfigure(line_buffering=True)
    os.dup2(errors, 2)
    from distill.cli import main

    code = main(words)
    if log != os.devnull:
        used = resource.getrusage(resource.RUSAGE_SELF)
        Path(log).with_suffix(".seconds").write_text(str(used.ru_utime + used.ru_stime))
    sys.exit(code)


def run_ranks(script: str, folder: Path, count: int, timeout: float = 900.0) -> None:
    """`worker(folder)` of a test file as `count` ranks, each with its log in the folder; all have to end well."""
    ranks = start_ranks(script, folder, count)
    try:
        for process in ranks:
            process.join(timeout)
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            if process.exitcode is None:
                kill(process)
    failed = next((rank for rank, code in enumerate(codes) if code), 0)
    assert codes == [0] * count, f"exit statuses {codes}: {(folder / f'{failed}.log').read_text()[-3000:]}"


def start_ranks(script: str, folder: Path, count: int) -> list[multiprocessing.process.BaseProcess]:
    """`run_ranks`, not waited for."""
    if torch.cuda.is_available():
        pytest.skip("several ranks of one GPU are no group")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    module = ".".join(Path(script).resolve().relative_to(ROOT).with_suffix("").parts)
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(count):
        environ = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(CONTEXT.Process(target=_rank, args=(module, folder, environ, folder / f"{rank}.log")))
    for process in ranks:
        process.start()
    return ranks


def _rank(module: str, folder: Path, environ: dict[str, str], log: Path) -> None:
    _own()
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= environ
    try:
        importlib.import_module(module).worker(folder)
    except BaseException:
        traceback.print_exc()
        raise
