"""Checkpoints that any engine reads: a folder of full tensors (safetensors, streamed) and manifest.json with their digests.

`checkpoint-<step>` is renamed into place when everything is on the disk, so what has that name is complete. Rank 0 alone writes,
with one file's tensors in memory at a time.
"""

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.training.role import Rows, whole
from teachers.disk.digests import faults, read_sealed, recording, sealed
from teachers.errors import UserError
from teachers.files import atomic_write, make_folder, remove_folder, save_tensors, staged

FORMAT = 1
MANIFEST = "manifest.json"
HINT = "; delete its folder, and the run resumes from the checkpoint before"
FILE_BYTES = 2**31
"""Size at which a file is closed."""


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a stage's folder, oldest first."""
    return sorted(path for path in folder.glob("checkpoint-*") if (path / MANIFEST).is_file())


def save(
    folder: Path,
    step: int,
    part: int,
    metadata: Mapping[str, Any],
    tensors: Iterator[tuple[str, Tensor]],
    engine,
    keep: int,
):
    """Write `tensors` and `metadata` as the checkpoint of `step`, or of `part` updates after it; delete all but the last `keep`.
    Every rank calls it.

    UserError on every rank, and the older checkpoints untouched, when rank 0 cannot write.
    """
    target = folder / (f"checkpoint-{step:08d}" + (f"-{part:02d}" if part else ""))
    if any_rank(engine, engine.is_main and target.is_dir()):  # a late rank may see what rank 0 is writing now
        return
    on_main(engine, target, lambda: _write(target, {**metadata, "step": step}, tensors), tensors)
    if engine.is_main:
        for old in saved(folder)[:-keep]:
            remove_folder(old)
    engine.barrier()


def on_main(engine, path: Path, write: Callable[[], None], collective: Iterator = iter(())) -> None:  # noqa: B008
    """write() on rank 0 while the others consume `collective`; UserError on every rank when rank 0 cannot write `path`."""
    error: UserError | None = None
    if engine.is_main:
        try:
            write()
        except UserError as problem:
            error = problem
        except OSError as problem:
            error = UserError(f"cannot write: {path} ({problem.strerror or problem}); make it writable and run again")
    for _ in collective:  # collectives need every rank, also after rank 0 has failed
        pass
    if any_rank(engine, error is not None):
        raise error or UserError(f"rank 0 could not write {path}; see its message")


def any_rank(engine, flag: bool) -> bool:
    """Whether any rank's flag is set."""
    if engine.world_size == 1:
        return flag
    mean = torch.tensor(float(flag), device=engine.device)
    engine.all_reduce_mean([mean])
    return mean.item() > 0


def _write(target: Path, metadata: Mapping[str, Any], tensors: Iterator[tuple[str, Tensor]]) -> None:
    for stale in target.parent.glob(".checkpoint-*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    make_folder(target.parent)
    with staged(target) as partial:
        partial.mkdir()
        pending: dict[str, Tensor] = {}
        number, held = itertools.count(), 0
        with recording(partial) as recorder:
            for key, tensor in tensors:
                pending[key] = tensor.detach().to("cpu", copy=True)
                held += pending[key].nbytes
                if held >= FILE_BYTES:
                    save_tensors(partial / f"tensors-{next(number):05d}.safetensors", pending)
                    pending.clear()
                    held = 0
            if pending:
                save_tensors(partial / f"tensors-{next(number):05d}.safetensors", pending)
            files = recorder.wait()
        atomic_write(partial / MANIFEST, sealed({"format": FORMAT, **metadata, "files": files}))


def _metadata(path: Path) -> dict[str, Any]:
    metadata = read_sealed(path / MANIFEST, HINT.removeprefix("; "))
    if metadata is None or metadata["format"] != FORMAT:
        raise UserError(f"no checkpoint of format {FORMAT}: {path}{HINT}")
    return metadata


class Reader:
    """A checkpoint's metadata, and its tensors one by one; UserError where it is damaged."""

    def __init__(self, path: Path):
        self.path, self.metadata, self.files = path, _metadata(path), {}
        try:
            for name in self.metadata["files"]:
                with safe_open(path / name, framework="pt") as file:
                    self.files |= dict.fromkeys(file.keys(), name)
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(f"damaged checkpoint: {self.path} ({error}){HINT}") from error

    def stream(self, prefix: str) -> Iterator[tuple[str, Rows]]:
        """The tensors whose names begin with `prefix`, named without it, one at a time; what is not read stays on the disk."""
        for name in sorted({name for key, name in self.files.items() if key.startswith(prefix)}):
            with safe_open(self.path / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    if key.startswith(prefix):
                        rows = file.get_slice(key)
                        yield key.removeprefix(prefix), rows if rows.get_shape() else file.get_tensor(key)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of `stream`, read, as a dict."""
        return {name: whole(rows) for name, rows in self.stream(prefix)}


def verify(path: Path) -> None:
    """UserError for the first file of a checkpoint that differs from its digest; for one rank."""
    for name, words in faults(path, _metadata(path)["files"]):
        raise UserError(f"damaged checkpoint: {path / name} {words}{HINT}")
