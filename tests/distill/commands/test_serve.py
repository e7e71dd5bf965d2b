"""`distill serve` as a process: how it ends, what it needs beyond this machine, and what it says of a mistake."""

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest
from websockets.exceptions import ConnectionClosed

from distill.cli import main
from distill.live.client import Client
from students.weights.checkpoint import save_student
from tests.support import tiny
from tests.support.processes import kill, start

ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def a_server(folder: Path, *words: str):
    """`distill serve` of a student in `folder`: its process and its first line."""
    command = [sys.executable, "-m", "distill", "serve", "--student", folder, "--port", "0", "--talker", "echo", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("http"), line + process.stderr.read()
            yield process, line
        finally:
            process.kill()


def line_of(file: TextIO, process) -> str:
    """The next line that a process writes."""
    line = ""
    while not line.endswith("\n"):
        assert process.is_alive(), f"it ended: {line}"
        line += file.readline()
        time.sleep(0.01)
    return line


@contextmanager
def a_forked_server(folder: Path, *words: str):
    """`a_server` with all imports done, and its stderr."""
    output, errors = (folder.parent / name for name in ("output", "errors"))
    output.touch()
    errors.touch()
    command = ["serve", "--student", folder, "--port", "0", "--talker", "echo", *words]
    process = start([str(word) for word in command], errors, output)
    try:
        with output.open() as said, errors.open() as noted:
            yield process, line_of(said, process), noted
    finally:
        kill(process)


@pytest.mark.slow
def test_sigterm_ends_a_talking_server_cleanly(tmp_path):
    save_student(tmp_path / "student", tiny.a_bundle(), "card")
    with a_server(tmp_path / "student") as (process, line):
        assert line.startswith("http://127.0.0.1:")
        client = Client(line.split()[0].replace("http", "ws") + "live")
        client.open()
        client.ask("a b c d e f g h i j")
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        with pytest.raises(ConnectionClosed) as closed:
            client.pump(20)
        assert time.monotonic() - began < 5
        assert closed.value.rcvd.code == 1012
        assert {"type": "note", "message": "this server is closing; connect again in a moment"} in client.messages
        assert process.wait(30) == 0  # most of it Python taking its modules down
        assert "Traceback" not in process.stderr.read()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed: no certificate")
def test_a_server_for_others_has_tls_a_token_a_name_a_mark_and_another_student(tmp_path):
    certificate, key, folder = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "student"
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=avatar.test"]
    words += ["-addext", "subjectAltName=DNS:avatar.test,IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(["openssl", *words], check=True, capture_output=True)
    save_student(folder, tiny.a_bundle(), "card")
    options = ["--host", "0.0.0.0", "--token", "auto", "--tls-cert", certificate, "--tls-key", key]
    options += ["--allow-host", "avatar.test", "--mark", "AI"]
    with a_forked_server(folder, *options) as (process, line, noted):
        address, _, token = line.split()[0].partition("/?token=")
        assert address.startswith("https://0.0.0.0:")
        assert len(token) >= 32
        assert "  student" in line
        port, tls = address.rpartition(":")[2], ssl.create_default_context(cafile=certificate)
        base = f"https://127.0.0.1:{port}"

        def ask(path: str, **headers: str) -> int:
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(base + path, headers=headers), context=tls
                ) as answer:
                    return answer.status
            except urllib.error.HTTPError as error:
                return error.code

        assert ask("/health") == 200
        assert ask("/") == 401
        assert ask(f"/portraits/0.png?token={token}") == 200
        assert ask(f"/portraits/0.png?token={token}", Host=f"avatar.test:{port}") == 200
        assert ask(f"/portraits/0.png?token={token}", Host="evil.test") == 403
        url, bearer = f"wss://127.0.0.1:{port}/live", {"Authorization": f"Bearer {token}"}
        client = Client(url, additional_headers=bearer, ssl=tls)
        client.open(seed=1)
        before = client.frames[1]
        assert (before[-3, 1:9].max(axis=0) > 200).any(), "the mark is not there"
        save_student(folder, tiny.a_bundle(seed=5), "card")
        os.kill(process.pid, signal.SIGHUP)
        text = ""
        while "is taken by streams" not in text:
            assert process.is_alive(), text
            client.pump(0.05)
            text += noted.read()
        client.send(type="open", portrait=0, text="a person talks", seed=1)
        client.until(lambda: bool((client.frames[1] != before).any()), 10)
        client.close()
        os.kill(process.pid, signal.SIGTERM)
        process.join(30)
        assert process.exitcode == 0


def test_a_mistake_is_one_line(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, given in (
            (["--student", "nowhere", "--port", "0"], "no student"),
            (["--student", str(tmp_path), "--port", port], "cannot serve on"),
            (["--student", str(tmp_path), "--port", "70000"], "--port"),
            (["--student", str(tmp_path), "--talker", "nobody"], "no talker"),
            (["--student", str(tmp_path), "--transcribe", "http://x/v1"], "--transcribe is of conversation mode"),
            (
                ["--student", str(tmp_path), "--answer", "http://127.0.0.1:9/v1"],
                "--answer: no answer (ConnectionRefused",
            ),
            (["--student", str(tmp_path), "--host", "0.0.0.0"], "--host 0.0.0.0: whoever reaches it"),
            (["--student", str(tmp_path), "--token", "short"], "--token: give 16 characters"),
            (["--student", str(tmp_path), "--token", "@nowhere"], "--token @nowhere: cannot be read"),
            (["--student", str(tmp_path), "--tls-cert", "x.pem"], "--tls-cert and --tls-key belong together"),
            (["--student", str(tmp_path), "--viewers", "0"], "--viewers"),
        ):
            assert main(["serve", "--port", "0", *words]) == 2
            lines = capsys.readouterr().err.strip().splitlines()
            assert len(lines) == 1
            assert given in lines[0]


def test_without_its_libraries_serve_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", "--student", "x"]) == 2
    assert "pip install 'avatar-distill[serve]'" in capsys.readouterr().err
