"""What a stage leaves beside its artifacts: fingerprint.json with the digest of every file, written last; started.json before; and,
while it runs, lists of what each rank has written, so that a killed stage goes on with files that are known to be whole.

When a stage is found done, the size and the content of each of its files are verified, by several threads (1.7 GB a second of CPU
were measured: 56 GB, 14B parameters in fp32, are half a minute of CPU, or as long as the disk takes). Of a stage with more than
`BIG_BYTES` of shards these are verified where they are first read, once a process (`distill.data.stored`), behind the training.
"""

from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from distill.data.stored import unread_shards
from teachers.disk.digests import SUMS, Written, faults, measure_all, read_sealed, read_sums, sealed
from teachers.errors import UserError
from teachers.files import atomic_write

__all__ = ["SUMS", "sealed"]

FILE, STARTED = "fingerprint.json", "started.json"
TOP = "../../"
"""Before the name of a file at the top of the run."""
OTHERS = (FILE, STARTED, f"{SUMS}.*", "tracked.json", "checkpoint-*/*", "best-*/*", "*.state", ".*", "*/.*")
"""What is no artifact of a stage; checkpoints and best weights have digests of their own, and the state of a codec that is trained
is written over and over."""

SCRATCH = ("checkpoint-*", "best-*", "clip_sets", "clips")
"""Folders of a stage that its end deletes, once its record is written: only an unfinished one goes on from them."""


class Fault(NamedTuple):
    """A file of a stage that is not as it was written."""

    name: str
    words: str

    def __str__(self) -> str:
        return f"{self.name.removeprefix(TOP)} {self.words}"


def belongs(name: str) -> bool:
    """Whether a file of a stage's folder is one of its artifacts."""
    return not any(fnmatch(name, pattern) for pattern in OTHERS)


def read(folder: Path) -> dict[str, Any] | None:
    """The record of a finished stage, None of one that is not; UserError for a damaged one."""
    file = folder / FILE
    return read_sealed(file, f"put it back, or delete it and run again: what {folder.name} has left is kept")


def read_started(folder: Path) -> dict[str, Any] | None:
    """fingerprint, seconds and began of a stage that was started; UserError for a damaged file."""
    return read_sealed(folder / STARTED, f"delete {folder} and run again")


def files_of(folder: Path, known: Mapping[str, Written], top: Collection[Path]) -> dict[str, Written]:
    """Every artifact of a stage: what its lists say, what this process knows, and for the rest what is read now."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if belongs(name) and not _scratch(name)]
    listed = _listed(folder)
    found = {
        name: known.get(name) or ((folder / name).stat().st_size, listed[name]) for name in names if name in listed
    }
    found |= measure_all(folder, [name for name in names if name not in found])
    return dict(sorted(found.items())) | measure_all(
        folder, sorted(f"{TOP}{path.relative_to(folder.parents[1])}" for path in top)
    )


def _scratch(name: str) -> bool:
    return any(fnmatch(name.partition("/")[0], pattern) for pattern in SCRATCH)


def _listed(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in sorted(folder.glob(f"{SUMS}.*")):
        found |= read_sums(file, strict=False)
    return found


def fault(folder: Path, done: Mapping[str, Any]) -> Fault | None:
    """The first file of a finished stage that is lost or damaged; None where all are whole."""
    return next((Fault(*one) for one in faults(folder, done["files"], unread_shards(done["files"]))), None)


def fix(folder: Path, fault: Fault) -> str:
    """What to do about a fault."""
    which = f"{fault.name} and " if (folder / fault.name).exists() else ""
    return f"put it back, or delete {which}{FILE} there and run again: what is missing is made again"


def require(folder: Path) -> dict[str, Any]:
    """The record of a stage that is finished and whole; UserError for one that is not."""
    done = read(folder)
    if done is None:
        raise UserError(f"stage is not finished: {folder}; run the recipe first, or give its run_dir=")
    if (found := fault(folder, done)) is not None:
        raise UserError(f"damaged stage: {folder}: {found}; {fix(folder, found)}")
    return done


def sift(folder: Path) -> list[Fault]:
    """Delete leftovers of a killed stage that are not as its lists say, and return them; those in no list (the kill came before) go
    unsaid. Nothing is deleted where there is no list."""
    listed = _listed(folder)
    if not listed:
        return []
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    there = {name: path for name, path in there.items() if belongs(name)}
    given = {name: (there[name].stat().st_size, digest) for name, digest in listed.items() if name in there}
    wrong = [Fault(*one) for one in faults(folder, given, unread_shards(given))]
    for name in (there.keys() - given.keys()) | {one.name for one in wrong}:
        there[name].unlink()
        given.pop(name, None)
    for file in folder.glob(f"{SUMS}.*"):
        file.unlink()
    atomic_write(folder / f"{SUMS}.0", "".join(f"{digest}  {name}\n" for name, (_, digest) in given.items()))
    return wrong
