"""uvicorn, for strangers: connections that never become a request are closed, and the end is announced."""

import asyncio
import logging
import socket
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from distill.live import protocol
from distill.live.operations.addresses import is_loopback
from teachers.errors import UserError

REQUEST_SECONDS = 10.0  # from a connection, or the answer before, to a whole request
MOST_SOCKETS = 32  # of one peer that is not this machine


def choose_congestion_control(connection: Any) -> None:
    """BBR for a TCP socket, where the system has and allows it: at 3 % of packets lost one frame in a hundred is 0.40 s late or
    more, with cubic 0.90 (docs/results.md, over a line that loses packets)."""
    if connection is not None and hasattr(socket, "TCP_CONGESTION"):
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, which waits `REQUEST_SECONDS` for a request and takes `MOST_SOCKETS` of a peer; uvicorn's own waits for
    ever and takes all. A server has a subclass, whose `refused` counts by reason."""

    open_sockets: Counter[str]
    refused: dict[str, int]
    _timer: asyncio.TimerHandle | None = None
    _counted: str = ""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        choose_congestion_control(transport.get_extra_info("socket"))
        peer = self.client[0] if self.client else ""
        if not is_loopback(peer):
            if self.open_sockets[peer] >= MOST_SOCKETS:
                self.refused["sockets"] += 1
                transport.close()
                return
            self.open_sockets[peer] += 1
            self._counted = peer
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        self._leave()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body:
            self._rest()

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._rest()
        self._leave()
        super().handle_websocket_upgrade(event)

    def _wait(self) -> None:
        self._rest()
        self._timer = self.loop.call_later(REQUEST_SECONDS, self._expire)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _leave(self) -> None:
        if self._counted:
            self.open_sockets[self._counted] -= 1
            if not self.open_sockets[self._counted]:
                del self.open_sockets[self._counted]
            self._counted = ""

    def _expire(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.refused["silent"] += 1
            self.transport.close()


def _worth_a_line(record: logging.LogRecord) -> bool:
    """Not what uvicorn says of each WebSocket that was refused with a status, as if no answer had been sent."""
    return "without completing handshake" not in record.getMessage()


class DrainingServer(uvicorn.Server):
    """uvicorn, which on SIGTERM or SIGINT first waits for `drain` of the application's `state.server`."""

    def __init__(self, app: Starlette, host: str, port: int, certificate: Path | None = None, key: Path | None = None):
        """`app` at an address, over TLS where there are a certificate and its key (PEM). Messages are bounded, and a viewer who
        vanished is noticed in 4 s. UserError for files that are none."""
        self.live = app.state.server
        counters = {"refused": self.live.turned_away, "open_sockets": Counter()}
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=type("Http", (PatientProtocol,), counters),
            ws="websockets-sansio",
            ws_max_size=protocol.MAX_MESSAGE + 1,
            ws_ping_interval=2.0,
            ws_ping_timeout=2.0,
            ws_per_message_deflate=False,
            h11_max_incomplete_event_size=32_768,
            timeout_graceful_shutdown=1,
            log_level="warning",
            access_log=False,
            server_header=False,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        logging.getLogger("uvicorn.error").addFilter(_worth_a_line)
        try:
            config.load()
        except OSError as error:  # ssl.SSLError too
            raise UserError(f"--tls-cert, --tls-key: {error}; give a certificate and its key as PEM files") from error
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.live.drain()
        await super().shutdown(sockets)
