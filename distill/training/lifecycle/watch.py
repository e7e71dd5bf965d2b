"""Ranks that notice each other's end: a connection of each rank to rank 0, on which nothing is sent while all live.

A process that is killed loses its connections at once; a machine that is lost does not answer the system's keepalive packets and is
given up after LOST_SECONDS. The other ranks then say so in one line and end, whatever their main threads wait for: a collective in
a GPU's queue cannot be interrupted, and would wait for `engine.timeout_minutes`. There is no heartbeat of our own, so that a rank
that computes for long without letting its threads run is alive.
"""

import atexit
import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import NoReturn

from tqdm import tqdm

IDLE, INTERVAL, PROBES = 15, 10, 3
"""Keepalive of TCP: seconds of silence before the first packet, seconds between packets, packets without an answer."""
LOST_SECONDS = IDLE + INTERVAL * PROBES
GRACE_SECONDS = 10.0
"""In which a rank may end with a message of its own, when another has failed with one."""
CONNECT_SECONDS = 60.0
SETTLE_SECONDS = 5.0
MOST_TEXT = 4096
"""Characters of a line."""
LEFT, FAILED = "left", "failed"
"""What a rank sends when it ends together with all others, and when it ends by itself."""


@dataclass
class Peer:
    """A connection, whose it is, and what came of its next line."""

    link: socket.socket
    rank: int = 0
    where: str = ""
    text: str = ""

    def lines(self) -> list[str] | None:
        """The lines that have come; None when the connection is at its end."""
        try:
            new = self.link.recv(4096)
        except OSError:
            new = b""
        *lines, self.text = (self.text + new.decode("utf-8", "replace"))[-MOST_TEXT:].split("\n")
        return lines if new or lines else None

    def send(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self.link.sendall(f"{line}\n".encode())


@dataclass
class Watch:
    """The connections of one rank, looked after by a thread: of rank 0 to all others, of another to rank 0."""

    rank: int
    key: str
    server: socket.socket | None = None
    peers: list[Peer] = field(default_factory=list)
    over: bool = False

    def __post_init__(self) -> None:
        atexit.register(self.failed)
        threading.Thread(target=self._attend, name="watch", daemon=True).start()

    def close(self) -> None:
        """Every rank is at its end: from here on connections may end."""
        self._end(LEFT)

    def failed(self) -> None:
        """This rank ends by itself, with a message of its own."""
        self._end(FAILED)

    def _end(self, line: str) -> None:
        if not self.over:
            self.over = True
            atexit.unregister(self.failed)
            for peer in list(self.peers):
                peer.send(line)

    def _attend(self) -> None:
        with selectors.DefaultSelector() as ready:
            for link in [peer.link for peer in self.peers] if self.server is None else [self.server]:
                ready.register(link, selectors.EVENT_READ, next(iter(self.peers), None))
            while not self.over:
                for found, _ in ready.select(1.0):
                    if found.data is None:
                        peer = Peer(_kept_alive(found.fileobj.accept()[0]))  # type: ignore[union-attr]
                        ready.register(peer.link, selectors.EVENT_READ, peer)
                    elif self._read(found.data):
                        ready.unregister(found.fileobj)
                        found.data.link.close()

    def _read(self, peer: Peer) -> bool:
        """Act on what a peer has sent; whether its connection is at its end."""
        lines = peer.lines()
        for line in lines or ():
            words = line.split(" ", 2)
            if words[0] == self.key and len(words) == 3:
                peer.rank, peer.where = int(words[1]), words[2]
                self.peers.append(peer)
            elif peer not in self.peers:
                return True
            elif line == LEFT:
                self.peers.remove(peer)
            elif line == FAILED:
                self._give_up(peer, f"{_name(peer)} has failed, see its message", GRACE_SECONDS)
            else:
                self._give_up(peer, line, GRACE_SECONDS if "failed" in line else 0.0)
        if lines is None and peer in self.peers and not self.over:
            self._give_up(peer, f"{_name(peer)} was killed, or its machine was lost")
        return lines is None

    def _give_up(self, lost: Peer, words: str, grace: float = 0.0) -> NoReturn:
        """End this process and, of rank 0, all others; one rank of a machine says why."""
        for peer in self.peers if self.rank == 0 else ():
            if peer is not lost:
                peer.send(words)
        time.sleep(grace)
        if os.environ.get("LOCAL_RANK", "0") == "0" or (self.rank == 1 and words.startswith("rank 0 ")):
            with contextlib.suppress(OSError, ValueError):
                tqdm.write(f"distill: {words}: all ranks end; the same command continues", file=sys.stderr)
                sys.stderr.flush()
        os._exit(1)


def _name(peer: Peer) -> str:
    return f"rank {peer.rank} ({peer.where})"


def _kept_alive(link: socket.socket) -> socket.socket:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", IDLE), ("TCP_KEEPINTVL", INTERVAL), ("TCP_KEEPCNT", PROBES)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_SECONDS)
    return link


_OPENED: list[Watch] = []


def watch(engine) -> Watch:
    """The watch of this process group, opened by the first engine that asks; every rank calls it. Rank 0 listens at a free port of
    where the launcher has its rendezvous (MASTER_ADDR). A rank that cannot reach it says so and is not watched."""
    if not _OPENED or _OPENED[0].over:
        _OPENED[:] = [_open(engine)]
    return _OPENED[0]


def _open(engine) -> Watch:
    where = f"process {os.getpid()} on {socket.gethostname()}"
    host, server = os.environ.get("MASTER_ADDR", "localhost"), None
    if engine.is_main:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=1024)
    port, key, place = engine.from_main((server and server.getsockname()[1], secrets.token_hex(8), where))
    if server is not None:
        return Watch(engine.rank, key, server)
    try:
        peer = Peer(_kept_alive(socket.create_connection((host, port), CONNECT_SECONDS)), 0, place)
    except OSError as error:
        tqdm.write(
            f"distill: rank {engine.rank} cannot reach rank 0 at {host}:{port} ({error.strerror or error}): that a rank was killed "
            "is then noticed after engine.timeout_minutes",
            file=sys.stderr,
        )
        return Watch(engine.rank, key)
    peer.link.settimeout(None)
    peer.send(f"{key} {engine.rank} {where}")
    return Watch(engine.rank, key, peers=[peer])
