"""Checkpoints of any engine: a folder of safetensors in which each rank stores its rows, written beside training.

A tensor lies flattened in pieces, one in each file of a rank that stores some of it; index.json has their places and manifest.json
the digests of all files. So a rank writes no more than its rows and reads no more than those that it asks for, whatever ranks wrote
them. `checkpoint-<step>` is renamed into place by rank 0 when everything is on the disk: what has that name is complete.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.training.role import Piece, Rows, whole
from teachers.disk.digests import faults, measure, read_sealed, recording, sealed
from teachers.errors import UserError
from teachers.files import atomic_write, make_folder, remove_folder, save_tensors, sync_folder
from teachers.machine import free_host_bytes

FORMAT = 2
MANIFEST, INDEX = "manifest.json", "index.json"
HINT = "; delete its folder, and the run resumes from the checkpoint before"
FILE_BYTES = 2**31
"""Size at which a file is closed."""
OPEN_FILES = 256
Place = tuple[int, int, str]
"""Start and count of a piece's elements in its flattened tensor, and the file."""


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a stage's folder, oldest first."""
    return sorted(path for path in folder.glob("checkpoint-*") if (path / MANIFEST).is_file())


class Writer:
    """The checkpoints of a stage; every rank calls every method, in the same order.

    `begin` copies this rank's pieces to the host's memory and returns; a thread writes them. Where the copy would take more than
    half of the memory that is free, it waits for the disk instead, with a file of tensors in memory at a time. `any_rank`, which
    training calls between micro-steps, also finds out when all ranks have written; then rank 0's thread puts the checkpoint in its
    place and deletes all but the last `keep`. UserError on every rank where one cannot write.
    """

    def __init__(self, folder: Path, engine, keep: int):
        self.folder, self.engine, self.keep = folder, engine, keep
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._work: Future | None = None  # of this rank, not looked at yet
        self._then: Callable[[], None] | None = None  # rank 0's, when all ranks have written
        self._target: Path | None = None  # what is being written

    def begin(self, step: int, part: int, facts: Callable[[], Mapping[str, Any]], pieces: Iterable[Piece]) -> None:
        """Write `pieces`, this rank's, and facts() as the checkpoint of `step`, or of `part` updates after it, once the one before
        is on the disk; nothing where it is there already."""
        self.finish()
        target = self.folder / (f"checkpoint-{step:08d}" + (f"-{part:02d}" if part else ""))
        if any_rank(self.engine, self.engine.is_main and target in saved(self.folder)):
            return
        staging, rank = target.with_name(f".{target.name}.tmp"), self.engine.rank
        on_main(self.engine, target, lambda: _new_folder(staging))
        own = list(pieces)  # views
        files, beside = _files(own), sum(piece.values.nbytes for piece in own) <= free_host_bytes() / 2
        files = iter(list(files)) if beside else files
        self._target, world = target, self.engine.world_size
        self._then = lambda: _commit(staging, target, {"step": step, **facts()}, world, self.keep)
        self._work = self._threads.submit(_write, staging, rank, files)
        if not beside:
            wait([self._work])

    def any_rank(self, flag: bool = False) -> bool:
        """Whether any rank's flag is set. UserError where a rank could not write."""
        if self._target is None:
            return any_rank(self.engine, flag)
        writing = self._work is not None and not self._work.done()
        error = self._work.exception() if self._work is not None and not writing else None
        flag, writing, failed = any_ranks(self.engine, flag, writing, error is not None)
        if failed:
            self._fail(error)
        if not writing:
            self._next()
        return flag

    def finish(self) -> None:
        """Wait until what was begun is on the disk."""
        while self._target is not None:
            if self._work is not None:
                wait([self._work])
            self.any_rank()

    def _next(self) -> None:
        """All ranks have written, or rank 0 has put it in its place."""
        self._work, then, self._then = None, self._then, None
        if then is None:
            self._target = None
        elif self.engine.is_main:
            self._work = self._threads.submit(then)

    def _fail(self, error: BaseException | None) -> None:
        target, self._target, self._work, self._then = self._target, None, None, None
        assert target is not None
        if self.engine.is_main:
            shutil.rmtree(target.with_name(f".{target.name}.tmp"), ignore_errors=True)
        raise _problem(target, error)


def _problem(path: Path, error: BaseException | None) -> BaseException:
    """What a rank says where `error`, or another rank's, kept `path` from being written or read."""
    if isinstance(error, OSError):
        return UserError(f"cannot write: {path} ({error.strerror or error}); make it writable and run again")
    return error or UserError(f"another rank has failed at {path}; see its message")


def on_main(engine, path: Path, work: Callable[[], None]) -> None:
    """work() on rank 0; UserError on every rank when it fails at `path`."""
    on_all(engine, path, work if engine.is_main else lambda: None)


def on_all(engine, path: Path, work: Callable[[], None]) -> None:
    """work() on every rank; UserError on every rank when one fails at `path`."""
    error: Exception | None = None
    try:
        work()
    except (UserError, OSError) as problem:
        error = problem
    if any_rank(engine, error is not None):
        raise _problem(path, error)


def any_rank(engine, flag: bool) -> bool:
    """Whether any rank's flag is set."""
    return any_ranks(engine, flag)[0]


def any_ranks(engine, *flags: bool) -> list[bool]:
    """Of each flag whether any rank's is set."""
    if engine.world_size == 1:
        return list(flags)
    mean = torch.tensor([float(flag) for flag in flags], device=engine.device)
    engine.all_reduce_mean([mean])
    return [value > 0 for value in mean.tolist()]


def _new_folder(staging: Path) -> None:
    make_folder(staging.parent)
    for stale in staging.parent.glob(".checkpoint-*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    staging.mkdir()


def _files(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Copies of the pieces in the host's memory, as many at a time as go into a file."""
    group: list[Piece] = []
    held = 0
    for piece in pieces:
        group.append(piece._replace(values=piece.values.detach().to("cpu", copy=True)))
        held += piece.values.nbytes
        if held >= FILE_BYTES:
            yield group
            group, held = [], 0
    if group:
        yield group


def _write(staging: Path, rank: int, files: Iterator[list[Piece]]) -> None:
    """The files of one rank, and RANK.json with their digests and what lies where."""
    places: dict[str, list] = {}
    names: list[str] = []
    with recording(staging) as recorder:
        for group in files:
            names.append(f"{rank:05d}-{len(names):05d}.safetensors")
            save_tensors(staging / names[-1], {piece.name: piece.values for piece in group})
            for piece in group:
                places[piece.name] = [list(piece.shape), piece.start, len(piece.values), names[-1]]
        known = recorder.wait()
    digests = {name: known.get(name) or measure(staging / name) for name in names}
    atomic_write(staging / f"{rank:05d}.json", json.dumps({"files": digests, "places": places}))


def _commit(staging: Path, target: Path, metadata: Mapping[str, Any], world: int, keep: int) -> None:
    """Put what all ranks have written in its place, and delete all but the last `keep` checkpoints."""
    parts = [staging / f"{rank:05d}.json" for rank in range(world)]
    digests, tensors = _merged([json.loads(part.read_bytes()) for part in parts], target)
    atomic_write(staging / INDEX, json.dumps(tensors, separators=(",", ":")))
    files = {**digests, INDEX: measure(staging / INDEX)}
    for part in parts:
        part.unlink()
    atomic_write(staging / MANIFEST, sealed({"format": FORMAT, **metadata, "files": files}))
    sync_folder(staging)
    remove_folder(target)
    staging.rename(target)
    sync_folder(target.parent)
    for old in saved(target.parent)[:-keep]:
        remove_folder(old)


def _merged(parts: Sequence[Mapping[str, Any]], target: Path) -> tuple[dict[str, Any], dict[str, list]]:
    """Digests of all files; and name -> [shape, places] of every tensor."""
    digests: dict[str, Any] = {}
    tensors: dict[str, list] = {}
    for part in parts:
        digests |= part["files"]
        for name, (shape, *place) in part["places"].items():
            tensors.setdefault(name, [shape, []])[1].append(place)
    for name, (shape, places) in tensors.items():
        places.sort()
        ends = [0, *(start + count for start, count, _ in places)]
        if [start for start, _, _ in places] != ends[:-1] or ends[-1] != torch.Size(shape).numel():
            raise AssertionError(f"{target}: the pieces of {name} are not all of it")
    return digests, tensors


def _metadata(path: Path) -> dict[str, Any]:
    metadata = read_sealed(path / MANIFEST, HINT.removeprefix("; "))
    if metadata is None or metadata["format"] != FORMAT:
        raise UserError(f"no checkpoint of format {FORMAT}: {path}{HINT}")
    return metadata


class Reader:
    """A checkpoint's metadata, and its tensors one by one; UserError where it is damaged."""

    def __init__(self, path: Path):
        self.path, self.metadata = path, _metadata(path)
        self.opened = functools.lru_cache(OPEN_FILES)(self._open)
        try:
            index = json.loads((path / INDEX).read_bytes())
            self.found = {
                name: (torch.Size(shape), [(int(start), int(count), str(file)) for start, count, file in places])
                for name, (shape, places) in index.items()
            }
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(INDEX, error) from error

    def names(self, prefix: str) -> list[str]:
        """The tensors whose names begin with `prefix`, without it."""
        return [name.removeprefix(prefix) for name in self.found if name.startswith(prefix)]

    def stream(self, prefix: str) -> Iterator[tuple[str, Rows]]:
        """The tensors of `names`, one at a time; what is not read of them stays on the disk."""
        for name in self.names(prefix):
            shape, places = self.found[prefix + name]
            rows = StoredRows(self, prefix + name, shape, places)
            yield name, rows if shape else rows.elements(0, 1).view(())

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of `stream`, read, as a dict."""
        return {name: whole(rows) for name, rows in self.stream(prefix)}

    def read(self, file: str, name: str, elements: slice) -> Tensor:
        """Elements of a piece."""
        try:
            return self.opened(file).get_slice(name)[elements]
        except (OSError, SafetensorError) as error:
            raise self._damaged(file, error) from error

    def _open(self, file: str) -> Any:
        return safe_open(self.path / file, framework="pt")

    def _damaged(self, file: str, error: Exception) -> UserError:
        return UserError(f"damaged checkpoint: {self.path / file} ({error}){HINT}")


class StoredRows:
    """`Rows` of a tensor that lies in pieces in a checkpoint; only what is asked for is read."""

    def __init__(self, reader: Reader, name: str, shape: torch.Size, places: Sequence[Place]):
        self.reader, self.name, self.shape, self.places = reader, name, shape, places

    def __getitem__(self, rows: slice) -> Tensor:
        first, last, _ = rows.indices(self.shape[0])
        width = self.shape[1:].numel()
        return self.elements(first * width, max(0, last - first) * width).view(-1, *self.shape[1:])

    def elements(self, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of the flattened tensor."""
        found = []
        for begin, size, file in self.places:
            first, last = max(start, begin), min(start + count, begin + size)
            if first < last:
                found.append(self.reader.read(file, self.name, slice(first - begin, last - begin)))
        if not found:  # none of them, in their type
            return self.reader.read(self.places[0][2], self.name, slice(0, 0))
        return found[0] if len(found) == 1 else torch.cat(found)


def verify(path: Path, rank: int = 0, world: int = 1) -> None:
    """UserError for the first file of a checkpoint that differs from its digest. Of `world` ranks each reads a share, that which it
    has written itself where they are as many as then."""
    files = _metadata(path)["files"]
    own = {name: file for name, file in files.items() if (int(name[:5]) if name[:5].isdigit() else 0) % world == rank}
    for name, words in faults(path, own):
        raise UserError(f"damaged checkpoint: {path / name} {words}{HINT}")
