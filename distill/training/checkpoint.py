"""Checkpoints of any engine: a folder of safetensors in which each rank stores its rows, written beside training.

A tensor lies flattened in pieces, one in each file of a rank that stores some of it; index.json has their places and manifest.json
the digests of all files. So a rank writes no more than its rows and reads no more than those that it asks for, whatever ranks wrote
them. `checkpoint-<step>` is renamed into place by rank 0 when everything is on the disk: what has that name is complete. The
weights of the best validation are `best-<step>`, in the same form.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
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
CHECKPOINT, BEST = "checkpoint", "best"
"""What is stored: everything that resume needs, and the averaged weights of the best validation."""
HINT = "delete its folder, and the run resumes from the checkpoint before"
FILE_BYTES = 2**31
"""Size at which a file is closed."""
OPEN_FILES = 256
POLL_SECONDS = 1.0
Place = tuple[int, int, str]
"""Start and count of a piece's elements in its flattened tensor, and the file."""


def saved(folder: Path, kind: str = CHECKPOINT) -> list[Path]:
    """The checkpoints, or the `BEST` weights, in a stage's folder, oldest first."""
    return sorted(path for path in folder.glob(f"{kind}-*") if (path / MANIFEST).is_file())


def best_in(folder: Path, best: Mapping[str, Any]) -> Path:
    """Where the weights of the best validation are, those of best["step"]."""
    return folder / f"{BEST}-{best['step']:08.0f}"


@dataclass
class Job:
    """A folder that all ranks write, and rank 0 then puts in its place: `work` is this rank's part, None where it has none."""

    target: Path
    work: Future | None
    commit: Callable[[], None] | None = None  # what rank 0 has still to do

    @property
    def staging(self) -> Path:
        return self.target.with_name(f".{self.target.name}.tmp")


class Writer:
    """The checkpoints of a stage and its best weights; every rank calls every method, in the same order.

    `begin` copies this rank's pieces to the host's memory and returns; a thread writes them. Where the copy would take more than
    half of the memory that is free, it waits for the disk instead, with a file of tensors in memory at a time. `any_rank`, which
    training calls between micro-steps, also finds out when all ranks have written; then a thread of rank 0 puts the folder in its
    place and deletes all but the last `keep` checkpoints. UserError on every rank where one cannot write.
    """

    def __init__(self, folder: Path, engine, keep: int):
        self.folder, self.engine, self.keep = folder, engine, keep
        self._writing, self._placing = (ThreadPoolExecutor(1, name) for name in ("write", "place"))
        self._jobs: list[Job] = []  # begun, in order; the first is looked after

    def begin(self, name: str, metadata: Mapping[str, Any], pieces: Iterable[Piece]) -> None:
        """Write `pieces`, this rank's, and the metadata as the folder `name`, once the one before of its kind (what the name begins
        with) is on the disk; nothing where it is there already."""
        kind, target = name.partition("-")[0], self.folder / name
        while any(job.target.name.startswith(f"{kind}-") for job in self._jobs):
            self._poll()
        if any_rank(self.engine, self.engine.is_main and target in saved(self.folder, kind)):
            return
        job = Job(target, None)
        on_main(self.engine, target, lambda: _new_folder(job.staging))
        own = list(pieces)  # views
        files, beside = _files(own), sum(piece.values.nbytes for piece in own) <= free_host_bytes() / 2
        files = iter(list(files)) if beside else files
        world, keep = self.engine.world_size, self.keep
        job.commit = lambda: _commit(job.staging, target, metadata, world, keep)
        job.work = self._writing.submit(_write, job.staging, self.engine.rank, files)
        self._jobs.append(job)
        if not beside:
            wait([job.work])

    def write(self, path: Path, work: Callable[[], None]) -> None:
        """work(), which writes `path`, by a thread of rank 0; waits until that and all that was begun is on the disk."""
        self._jobs.append(Job(path, self._writing.submit(work) if self.engine.is_main else None))
        self.finish()

    def any_rank(self, flag: bool = False) -> bool:
        """Whether any rank's flag is set. UserError where a rank could not write."""
        if not self._jobs:
            return any_rank(self.engine, flag)
        job = self._jobs[0]
        writing = job.work is not None and not job.work.done()
        error = job.work.exception() if job.work is not None and not writing else None
        flag, writing, failed = any_ranks(self.engine, flag, writing, error is not None)
        if failed:
            self._fail(error)
        if not writing:
            commit, job.commit = job.commit, None
            job.work = self._placing.submit(commit) if commit and self.engine.is_main else None
            if commit is None:
                self._jobs.pop(0)
        return flag

    def finish(self) -> None:
        """Wait until what was begun is on the disk."""
        while self._jobs:
            self._poll()

    def _poll(self) -> None:
        """Look after what was begun; no rank is in a collective for much longer than a second, however long the disk takes."""
        if (work := self._jobs[0].work) is not None:
            wait([work], POLL_SECONDS)
        self.any_rank()

    def _fail(self, error: BaseException | None) -> None:
        jobs, self._jobs = self._jobs, []
        wait([job.work for job in jobs if job.work is not None])
        for job in jobs if self.engine.is_main else ():
            shutil.rmtree(job.staging, ignore_errors=True)
        raise _problem(jobs[0].target, error)


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
    shutil.rmtree(staging, ignore_errors=True)
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
    """Put what all ranks have written in its place, and delete what nothing will go on from."""
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
    _prune(target.parent, keep)


def _prune(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints, and all best weights but the last and those that a checkpoint names as its
    best."""
    for path in saved(folder)[:-keep]:
        remove_folder(path)
    named: set[Path] = set(saved(folder, BEST)[-1:])
    for path in saved(folder):
        with suppress(UserError):  # a damaged one is nothing to go on from
            if best := _metadata(path).get("best"):
                named.add(best_in(folder, best))
    for path in set(saved(folder, BEST)) - named:
        remove_folder(path)


def forget_after(folder: Path, step: int) -> None:
    """Delete best weights of later steps, which a run that goes on from `step` has still to come to."""
    for path in saved(folder, BEST):
        if path > best_in(folder, {"step": step}):
            remove_folder(path)


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


def _metadata(path: Path, hint: str = HINT) -> dict[str, Any]:
    metadata = read_sealed(path / MANIFEST, hint)
    if metadata is None or metadata["format"] != FORMAT:
        raise UserError(f"no checkpoint of format {FORMAT}: {path}; {hint}")
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
        return UserError(f"damaged checkpoint: {self.path / file} ({error}); {HINT}")


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


def verify(path: Path, rank: int = 0, world: int = 1, what: str = "checkpoint", hint: str = HINT) -> None:
    """UserError for the first file of a checkpoint that differs from its digest. Of `world` ranks each reads a share, that which it
    has written itself where they are as many as then."""
    files = _metadata(path, hint)["files"]
    own = {name: file for name, file in files.items() if (int(name[:5]) if name[:5].isdigit() else 0) % world == rank}
    for name, words in faults(path, own):
        raise UserError(f"damaged {what}: {path / name} {words}; {hint}")
