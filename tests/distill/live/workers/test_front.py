"""The parent's choice among workers, and what it counts; workers are played by the other ends of their channels."""

import asyncio
import json
import socket
from contextlib import suppress

from distill.live.operations.sockets import MOST_SOCKETS
from distill.live.workers.channel import Channel
from distill.live.workers.front import LOST, STALE_SECONDS, Front

PEER = "192.0.2.7"


class Played:
    """A worker: what it was sent, and the connections."""

    def __init__(self, front: Front, index: int, limit: int):
        ours, theirs = socket.socketpair()
        self.worker = front.connect(index, ours)
        self.messages, self.sockets = [], {}
        self.channel = Channel(theirs, self._take)
        self.channel.send({"report": {"status": "ok", "limit": limit, "viewers": 0, "apart": 0, "text": ""}})
        self.channel.send({"ready": {}})

    def _take(self, message, file):
        if "connection" in message:
            self.sockets[message["connection"]] = file
        elif "wanted" in message:
            self.channel.send({"report": {"text": "# HELP a A.\n# TYPE a gauge\na 1\n"}})
        else:
            self.messages.append(message)


async def settle() -> None:
    """All messages are read, and answered."""
    for _ in range(12):
        await asyncio.sleep(0)


class Table:
    def __init__(self, *limits: int, peer_viewers: int = 4):
        self.now = 0.0
        self.front = Front(len(limits), peer_viewers, True, lambda: self.now)
        self.played = [Played(self.front, index, limit) for index, limit in enumerate(limits)]
        self.ends = []

    async def connect(self, peer: str = "127.0.0.1") -> socket.socket:
        server, client = socket.socketpair()
        self.ends.append(client)
        self.front.hand_over(server, peer)
        await settle()
        return client

    @property
    def counts(self) -> list[int]:
        return [len(one.sockets) for one in self.played]


def play(limits, go, **more) -> None:
    async def run() -> None:
        table = Table(*limits, **more)
        await settle()
        await go(table)

    asyncio.run(run())


def test_the_next_connection_goes_where_most_room_is():
    async def go(table: Table) -> None:
        for _ in range(8):
            await table.connect()
        assert table.counts == [2, 6], "limits 4 and 8"
        table.played[1].channel.send({"report": {"viewers": 5, "apart": 5}})  # rooms of voice agents
        await settle()
        await table.connect()
        assert table.counts == [3, 6]
        for ticket in list(table.played[0].sockets):
            table.played[0].channel.send({"closed": ticket})
        await settle()
        assert table.front.workers[0].opened == {}
        await table.connect()
        assert table.counts == [4, 6]

    play((4, 8), go)


def test_idle_connections_hide_no_room():
    async def go(table: Table) -> None:
        for _ in range(12):
            await table.connect()
        assert table.counts == [6, 6]
        table.played[0].channel.send({"report": {"viewers": 4}})
        for ticket in list(table.played[0].sockets)[4:]:
            table.played[0].channel.send({"closed": ticket})
        await settle()
        await table.connect()
        assert table.counts == [6, 7], "worker 0 has fewer connections, but they are viewers"

    play((4, 4), go)


def test_a_request_that_is_being_answered_takes_no_room():
    async def go(table: Table) -> None:
        for _ in range(2):
            await table.connect(PEER)
        assert table.counts == [1, 1]
        table.played[1].channel.send({"request": next(iter(table.played[1].sockets))})
        await settle()
        await table.connect(PEER)
        assert table.counts == [1, 2]
        assert table.front.open_sockets[PEER] == 3, "a socket all the same"

    play((4, 4), go)


def test_a_worker_that_does_not_report_is_chosen_last_and_is_stuck():
    async def go(table: Table) -> None:
        table.now = STALE_SECONDS + 1
        table.played[1].channel.send({"report": {"viewers": 3}})
        await settle()
        await table.connect()
        assert table.counts == [0, 1]
        assert table.front.health() == ({"status": "ok", "workers": ["stuck", "ok"]}, 200)
        table.now = 3 * STALE_SECONDS
        assert table.front.health() == ({"status": "stuck", "workers": ["stuck", "stuck"]}, 503)

    play((8, 4), go)


def test_sockets_of_a_peer_are_counted_over_all_workers():
    async def go(table: Table) -> None:
        for _ in range(MOST_SOCKETS):
            await table.connect(PEER)
        assert sorted(table.counts) == [MOST_SOCKETS // 2] * 2
        refused = await table.connect(PEER)
        assert refused.recv(1) == b""
        assert table.front.refused["sockets"] == 1
        await table.connect("192.0.2.8")
        for played, message in zip(table.played, ("closed", "upgraded"), strict=True):
            played.channel.send({message: next(iter(played.sockets))})
        await settle()
        assert table.front.open_sockets[PEER] == MOST_SOCKETS - 2
        for _ in range(3):
            await table.connect(PEER)
        assert table.front.refused["sockets"] == 2
        table.played[1].channel.close()
        await settle()
        assert table.front.open_sockets[PEER] < MOST_SOCKETS - 10, "of a worker that has ended"
        for _ in range(50):
            await table.connect()
        assert table.front.refused["sockets"] == 2, "this machine has no limit"

    play((100, 100), go)


def test_viewers_of_a_peer_are_counted_over_all_workers():
    async def go(table: Table) -> None:
        async def enter(index: int) -> str:
            played = table.played[index]
            played.channel.send({"ask": len(played.messages), "what": "enter", "peer": PEER})
            await settle()
            return played.messages[-1]["value"]

        assert [await enter(index) for index in (0, 1, 1)] == ["", "", ""]
        assert "3 viewers from your address" in await enter(0)
        table.played[0].channel.send({"left": PEER})
        table.played[0].channel.send({"left": PEER})  # it has no other
        await settle()
        assert await enter(0) == ""
        assert await enter(0) != ""
        table.played[1].channel.close()
        await settle()
        assert [await enter(0) for _ in range(3)][:2] == ["", ""]

    play((4, 4), go, peer_viewers=3)


def test_viewers_of_a_worker_that_has_ended_are_told_and_others_are_not():
    async def go(table: Table) -> None:
        clients = [await table.connect() for _ in range(4)]
        for played in table.played:
            for ticket, connection in played.sockets.items():
                played.channel.send({"upgraded": ticket}, connection.dup())
        await settle()
        for connection in table.played[0].sockets.values():
            connection.close()
        table.played[0].channel.close()
        for client in clients:
            client.settimeout(0.2)
        loop = asyncio.get_running_loop()

        async def received(client: socket.socket) -> bytes:
            client.setblocking(False)
            found = b""
            with suppress(TimeoutError):
                async with asyncio.timeout(0.3):
                    while part := await loop.sock_recv(client, 100):
                        found += part
            return found

        found = [await received(client) for client in clients]
        assert sorted(found) == [b"", b"", LOST, LOST]
        assert LOST[2:4] == (1012).to_bytes(2, "big")
        assert table.front.workers[0].opened == {}
        assert table.front.health()[0] == {"status": "ok", "workers": ["ended", "ok"]}
        table.played[1].channel.close()
        await settle()
        assert not table.front.any_ready.is_set()
        late = await table.connect()
        assert (await received(late), table.front.refused["worker"]) == (b"", 1)

    play((4, 4), go)


def test_what_is_asked_of_all_is_of_all():
    async def go(table: Table) -> None:
        played = table.played[0]
        for number, what in enumerate(("full", "health", "metrics")):
            played.channel.send({"ask": number, "what": what})
        await settle()
        answers = {message["answer"]: message["value"] for message in played.messages}
        assert answers[0].startswith("maximum number of viewers reached (10, as many as this machine draws")
        assert answers[1] == [{"status": "ok", "workers": ["ok", "ok"]}, 200]
        lines = answers[2].splitlines()
        assert 'a{worker="0"} 1' in lines
        assert 'a{worker="1"} 1' in lines
        assert 'distill_worker_up{worker="1"} 1' in lines
        assert 'distill_refused_total{worker="parent",reason="sockets"} 0' in lines
        json.dumps(answers)
        table.front.closing = True
        assert table.front.health() == ({"status": "closing", "workers": ["ok", "ok"]}, 503)

    play((4, 6), go)
