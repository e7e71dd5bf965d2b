"""Tasks distributed over processes; survives a worker's crash and leaves no process behind."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from typing import TypeVar

import av.logging
import torch

PRELOADED = ["distill.data.prepare.cutting"]  # its imports are done once
Task = TypeVar("Task")
Result = TypeVar("Result")


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
