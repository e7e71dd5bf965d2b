"""What one viewer may send, and how many viewers one peer may be."""

import json

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from distill.live.client import Client
from distill.live.operations import limits
from distill.live.operations.limits import RATES, Allowance, Peers, Rate
from teachers.errors import UserError
from tests.support.live.serving import a_puppet, eventually, serving


def test_a_burst_then_its_rate():
    allowance = Allowance({"message": Rate(10, 20), "say": Rate(1, 3)})
    for _ in range(3):
        allowance.take("say", 0.0)
    with pytest.raises(UserError, match="too many 'say': 1 a second are allowed, 3 at once"):
        allowance.take("say", 0.0)
    for second in range(1, 20):
        allowance.take("say", float(second))
        with pytest.raises(UserError):
            allowance.take("say", second + 0.5)
    allowance.take("say", 10**6)
    for _ in range(2):
        allowance.take("say", 10**6)
    with pytest.raises(UserError):
        allowance.take("say", 10**6)
    for _ in range(20):
        allowance.take("played", 0.0)
        if _ % 2:
            allowance.take("seen", 0.0, 0.0)
    with pytest.raises(UserError, match="too many messages"):
        allowance.take("seen", 0.0)


def test_what_a_page_sends_is_within_the_rates():
    """The playhead 20 times a second, a microphone 25 times, for minutes."""
    allowance = Allowance()
    for i in range(10_000):
        now = i / 25
        allowance.take("played", now)
        allowance.take("sound", now, 640 / 16000)
        if i % 50 == 0:
            allowance.take("say", now)
    with pytest.raises(UserError, match="seconds of sound"):
        allowance.take("sound", now, RATES["sound"].burst + 1)


def test_viewers_of_one_address_are_few_and_this_machine_is_free():
    peers = Peers(2)
    assert [peers.enter("192.0.2.1") for _ in range(2)] == ["", ""]
    assert peers.enter("192.0.2.1") == "2 viewers from your address are here already; close one first"
    assert peers.enter("192.0.2.2") == ""
    peers.leave("192.0.2.1")
    assert peers.enter("192.0.2.1") == ""
    assert not any(peers.enter("127.0.0.1") for _ in range(50))
    for peer in list(peers.count):
        while peer in peers.count:
            peers.leave(peer)
    assert peers.count == {}


def test_a_flood_is_refused_then_shut_out_and_nobody_else_feels_it(monkeypatch):
    monkeypatch.setitem(RATES, "text", Rate(2, 3))
    with serving(a_puppet(), viewers=3) as (address, engine):
        url = f"ws://{address}/live"
        bystander = Client(url)
        bystander.open()
        with connect(url) as flood:
            hello = json.loads(flood.recv())
            if "version" in hello:
                flood.send(json.dumps({"type": "hello", "version": hello["version"]}))
            flood.send('{"type": "open"}')
            for _ in range(40):
                flood.send('{"type": "text", "text": "x"}')
            errors, code = [], None
            try:
                while True:
                    message = flood.recv(timeout=10)
                    if isinstance(message, str) and (read := json.loads(message))["type"] == "error":
                        errors.append(read["message"])
            except ConnectionClosed as closed:
                code = closed.rcvd and closed.rcvd.code
        assert code == 1001
        assert errors[0].startswith("too many 'text'")
        assert errors[-1] == "20 messages were refused: closed"
        last = bystander.last
        bystander.until(lambda: bystander.last > last, 5)
        bystander.close()
        eventually(lambda: not engine.viewers, 10)


def test_a_peer_with_too_many_viewers_is_told(monkeypatch):
    monkeypatch.setattr(limits, "is_loopback", lambda peer: False)
    with serving(a_puppet(), viewers=8) as (address, engine):
        url = f"ws://{address}/live"
        clients = [Client(url) for _ in range(4)]
        with pytest.raises(UserError, match="4 viewers from your address"):
            Client(url)
        clients.pop().close()
        eventually(lambda: len(engine.viewers) == 3, 10)
        clients.append(Client(url))
        for client in clients:
            client.close()
        eventually(lambda: not engine.viewers, 10)
