"""A rank that is killed, or fails, ends the others with one line, whatever they wait for; a clean end says nothing.

`worker` is one rank of the scene that the file `scene` of its folder names.
"""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from distill.pipeline import stages
from distill.training.config import EngineConfig
from distill.training.engines.engine import Engine
from distill.training.lifecycle import watch
from teachers.errors import UserError
from tests.support.processes import start_ranks


def worker(folder: Path) -> None:
    scene = (folder / "scene").read_text()
    watch.GRACE_SECONDS = 60.0 if scene == "all fail" else 0.5
    engine = Engine(EngineConfig(precision="fp32"))
    assert Engine(EngineConfig(precision="fp32"))._watch is engine._watch, "one for the process group"
    engine.barrier()
    if scene == "all end":
        return engine.close()
    if scene == "all fail":
        engine.close(failed=True)
        raise UserError("the recipe is wrong")
    if engine.rank == int(scene[0]) if scene[0].isdigit() else False:
        time.sleep(0.3)
        if "fails" in scene:
            engine.close(failed=True)
            os._exit(2)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        engine.barrier() if "collective" in scene else time.sleep(100)  # as a GPU's queue, which nothing interrupts
    except RuntimeError:
        engine.settle()
        raise
    return None


def outcome(folder: Path, scene: str) -> tuple[list[int], list[list[str]], float]:
    """Exit statuses of two ranks, the lines that each has left, and seconds until the last has ended."""
    (folder / "scene").write_text(scene)
    processes = start_ranks(__file__, folder, 2)
    began = time.monotonic()
    for process in processes:
        process.join(100)
    texts = [(folder / f"{rank}.log").read_text() for rank in range(2)]
    lines = [[line for line in text.splitlines() if line.startswith("distill: ")] for text in texts]
    return [process.exitcode for process in processes], lines, time.monotonic() - began


@pytest.mark.parametrize("scene", ["0 is killed", "1 is killed", "1 is killed in a collective", "1 fails"])
def test_the_end_of_one_rank_ends_the_other_with_a_word(tmp_path, scene):
    codes, lines, seconds = outcome(tmp_path, scene)
    ended = int(scene[0])
    assert codes[ended] == (2 if "fails" in scene else -signal.SIGKILL)
    assert codes[1 - ended] == 1
    assert len(lines[1 - ended]) == 1
    words = "has failed, see its message" if "fails" in scene else "was killed, or its machine was lost"
    line = lines[1 - ended][0]
    assert line.startswith(f"distill: rank {ended} (process ")
    assert line.endswith(f" on {socket.gethostname()}) {words}: all ranks end; the same command continues")
    assert "Traceback" not in (tmp_path / f"{1 - ended}.log").read_text()
    assert seconds < 60


@pytest.mark.parametrize("scene", ["all end", "all fail"])
def test_ranks_that_end_together_say_nothing_of_each_other(tmp_path, scene):
    codes, lines, _ = outcome(tmp_path, scene)
    assert codes == ([0, 0] if scene == "all end" else [1, 1])
    assert lines == [[], []]


def test_a_machine_that_is_lost_is_given_up_within_a_minute():
    """The system's own packets; a peer that lives answers them even while it computes."""
    assert watch.LOST_SECONDS <= 50
    with socket.create_server(("localhost", 0)) as server:
        link = watch._kept_alive(socket.create_connection(server.getsockname()))
        assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        idle, interval, probes = (link.getsockopt(socket.IPPROTO_TCP, name) for name in names)
        assert idle + interval * probes == watch.LOST_SECONDS
        link.close()


def test_a_stranger_at_the_port_is_sent_away():
    with socket.create_server(("localhost", 0)) as server:
        kept = watch.Watch(0, "key", server)
        try:
            with socket.create_connection(server.getsockname()) as stranger:
                stranger.sendall(b"lock 1 nobody\n")
                assert stranger.recv(1) == b""
            assert kept.peers == []
        finally:
            kept.close()


@pytest.mark.parametrize(
    ("error", "settled", "failed"),
    [(UserError("x"), 0, True), (RuntimeError("x"), 1, True), (SystemExit(143), 0, False)],
)
def test_a_run_that_fails_waits_for_no_rank(monkeypatch, error, settled, failed):
    """Its message would come after the others' time-out; but a stop is one that all have agreed on."""
    calls = []

    class Fake:
        def __init__(self, *_):
            """An engine that notes what is asked of it."""

        def settle(self) -> None:
            calls.append("settle")

        def close(self, failed: bool = False) -> None:
            calls.append(failed)

    def pipeline(*_):
        raise error

    monkeypatch.setattr(stages, "Engine", Fake)
    monkeypatch.setattr(stages, "Pipeline", pipeline)
    recipe = type("Recipe", (), {"tracker": "none", "engine": None, "threads": None})
    with pytest.raises(type(error)):
        stages.run(recipe)
    assert calls == ["settle"] * settled + [failed]
