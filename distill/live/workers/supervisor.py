"""The parent's care for its worker processes: start, restart, reload, end."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess

from distill.live.workers.front import Front, Worker
from teachers.errors import UserError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before a worker is started again; doubled each time
STEADY_SECONDS = 60.0  # that a worker has to be ready for the pause to be the first again
MOST_EARLY = 5  # ends in a row before it was ready
END_SECONDS = 4.5  # for all workers to end
REAP_SECONDS = 2.0  # from the end of a worker's channel to its process's


class Supervisor:
    """`start(index, end)` starts a worker's process, which has the other end of its channel. `names`: where each runs."""

    def __init__(self, front: Front, start: Callable[[int, socket.socket], BaseProcess], names: Sequence[str]):
        self.front, self.start, self.names = front, start, names
        self.processes: dict[int, BaseProcess] = {}
        self.ending, self.announced = asyncio.Event(), False
        self.late_reload: set[int] = set()  # workers that were being started when the student was to be read again
        self.last = ""  # why a worker ended

    async def run(self, bound: socket.socket, announce: Callable[[], None]) -> None:
        """Serve until SIGINT or SIGTERM; `announce()` once workers are ready. UserError where none can be started, or none is left.
        In the main thread."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.ending.set)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        ended = asyncio.create_task(self.ending.wait())
        keeping = [asyncio.create_task(self._keep(index)) for index in range(len(self.names))]
        accepting = None
        try:
            while not self._started(keeping) and not ended.done():
                await asyncio.wait([ended], timeout=0.05)
            if not ended.done() and self.front.any_ready.is_set():
                self.announced = True
                announce()
                accepting = asyncio.create_task(self.front.accept(bound))
            left: set[asyncio.Task] = set(keeping)
            while left and not ended.done():
                await asyncio.wait({*left, ended}, return_when=asyncio.FIRST_COMPLETED)
                left = {task for task in left if not task.done()}
            if not ended.done():
                raise UserError(f"no worker is left; the last ended: {self.last}")
        finally:
            await self._end(keeping)
            ended.cancel()
            if accepting is not None:
                accepting.cancel()
            bound.close()

    def reload(self) -> None:
        """Let all workers read the student again."""
        for index, process in self.processes.items():
            if self.front.workers[index].ready and process.pid is not None:
                process_signal(process, signal.SIGHUP)
            else:
                self.late_reload.add(index)

    def _started(self, keeping: Sequence[asyncio.Task]) -> bool:
        """Whether every worker is ready or given up. UserError where one cannot be started by what the user has given."""
        for task in keeping:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error
        return all(worker.ready or task.done() for worker, task in zip(self.front.workers, keeping, strict=True))

    async def _keep(self, index: int) -> None:
        """Start a worker, and start it again when it has ended."""
        early, pause = 0, FIRST_PAUSE
        name = f"worker {index} ({self.names[index]})"
        while not self.ending.is_set():
            worker, process = self._begin(index)
            seconds = await self._watch(worker, index)
            how = await _reap(process)
            why = worker.failed or how
            if self.ending.is_set():
                return
            if worker.failed and not self.announced:
                raise UserError(worker.failed)
            early = 0 if worker.facts is not None else early + 1
            self.last = why
            if early == MOST_EARLY:
                _say(f"{name} ended {early} times before it was ready; given up ({why})")
                return
            pause = FIRST_PAUSE if seconds > STEADY_SECONDS else pause
            _say(f"{name} ended ({why}); it is started again in {pause:g} s")
            with suppress(TimeoutError):
                await asyncio.wait_for(self.ending.wait(), pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            self.front.restarts[index] += 1

    def _begin(self, index: int) -> tuple[Worker, BaseProcess]:
        ours, theirs = socket.socketpair()
        with theirs:
            self.processes[index] = self.start(index, theirs)
        return self.front.connect(index, ours), self.processes[index]

    async def _watch(self, worker: Worker, index: int) -> float:
        """Wait until it is gone; the seconds that it was ready for."""
        loop = asyncio.get_running_loop()
        await worker.changed.wait()
        began = loop.time()
        if worker.ready and index in self.late_reload:
            process_signal(self.processes[index], signal.SIGHUP)
        self.late_reload.discard(index)
        await worker.gone.wait()
        return loop.time() - began if worker.facts is not None else 0.0

    async def _end(self, keeping: Sequence[asyncio.Task]) -> None:
        """Let every worker drain, at most END_SECONDS, and end those that are left."""
        self.ending.set()
        self.front.closing = True
        for process in self.processes.values():
            process_signal(process, signal.SIGTERM)
        await asyncio.wait(keeping, timeout=END_SECONDS)
        for process in self.processes.values():
            process_signal(process, signal.SIGKILL)
        await asyncio.gather(*keeping, return_exceptions=True)  # of several failures one is reported, by `run`
        for process in self.processes.values():
            process.join()


def process_signal(process: BaseProcess, number: signal.Signals) -> None:
    """Send a signal to a child unless it has ended."""
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, number)


async def _reap(process: BaseProcess) -> str:
    """Wait for a process whose channel has ended; how it ended."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(process.sentinel, over.set)
    try:
        async with asyncio.timeout(REAP_SECONDS):
            await over.wait()
    except TimeoutError:
        process.kill()
        await over.wait()
    finally:
        loop.remove_reader(process.sentinel)
    process.join()
    code = process.exitcode or 0
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def _say(line: str) -> None:
    sys.stderr.write(f"distill: {line}\n")
