"""Two workers behind one port: who gets which viewer, what they share, how one ends alone and all end together."""

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from shutil import which

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from distill.live import protocol
from distill.live.client import Client
from students.weights.checkpoint import save_student
from teachers.errors import UserError
from tests.distill.live.test_uploads import png
from tests.support import tiny
from tests.support.live.serving import eventually
from tests.support.live.workers import Started, alive, started

TOKEN = "a-token-of-24-characters"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


def ask(server: Started, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://{server.address}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def health(server: Started) -> dict:
    return json.loads(ask(server, "/health")[1])


def metric(server: Started, name: str, **labels: str) -> dict[str, float]:
    """Values by worker of the series that has these labels."""
    text = ask(server, "/metrics", **BEARER)[1]
    assert len(re.findall(f"^# TYPE {name} ", text, re.M)) == 1
    rest = "".join(f',{key}="{value}"' for key, value in labels.items())
    found = re.findall(rf'^{name}{{worker="(\w+)"{re.escape(rest)}}} (\S+)$', text, re.M)
    return {worker: float(value) for worker, value in found}


def viewer(server: Started, **more: str) -> Client:
    return Client(f"ws://{server.address}/live", additional_headers=BEARER | more)


def spread(server: Started) -> dict[str, float]:
    return metric(server, "distill_viewers")


def place_of(server: Started, client: Client) -> tuple[int, Client]:
    """The worker whose counter of turns goes up with this client's."""
    before = metric(server, "distill_turns_total")
    client.ask("a")
    eventually(lambda: metric(server, "distill_turns_total") != before, 10)
    after = metric(server, "distill_turns_total")
    (index,) = (int(worker) for worker in after if after[worker] != before[worker])
    return index, client


def end_of(client: Client):
    """How the server closes it; None without a word."""
    with pytest.raises(ConnectionClosed) as closed:
        client.pump(20)
    return closed.value.rcvd


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "token").write_text(TOKEN)
    words = ("--viewers", "4", "--token", f"@{folder / 'token'}", "--peer-viewers", "3")
    with started(folder, *words) as server:
        yield server


@pytest.fixture
def server(shared):
    yield shared
    eventually(lambda: spread(shared) == {"0": 0, "1": 0}, 20)
    assert len(shared.running()) == 2


def test_viewers_spread_over_workers_and_the_one_beyond_all_is_told(server):
    assert "workers on cpu, cpu, up to 4 viewers" in server.line
    clients = []
    for count, wanted in enumerate(([0, 1], [1, 1], [1, 2], [2, 2]), start=1):
        clients.append(viewer(server))
        assert sorted(spread(server).values()) == wanted, f"{count} viewers"
    assert sum(metric(server, "distill_viewers_limit").values()) == 4
    with pytest.raises(UserError, match=r"maximum number of viewers reached \(4\)"):
        viewer(server)
    with connect(f"ws://{server.address}/live", additional_headers=BEARER) as socket_:
        assert json.loads(socket_.recv())["type"] == "full"
        with pytest.raises(ConnectionClosed) as closed:
            socket_.recv(timeout=5)
    assert closed.value.rcvd.code == 1013
    eventually(lambda: health(server) == {"status": "full", "workers": ["full", "full"]}, 10)
    clients.pop(1).close()
    eventually(lambda: sum(spread(server).values()) == 3, 10)
    clients.append(viewer(server))
    assert sorted(spread(server).values()) == [2, 2]
    for client in clients:
        client.close()


def test_a_session_stays_on_its_worker_through_upload_and_turns(server):
    clients = [viewer(server) for _ in range(2)]
    client = clients[0]
    client.socket.send(bytes([protocol.IMAGE]) + png(40, 40))
    client.until(lambda: any(message["type"] == "portrait" for message in client.messages), 60)
    client.send(type="open", portrait=None, text="a person talks", seed=0)
    client.until(lambda: client.origin is not None, 20)
    index, _ = place_of(server, client)
    other = {"0": "1", "1": "0"}[str(index)]
    before = metric(server, "distill_chunks_total")
    for _ in range(3):
        assert ask(server, "/hello", **BEARER)[0] == 200
        client.converse("a b")
    after = metric(server, "distill_chunks_total")
    assert after[str(index)] > before[str(index)]
    assert after[other] == before[other], "the other worker drew for it"
    for one in clients:
        one.close()


def test_every_worker_refuses_what_one_server_does(server):
    port = server.address.rpartition(":")[2]
    before = metric(server, "distill_refused_total", reason="token")
    held = []
    for _ in range(6):  # an idle connection each, so that requests go to both
        held.append(socket.create_connection(("127.0.0.1", int(port))))
        for path in ("/", "/metrics", "/portraits/0.png", "/nowhere"):
            assert ask(server, path) == (401, "a token is required: open the address with ?token=..\n")
        assert ask(server, "/", Host="evil.example", **BEARER)[0] == 403
        assert ask(server, "/", Origin="http://evil.example", **BEARER)[0] == 403
        assert ask(server, "/health", Host="evil.example")[0] == 403
        for wrong in ({}, {"Authorization": f"Bearer {TOKEN}x"}):
            with pytest.raises(InvalidStatus) as refused:
                connect(f"ws://{server.address}/live", additional_headers=wrong)
            assert refused.value.response.status_code == 401
        with pytest.raises(InvalidStatus):
            connect(f"ws://{server.address}/live", additional_headers=BEARER, origin="http://evil.example")
    for one in held:
        one.close()
    after = metric(server, "distill_refused_total", reason="token")
    assert all(after[worker] > before[worker] for worker in ("0", "1")), "one worker was not asked"


def test_a_peer_has_its_viewers_counted_over_all_workers(server):
    peer = {"X-Forwarded-For": "192.0.2.7"}
    clients = [viewer(server, **peer) for _ in range(3)]
    assert sorted(spread(server).values()) == [1, 2]
    with pytest.raises(UserError, match="3 viewers from your address"):
        viewer(server, **peer)
    clients.append(viewer(server))
    clients.pop(0).close()
    eventually(lambda: sum(spread(server).values()) == 3, 10)
    clients.append(viewer(server, **peer))
    for client in clients:
        client.close()


def test_a_connection_is_one_request_so_that_none_becomes_a_viewer_later(server):
    upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + "A" * 22
    second = f"GET /live?token={TOKEN} HTTP/1.1\r\nHost: localhost\r\n{upgrade}==\r\n\r\n"
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as one:
        one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + second.encode())
        found = b""
        while part := one.recv(65_536):
            found += part
    assert found.count(b"HTTP/1.1") == 1
    assert b"connection: close\r\n" in found


def test_another_student_reaches_all_workers(server):
    clients = [viewer(server) for _ in range(2)]
    for client in clients:
        client.open(seed=1)
    before = clients[0].frames[1]
    save_student(server.folder / "student", tiny.a_bundle(seed=5), "card")
    os.kill(server.process.pid, signal.SIGHUP)
    eventually(lambda: server.noted().count("is taken by streams that are opened from now on") == 2, 60)
    for client in clients:
        assert (client.frames[1] == before).all()
        client.send(type="open", portrait=0, text="a person talks", seed=1)
        client.until(lambda client=client: bool((client.frames[1] != before).any()), 10)
        client.close()


@pytest.mark.slow
def test_a_worker_that_is_killed_cuts_its_own_viewers_alone_and_comes_back(tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    with started(tmp_path, "--viewers", "4", "--token", f"@{tmp_path / 'token'}") as server:
        clients = [viewer(server) for _ in range(4)]
        for client in clients:
            client.open()
        places = [place_of(server, client) for client in clients]
        lost, kept = ([client for index, client in places if index == at] for at in (0, 1))
        assert len(lost) == len(kept) == 2
        first = server.pid(0)
        os.kill(first, signal.SIGKILL)
        for client in lost:
            end = end_of(client)
            assert end is not None, "cut without a word"
            assert (end.code, end.reason) == (1012, "this worker has ended; connect again")
        state = health(server)
        assert state["workers"][0] in ("starting", "ended", "ok")
        for client in kept:
            last = client.last
            client.until(lambda client=client, last=last: client.last > last + 4, 20)
        eventually(lambda: health(server)["workers"][0] == "ok", 60)
        assert server.pid(0) != first
        assert re.search(r"worker 0 \(cpu\) ended \(signal 9\); it is started again in 0\.5 s", server.noted())
        assert metric(server, "distill_worker_restarts_total") == {"0": 1, "1": 0}
        assert metric(server, "distill_worker_up") == {"0": 1, "1": 1}
        more = [viewer(server) for _ in range(2)]
        assert spread(server) == {"0": 2, "1": 2}
        for client in (*kept, *more):
            client.close()


@pytest.mark.slow
def test_sigterm_ends_all_talking_workers_in_5_seconds(tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    with started(tmp_path, "--viewers", "4", "--token", f"@{tmp_path / 'token'}") as server:
        clients = [viewer(server) for _ in range(2)]
        for client in clients:
            client.open()
            client.ask("a b c d e f g h i j")
        assert spread(server) == {"0": 1, "1": 1}
        pids = [server.pid(0), server.pid(1)]
        os.kill(server.process.pid, signal.SIGTERM)
        began = time.monotonic()
        with ThreadPoolExecutor(2) as pool:  # whoever sends before it has read all loses what came last
            ends = list(pool.map(end_of, clients))
        for client, end in zip(clients, ends, strict=True):
            assert end.code == 1012
            assert {"type": "note", "message": "this server is closing; connect again in a moment"} in client.messages
        server.process.join(20)
        seconds = time.monotonic() - began
        print(f"ended in {seconds:.2f} s")
        assert seconds < 5
        assert server.process.exitcode == 0
        assert not any(alive(pid) for pid in pids)
        assert "Traceback" not in server.noted()


@pytest.mark.slow
def test_workers_end_without_their_parent(tmp_path):
    with started(tmp_path, "--viewers", "2") as server:
        pids = [server.pid(0), server.pid(1)]
        os.kill(server.process.pid, signal.SIGKILL)
        eventually(lambda: not any(alive(pid) for pid in pids), 10)


@pytest.mark.slow
@pytest.mark.skipif(which("openssl") is None, reason="openssl is not installed: no certificate")
def test_workers_speak_tls_themselves(tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=avatar.test"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(["openssl", *words], check=True, capture_output=True)
    (tmp_path / "token").write_text(TOKEN)
    options = ["--viewers", "2", "--tls-cert", certificate, "--tls-key", key, "--token", f"@{tmp_path / 'token'}"]
    with started(tmp_path, *map(str, options)) as server:
        tls = ssl.create_default_context(cafile=certificate)
        clients = [
            Client(f"wss://{server.address}/live", timeout=60, additional_headers=BEARER, ssl=tls) for _ in range(2)
        ]
        with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2]))) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            plain.settimeout(10)
            assert plain.recv(100) in (b"", b"HTTP/1.1 400 Bad Request\r\n")
        for client in clients:
            client.open()
        with urllib.request.urlopen(f"https://{server.address}/health", context=tls) as answer:
            assert json.load(answer) in (
                {"status": "full", "workers": ["full", "full"]},
                {"status": "ok", "workers": ["ok", "ok"]},
            )
        for client in clients:
            client.close()
