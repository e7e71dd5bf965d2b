"""The command line in processes that are forked from one with all imports done: a start does not take ten seconds."""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["distill.cli", "distill.pipeline.stages", "distill.commands.sample.command"])


@dataclass(frozen=True)
class Done:
    returncode: int | None
    stderr: str
    cpu_seconds: float


def start(words: list[str], log: Path | str = os.devnull) -> multiprocessing.process.BaseProcess:
    """`distill WORDS` in a process group of its own, its stderr in `log`."""
    process = CONTEXT.Process(target=_main, args=(words, str(log)))
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


def kill(process: multiprocessing.process.BaseProcess) -> None:
    """SIGKILL to it and to what it started."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group yet, or no life any more
        process.kill()
    process.join()


def _main(words: list[str], log: str) -> None:
    os.setsid()
    errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(errors, 2)
    from distill.cli import main

    code = main(words)
    if log != os.devnull:
        used = resource.getrusage(resource.RUSAGE_SELF)
        Path(log).with_suffix(".seconds").write_text(str(used.ru_utime + used.ru_stime))
    sys.exit(code)
