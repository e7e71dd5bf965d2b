"""The web server: the page, portraits, health, metrics, and a WebSocket for each viewer.

Who gets in is `distill.live.operations`'s to say. A slow reader is cut off, never waited for.
"""

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from torch import Tensor

from distill.live import protocol
from distill.live.apart import Decoders
from distill.live.connection import Connection
from distill.live.operations.access import Access, Guard
from distill.live.operations.limits import Peers
from distill.live.operations.metrics import Histogram, report
from distill.live.operations.reload import reload_on
from distill.live.operations.sockets import DrainingServer
from distill.live.scheduler import Engine
from distill.live.viewer import Viewer
from students.weights.checkpoint import Bundle

log = logging.getLogger(__name__)
QUEUE = 64  # messages on their way to a page
DRAIN_SECONDS = 2.5  # that sentences have to end when the server is to
STUCK_SECONDS = 30.0  # without an answer of the engine's thread
FULL, GONE = 1013, 1001
PAGE = Path(__file__).with_name("page")
CLIENT = Path(__file__).with_name("client.js")
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Door(Protocol):
    """Another way in, beside the page: `distill.live.doors`."""

    def routes(self) -> list[Route]: ...

    async def run(self) -> None:
        """Until it is cancelled."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """`access`: who gets in. `crop`: the rule for pictures that are sent. `strict` refuses pictures and words unlike what the
    student was trained on. `peer_viewers`: as many of one address. `doors`: other ways in."""

    access: Access = field(default_factory=Access)
    crop: str = "face"
    strict: bool = False
    peer_viewers: int = 4
    doors: Sequence[Door] = ()


def build_app(
    engine: Engine,
    portraits: list[Tensor],
    options: Options | None = None,
    load: Callable[[], Bundle] | None = None,
    make: "Callable[[Engine, list[Tensor], Options], Server] | None" = None,
) -> Starlette:
    """The application, its `Server`, or what `make` makes in its place, as `state.server`; `portraits` [3, H, W] in [-1, 1] may be
    chosen on the page. On SIGHUP the student is taken that `load` gives then."""
    server = (make or Server)(engine, portraits, options or Options())

    @asynccontextmanager
    async def lifespan(_: Starlette):
        engine.start()
        if load is not None:
            reload_on(signal.SIGHUP, engine, load, portraits[0])
        running = [asyncio.create_task(door.run()) for door in server.options.doors]
        yield
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        server.decoders.close()
        await asyncio.to_thread(engine.stop)

    routes = [
        Route("/", server.page),
        Route("/client.js", server.client),
        Route("/page/{name}", server.part),
        Route("/hello", server.greet),
        Route("/portraits/{number:int}.png", server.portrait),
        Route("/health", server.health),
        Route("/metrics", server.metrics),
        WebSocketRoute("/live", server.live),
        *(route for door in server.options.doors for route in door.routes()),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.server = server
    app.add_middleware(Guard, access=server.options.access, refused=server.turned_away)
    return app


@contextmanager
def running(engine: Engine, portraits: list[Tensor], options: Options | None = None) -> Iterator[str]:
    """Serve on a free loopback port in a thread; gives "127.0.0.1:PORT"."""
    bound = socket.create_server(("127.0.0.1", 0))
    server = DrainingServer(build_app(engine, portraits, options), "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="server", daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


class Server:
    """The endpoints."""

    def __init__(self, engine: Engine, portraits: list[Tensor], options: Options):
        self.engine, self.portraits, self.options = engine, portraits, options
        self.pictures = [protocol.to_png(portrait) for portrait in portraits]
        self.files = {file.name: file for file in PAGE.iterdir() if file.suffix in KINDS}
        self.decoders, self.peers = Decoders(), Peers(options.peer_viewers)
        self.started = time.time()
        self.pages: set[Any] = set()  # what puts a message on its way to each viewer
        self.turned_away: dict[str, int] = dict.fromkeys(("host", "origin", "token", "silent", "sockets", "peer"), 0)
        self.seen = Histogram(0.2, 0.4, 0.6, 0.8, 1.2, 2.4)
        self.mistakes = 0

    async def page(self, _: Request) -> Response:
        self.decoders.start()  # somebody comes who may send files
        return _file(self.files["index.html"])

    async def client(self, _: Request) -> Response:
        return _file(CLIENT)

    async def part(self, request: Request) -> Response:
        """A style or a script of the page."""
        file = self.files.get(request.path_params["name"])
        return PlainTextResponse("no such file\n", 404) if file is None else _file(file)

    async def greet(self, _: Request) -> Response:
        """The `hello` message, for who is no viewer yet."""
        return JSONResponse(self._hello(), headers=HEADERS)

    async def portrait(self, request: Request) -> Response:
        number = request.path_params["number"]
        if number >= len(self.pictures):
            return PlainTextResponse("no such portrait\n", 404)
        return Response(self.pictures[number], media_type="image/png", headers=HEADERS)

    async def status(self) -> str:
        """ok, full, closing, or stuck where the engine hangs."""
        try:
            await asyncio.wait_for(self.ask(lambda: None), STUCK_SECONDS)
        except (TimeoutError, asyncio.CancelledError):
            return "stuck"
        if self.engine.closing:
            return "closing"
        return "full" if self.engine.full() else "ok"

    async def health(self, _: Request) -> Response:
        """200 where viewers are served, 503 once the server is closing, or where the engine hangs."""
        status = await self.status()
        return JSONResponse({"status": status}, 200 if status in ("ok", "full") else 503)

    async def metrics(self, _: Request) -> Response:
        return PlainTextResponse(report(self), media_type="text/plain; version=0.0.4")

    async def drain(self) -> None:
        """Let nobody in any more, say so to all who are here, and wait until no avatar talks, at most DRAIN_SECONDS."""
        end = time.monotonic() + DRAIN_SECONDS
        with suppress(TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(self.ask(self.engine.close), DRAIN_SECONDS)
        for put in self.pages:
            put({"type": "note", "message": self.engine.full()})
        while not self.engine.talked_out and time.monotonic() < end:
            await asyncio.sleep(0.05)

    async def enter(self, peer: str) -> str:
        """Why this peer may have no more viewers; empty where it has another one from now on."""
        return self.peers.enter(peer)

    def leave(self, peer: str) -> None:
        """A peer has a viewer less."""
        self.peers.leave(peer)

    async def full(self) -> str:
        """The message to a viewer for whom there is no room."""
        return self.engine.full() or "try again"

    def changed(self) -> None:
        """A viewer has come or gone."""

    async def live(self, page: WebSocket) -> None:
        """One viewer, from the handshake to the end."""
        await page.accept()
        loop, queue = asyncio.get_running_loop(), asyncio.Queue(QUEUE)
        ended = asyncio.Event()

        def put(message: dict | bytes) -> None:
            if queue.full():
                ended.set()  # does not read: cut off
            else:
                queue.put_nowait(message)

        def emit(message: dict | bytes) -> None:  # from the engine's thread
            if not loop.is_closed():
                loop.call_soon_threadsafe(put, message)

        peer = page.client.host if page.client else ""
        why = await self.enter(peer)
        if why:
            self.turned_away["peer"] += 1
        viewer = None if why else await self.ask(self.engine.join, emit)
        if viewer is None:
            if not why:
                self.leave(peer)
            await page.send_json({"type": "full", "message": why or await self.full()})
            await page.close(FULL)
            return
        self.pages.add(put)
        self.changed()
        connection = Connection(self, page, viewer, put)
        tasks = [
            asyncio.create_task(connection.send(queue)),
            asyncio.create_task(connection.receive()),
            asyncio.create_task(ended.wait()),
        ]
        try:
            put(self._hello())
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            self.pages.discard(put)
            self.leave(peer)
            await self.ask(self.engine.leave, viewer)
            self.changed()
            for fault in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(fault, Exception) and not isinstance(fault, WebSocketDisconnect | OSError | RuntimeError):
                    log.error("a viewer's connection failed", exc_info=fault)
        with suppress(RuntimeError, WebSocketDisconnect, OSError, TimeoutError):  # closed already
            await asyncio.wait_for(page.close(GONE), 1.0)

    def _hello(self) -> dict[str, Any]:
        spec, talker = self.engine.bundle.spec, self.engine.talker
        return {
            "type": "hello",
            "version": protocol.VERSION,
            "width": spec.width,
            "height": spec.height,
            "fps": float(spec.fps),
            "samples_per_frame": spec.samples_per_frame,
            "lead": self.engine.lead,
            "portraits": len(self.portraits),
            "talker": talker.name,
            "model": talker.model,
            "mode": "conversation" if talker.model else "echo",
            "takes_speech": talker.takes_speech,
            "guidance": {} if spec.guidance is None else {k: asdict(v) for k, v in spec.guidance.ranges.items()},
            "limits": {"text": protocol.MAX_TEXT, "bytes": protocol.MAX_MESSAGE},
        }

    async def ask(self, function: Any, *given: Any, of: Viewer | None = None) -> Any:
        """What the engine's thread answers."""
        return await asyncio.wrap_future(self.engine.call(function, *given, of=of))


def _file(file: Path) -> Response:
    return FileResponse(file, media_type=KINDS[file.suffix], headers=HEADERS)
