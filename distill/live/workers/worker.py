"""A worker's side: uvicorn without a listening socket, which serves the connections that the parent hands over."""

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from distill.live.operations import sockets
from distill.live.operations.metrics import report as metrics_text
from distill.live.operations.sockets import DrainingServer, PatientProtocol
from distill.live.scheduler import Engine
from distill.live.server import Options, Server
from distill.live.workers.channel import Asking, Channel

TICKET = "ticket"  # the parent's number of a connection, in the state of its protocols
REPORT_SECONDS = 1.0
CLOSING = "this server is closing; connect again in a moment"


class Link:
    """The worker's end of its channel to the parent."""

    def __init__(self, end: socket.socket, feed: "FedServer"):
        self.feed = feed
        self.channel = Channel(end, self._take, self._gone)
        self.asking = Asking(self.channel)

    def send(self, message: dict[str, Any], file: socket.socket | None = None) -> None:
        """To the parent."""
        self.channel.send(message, file)

    def _take(self, message: dict[str, Any], file: socket.socket | None) -> None:
        if "answer" in message:
            self.asking.answered(message["answer"], message["value"])
        elif "wanted" in message:
            self.feed.live.report()
        elif file is not None:
            self.feed.take(message["connection"], file)

    def _gone(self) -> None:
        """Without its parent a worker ends."""
        self.asking.fail()
        self.feed.should_exit = True


class OneOfMany(Server):
    """The endpoints of a worker: what is of all workers is asked of the parent. `link` is there once it serves."""

    def __init__(self, engine: Engine, portraits: list[Tensor], options: Options):
        super().__init__(engine, portraits, options)
        self.link: Link | None = None
        self.last_status = "ok"

    async def enter(self, peer: str) -> str:
        return await self._ask("enter", CLOSING, peer=peer)

    def leave(self, peer: str) -> None:
        self._link().send({"left": peer})

    async def full(self) -> str:
        return CLOSING if self.engine.closing else await self._ask("full", CLOSING)

    async def health(self, _: Request) -> Response:
        body, status = await self._ask("health", ({"status": "closing"}, 503))
        return JSONResponse(body, status)

    async def metrics(self, _: Request) -> Response:
        return PlainTextResponse(await self._ask("metrics", ""), media_type="text/plain; version=0.0.4")

    async def drain(self) -> None:
        await super().drain()
        self._link().feed.closed = True

    def changed(self) -> None:
        """The parent chooses by it who gets the next connection."""
        self._link().send({"report": self._counts()})

    def report(self) -> None:
        """Send the parent everything that others ask it for."""
        self._link().send({"report": self._counts() | {"status": self.last_status, "text": metrics_text(self)}})

    async def keep_status(self) -> None:
        """Ask the engine every now and then, until cancelled."""
        while True:
            self.last_status = await self.status()
            await asyncio.sleep(REPORT_SECONDS)

    async def keep_reporting(self) -> None:
        """Whether the engine answers or not, until cancelled."""
        while True:
            self.report()
            await asyncio.sleep(REPORT_SECONDS)

    def _counts(self) -> dict[str, int]:
        viewers = len(self.engine.viewers)
        return {"limit": self.engine.max_viewers, "viewers": viewers, "apart": max(viewers - len(self.pages), 0)}

    def _link(self) -> Link:
        assert self.link is not None
        return self.link

    async def _ask(self, what: str, otherwise: Any, **given: Any) -> Any:
        try:
            return await self._link().asking.ask(what, **given)
        except ConnectionError:
            return otherwise


class OneRequest:
    """Middleware by which a connection ends with its response. A WebSocket then never comes over a connection that had been handed
    to this worker for something else, before it was known who has room; and the parent knows from the request on."""

    def __init__(self, app: ASGIApp, notify: Callable[[dict[str, Any]], None]):
        self.app, self.notify = app, notify

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        if scope["type"] == "http":
            self.notify({"request": scope["state"][TICKET]})
            await self.app(scope, receive, last)
        else:
            await self.app(scope, receive, send)


class HandedHttp(PatientProtocol):
    """Says when a connection has ended, or has become a WebSocket. `feed` is the subclass's."""

    feed: "FedServer"

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.feed.notify({"closed": self.app_state[TICKET]})

    def handle_websocket_upgrade(self, event: Any) -> None:
        file = None
        if self.scheme == "http":  # so that the parent can say goodbye for this process
            file = socket.socket(fileno=os.dup(self.transport.get_extra_info("socket").fileno()))
        self.feed.notify({"upgraded": self.app_state[TICKET]}, file)
        super().handle_websocket_upgrade(event)


class HandedWebSocket(WebSocketsSansIOProtocol):
    """Says when it has ended."""

    feed: "FedServer"

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.feed.notify({"closed": self.app_state[TICKET]})


class FedServer(DrainingServer):
    """A `DrainingServer` of an application with `OneOfMany`, whose connections come over the socket `end`."""

    def __init__(self, end: socket.socket, facts: dict[str, Any], app: Starlette, *given: Any):
        """`facts` go to the parent when this worker is ready; `given` is the `DrainingServer`'s."""
        app.add_middleware(OneRequest, notify=self.notify)
        super().__init__(app, *given)
        self.end, self.facts = end, facts
        self.link: Link | None = None
        self.closed = False  # no connection more is taken
        self._tasks: set[asyncio.Task[Any]] = set()
        self.http: Callable[..., HandedHttp] = type(
            "Http", (HandedHttp, self.config.http_protocol_class), {"feed": self}
        )
        self.config.ws_protocol_class = type("WebSocket", (HandedWebSocket,), {"feed": self})

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([] if sockets is None else sockets)
        self.link = self.live.link = Link(self.end, self)
        self.live.report()
        self.link.send({"ready": self.facts})
        for work in (self.live.keep_status(), self.live.keep_reporting()):
            self._keep(work)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for task in self._tasks:
            task.cancel()
        assert self.link is not None
        self.link.channel.close()

    def notify(self, message: dict[str, Any], file: socket.socket | None = None) -> None:
        """Send the parent a message."""
        assert self.link is not None
        self.link.send(message, file)

    def take(self, ticket: int, connection: socket.socket) -> None:
        """Serve a connection."""
        if self.closed:
            connection.close()
            self.notify({"closed": ticket})
            return
        self._keep(self._connect(ticket, connection))

    async def _connect(self, ticket: int, connection: socket.socket) -> None:
        def make() -> asyncio.Protocol:
            state = {**self.lifespan.state, TICKET: ticket}
            return self.http(config=self.config, server_state=self.server_state, app_state=state)

        patience = {"ssl_handshake_timeout": sockets.REQUEST_SECONDS} if self.config.ssl else {}
        loop = asyncio.get_running_loop()
        try:
            connection.setblocking(False)
            await loop.connect_accepted_socket(make, connection, ssl=self.config.ssl, **patience)
        except OSError:  # no TLS, or none in time: no protocol has seen it
            connection.close()
            self.notify({"closed": ticket})

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
