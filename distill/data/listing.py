"""What rank 0 reads of a slow disk for all ranks, which then agree on it: lists of files, indices."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from teachers.errors import UserError

T = TypeVar("T")


def read_by_main(read: Callable[[], T]) -> T:
    """What `read` gives rank 0 (what pickles), on every rank; called here where there is no process group. Every rank enters, and
    raises the UserError that rank 0 raises."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return read()
    box: list = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = read()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def list_files(folder: Path, key: str, suffixes: Sequence[str]) -> list[tuple[str, int]]:
    """(path below the folder, bytes) of its files of such names, sorted, as rank 0 sees them: 64 ranks that walk 280,000
    files on a slow disk would wait for it, and might see different ones. No file is opened, links to folders are not followed.
    UserError that begins with `key` without one."""
    return read_by_main(lambda: _walk(folder, key, suffixes))


def _walk(folder: Path, key: str, suffixes: Sequence[str]) -> list[tuple[str, int]]:
    if not folder.is_dir():
        raise UserError(f"{key}: no such folder: {folder}; give one with {', '.join(suffixes)} files")
    found: list[tuple[str, int]] = []

    def refuse(error: OSError) -> None:
        raise UserError(f"{key}: {error}; make it readable or choose another folder") from error

    for where, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(where, name) for name in names if not name.startswith("."))
        chosen = (file for file in files if file.suffix.lower() in suffixes)
        found += [(file.relative_to(folder).as_posix(), file.stat().st_size) for file in chosen if file.is_file()]
    if not found:
        raise UserError(f"{key}: no file is one of {', '.join(suffixes)}: {folder}; convert or add some")
    return sorted(found)
