"""One process at work in a folder: a lock with the holder's process id, which ends with that process however it ends."""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

from teachers.errors import UserError

LOCK = ".lock"
WAIT_SECONDS = 2.0
"""How long the second process waits for the first to write its name."""
_HELD: dict[tuple[int, int], "FolderLock"] = {}


class FolderLock:
    """The lock of `folder`, which exists, until `release` or the end of this process; a process that has it may take it again.
    UserError that names the holder where another process has it, and where the folder cannot be written to."""

    def __init__(self, folder: Path, hint: str):
        self.path, self.count, self.pid = folder / LOCK, 0, os.getpid()
        self.descriptor = self._take(folder, hint)

    @staticmethod
    def of(folder: Path, hint: str) -> "FolderLock":
        """The lock of `folder`; `hint` is how the message ends where another process has it."""
        found = folder.stat()
        key = (found.st_dev, found.st_ino)
        lock = _HELD.get(key)
        if lock is None or lock.pid != os.getpid() or lock.count == 0:
            lock = _HELD[key] = FolderLock(folder, hint)
        lock.count += 1
        return lock

    def release(self) -> None:
        """Give it back, and remove its file."""
        self.count -= 1
        if self.count == 0:
            self.path.unlink(missing_ok=True)
            os.close(self.descriptor)

    def _take(self, folder: Path, hint: str) -> int:
        while True:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise UserError(f"cannot write: {folder} ({error.strerror}); make it writable") from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    holder = _holder(descriptor)
                    os.close(descriptor)
                    raise UserError(f"in use: {folder} by {holder}; {hint}") from error
                sys.stderr.write(
                    f"distill: {folder} cannot be locked ({error.strerror}): start one process at a time\n"
                )
            if self._is_ours(descriptor):
                break
            os.close(descriptor)  # removed by its holder, who has just ended
        os.ftruncate(descriptor, 0)
        name = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.pwrite(descriptor, json.dumps(name).encode(), 0)
        return descriptor

    def _is_ours(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False


def _holder(descriptor: int) -> str:
    """Who has the lock; a name of a process that is gone is waited for to be replaced."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            name = json.loads(os.pread(descriptor, 4096, 0))
            host, process = name["host"], int(name["process"])
            if host != socket.gethostname() or _lives(process) or time.monotonic() > deadline:
                return f"process {process} on {host} since {name['since']}"
        except (ValueError, KeyError, TypeError):
            if time.monotonic() > deadline:
                return "another process"
        time.sleep(0.02)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
