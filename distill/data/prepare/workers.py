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
from teachers.media.container import is_of_the_machine

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
    """(task, work(task)) as they finish, in any order; result None for a task that crashed its process, twice.

    With 0 workers all run in this process, in order. Each worker is a pool of its own, so that a crash is that of the task it
    was at; one that crashed runs again behind all others, alone, since it may have wanted memory that they had. What `work` raises
    is raised here, and the workers are killed, as when the caller stops early.
    """
    if workers == 0:
        for task in tasks:
            yield task, work(task)
        return
    waiting, crashed = deque(tasks), deque[Task]()
    before = set(multiprocessing.active_children())
    try:
        for task, result in _by_processes(work, waiting, workers):
            if result is None:
                crashed.append(task)
            else:
                yield task, result[0]
        for task, result in _by_processes(work, crashed, 1):
            yield task, None if result is None else result[0]
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
        raise


def _by_processes(
    work: Callable[[Task], Result], waiting: deque[Task], workers: int
) -> Iterator[tuple[Task, tuple[Result] | None]]:
    """(task, (work(task),)) as they finish, by as many processes; (task, None) where its process crashed."""
    pools = [_pool() for _ in range(min(workers, len(waiting)))]
    free, in_flight = list(range(len(pools))), dict[Future, tuple[int, Task]]()
    try:
        while waiting or in_flight:
            while waiting and free:
                number, task = free.pop(), waiting.popleft()
                in_flight[pools[number].submit(work, task)] = number, task
            for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
                number, task = in_flight.pop(future)
                try:
                    result = (future.result(),)
                except BrokenProcessPool:
                    pools[number].shutdown()
                    pools[number], result = _pool(), None
                free.append(number)
                yield task, result
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def _pool() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_init_worker)


def stop_for_the_machine(error: Exception, clip: str) -> None:
    """UserError where a clip failed by what says nothing of it, such as a network disk that is gone: all others would too."""
    if is_of_the_machine(error):
        what = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"stopped at {clip}, by an error of the machine ({what}); run the same command again"
        ) from error


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
