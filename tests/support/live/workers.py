"""`distill serve` with several workers, which are forked with all imports done and decode uploads themselves."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.commands import workers
from distill.live import server
from students.weights.checkpoint import save_student
from tests.support import processes, tiny
from tests.support.live.serving import eventually

work = workers.work
START_SECONDS = 240.0


class Direct:
    """Decoders without a process: it takes seconds to start one."""

    def start(self) -> None:
        pass

    def run(self, function: Any, data: bytes, *given: Any) -> tuple[Any, str]:
        found = function(data, *given)
        return found if isinstance(found, tuple) else (found, "")

    def close(self) -> None:
        pass


@dataclass
class Started:
    """`folder` has the student, and the output of all processes."""

    process: Any
    folder: Path
    line: str = ""

    @property
    def address(self) -> str:
        """127.0.0.1:PORT"""
        return self.line.split()[0].partition("://")[2].strip("/")

    def noted(self) -> str:
        """What all processes have written to stderr."""
        return (self.folder / "errors").read_text()

    def pid(self, index: int) -> int:
        """Of a worker that was started last in this place."""
        return int((self.folder / f"worker {index}").read_text())

    def running(self) -> list[int]:
        """Workers that are there."""
        pids = [int(file.read_text()) for file in self.folder.glob("worker *")]
        return [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    """Whether there is such a process, no zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@contextmanager
def started(folder: Path, *words: str) -> Iterator[Started]:
    """A server of two workers with a tiny student, in `folder`."""
    if not (folder / "student").exists():
        save_student(folder / "student", tiny.a_bundle(), "card")
    command = ["serve", "--student", str(folder / "student"), "--port", "0", "--talker", "echo", "--workers", "2"]
    output = folder / "output"
    output.touch()
    process = processes.CONTEXT.Process(target=_main, args=([*command, *words], folder))
    process.start()
    found = Started(process, folder)
    try:
        eventually(lambda: output.read_text().endswith("\n") or not process.is_alive(), START_SECONDS)
        assert process.is_alive(), found.noted()
        found.line = output.read_text()
        yield found
    finally:
        processes.kill(process)
        end = time.monotonic() + 10
        while found.running() and time.monotonic() < end:
            time.sleep(0.02)
        for pid in found.running():
            os.kill(pid, 9)


def _main(words: list[str], folder: Path) -> None:
    workers.METHOD, workers.work = "forkserver", _work
    processes._main(words, str(folder / "errors"), str(folder / "output"))


def _work(args: Any, *given: Any) -> None:
    errors = os.open(args.student.parent / "errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 2)
    (args.student.parent / multiprocessing.current_process().name).write_text(str(os.getpid()))
    server.Decoders = Direct
    work(args, *given)
