"""Tasks distributed over processes, and the one process that may write into a folder.

A worker's crash is survived, and no process stays behind."""

import argparse
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import TypeVar

import av.logging
import torch

from teachers.disk.lock import FolderLock
from teachers.errors import UserError

PRELOADED = ["distill.data.prepare.cutting"]  # its imports are done once
PARTIAL = (".*.tmp", ".work/.*.tmp", ".work/*.mp4", "references/.*.tmp")  # what a killed process left in its folder
Task = TypeVar("Task")
Result = TypeVar("Result")


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Declare --workers, the number of processes."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=_count, default=cores, help="processes, 0: only this one (one a core)")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"not a number of processes, 0 or more: {text}")
    return int(text)


def size_of(text: str) -> tuple[int, int]:
    """Height and width of `HxW` on a command line."""
    if not re.fullmatch(r"\d{1,5}x\d{1,5}", text):
        raise argparse.ArgumentTypeError(f"not a height and a width such as 512x512: {text}")
    height, width = text.split("x")
    return int(height), int(width)


@contextmanager
def exclusive(out: Path, command: str) -> Iterator[None]:
    """Only one process of `command` writes into a folder, and removes partial files of a killed one; UserError for the second,
    which names the first."""
    lock = FolderLock.of(out, f"wait for that {command} or choose another --out")
    try:
        for pattern in PARTIAL:
            for file in out.glob(pattern):
                file.unlink(missing_ok=True)
        yield
    except PermissionError as error:
        raise UserError(f"folder cannot be written ({error.strerror}): {out}; choose another --out") from error
    finally:
        lock.release()


def shared_out(
    work: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Generator[tuple[Task, Result | None], None, None]:
    """(task, work(task)) as they finish, in any order; result None for a task that crashed its process.

    With 0 workers all run in this process, in order. After a crash the tasks in flight run again one at a time, so that the
    crashing one is identified. What `work` raises is raised here, and the workers are killed, as when the caller stops early.
    """
    if workers == 0:
        for task in tasks:
            yield task, work(task)
        return
    waiting, suspects = deque(tasks), deque[Task]()
    while waiting or suspects:
        source, width = (suspects, 1) if suspects else (waiting, 2 * workers)
        in_flight: dict[Future, Task] = {}
        before = set(multiprocessing.active_children())
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        pool = ProcessPoolExecutor(max_workers=min(width, workers), mp_context=context, initializer=_init_worker)
        try:
            while source or in_flight:
                while source and len(in_flight) < width:
                    future = pool.submit(work, source[0])
                    in_flight[future] = source.popleft()
                for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield in_flight.pop(future), result
        except BrokenProcessPool:
            broken = deque(in_flight.values())
            if source is suspects:
                yield broken.popleft(), None
            suspects.extend(broken)
        except BaseException:
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run with one torch thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _init_worker() -> None:
    """In a worker: one thread, interrupts left to the parent, and an exit when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    av.logging.set_level(None)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
