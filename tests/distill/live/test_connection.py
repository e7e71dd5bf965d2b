"""What many messages of one viewer cost: nothing waits for the engine that comes many times a second."""

import json
import threading
import time
from contextlib import suppress
from unittest import mock

import numpy as np
import pytest
from websockets.sync.client import connect

from distill.live import protocol
from distill.live.client import Client
from distill.live.talkers import Echo
from teachers.errors import UserError
from tests.support.live.serving import a_puppet, eventually, serving, shared_decoders


@pytest.mark.slow
def test_a_busy_engine_cuts_nobody_off():
    """Batches of half a second: the playhead 20 times a second and a microphone 25 times, and pings are answered all the time."""
    with serving(a_puppet(), viewers=2) as (address, engine):
        client = Client(f"ws://{address}/live")
        client.open()
        slow = [engine.call(time.sleep, 0.5) for _ in range(1)]
        end, quiet = time.monotonic() + 6.0, bytes([protocol.SOUND]) + bytes(1280)
        while time.monotonic() < end:
            client.socket.send(quiet)
            if slow[-1].done():
                slow.append(engine.call(time.sleep, 0.5))
            client.pump(0.04)
        assert len(slow) > 5
        assert client.last > 20
        eventually(lambda: not engine.calls, 5)
        client.close()


def test_a_talker_begins_while_the_engine_draws():
    busy = []

    class Noting(Echo):
        def speak(self, text):
            busy.append(not slow.done())
            return super().speak(text)

    with serving(a_puppet(), Noting(), viewers=1) as (address, engine):
        client = Client(f"ws://{address}/live")
        client.open()
        slow = engine.call(time.sleep, 2.0)
        answer = client.converse("one two")
        assert busy == [True]
        assert answer.parts_ms["talker"] < 1000 < answer.parts_ms["queue"]
        assert engine.totals.turns == 1
        client.close()


def test_what_is_wrong_with_a_report_is_said_and_counted():
    with serving(a_puppet(), viewers=2) as (address, engine):
        client = Client(f"ws://{address}/live")
        client.open()
        for _ in range(3):
            client.send(type="played", frame=10**6, epoch=client.epoch)
        client.until(lambda: sum("frames were drawn" in m.get("message", "") for m in client.messages) == 3, 5)
        assert engine.viewers[0].mistakes == 3
        client.close()


def test_many_large_messages_fill_no_memory_and_cut_nobody_off():
    """While one is worked on for longer than a ping may wait, two wait and more are refused."""
    go = threading.Event()

    def decode(*_):
        go.wait(30)
        raise UserError("no picture")

    noise = np.random.default_rng(0).integers(0, 256, 2**20, np.uint8).tobytes()
    with serving(a_puppet(), viewers=2) as (address, engine), mock.patch.object(shared_decoders(), "run", decode):
        with connect(f"ws://{address}/live", compression=None, max_size=None) as page:
            page.send(json.dumps({"type": "hello", "version": protocol.VERSION}))
            page.recv()
            for _ in range(5):
                page.send(bytes([protocol.IMAGE]) + noise)
            errors: list[str] = []

            def listen(until: float) -> None:
                while (left := until - time.monotonic()) > 0:
                    with suppress(TimeoutError):
                        message = json.loads(page.recv(timeout=left))
                        errors.extend([message["message"]] if message["type"] == "error" else [])

            listen(time.monotonic() + 6)
            assert errors == ["3 files or long messages wait: one more is refused; send it later"] * 2
            go.set()
            eventually(lambda: listen(time.monotonic() + 0.1) or len(errors) == 5, 20)
            assert errors[2:] == ["no picture"] * 3
            page.send("x" * 100_000)
            eventually(lambda: listen(time.monotonic() + 0.1) or len(errors) == 6, 20)
            assert "100000 characters" in errors[-1]
        eventually(lambda: not engine.viewers, 10)
