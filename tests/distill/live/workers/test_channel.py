"""Messages and sockets between two processes, here between two ends in one."""

import asyncio
import os
import socket

import pytest

from distill.live.workers.channel import Asking, Channel, send_at_once


async def until(condition, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def test_messages_come_whole_in_order_each_with_its_socket():
    async def go() -> None:
        came = []
        ends = socket.socketpair()
        one = Channel(ends[0], lambda *_: None)
        Channel(ends[1], lambda message, file: came.append((message, file)))
        pairs = [socket.socketpair() for _ in range(5)]
        for number, (mine, _) in enumerate(pairs):
            one.send({"number": number}, mine)
            one.send({"text": "x" * 500_000 if number == 2 else "y"})
        await until(lambda: len(came) == 10)
        assert [message.get("number") for message, _ in came[::2]] == list(range(5))
        assert [len(message["text"]) for message, _ in came[1::2]] == [1, 1, 500_000, 1, 1]
        assert all(file is None for _, file in came[1::2])
        for number, ((mine, theirs), (_, file)) in enumerate(zip(pairs, came[::2], strict=True)):
            assert mine.fileno() == -1, "this process has kept its copy"
            file.send(b"%d" % number)
            assert theirs.recv(10) == b"%d" % number
            assert not os.get_inheritable(file.fileno())
            file.close()
            assert theirs.recv(10) == b"", "a copy is open somewhere"

    asyncio.run(go())


def test_the_end_of_the_other_side_is_noticed_once_and_nothing_stays_open():
    async def go() -> None:
        gone = []
        ends = socket.socketpair()
        one = Channel(ends[0], lambda *_: None, lambda: gone.append(True))
        mine, theirs = socket.socketpair()
        one.send({"fill": "x" * 2_000_000})  # nobody reads it
        one.send({"late": True}, mine)
        ends[1].close()
        await until(lambda: gone)
        assert theirs.recv(10) == b""
        one.send({"later": True})
        one.close()
        assert gone == [True]

    asyncio.run(go())


def test_a_question_is_answered_or_fails():
    async def go() -> None:
        ends = socket.socketpair()
        asked = []
        here = Channel(ends[0], lambda message, _: asking.answered(message["answer"], message["value"]))
        asking = Asking(here)
        here.gone = asking.fail
        there = Channel(ends[1], lambda message, _: asked.append(message))
        questions = [asyncio.create_task(asking.ask("enter", peer=str(i))) for i in range(3)]
        await until(lambda: len(asked) == 3)
        for message in reversed(asked[:2]):
            there.send({"answer": message["ask"], "value": message["peer"]})
        assert await questions[0] == "0"
        assert await questions[1] == "1"
        there.close()
        with pytest.raises(ConnectionError):
            await questions[2]
        with pytest.raises(ConnectionError):
            await asking.ask("enter")

    asyncio.run(go())


def test_a_message_without_an_event_loop():
    async def go() -> None:
        came = []
        ends = socket.socketpair()
        Channel(ends[0], lambda message, _: came.append(message))
        send_at_once(ends[1], {"failed": "no student"})
        await until(lambda: came)
        assert came == [{"failed": "no student"}]
        ends[0].close()
        send_at_once(ends[1], {"failed": "nobody reads it"})

    asyncio.run(go())
