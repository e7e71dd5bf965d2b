"""The parent's view of its workers: which one takes the next connection, what all of them serve together.

The parent reads no byte of a connection. TLS, requests and WebSockets are the worker's, with all of its checks. What must be
counted once for all workers is counted here: sockets and viewers of a peer.
"""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from websockets.frames import Close, Frame, Opcode

from distill.live.operations import sockets
from distill.live.operations.addresses import is_loopback
from distill.live.operations.limits import Peers
from distill.live.operations.metrics import exposition
from distill.live.scheduler import limit_reached
from distill.live.workers.channel import Channel, Message
from distill.live.workers.gathered import SERVING, labelled, overall

STALE_SECONDS = 5.0  # without a report: the worker's event loop hangs
METRICS_SECONDS = 1.0  # for a worker to send its metrics when they are asked for; else its last ones count
LINGER_SECONDS = 2.0  # for a viewer to read why its WebSocket is closed
LOST = Frame(Opcode.CLOSE, Close(1012, "this worker has ended; connect again").serialize()).serialize(mask=False)
"""What the viewers of a worker that has died get, on connections without TLS (its keys have died with it)."""


@dataclass(eq=False)
class Worker:
    """One process, from its start to its end. `facts` are there once it is ready. `opened`: peers of its connections by ticket;
    `load`: tickets of those that are WebSockets, or may become one; `counted`: of those that count as sockets of their peer;
    `sockets`: its WebSockets without TLS."""

    index: int
    channel: Channel | None = None
    facts: dict[str, Any] | None = None
    failed: str = ""
    status: str = "starting"
    limit: int = 0
    viewers: int = 0
    apart: int = 0  # viewers without a WebSocket
    text: str = ""  # its metrics
    reported: float = 0.0  # when, by the front's clock
    opened: dict[int, str] = field(default_factory=dict)
    load: set[int] = field(default_factory=set)
    counted: set[int] = field(default_factory=set)
    sockets: dict[int, socket.socket] = field(default_factory=dict)
    peers: Counter[str] = field(default_factory=Counter)
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # ready, or gone
    metrics_sent: asyncio.Event = field(default_factory=asyncio.Event)  # since they were asked for
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ready(self) -> bool:
        """Whether it takes connections."""
        return self.facts is not None and not self.gone.is_set()

    def send(self, message: Message, file: socket.socket | None = None) -> None:
        """To its process, which closes this one's copy of `file`."""
        assert self.channel is not None
        self.channel.send(message, file)

    def rank(self, now: float) -> tuple[bool, bool, int, int]:
        """The larger, the sooner it gets the next connection. Any that has sent no request yet may become a viewer."""
        fresh = now - self.reported < STALE_SECONDS
        return fresh, self.viewers < self.limit, self.limit - len(self.load) - self.apart, -self.viewers


class Front:
    """All workers of a server, by index. In a running event loop."""

    def __init__(self, count: int, peer_viewers: int, measured: bool, clock: Callable[[], float] = time.monotonic):
        """`measured`: whether limits are what workers have measured, as the message to a refused viewer says."""
        self.workers = [Worker(index) for index in range(count)]
        self.restarts = [0] * count
        self.measured, self.clock = measured, clock
        self.peers, self.open_sockets = Peers(peer_viewers), Counter[str]()
        self.closing, self.refused = False, {"sockets": 0, "worker": 0}
        self.any_ready = asyncio.Event()
        self._tickets = 0
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- connections

    async def accept(self, bound: socket.socket) -> None:
        """Hand out connections while any worker is ready, until cancelled; meanwhile they wait in the socket's backlog."""
        loop = asyncio.get_running_loop()
        bound.setblocking(False)
        while True:
            await self.any_ready.wait()
            try:
                connection, address = await loop.sock_accept(bound)
            except OSError:  # the client is gone, or there is no file descriptor left
                await asyncio.sleep(0.1)
                continue
            self.hand_over(connection, address[0])

    def hand_over(self, connection: socket.socket, peer: str) -> None:
        """Give a connection to the worker with most room; close it where its peer has too many."""
        worker = max((one for one in self.workers if one.ready), key=lambda one: one.rank(self.clock()), default=None)
        reason = "worker" if worker is None else ""
        if not is_loopback(peer) and self.open_sockets[peer] >= sockets.MOST_SOCKETS:
            reason = "sockets"
        if worker is None or reason:
            self.refused[reason] += 1
            connection.close()
            return
        self._tickets += 1
        worker.opened[self._tickets] = peer
        worker.load.add(self._tickets)
        worker.counted.add(self._tickets)
        self.open_sockets[peer] += 1
        worker.send({"connection": self._tickets}, connection)

    def _uncount(self, worker: Worker, ticket: int) -> None:
        if ticket in worker.counted:
            worker.counted.discard(ticket)
            self._less(self.open_sockets, worker.opened[ticket])

    def _closed(self, worker: Worker, ticket: int) -> None:
        self._uncount(worker, ticket)
        worker.load.discard(ticket)
        worker.opened.pop(ticket, None)
        if held := worker.sockets.pop(ticket, None):
            held.close()

    @staticmethod
    def _less(counter: Counter[str], key: str) -> None:
        counter[key] -= 1
        if counter[key] <= 0:
            del counter[key]

    # ---- workers

    def connect(self, index: int, end: socket.socket) -> Worker:
        """A worker that is being started in this place; `end` is the parent's end of its channel."""
        worker = self.workers[index] = Worker(index)
        worker.channel = Channel(
            end, lambda message, file: self._take(worker, message, file), lambda: self._lost(worker)
        )
        return worker

    def _take(self, worker: Worker, message: Message, file: socket.socket | None) -> None:
        if "closed" in message:
            self._closed(worker, message["closed"])
        elif "request" in message:
            worker.load.discard(message["request"])
        elif "upgraded" in message:
            self._uncount(worker, message["upgraded"])
            if file is not None:
                worker.sockets[message["upgraded"]] = file
        elif "report" in message:
            worker.reported = self.clock()
            for name, value in message["report"].items():
                setattr(worker, name, value)
            if "text" in message["report"]:
                worker.metrics_sent.set()
        elif "ask" in message:
            self._do(self._answer(worker, message["what"], message))
        elif "left" in message:
            self._leave(worker, message["left"])
        elif "failed" in message:
            worker.failed = message["failed"]
        elif "ready" in message:
            worker.facts, worker.reported = message["ready"], self.clock()
            worker.changed.set()
            self.any_ready.set()

    async def _answer(self, worker: Worker, what: str, given: Message) -> None:
        value: Any
        if what == "health":
            value = self.health()
        elif what == "metrics":
            value = await self.metrics()
        elif what == "full":
            value = limit_reached(self.limit, self.measured)
        else:
            value = self._enter(worker, given["peer"])
        worker.send({"answer": given["ask"], "value": value})

    def _enter(self, worker: Worker, peer: str) -> str:
        if worker.gone.is_set():
            return "this worker has ended"
        why = self.peers.enter(peer)
        if not why:
            worker.peers[peer] += 1
        return why

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _leave(self, worker: Worker, peer: str) -> None:
        if worker.peers[peer]:
            self._less(worker.peers, peer)
            self.peers.leave(peer)

    def _lost(self, worker: Worker) -> None:
        """The process has ended: its viewers get a close frame, what it held is free."""
        for held in worker.sockets.values():
            self._do(_farewell(held))
        worker.sockets.clear()
        for ticket in list(worker.opened):
            self._closed(worker, ticket)
        for peer in list(worker.peers.elements()):
            self._leave(worker, peer)
        worker.status, worker.limit, worker.viewers, worker.apart, worker.text = "ended", 0, 0, 0, ""
        worker.metrics_sent.set()
        worker.gone.set()
        worker.changed.set()
        if not any(one.ready for one in self.workers):
            self.any_ready.clear()

    # ---- all together

    @property
    def limit(self) -> int:
        """Viewers that all workers may have now."""
        return sum(worker.limit for worker in self.workers)

    def status(self, worker: Worker) -> str:
        """ok, full, closing, stuck, starting or ended."""
        late = worker.ready and self.clock() - worker.reported > STALE_SECONDS
        return "stuck" if late and worker.status in SERVING else worker.status

    def health(self) -> tuple[dict[str, Any], int]:
        """The body of /health, and its HTTP status: 200 where any worker serves."""
        each = [self.status(worker) for worker in self.workers]
        status = "closing" if self.closing else overall(each)
        return {"status": status, "workers": each}, 200 if status in SERVING else 503

    async def metrics(self) -> str:
        """Those of all workers, with a label."""
        asked = [worker for worker in self.workers if worker.ready]
        for worker in asked:
            worker.metrics_sent.clear()
            worker.send({"wanted": "metrics"})
        with suppress(TimeoutError):
            async with asyncio.timeout(METRICS_SECONDS):
                for worker in asked:
                    await worker.metrics_sent.wait()
        texts = {}
        for worker, restarts in zip(self.workers, self.restarts, strict=True):
            own = exposition(
                (
                    ("distill_worker_up", "gauge", "Whether the worker is ready for viewers.", int(worker.ready)),
                    ("distill_worker_restarts_total", "counter", "Starts after the worker's first.", restarts),
                )
            )
            texts[str(worker.index)] = own + worker.text
        refused = ("distill_refused_total", "counter", "Requests and connections refused.", self.refused)
        return labelled(texts | {"parent": exposition((refused,))})


async def _farewell(held: socket.socket) -> None:
    """Send the last frame of a WebSocket, then read on until the client has closed: closing at once could take the frame back."""
    loop = asyncio.get_running_loop()
    with suppress(OSError, TimeoutError):
        held.setblocking(False)
        held.send(LOST)
        held.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(LINGER_SECONDS):
            while await loop.sock_recv(held, 65_536):
                pass
    held.close()
