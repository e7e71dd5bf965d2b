"""sha256 of files: computed once, by a thread, while the next file is made; what was recorded is compared later.

A core hashed 1.7 GB a second where this was measured; whole files are hashed side by side by THREADS threads.
"""

import hashlib
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from teachers.errors import UserError

THREADS = min(8, os.cpu_count() or 1)
SUMS = "SHA256SUMS"
"""The list of a folder's files, as `sha256sum --check` reads it."""
Written = tuple[int, str]
"""Bytes and sha256 of a file."""


SETTLED_NS = 2 * 10**9
"""Age of a change from which another one has another time, on every file system."""
_READ: dict[tuple[int, ...], str] = {}


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file. One that has not changed since this process read it is not read again."""
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if state not in _READ:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < SETTLED_NS:
                return digest
            _READ[state] = digest
        return _READ[state]


def measure(path: Path) -> Written:
    """What there is now."""
    return path.stat().st_size, sha256(path)


class Recorder:
    """Digests of the files that this process writes below `folder`, those alone that `wanted` says by their names. Each is read
    back by a thread, from the page cache as a rule, and appended to the list `sums` where one is given."""

    def __init__(self, folder: Path, sums: Path | None = None, wanted: Callable[[str], bool] = lambda _: True):
        self.folder, self.sums, self.wanted = folder, sums, wanted
        self.known: dict[str, Written] = {}
        self._waiting: queue.Queue[tuple[str, BufferedReader]] = queue.Queue()
        self._thread: threading.Thread | None = None

    def add(self, path: Path) -> None:
        """A file that is whole now; one in a folder that is being staged is recorded when that has its name."""
        if not path.is_relative_to(self.folder):
            return
        inside = path.relative_to(self.folder)
        staging = any(part.startswith(".") and part.endswith(".tmp") for part in inside.parts)
        if not staging and self.wanted(name := inside.as_posix()):
            self._waiting.put((name, path.open("rb")))  # opened here: it may be replaced before its turn
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            name, file = self._waiting.get()
            try:
                with file:
                    found = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
                self.known[name] = found
                if self.sums is not None:
                    with self.sums.open("a", encoding="utf-8") as out:
                        out.write(f"{found[1]}  {name}\n")
            except Exception:  # what is not known is read at the end; who waits must not wait for ever
                self.known.pop(name, None)
            finally:
                self._waiting.task_done()

    def wait(self) -> dict[str, Written]:
        """Name -> bytes and sha256 of all that was added."""
        self._waiting.join()
        return self.known


_ACTIVE: list[Recorder] = []


@contextmanager
def recording(
    folder: Path, sums: Path | None = None, wanted: Callable[[str], bool] = lambda _: True
) -> Iterator[Recorder]:
    """Inside, a Recorder gets the files that `teachers.files` writes below `folder`."""
    recorder = Recorder(folder, sums, wanted)
    _ACTIVE.append(recorder)
    try:
        yield recorder
    finally:
        _ACTIVE.remove(recorder)


def written(path: Path) -> None:
    """Tell the recorders of a file, or of a folder's files, that are whole now."""
    if _ACTIVE:
        for file in [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file()):
            for recorder in _ACTIVE:
                recorder.add(file)


def measure_all(folder: Path, names: Collection[str]) -> dict[str, Written]:
    """Name -> bytes and sha256 of files of a folder, several at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: measure(folder / name), names), strict=True))


def faults(folder: Path, files: Mapping[str, Written], by_size: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """(name, what is wrong) of each recorded file that is lost or not what was written; those of `by_size` are not read."""

    def fault(name: str) -> str:
        path, (size, digest) = folder / name, files[name]
        try:
            found = path.stat().st_size
            if found != size:
                return f"has {found} bytes, {size} were written"
            return "" if name in by_size or sha256(path) == digest else "is not what was written"
        except FileNotFoundError:
            return "was written and is not there"
        except OSError as error:
            return f"cannot be read ({error.strerror})"

    with ThreadPoolExecutor(THREADS) as pool:
        yield from ((name, words) for name, words in zip(files, pool.map(fault, files), strict=True) if words)


def write_sums(folder: Path, files: Mapping[str, Written]) -> None:
    """The list SUMS of a folder."""
    text = "".join(f"{files[name][1]}  {name}\n" for name in sorted(files))
    (folder / SUMS).write_text(text, encoding="utf-8")


def read_sums(path: Path, strict: bool = True) -> dict[str, str]:
    """Name -> sha256 of a list, the last line of a name; {} where there is none. UserError for a line that is none, unless a
    killed process may have left half of one (not `strict`)."""
    if not path.is_file():
        return {}
    found = {}
    for line in path.read_bytes().decode("utf-8", "replace").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64})  ([^\x00-\x1f]+)", line)
        if match and not Path(match[2]).is_absolute() and ".." not in Path(match[2]).parts:
            found[match[2]] = match[1]
        elif strict:
            raise UserError(f"damaged file: {path} has a line {line[:80]!r}; copy it again with its folder")
    return found


def canonical(values: Any) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sealed(values: Mapping[str, Any]) -> str:
    """JSON text of a mapping with a digest of the rest of it; numbers that are not finite become null."""
    plain = _without_nan(json.loads(json.dumps(dict(values))))
    seal = hashlib.sha256(canonical(plain).encode()).hexdigest()
    return json.dumps({**plain, "digest": seal}, indent=1, allow_nan=False) + "\n"


def read_sealed(path: Path, hint: str) -> dict[str, Any] | None:
    """What `sealed` wrote, None where there is no file; UserError, which ends with `hint`, for one that was changed."""
    try:
        values = json.loads(path.read_bytes())
        seal = values.pop("digest")
        whole = hashlib.sha256(canonical(values).encode()).hexdigest() == seal
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole, values = False, {}
    if not whole:
        raise UserError(f"damaged file: {path} is not what was written; {hint}")
    return values


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value
