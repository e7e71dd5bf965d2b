"""Files that are whole or absent: atomic writes, tensors, JSON, folders."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from teachers.errors import UserError

FULL_DISK = ("No space left", "PytorchStreamWriter failed")
"""How safetensors and torch.save say it."""


@contextmanager
def replacing(path: Path, num_bytes: int) -> Iterator[Path]:
    """A temporary name beside `path` to write to; synced and renamed at the end, removed on failure.

    So the file is whole or absent. A full disk is a UserError that says how many of `num_bytes` there is room for.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(words in str(error) for words in FULL_DISK):
            free = shutil.disk_usage(path.parent).free
            raise UserError(
                f"the disk is full: {path} needs {num_bytes} bytes, {free} are free; make room and run again"
            ) from error
        raise


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a whole file or none (see `replacing`); text is UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path, len(data)) as temporary:
        temporary.write_bytes(data)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> None:
    """Safetensors file with optional string metadata, whole or absent (see `replacing`)."""
    owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in owned.values())
    with replacing(path, num_bytes) as temporary:
        save_file(owned, temporary, metadata=dict(facts) if facts else None)
        temporary.chmod(0o644)  # safetensors makes files that nobody else may read


def load_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file; UserError when it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"no tensor file: {path}; the stage that writes it has to run first")
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise UserError(f"damaged tensor file: {path} ({error}); delete it and run again") from error


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


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
    """A JSON file's content; None where there is no file, or a torn one that a killed start left."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def remove_folder(folder: Path) -> None:
    """Delete a stage folder so that a kill in between leaves no half of it under its name."""
    if folder.exists():
        trash = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(trash, ignore_errors=True)
        folder.rename(trash)
        shutil.rmtree(trash)


def copy_folder(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, temporary, copy_function=link_or_copy)
    temporary.rename(target)


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
