"""How processes end: signals that are waited with until a place to save, and children that end with their parent."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""


@contextmanager
def terminations() -> Iterator[list[int]]:
    """A list to which SIGTERM and SIGUSR1 (what Slurm sends before the time is up) add themselves instead of killing the process
    (in the main thread, where Python handles signals)."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent(parent: int) -> None:
    """In a child of process `parent`: SIGTERM when that one ends, however it ends (Linux)."""
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has ended already
            os.kill(os.getpid(), signal.SIGTERM)
