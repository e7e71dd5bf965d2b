"""Files and folders that are whole or absent: `replacing` and `staged` are the only atomic writers; tensors and JSON on top."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from teachers.disk import digests
from teachers.errors import UserError

_UMASK = os.umask(0)
os.umask(_UMASK)
MODE = 0o666 & ~_UMASK
"""Of the files that are written: safetensors makes files that no other user may read."""
FULL_DISK = ("No space left", "PytorchStreamWriter failed")
"""How safetensors and torch.save say it."""


OTHER_KINDS = (
    (
        b"version https://git-lfs",
        "a pointer of git-lfs in the place of the file",
        "run `git lfs pull` where it was cloned",
    ),
    (b"GGUF", "a GGUF file, quantised for llama.cpp", "get the safetensors weights that it was made from"),
    (b"<!doctype", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
)
"""What lies in the place of weights: its first bytes in lower case, what it is, and what to do."""


def refuse_other_kind(path: Path) -> None:
    """UserError for a file that is not damaged but of another kind (OTHER_KINDS); nothing for any other, or none."""
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip().lower()
    except OSError:
        return
    for begins, kind, fix in OTHER_KINDS:
        if head.startswith(begins.lower()):
            raise UserError(f"not weights: {path} is {kind}; {fix}")


def _sibling(path: Path) -> Path:
    """A hidden name beside `path` that no other process writes to: `.NAME.HEX.tmp`."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")


def sync_folder(folder: Path) -> None:
    """Put a rename in `folder` on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path, num_bytes: int = 0) -> Iterator[Path]:
    """A temporary name beside `path` for a file; synced and renamed at the end over what was there, removed on failure.

    A full disk is a UserError; `num_bytes` (0: not known) is the room that it then asks for.
    """
    temporary = _sibling(path)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(MODE)
        os.replace(temporary, path)
        digests.written(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(words in str(error) for words in FULL_DISK):
            free = shutil.disk_usage(path.parent).free
            needs = f" needs {num_bytes} bytes" if num_bytes else ""
            raise UserError(
                f"the disk is full: {path}{needs}, {free} bytes are free; make room and run again"
            ) from error
        raise


@contextmanager
def staged(target: Path, num_bytes: int = 0) -> Iterator[Path]:
    """A temporary name beside `target` for a new folder or file; renamed at the end, removed on failure.

    UserError where the target exists, or its folder does not, cannot be written to or has no `num_bytes` left.
    """
    if target.exists():
        raise UserError(f"output exists: {target}; name another, or remove it")
    if not target.parent.is_dir():
        raise UserError(f"output folder not found: {target.parent}; make it first")
    if (free := shutil.disk_usage(target.parent).free) < num_bytes:
        raise UserError(
            f"disk is too full: {target.parent} has {free / 2**30:.1f} GiB free, {num_bytes / 2**30:.1f} are needed; make room"
        )
    temporary = _sibling(target)
    try:
        yield temporary
        for file in [temporary] if temporary.is_file() else temporary.rglob("*"):
            if file.stat().st_mode & 0o777 == 0o600:
                file.chmod(MODE)
        temporary.rename(target)
        sync_folder(target.parent)
        digests.written(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {target}: {str(error).splitlines()[0]}; choose another place") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink()


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a whole file or none (see `replacing`); text is UTF-8. UserError where it cannot be written."""
    data = content.encode() if isinstance(content, str) else content
    try:
        with replacing(path, len(data)) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise UserError(f"file cannot be written ({error.strerror or error}): {path}; choose another place") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> None:
    """Safetensors file with optional string metadata, whole or absent (see `replacing`). Give one entry where the same tensors are
    to be the same file: safetensors writes several in another order every time."""
    owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in owned.values())
    with replacing(path, num_bytes) as temporary:
        save_file(owned, temporary, metadata=dict(facts) if facts else None)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; UserError when it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"no tensor file: {path}; the stage that writes it has to run first")
    try:
        return load_file(path)
    except SafetensorError as error:
        refuse_other_kind(path)
        raise UserError(f"damaged tensor file: {path} ({error}); delete it and run again") from error


def read_facts(path: Path) -> dict[str, str]:
    """The string metadata of a safetensors file; UserError when it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"no tensor file: {path}; the stage that writes it has to run first")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"damaged tensor file: {path} ({error}); delete it and run again") from error


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def check_path(path: Path) -> None:
    """UserError for a path that no file can have, such as a name that is too long, or that may not be looked at."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise UserError(
            f"not a path: {str(path)[:300]} ({getattr(error, 'strerror', None) or error}); choose another"
        ) from error


def make_folder(path: Path) -> None:
    """mkdir -p; UserError where a folder cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder: {path} ({error.strerror}); choose another run_dir=") from error


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys."""
    if isinstance(value, dict) and value:
        return {
            k: v for name, item in value.items() for k, v in flatten(item, f"{key}.{name}" if key else name).items()
        }
    return {key: value}


def read_json_or_none(path: Path) -> dict[str, Any] | None:
    """A JSON file's mapping; None where there is no file, or one that holds none, as a killed start may leave it."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def remove_folder(folder: Path) -> None:
    """Delete a stage folder so that a kill in between leaves no half of it under its name."""
    if folder.exists():
        trash = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(trash, ignore_errors=True)
        folder.rename(trash)
        shutil.rmtree(trash)


def copy_folder(source: Path, target: Path) -> None:
    """A folder once more, by hard links where they can be made; whole or absent (see `staged`)."""
    make_folder(target.parent)
    with staged(target) as temporary:
        shutil.copytree(source, temporary, copy_function=link_or_copy)


def link_or_copy(source: str, target: str) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
