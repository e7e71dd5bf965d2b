"""`distill serve`: many viewers, rude ones, vanishing ones, and the end."""

import base64
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.sync.server import serve

from distill.live import protocol
from distill.live.client import Client
from teachers.errors import UserError
from teachers.guidance import EmbeddedScales, GuidanceRange
from tests.distill.live.test_uploads import png, wav
from tests.support.live.serving import a_puppet, eventually, serving

HELLO = json.dumps({"type": "hello", "version": protocol.VERSION})
ROOT = Path(__file__).resolve().parents[3]
FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS", "5"))


@pytest.fixture(scope="module")
def served():
    with serving(a_puppet(), viewers=3) as (address, engine):
        yield address, engine


@pytest.fixture
def url(served):
    address, engine = served
    yield f"ws://{address}/live"
    eventually(lambda: not engine.viewers, 20.0)
    assert engine.thread.is_alive()
    assert engine.totals.errors == 0


def get(address: str, path: str, **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(f"http://{address}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def still_answers(url: str) -> None:
    client = Client(url)
    client.open()
    client.close()


def closing(socket_) -> int | None:
    """The code with which the server closes; TimeoutError when it does not."""
    try:
        while True:
            socket_.recv(timeout=5)
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd is not None else None


def test_a_turn_is_answered_in_the_stream_without_a_gap(url):
    client = Client(url)
    client.open()
    answer = client.converse("two words")
    numbers = sorted(client.frames)
    assert numbers == list(range(numbers[-1] + 1))
    loud = [n for n in numbers if np.abs(client.sound[n]).max() > 0.05]
    assert loud[0] == answer.frame
    assert all((client.frames[n][11, 8, 0] > 60) == (n in loud) for n in numbers if n < answer.frame + 2)
    assert answer.latency < 5.0
    assert set(answer.parts_ms) == {"talker", "queue", "wait", "encode", "denoise", "decode", "rest"}
    client.close()


def test_guidance_changes_the_stream_that_asks_for_it(url):
    """A range that was not trained, and a student without scales, are each an error; the stream goes on."""
    scales = EmbeddedScales(text=GuidanceRange(), audio=GuidanceRange(served=1.5))
    with serving(a_puppet(guidance=scales), viewers=2) as (address, engine), Client(f"ws://{address}/live") as client:
        assert client.hello["guidance"]["audio"] == {"least": 1.0, "most": 2.0, "served": 1.5}
        client.open()
        client.send(type="guidance", scales={"audio": 2.0})
        client.until(lambda: {"type": "guidance", "scales": {"audio": 2.0}} in client.messages, 10.0)
        (session,) = [viewer.session for viewer in engine.viewers]
        client.until(lambda: session.guidance == {"text": 1.25, "audio": 2.0}, 10.0)
        client.send(type="guidance", scales={"audio": 9.0})
        client.until(lambda: "was trained from 1.0 to 2.0" in client.messages[-1].get("message", ""), 10.0)
    with Client(url) as client:
        assert client.hello["guidance"] == {}
        client.open()
        client.send(type="guidance", scales={"audio": 2.0})
        client.until(lambda: "embeds none" in client.messages[-1].get("message", ""), 10.0)


def test_viewers_never_mix_and_the_one_too_many_is_refused(url):
    clients = [Client(url) for _ in range(3)]
    with pytest.raises(UserError, match=r"maximum number of viewers reached \(3\)"):
        Client(url)
    for seed, client in enumerate(clients):
        client.open(portrait=seed, text=("a person nods", "someone smiles", "x")[seed], seed=seed)
    faults = []

    def talk(client, words):
        try:
            client.converse(" ".join(["word"] * words))
        except Exception as error:  # reported to the test below
            faults.append(error)

    threads = [threading.Thread(target=talk, args=(client, i + 1)) for i, client in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert faults == []
    for words, client in enumerate(clients, start=1):
        loud = [n for n in sorted(client.sound) if np.abs(client.sound[n]).max() > 0.05]
        beeps = 1 + sum(b - a > 1 for a, b in pairwise(loud))
        assert beeps == words, "another viewer's speech"
    walls = [{int(frame[5, 14, 0]) for frame in client.frames.values()} for client in clients]
    assert all(len(wall) == 1 for wall in walls), "another viewer's text"
    assert len(set.union(*walls)) == 3
    for client in clients:
        client.close()


def test_a_viewer_who_vanishes_or_is_frozen_is_freed_in_5_seconds(served, url):
    _, engine = served
    code = f"""
from websockets.sync.client import connect
with connect({url!r}) as page:
    page.recv()
    page.send({HELLO!r})
    page.send('{{"type": "open"}}')
    page.send('{{"type": "say", "text": "a b c d e f g h"}}')
    while True:
        if isinstance(page.recv(), bytes):
            print("here", flush=True)
"""
    for how in (signal.SIGKILL, signal.SIGSTOP):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"here\n"
            assert len(engine.viewers) == 1
            process.send_signal(how)
            try:
                seconds = eventually(lambda: not engine.viewers, 20.0)
            finally:
                process.kill()
        assert seconds < 5
    still_answers(url)


def test_a_viewer_who_does_not_read_holds_no_memory_and_no_one_up(served, url):
    _, engine = served
    with connect(url, compression=None) as rude:
        rude.recv()
        rude.send(HELLO)
        rude.send('{"type": "open"}')
        eventually(lambda: engine.viewers and engine.viewers[0].session is not None, 20)
        time.sleep(1.0)
        assert engine.viewers[0].session.point.frame <= 3 * 4
        still_answers(url)


def test_other_sites_names_and_paths_are_refused(served, url):
    address, _ = served
    port = address.rpartition(":")[2]
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"http://127.0.0.1.evil.example:{port}"):
        with pytest.raises(InvalidStatus):
            connect(url, origin=origin)
        assert get(address, "/", Origin=origin)[0] == 403
    with connect(url, origin=f"http://{address}") as socket_:
        assert json.loads(socket_.recv())["type"] == "hello"
    assert get(address, "/", Host="evil.example")[0] == 403
    assert get(address, "/", Host=f"localhost:{port}")[0] == 200
    for path in (
        "/../pyproject.toml",
        "/portraits/../../pyproject.toml",
        "/portraits/%2e%2e/%2e%2e/etc/passwd",
        "/page.html",
    ):
        assert get(address, path)[0] == 404
    for path in ("/page/..%2fserver.py", "/page/server.py", "/page/%2e%2e/client.py", "/page/"):
        assert get(address, path)[0] == 404
    assert get(address, "/page/main.js")[0] == 200
    assert get(address, "/portraits/0.png")[1].startswith(b"\x89PNG")
    assert get(address, "/portraits/99.png")[0] == 404
    assert get(address, "/portraits/-1.png")[0] == 404


def test_uploads_are_bounded_before_they_are_read(url):
    for size in (protocol.MAX_MESSAGE + 2, 200 * 2**20):
        with connect(url, compression=None, max_size=None) as socket_:
            socket_.recv()
            socket_.send(HELLO)
            with suppress(ConnectionClosed):
                socket_.send(bytes([protocol.FILE]) + bytes(size))
            assert closing(socket_) in (None, 1009)
    client = Client(url)
    for data in (b"\x01PK\x03\x04zip", b"\x02PK\x03\x04zip", b"\x01", b"\x07abc", b"\x00\x01"):
        client.socket.send(data)
    client.until(lambda: sum(message["type"] == "error" for message in client.messages) == 5, 120)
    assert all(len(message["message"]) < 300 for message in client.messages)
    client.open()
    client.close()


def test_files_are_decoded_in_another_process(url, monkeypatch):
    """This process could not read one."""
    monkeypatch.setattr("PIL.Image.open", None)
    monkeypatch.setattr("teachers.media.sound._Track.__init__", None)
    client = Client(url)
    client.socket.send(bytes([protocol.IMAGE]) + png(40, 40))
    client.until(lambda: any(message["type"] == "portrait" for message in client.messages), 120)
    (answer,) = (message for message in client.messages if message["type"] == "portrait")
    kind, _, seen = answer["image"].partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(seen) == png(16, 16)
    assert answer["note"] == ""
    client.open()
    client.socket.send(bytes([protocol.FILE]) + wav(0.5))
    client.until(lambda: client.answers, 120)
    client.close()


def test_after_20_mistakes_a_page_is_shut_out(url):
    with connect(url) as socket_:
        socket_.send(HELLO)
        for _ in range(25):
            socket_.send("{")
        assert closing(socket_) == 1001
    still_answers(url)


@pytest.mark.parametrize(
    ("first", "why"),
    [
        ('{"type": "hello", "version": 2}', "the client speaks protocol 2, this side 1; update the older one"),
        ('{"type": "open"}', 'the first message must be {"type": "hello", "version": 1}'),
        ('{"type": "hello"}', 'the first message must be {"type": "hello", "version": 1}'),
        (b"\x00\x00\x00", 'the first message must be {"type": "hello", "version": 1}'),
    ],
)
def test_a_client_of_another_version_is_refused_in_one_line_and_closed(url, first, why):
    with connect(url) as socket_:
        assert json.loads(socket_.recv())["version"] == protocol.VERSION
        socket_.send(first)
        answer = json.loads(socket_.recv())
        assert answer["type"] == "error"
        assert why in answer["message"]
        assert "\n" not in answer["message"]
        assert closing(socket_) == 1001
    still_answers(url)


def test_the_client_refuses_a_server_of_another_version():
    def answer(page):
        page.send(json.dumps({"type": "hello", "version": 2}))
        page.recv()

    with serve(answer, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with pytest.raises(UserError, match="the server speaks protocol 2, this side 1; update the older one"):
            Client(f"ws://127.0.0.1:{server.socket.getsockname()[1]}/live")
        server.shutdown()
        thread.join()


def test_a_client_speaks_through_the_avatar_and_interrupts_it(url):
    with Client(url) as client:
        client.open()
        said = 0.4 * np.sin(np.arange(16_000 * 3 // 2) * 0.157).astype(np.float32)
        for piece in np.array_split(said, 7):
            client.speak(piece)
        client.spoken()
        client.until(lambda: client.answers and client.answers[1].end is not None, 10)
        answer = client.answers[1]
        client.until(lambda: min(client.place(), client.last) > answer.end, 10)
        heard = np.concatenate([client.sound[n] for n in range(answer.frame, answer.end)])
        assert np.abs(heard[: len(said)] - said).max() < 1e-4
        assert not heard[len(said) :].any()
        open_ = [n for n in sorted(client.frames) if client.frames[n][11, 8, 0] > 60]
        assert open_ == list(range(answer.frame, answer.frame + 19))  # of 18.75 frames of sound
        for _ in range(30):
            client.speak(said)
        client.until(lambda: 2 in client.answers and client.answers[2].frame is not None, 10)
        client.pump(0.5)
        client.interrupt()
        client.until(lambda: client.answers[2].end is not None, 5)
        client.pump(1.0)
        assert not any(np.abs(client.sound[n]).max() > 0.01 for n in client.sound if n >= client.answers[2].end)


def a_mess(rng: random.Random) -> str | bytes:
    """One message: valid, nearly valid, or noise."""
    if rng.random() < 0.3:
        marks = (
            b"",
            b"\x00",
            b"\x01\x89PNG\r\n\x1a\n",
            b"\x02RIFF\x00\x00\x00\x00WAVEfmt ",
            b"\x01\xff\xd8\xff",
            b"\x02ID3",
        )
        return rng.choice(marks) + rng.randbytes(rng.choice((0, 1, 2, 1280, 5000)))
    if rng.random() < 0.2:
        return "".join(
            chr(rng.choice((34, 123, 125, 91, 93, 58, 92, 0, 0x20AC, 0x1F600, rng.randrange(32, 127))))
            for _ in range(40)
        )
    value = lambda: rng.choice((0, 1, -1, 3, 10**9, 10**30, 0.5, None, True, "", "x", "a b", [], {}, "\x00", "\ud800"))  # noqa: E731
    message = {"type": rng.choice((*protocol.MESSAGES, "quit", ""))}
    for name in rng.sample(
        ("portrait", "text", "scales", "seed", "frame", "epoch", "turn", "ms", "on", "odd"), rng.randrange(4)
    ):
        message[name] = value()
    if rng.random() < 0.6:  # well formed
        message = rng.choice(
            (
                {"type": "open", "portrait": rng.randrange(6), "text": "x"},
                {"type": "say", "text": "some words"},
                {"type": "text", "text": "y" * rng.randrange(600)},
                {"type": "interrupt"},
                {"type": "guidance", "scales": {"audio": rng.choice((1.0, 9.0))}},
                {"type": "played", "frame": rng.randrange(-3, 50), "epoch": rng.randrange(9)},
                {"type": "microphone", "on": rng.random() < 0.5},
            )
        )
    return json.dumps(message)


def test_noise_on_the_line_ends_no_other_stream(served, url):
    """FUZZ_SECONDS=300 for the long one; the same seed sends the same messages."""
    rng, bystander = random.Random(int(os.environ.get("FUZZ_SEED", "0"))), Client(url, keep=False)
    bystander.open()
    end, sent, last = time.monotonic() + FUZZ_SECONDS, 0, -1
    while time.monotonic() < end:
        try:
            with connect(url, compression=None, close_timeout=0.5) as socket_:
                if rng.random() < 0.9:
                    socket_.send(HELLO)
                for _ in range(rng.randrange(1, 60)):
                    socket_.send(a_mess(rng))
                    sent += 1
                    bystander.pump(0.002)
                if rng.random() < 0.3:
                    socket_.socket.shutdown(socket.SHUT_RDWR)
        except (ConnectionClosed, OSError):
            pass
        bystander.pump(0.02)
    assert sent > 20, "the line itself is too slow"
    last = bystander.last
    bystander.until(lambda: bystander.last > last, 5)
    print(f"{sent} messages")
    assert get(served[0], "/metrics")[0] == 200
    bystander.close()


def test_metrics_count_what_happened(served, url):
    address, _ = served
    still_answers(url)
    lines = get(address, "/metrics")[1].decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["distill_viewers_limit"]) == 3
    assert float(values["distill_chunks_total"]) > 0
    assert float(values["distill_chunk_seconds_count"]) == float(values["distill_chunks_total"])
    assert values['distill_chunk_seconds_bucket{le="+Inf"}'] == values["distill_chunk_seconds_count"]
    assert float(values["process_resident_memory_bytes"]) > 1e6
