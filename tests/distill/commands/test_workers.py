"""`distill serve --workers`: which devices its workers get, and the whole of it as processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest

from distill.cli import main, parse
from distill.commands import workers
from distill.live.client import Client
from students.weights.checkpoint import save_student
from teachers.errors import UserError
from tests.support import tiny
from tests.support.live.serving import eventually
from tests.support.live.workers import alive

ROOT = Path(__file__).resolve().parents[3]


def arguments(*words: str):
    return parse(["serve", "--student", "s", *words])


@pytest.mark.parametrize(
    ("words", "gpus", "wanted"),
    [
        ("", 0, [None]),
        ("", 8, [None]),
        ("--device cuda:1", 8, ["cuda:1"]),
        ("--workers 1", 8, [None]),
        ("--workers 3", 8, ["cuda:0", "cuda:1", "cuda:2"]),
        ("--workers 2 --device cuda", 2, ["cuda:0", "cuda:1"]),
        ("--workers 2", 0, ["cpu", "cpu"]),
        ("--workers 2 --device cpu", 8, ["cpu", "cpu"]),
        ("--device cuda:0,cuda:3", 8, ["cuda:0", "cuda:3"]),
        ("--workers 2 --device cuda:2,cuda:3", 8, ["cuda:2", "cuda:3"]),
    ],
)
def test_each_worker_has_a_device(words, gpus, wanted):
    with mock.patch("torch.cuda.device_count", return_value=gpus):
        assert workers.places(arguments(*words.split())) == wanted


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--workers 0", "give one worker or more"),
        ("--device cuda:0,", "a device for each"),
        ("--workers 3", "this machine has 2 GPUs"),
        ("--workers 3 --device cuda:0,cuda:1", "--device names 2"),
        ("--workers 2 --device cuda:1", "--device names 1"),
        ("--device cuda:0,cuda:0", "names cuda:0 twice"),
        ("--workers 2 --viewers 1", "give one for each at least"),
    ],
)
def test_options_that_contradict_are_refused(words, why, capsys):
    with mock.patch("torch.cuda.device_count", return_value=2):
        assert main(["serve", "--student", "s", *words.split()]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert why in lines[0]


def test_a_launcher_and_workers_are_one_too_many(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="share one stream"):
        workers.places(arguments("--workers", "2", "--device", "cpu"))


def test_a_workers_options_are_its_part_and_no_secret():
    args = arguments("--workers", "3", "--device", "cpu", "--viewers", "5", "--token", "x" * 20, "--livekit", "ws://a")
    args.room = "hall"
    own = [workers._own_arguments(args, ["cpu"] * 3, index) for index in range(3)]
    assert [one.viewers for one in own] == [2, 2, 1]
    assert [one.room for one in own] == ["hall", None, None]
    assert {one.token for one in own} == {None}
    assert args.viewers == 5


@pytest.mark.slow
def test_a_student_that_is_none_is_one_line_and_leaves_nothing():
    before = set(psutil.Process().children(recursive=True))
    command = [sys.executable, "-m", "distill", "serve", "--student", "nowhere", "--port", "0", "--workers", "2"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--talker", "echo"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert [line[:24] for line in done.stderr.splitlines()] == ["distill: no student: now"], done.stderr
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.slow
def test_sigterm_ends_two_spawned_workers_with_talking_viewers(tmp_path):
    save_student(tmp_path / "student", tiny.a_bundle(), "card")
    command = [sys.executable, "-m", "distill", "serve", "--student", tmp_path / "student", "--port", "0"]
    command += ["--talker", "echo", "--workers", "2", "--device", "cpu", "--viewers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes) as process:
        line = process.stdout.readline()
        assert re.match(r"http://127.0.0.1:\d+/  student .*, workers on cpu, cpu, up to 2 viewers", line), line
        clients = [Client(line.split()[0].replace("http", "ws") + "live") for _ in range(2)]
        for client in clients:
            client.open()
            client.ask("a b c d e f g h i j")
        children = psutil.Process(process.pid).children(recursive=True)
        pids = [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert len(pids) == 2
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        while any(alive(pid) for pid in pids):
            time.sleep(0.02)
        seconds = time.monotonic() - began
        assert process.wait(30) == 0  # most of it Python taking its modules down
        print(f"workers ended in {seconds:.2f} s, all in {time.monotonic() - began:.2f} s")
        assert seconds < 5
        eventually(
            lambda: not any(alive(child.pid) for child in children), 10
        )  # Python's own tracker ends behind its parent
        assert "Traceback" not in process.stderr.read()
