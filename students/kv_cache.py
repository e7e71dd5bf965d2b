"""The KV cache, rotated for attention: concatenated as values (training), or written to fixed buffers in place (serving)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from students.history import History
from teachers.networks.kind import KeyValue, PastParts


@dataclass(frozen=True)
class CachedChunk:
    """A chunk in the context: its number, and the un-rotated keys and values of all blocks [L, B, n, M, d], once for the clean
    pass or once for each denoising step (same_level). Of a history with a cycle of windows, those of the blocks of one `part`."""

    chunk: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    part: int = 0

    def split(self, part_of: Sequence[int]) -> "tuple[CachedChunk, ...]":
        """An entry of all blocks as one for each part, `part_of` each block; copies, so that one is freed without the others."""
        if max(part_of) == 0:
            return (self,)
        entries = []
        for part in range(max(part_of) + 1):
            own = [block for block, its in enumerate(part_of) if its == part]
            keys, values = (tuple(x[own] for x in given) for given in (self.keys, self.values))
            entries.append(CachedChunk(self.chunk, keys, values, part))
        return tuple(entries)


ContextKV = Sequence[tuple[KeyValue | None, ...]]
"""Of each pass and block, rotated keys and values [B, N, M, d] of all that is seen; None where a block sees nothing."""
RotateKeys = Callable[[Tensor, int], Tensor]
"""Keys of a chunk and its place in time (History.place) -> rotated keys."""


def of_part(cached: Sequence[CachedChunk], part: int) -> tuple[CachedChunk, ...]:
    """The entries of a part, in order of time."""
    return tuple(entry for entry in cached if entry.part == part)


def by_block(parts: Sequence[Sequence[Any] | None], part_of: Sequence[int]) -> tuple[Any, ...]:
    """What the parts have for their blocks, in the order of all blocks; None where a part has nothing."""
    rest = [iter(()) if own is None else iter(own) for own in parts]
    return tuple(next(rest[part], None) for part in part_of)


def concatenate(
    cached: Sequence[CachedChunk], chunk: int, history: History, rotate_keys: RotateKeys, part_of: Sequence[int]
) -> ContextKV:
    """The context of chunk number `chunk` as new tensors, in the order of History.slot; `part_of` each block."""
    parts = [
        _concatenated(own, chunk, part, rotate_keys) if (own := of_part(cached, i)) else None
        for i, part in enumerate(history.parts)
    ]
    if len(parts) == 1:
        return parts[0] or ()
    return tuple(by_block([own and own[step] for own in parts], part_of) for step in range(len(cached[0].keys)))


def _concatenated(cached: Sequence[CachedChunk], chunk: int, history: History, rotate_keys: RotateKeys) -> ContextKV:
    """`concatenate` of one part."""
    order = sorted(range(len(cached)), key=lambda i: history.slot(cached[i].chunk, chunk))
    context_kv = []
    for step in range(len(cached[0].keys)):
        keys = torch.cat([rotate_keys(cached[i].keys[step], history.place(cached[i].chunk, i)) for i in order], dim=2)
        values = torch.cat([cached[i].values[step] for i in order], dim=2)
        context_kv.append(tuple(zip(keys, values, strict=True)))
    return tuple(context_kv)


class LazyContext(Sequence[tuple[KeyValue, ...]]):
    """A context that is made when a step first asks for it. By then nobody holds the one before it, and of the two, the largest
    tensors of a rollout, there is never more than one."""

    def __init__(self, make: Callable[[], ContextKV], passes: int):
        self._make, self._passes = make, passes

    @cached_property
    def _made(self) -> ContextKV:
        return self._make()

    def __len__(self) -> int:
        return self._passes

    def __getitem__(self, index):
        return self._made[index]


def unrotated(
    cached: Sequence[CachedChunk], chunk: int, history: History, table: Callable[[int], Tensor], step: int
) -> list[PastParts]:
    """Of each block of a part what `concatenate` makes the context of: `cached` itself and the table of each chunk's place, so that
    a block which is computed again in the backward pass keeps no copy of its own."""
    order = sorted(range(len(cached)), key=lambda i: history.slot(cached[i].chunk, chunk))
    keys, values = ([getattr(cached[i], name)[step] for i in order] for name in ("keys", "values"))
    tables = tuple(table(history.place(cached[i].chunk, i)) for i in order)
    layers = range(len(keys[0]))
    return [(tuple(key[i] for key in keys), tuple(value[i] for value in values), tables) for i in layers]


class InplaceKVCache:
    """The same context in buffers that are written in place, of one stream (of one part), without gradient.

    Only what changed is written: a slot's values when another chunk takes it, its keys also when its place in time moves. Any
    earlier state of the stream may come again; then its slots are written back, so a state stays a value.
    """

    def __init__(self, history: History):
        self.history = history
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.slots: dict[int, tuple[CachedChunk, int]] = {}  # slot -> entry and its place in time
        self.views: dict[int, ContextKV] = {}  # tokens -> the front of the buffers, cut into blocks
        self.latest: tuple[Sequence[CachedChunk], int] = ((), -1)  # every step of a chunk wants the same

    def context_kv(self, cached: Sequence[CachedChunk], chunk: int, rotate_keys: RotateKeys) -> ContextKV:
        """The context of chunk number `chunk`: views of the buffers, valid until the next call."""
        size = cached[0].keys[0].shape[2]
        tokens = len(cached) * size
        if self.latest[0] is cached and self.latest[1] == chunk:
            return self.views[tokens]
        self._allocate(cached[0], len(cached))
        for rank, entry in enumerate(cached):
            place = self.history.place(entry.chunk, rank)
            slot = self.history.slot(entry.chunk, chunk)
            written, at = self.slots.get(slot, (None, -1))
            if written is entry and at == place:
                continue
            where = slice(slot * size, (slot + 1) * size)
            for step, (keys, values) in enumerate(self.buffers):
                keys[:, :, where] = rotate_keys(entry.keys[step], place)
                if written is not entry:
                    values[:, :, where] = entry.values[step]
            self.slots[slot] = (entry, place)
        self.latest = (cached, chunk)
        if tokens not in self.views:
            self.views[tokens] = tuple(
                tuple(zip(keys[:, :, :tokens], values[:, :, :tokens], strict=True)) for keys, values in self.buffers
            )
        return self.views[tokens]

    def _allocate(self, like: CachedChunk, count: int) -> None:
        """Buffers for every slot; without a bound they double."""
        size = like.keys[0].shape[2]
        room = self.buffers[0][0].shape[2] // size if self.buffers else 0
        if room >= count:
            return
        room = self.history.capacity or max(2 * room, count, 4)
        layers, batch, _, *rest = like.keys[0].shape
        self.slots, self.views = {}, {}
        self.buffers = [
            (key.new_zeros(layers, batch, room * size, *rest), value.new_zeros(layers, batch, room * size, *rest))
            for key, value in zip(like.keys, like.values, strict=True)
        ]


class CycledKVCache:
    """An `InplaceKVCache` for each part of a history with a cycle of windows, `part_of` each block: a block's buffers have room for
    what it sees and no more."""

    def __init__(self, history: History, part_of: Sequence[int]):
        self.parts, self.part_of = [InplaceKVCache(part) for part in history.parts], part_of
        self.latest: tuple[Sequence[CachedChunk], int, ContextKV] = ((), -1, ())

    def context_kv(self, cached: Sequence[CachedChunk], chunk: int, rotate_keys: RotateKeys) -> ContextKV:
        """As InplaceKVCache's."""
        if self.latest[0] is not cached or self.latest[1] != chunk:
            found = [
                part.context_kv(own, chunk, rotate_keys) if (own := of_part(cached, i)) else None
                for i, part in enumerate(self.parts)
            ]
            steps = range(len(cached[0].keys))
            made = tuple(by_block([own and own[step] for own in found], self.part_of) for step in steps)
            self.latest = cached, chunk, made
        return self.latest[2]
