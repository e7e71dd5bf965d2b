"""JSON messages, each with an open socket where one goes along (SCM_RIGHTS), between the parent and a worker. Linux only."""

import asyncio
import json
import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

HEAD = 4  # bytes of a message's length
READ = 65_536
Message = dict[str, Any]


class Channel:
    """One end of a `socket.socketpair()`, in a running event loop. `take(message, socket)` gets what comes; `gone()` is called once
    when the other end has closed, or its process has ended."""

    def __init__(
        self,
        end: socket.socket,
        take: Callable[[Message, socket.socket | None], None],
        gone: Callable[[], None] = lambda: None,
    ):
        self.end, self.take, self.gone = end, take, gone
        self.loop, self.open = asyncio.get_running_loop(), True
        self._waiting: deque[tuple[bytes, socket.socket | None]] = deque()
        self._data, self._files = bytearray(), deque[socket.socket]()
        end.setblocking(False)
        self.loop.add_reader(end, self._read)

    def send(self, message: Message, file: socket.socket | None = None) -> None:
        """Send it, as soon as there is room, and close this process's copy of `file` then."""
        if not self.open:
            if file is not None:
                file.close()
            return
        text = json.dumps(message | {"file": True} if file is not None else message).encode()
        self._waiting.append((len(text).to_bytes(HEAD, "big") + text, file))
        if len(self._waiting) == 1:
            self._write()

    def close(self) -> None:
        """Close this end; what still waits is dropped."""
        if not self.open:
            return
        self.open = False
        self.loop.remove_reader(self.end)
        self.loop.remove_writer(self.end)
        self.end.close()
        for file in (*self._files, *(file for _, file in self._waiting if file is not None)):
            file.close()
        self.gone()

    def _write(self) -> None:
        while self.open and self._waiting:
            data, file = self._waiting[0]
            try:
                files = [] if file is None else [file.fileno()]
                sent = socket.send_fds(self.end, [data], files)
            except BlockingIOError:
                self.loop.add_writer(self.end, self._write)
                return
            except OSError:  # the reader will see the end
                return
            if file is not None:
                file.close()
            if sent < len(data):
                self._waiting[0] = (data[sent:], None)
            else:
                self._waiting.popleft()
        if self.open:
            self.loop.remove_writer(self.end)

    def _read(self) -> None:
        try:
            data, files, _, _ = socket.recv_fds(self.end, READ, 16)
        except BlockingIOError:
            return
        except OSError:
            data, files = b"", []
        for number in files:
            os.set_inheritable(number, False)
            self._files.append(socket.socket(fileno=number))
        self._data += data
        while self.open and len(self._data) >= (end := HEAD + int.from_bytes(self._data[:HEAD], "big")) > HEAD:
            message = json.loads(self._data[HEAD:end])
            del self._data[:end]
            self.take(message, self._files.popleft() if message.pop("file", False) else None)
        if not data:
            self.close()


class Asking:
    """Questions over a channel, each answered by a message {"answer": number, "value": ..}."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._count = 0

    async def ask(self, what: str, **given: Any) -> Any:
        """The other side's answer. ConnectionError where it is gone."""
        if not self.channel.open:
            raise ConnectionError("the other process is gone")
        self._count += 1
        number, future = self._count, self.channel.loop.create_future()
        self._asked[number] = future
        self.channel.send({"ask": number, "what": what, **given})
        try:
            return await future
        finally:
            del self._asked[number]

    def answered(self, number: int, value: Any) -> None:
        """The answer to a question has come."""
        with suppress(KeyError, asyncio.InvalidStateError):  # the asker is gone
            self._asked[number].set_result(value)

    def fail(self) -> None:
        """No answer will come any more."""
        for future in self._asked.values():
            if not future.done():
                future.set_exception(ConnectionError("the other process is gone"))


def send_at_once(end: socket.socket, message: Message) -> None:
    """One message without an event loop; nothing happens where the other side is gone."""
    text = json.dumps(message).encode()
    with suppress(OSError):
        end.sendall(len(text).to_bytes(HEAD, "big") + text)
