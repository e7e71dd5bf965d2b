"""Uploads decoded in a process of their own: a crash, a bomb or an endless loop there ends that process alone.

The child gets a function's name, its plain arguments and the upload, and gives back the shape and the bytes of a float32 tensor and
a note, or one line of error. Nothing that comes from it is executed or unpickled.
"""

import importlib
import json
import math
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any

import av.logging
import numpy as np
import torch
from torch import Tensor

from teachers.errors import UserError

SECONDS = 5.0  # that an upload may take
START_SECONDS = 120.0  # and a new process until it takes one
MEMORY = 2**30  # bytes above those of an idle child
PROCESSES = 2
MAX_REPLY = 2**28  # bytes
Decoded = Tensor | tuple[Tensor, str]


class Decoders:
    """Child processes that decode one upload each at a time; `run` may be called by any thread. Close it in the end."""

    def __init__(self, seconds: float = SECONDS, processes: int = PROCESSES):
        self.seconds, self._closed = seconds, False
        self._children = [_Child() for _ in range(processes)]
        self._free: LifoQueue[_Child] = LifoQueue()
        for child in self._children:
            self._free.put(child)

    def start(self) -> None:
        """Start a child ahead of the first upload; waits for nothing."""
        with suppress(Empty):
            child = self._free.get_nowait()
            child.start()
            self._free.put(child)

    def run(self, function: Callable[..., Decoded], data: bytes, *given: Any) -> tuple[Tensor, str]:
        """`function(data, *given)`, a function of a module by its name, with arguments that JSON can hold; it gives a tensor, or a
        tensor and a note.

        UserError as it raises, and where the child crashes, takes too long or too much memory.
        """
        child = self._free.get()
        try:
            child.start()
            return child.run(function, data, given, self.seconds)
        except UserError:
            raise
        except (OSError, ValueError, LookupError, TypeError) as error:
            child.kill()
            if not self._closed:
                child.start()  # ready before it is needed
            why = f"took more than {self.seconds:g} s" if isinstance(error, TimeoutError) else "crashed"
            raise UserError(f"file cannot be read, its decoder {why}; give another") from error
        finally:
            self._free.put(child)

    def close(self) -> None:
        """End all children, those at work too."""
        self._closed = True
        for child in self._children:
            child.kill()


class _Child:
    """A process that is started when it is needed, and again after it has ended."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._ready = False

    def start(self) -> None:
        """Begin to start it, unless it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        self.kill()
        self._ready = False
        self._socket, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from distill.live.apart import child_main; "
            f"child_main({theirs.fileno()}, {MEMORY})"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the parent's
            )

    def run(
        self, function: Callable[..., Decoded], data: bytes, given: tuple[Any, ...], seconds: float
    ) -> tuple[Tensor, str]:
        """OSError where the child crashes, TimeoutError where it takes too long."""
        if not self._ready:
            self._read(1, time.monotonic() + START_SECONDS)
            self._ready = True
        until = time.monotonic() + seconds
        name = f"{function.__module__}:{function.__qualname__}"
        request = json.dumps({"function": name, "given": given, "bytes": len(data), "seconds": seconds}).encode()
        self._socket.settimeout(seconds)
        self._socket.sendall(len(request).to_bytes(4, "big") + request + data)
        reply = json.loads(self._read(int.from_bytes(self._read(4, until), "big"), until))
        if "error" in reply:
            raise UserError(str(reply["error"]))
        shape = [int(size) for size in reply["shape"]]
        values = np.frombuffer(self._read(4 * int(np.prod(shape)), until), np.float32)
        return torch.from_numpy(values.reshape(shape)), str(reply["note"])

    def _read(self, count: int, until: float) -> bytearray:
        if not 0 < count <= MAX_REPLY:
            raise OSError(f"a reply of {count} bytes")
        found = bytearray()
        while len(found) < count:
            self._socket.settimeout(max(0.001, until - time.monotonic()))
            part = self._socket.recv(min(count - len(found), 1 << 20))
            if not part:
                raise OSError("the child is gone")
            found += part
        return found

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            self._socket.close()


def child_main(descriptor: int, memory: int) -> None:
    """Serve one request after the other, until the parent is gone."""
    torch.set_num_threads(1)
    av.logging.set_level(None)
    importlib.import_module("distill.live.uploads")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # only Linux says how much there is, and holds the limit
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rwb") as stream:
        stream.write(b"+")
        stream.flush()
        while head := stream.read(4):
            request = json.loads(stream.read(int.from_bytes(head, "big")))
            data = stream.read(request["bytes"])
            signal.alarm(math.ceil(request["seconds"]) + 1)  # where the parent is no more there to end it
            reply, content = _answer(request, data)
            signal.alarm(0)
            text = json.dumps(reply).encode()
            stream.write(len(text).to_bytes(4, "big") + text + content)
            stream.flush()


def _answer(request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    try:
        module, _, name = request["function"].partition(":")
        found = getattr(importlib.import_module(module), name)(data, *request["given"])
        values, note = found if isinstance(found, tuple) else (found, "")
        return {"shape": list(values.shape), "note": note}, values.float().contiguous().numpy().tobytes()
    except UserError as error:
        return {"error": str(error)}, b""
    except Exception as error:  # torch says RuntimeError where memory ends, and a hostile file makes anything else
        return {"error": f"file cannot be read ({type(error).__name__}); give another, or a smaller one"}, b""
