"""Workers that end, cannot be started, or hang; processes without a student."""

import asyncio
import functools
import gc
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

import pytest

from distill.live.workers import supervisor
from distill.live.workers.channel import send_at_once
from distill.live.workers.front import Front
from distill.live.workers.supervisor import MOST_EARLY, Supervisor
from teachers.errors import UserError
from tests.support.live.workers import alive
from tests.support.processes import CONTEXT


def behave(how: str, index: int, end: socket.socket) -> None:
    """A worker's process."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if how == "dies":
        sys.exit(7)
    if how == "cannot":
        send_at_once(end, {"failed": "no student: nowhere; export one"})
        sys.exit(2)
    if how == "ignores":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if how == "reloads":
        signal.signal(signal.SIGHUP, lambda *_: send_at_once(end, {"report": {"limit": 7}}))
        time.sleep(0.5)  # is asked to meanwhile
    send_at_once(end, {"report": {"status": "ok", "limit": 1}})
    send_at_once(end, {"ready": {"pid": os.getpid()}})
    with suppress(ConnectionError):
        while end.recv(4096):
            pass


class Run:
    """A supervisor of workers that behave so, in this thread; `act(run)` is called in another once it is announced."""

    def __init__(self, *hows: str):
        self.hows = list(hows)
        self.announced = self.ended = 0.0
        self.error: BaseException | None = None

    def start(self, index: int, end: socket.socket):
        how = self.hows[index]
        process = CONTEXT.Process(target=behave, args=(how, index, end))
        process.start()
        return process

    def __call__(self, act=None, early=None) -> "Run":
        async def go() -> None:
            self.front = Front(len(self.hows), 4, True)
            self.supervisor = Supervisor(self.front, self.start, [f"place {i}" for i in range(len(self.hows))])
            if early is not None:
                asyncio.get_running_loop().call_later(0.1, functools.partial(early, self))
            await self.supervisor.run(socket.create_server(("127.0.0.1", 0)), announce)

        def announce() -> None:
            self.announced = time.monotonic()
            if act is not None:
                threading.Thread(target=self._act, args=(act,)).start()

        asyncio.run(go())
        self.ended = time.monotonic()
        return self

    def _act(self, act) -> None:
        try:
            act(self)
        except BaseException as error:  # the test's, below
            self.error = error
        os.kill(os.getpid(), signal.SIGTERM)

    def until(self, condition) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.01)


def test_a_worker_that_dies_at_its_start_is_given_up_in_one_line_and_the_other_serves(capfd):
    run = Run("dies", "lives")(lambda run: None)
    assert run.error is None
    lines = [line for line in capfd.readouterr().err.splitlines() if "given up" in line]
    assert lines == [
        f"distill: worker 0 (place 0) ended {MOST_EARLY} times before it was ready; given up (exit status 7)"
    ]
    assert run.front.restarts == [MOST_EARLY - 1, 0]
    assert not any(process.is_alive() for process in run.supervisor.processes.values())


def test_where_none_can_be_started_the_server_ends_with_the_reason():
    with pytest.raises(UserError, match="no worker is left; the last ended: exit status 7"):
        Run("dies", "dies")()


def test_what_a_worker_cannot_do_at_the_start_is_not_tried_again():
    run = Run("cannot", "lives")
    with pytest.raises(UserError, match="no student: nowhere; export one"):
        run()
    assert run.announced == 0.0
    assert not any(process.is_alive() for process in run.supervisor.processes.values())


def test_of_two_that_cannot_start_one_is_reported(monkeypatch, caplog):
    started = Supervisor._started
    monkeypatch.setattr(
        Supervisor, "_started", lambda self, tasks: all(t.done() for t in tasks) and started(self, tasks)
    )
    with pytest.raises(UserError, match="no student: nowhere; export one"):
        Run("cannot", "cannot")()
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_a_worker_that_ends_later_is_started_again(capfd):
    def act(run: Run) -> None:
        for _ in range(MOST_EARLY + 1):  # not at its start, so without end
            before = run.front.workers[1].facts["pid"]
            os.kill(before, signal.SIGKILL)
            run.until(lambda before=before: (run.front.workers[1].facts or {"pid": before})["pid"] != before)
        run.hows[0] = "cannot"
        os.kill(run.front.workers[0].facts["pid"], signal.SIGKILL)
        run.until(lambda: run.front.restarts[0] >= 2)
        run.hows[0] = "lives"
        run.until(lambda: run.front.workers[0].ready)

    run = Run("lives", "lives")(act)
    assert run.error is None
    assert run.front.restarts[1] == MOST_EARLY + 1
    noted = capfd.readouterr().err
    assert "worker 1 (place 1) ended (signal 9); it is started again in" in noted
    assert "worker 0 (place 0) ended (no student: nowhere; export one); it is started again in" in noted


@pytest.mark.slow
def test_a_worker_that_hangs_at_the_end_is_ended_in_5_seconds(monkeypatch):
    pids = []

    def act(run: Run) -> None:
        pids.extend(worker.facts["pid"] for worker in run.front.workers)
        run.asked = time.monotonic()

    run = Run("ignores", "lives")(act)
    assert run.error is None
    assert 4 < run.ended - run.asked < 5
    assert not any(alive(pid) for pid in pids)


def test_a_reload_reaches_a_worker_that_is_still_being_started():
    run = Run("reloads", "lives")(
        lambda run: run.until(lambda: run.front.workers[0].limit == 7),
        lambda run: os.kill(os.getpid(), signal.SIGHUP),
    )
    assert run.error is None


def test_a_signal_while_workers_are_being_started_ends_all():
    run = Run("reloads", "reloads")(early=lambda run: os.kill(os.getpid(), signal.SIGTERM))
    assert run.announced == 0.0
    assert not any(process.is_alive() for process in run.supervisor.processes.values())
