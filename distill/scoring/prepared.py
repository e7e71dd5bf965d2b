"""Prepared shards as a set of clips: what `distill data prepare` wrote, each sample found by the id of its clip and read whole."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distill.data.loader import Index, Windows
from distill.data.prepare.shards import CHECKSUMS, HINT
from teachers.errors import UserError


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds shards with their checksums."""
    return (folder / CHECKSUMS).is_file()


def open_samples(folder: Path) -> dict[str, Index]:
    """Clip id, its dots as "_", -> an index of its sample alone. UserError where shards are not whole or hold what is no video."""
    index = Index.read(folder, Fraction(25))  # the rate is for sound without video, which is refused here
    found = {}
    for entry in range(len(index.keys)):
        if "video" not in index.buckets[index.bucket[entry]].parts:
            raise UserError(f"sample {index.key(entry)} of {folder} is no video; remove it")
        found[index.key(entry).replace("+", "_")] = _alone(
            index, entry
        )  # a key has "+" for a dot (`shards.sample_key`)
    return found


def _alone(index: Index, entry: int) -> Index:
    columns: dict[str, Any] = {
        name: getattr(index, name)[entry : entry + 1] for name in ("offset", "num_bytes", "frames", "keys")
    }
    shard, bucket = index.shards[index.shard[entry]], index.buckets[index.bucket[entry]]
    zero = np.zeros(1, dtype=np.int64)
    return replace(index, shards=(shard,), buckets=(bucket,), shard=zero, bucket=zero, **columns)


def place_of(sample: Index) -> tuple[Path, int, int]:
    """The shard of a sample, and its first byte and number of bytes there."""
    return sample.folder / sample.shards[0], int(sample.offset[0]), int(sample.num_bytes[0])


def shape_of(sample: Index) -> tuple[int, int, int]:
    """Frames, height and width of a sample, as its shard's index has them."""
    return int(sample.frames[0]), sample.buckets[0].height, sample.buckets[0].width


def read_sample(sample: Index) -> tuple[Tensor, Fraction, Tensor | None]:
    """Video uint8 [3, T, H, W], its rate, and sound [S] at 16 kHz where it has some; UserError, naming shard and sample."""
    where = f"sample {sample.key(0)} of {sample.folder / sample.shards[0]}"
    members = sample.members(0)
    try:
        fps = Fraction(json.loads(members["json"])["fps"])
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"metadata cannot be read ({error!r}): {where}; {HINT}") from error
    clip = Windows(sample, int(sample.frames[0]), fps)[0]
    assert clip.video is not None
    return clip.video, fps, clip.audio
