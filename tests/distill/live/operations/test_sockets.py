"""Half requests, silent sockets, too many of one peer: closed, and the server goes on."""

import socket
import time
from contextlib import suppress

import pytest

from distill.live.client import Client
from distill.live.operations import sockets
from distill.live.operations.sockets import DrainingServer
from distill.live.scheduler import Engine
from distill.live.server import build_app
from distill.live.talkers import Echo
from teachers.errors import UserError
from tests.support import tiny
from tests.support.live.serving import a_puppet, eventually, serving

PATIENCE = 0.6


@pytest.fixture(scope="module")
def served():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sockets, "REQUEST_SECONDS", PATIENCE)
        with serving(a_puppet(), viewers=8) as (address, engine):
            yield address, engine


def dial(address: str, data: bytes = b"") -> socket.socket:
    host, _, port = address.partition(":")
    made = socket.create_connection((host, int(port)), timeout=15)
    if data:
        made.sendall(data)
    return made


def read_to_end(one: socket.socket) -> bytes:
    found = b""
    with suppress(ConnectionResetError):
        while part := one.recv(65536):
            found += part
    return found


WHOLE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALF = {
    "nothing": b"",
    "a letter": b"G",
    "half a request": WHOLE[:30],
    "half headers": b"GET /live HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n",
    "half a body": b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\nabc",
    "a second half": WHOLE + WHOLE[:20],
    "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(20),
}


@pytest.mark.parametrize("what", list(HALF))
def test_what_never_becomes_a_request_is_closed(served, what):
    address, _ = served
    began = time.monotonic()
    with dial(address, HALF[what]) as one:
        found = read_to_end(one)
    assert time.monotonic() - began < PATIENCE + 8
    assert b"200 OK" in found or not found or found.startswith(b"HTTP/1.1 4")
    with dial(address, WHOLE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")) as one:
        assert b'"ok"' in read_to_end(one)


def test_a_request_a_letter_at_a_time_does_not_buy_time(served):
    address, _ = served
    began = time.monotonic()
    with dial(address) as one, suppress(OSError):
        for letter in WHOLE * 2:
            one.sendall(bytes([letter]))
            time.sleep(0.1)
            one.settimeout(0.01)
            with suppress(TimeoutError):
                if one.recv(1) == b"":
                    break
    assert time.monotonic() - began < PATIENCE + 5


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff\xfe garbage\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 2_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 2_000_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    ],
    ids=["garbage", "version", "long path", "long header", "length"],
)
def test_malformed_and_oversized_requests_are_answered_and_closed(served, data):
    address, _ = served
    with dial(address) as one:
        with suppress(OSError):
            one.sendall(data)
        found = read_to_end(one)
    assert not found or b" 4" in found.splitlines()[0]
    with dial(address, WHOLE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")) as one:
        assert b'"ok"' in read_to_end(one)


def test_a_viewer_is_not_closed_for_being_patient(served):
    address, engine = served
    client = Client(f"ws://{address}/live")
    client.open()
    client.pump(3 * PATIENCE)
    assert client.last > 8
    client.close()
    eventually(lambda: not engine.viewers, 10)


def test_sockets_of_one_peer_are_few(served, monkeypatch):
    address, _ = served
    monkeypatch.setattr(sockets, "is_loopback", lambda peer: False)
    monkeypatch.setattr(sockets, "MOST_SOCKETS", 3)
    held = [dial(address) for _ in range(3)]
    time.sleep(0.2)
    with dial(address, WHOLE) as one:
        assert read_to_end(one) == b""
    for one in held:
        read_to_end(one)
        one.close()
    with dial(address, WHOLE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")) as one:
        assert b'"ok"' in read_to_end(one)


@pytest.mark.skipif(not hasattr(socket, "TCP_CONGESTION"), reason="the system names no congestion control; Linux does")
def test_each_connection_has_the_congestion_control_that_bears_loss(served, monkeypatch):
    """BBR, where the system allows it; else what it had."""
    address, _ = served
    option, choose, found = (socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16), sockets.choose_congestion_control, []
    with socket.socket() as probe:
        probe.setsockopt(*option[:2], b"reno")
        with suppress(OSError):
            probe.setsockopt(*option[:2], b"bbr")
        best = probe.getsockopt(*option)

    def recorded(connection):
        connection.setsockopt(*option[:2], b"reno")
        choose(connection)
        found.append(connection.getsockopt(*option))

    monkeypatch.setattr(sockets, "choose_congestion_control", recorded)
    with dial(address, WHOLE) as one:
        assert one.recv(1)
    assert found == [best]
    choose(None)
    with socket.socketpair()[0] as local:
        choose(local)


def test_files_that_are_no_certificate_are_one_line(tmp_path):
    (tmp_path / "a.pem").write_text("nothing")
    engine = Engine(a_puppet(), Echo(), 1)
    app = build_app(engine, [tiny.a_portrait()])
    for certificate in (tmp_path / "a.pem", tmp_path / "none.pem"):
        with pytest.raises(UserError, match="--tls-cert, --tls-key"):
            DrainingServer(app, "127.0.0.1", 0, certificate, certificate)
