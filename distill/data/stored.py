"""Rows of tensors in many files, which are opened when a batch asks for them: a start reads one manifest, whatever the number of
files, and no more than OPEN_FILES of them are mapped at once (a Linux process may hold 65,530 maps)."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from teachers.disk.digests import Written, faults, read_sealed
from teachers.errors import UserError
from teachers.files import load_tensors

OPEN_FILES = 64
BIG_BYTES = 2**32
"""A stage with more shards than this is not read through at a start: each shard is verified where it is first read."""
TEXTS_A_FILE = 512

Opened = Callable[[Path], dict[str, Tensor]]


def opener(folder: Path | None = None) -> Opened:
    """`load_tensors`, which keeps the last OPEN_FILES files mapped. Of a big stage's `folder` each shard is compared with the
    stage's record first, once a process; UserError where it is damaged."""
    record = folder and read_sealed(folder / "fingerprint.json", "delete it and run again")
    unread = unread_shards(record["files"]) if record else {}

    def load(file: Path) -> dict[str, Tensor]:
        if folder is not None and file.name in unread:
            for name, words in faults(folder, {file.name: unread.pop(file.name)}):
                raise UserError(
                    f"damaged stage: {folder}: {name} {words}; put it back, or delete it and fingerprint.json there and run again: "
                    "what is missing is made again"
                )
        return load_tensors(file)

    return lru_cache(maxsize=OPEN_FILES)(load)


def unread_shards(files: Mapping[str, Written]) -> dict[str, Written]:
    """Those of a stage's recorded files that are not read when it is found done: its shards, where they have over BIG_BYTES."""
    shards = {name: file for name, file in files.items() if re.fullmatch(r"(shard|text)-\d+\.safetensors", name)}
    return shards if sum(size for size, _ in shards.values()) > BIG_BYTES else {}


def files_of(folder: Path, what: str, num: int) -> list[Path]:
    """The names of a stage's `num` tensor files."""
    return [folder / f"{what}-{i:05d}.safetensors" for i in range(num)]


class Stored:
    """Rows [N, ..] of the tensor `name` of files with `lengths` rows each; indexed by rows [B] as one tensor is. Where a file's
    tensor has fewer rows, it goes round: a clip and its mirror image share what is equal. `frames`: rows are latents
    [C, frames, h, w], and those of a portrait alone are followed by zeros."""

    def __init__(
        self, files: Sequence[Path], lengths: Sequence[int], name: str, opened: Opened, frames: int | None = None
    ):
        self.files, self.name, self.opened, self.frames = files, name, opened, frames
        self.ends = torch.tensor(lengths).cumsum(0)
        self.starts = self.ends - torch.tensor(lengths)
        row = opened(files[0])[name].shape[1:]
        self.shape = torch.Size((int(self.ends[-1]), *(row if frames is None else (row[0], frames, *row[2:]))))

    def __getitem__(self, rows: Tensor) -> Tensor:
        at = torch.bucketize(rows, self.ends, right=True)
        parts = [self.opened(self.files[i])[self.name] for i in at.tolist()]
        places = (rows - self.starts[at]).tolist()
        found = [part[place % len(part)] for part, place in zip(parts, places, strict=True)]
        if self.frames is not None:
            found = [F.pad(row, (0, 0, 0, 0, 0, self.frames - row.shape[1])) for row in found]
        return torch.stack(found)


def packed_texts(features: Sequence[Tensor], precision: torch.dtype) -> dict[str, Tensor]:
    """Token features [L, D] of texts as the tensors of one file, without the zeros at their ends."""
    kept = [own[: int(own.any(dim=1).nonzero().max()) + 1] if own.any() else own[:0] for own in features]
    return {"features": torch.cat(kept).to(precision), "ends": torch.tensor([len(own) for own in kept]).cumsum(0)}


class Texts:
    """Token features [N, L, D] of rows whose text is number `of` [N], each stored once (`packed_texts`); indexed by rows [B]."""

    def __init__(self, files: Sequence[Path], of: Tensor, num_tokens: int, opened: Opened):
        self.files, self.of, self.num_tokens, self.opened = files, of, num_tokens, opened

    def __getitem__(self, rows: Tensor) -> Tensor:
        return torch.stack([self._text(number) for number in self.of[rows].tolist()])

    def _text(self, number: int) -> Tensor:
        part, k = self.opened(self.files[number // TEXTS_A_FILE]), number % TEXTS_A_FILE
        begin, end = (int(part["ends"][i]) if i >= 0 else 0 for i in (k - 1, k))
        return F.pad(part["features"][begin:end], (0, 0, 0, self.num_tokens - (end - begin)))
