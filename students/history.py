"""What a chunk may see of the past: one policy value, used by training masks, rollouts and the serving session alike."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class History:
    """`sinks` first chunks that are never evicted, the last `window` finished chunks (null: all), and of those that left the
    window every `memory_every`th, the newest `memory` of them. All count chunks.

    `window` a list: a window for each block of the network, over and over ([2, 2, 2, 2, 21]: each fifth block sees 21 chunks, the
    others 2; SekoTalk-AR of LightX2V). Each block counts positions and keeps keys and values as a history of its window alone does.
    A student is trained with the windows that it is served with.

    `commit`: clean puts a finished chunk into the context by one more pass at the sigma `level` (the chunk itself stays clean,
    as in Self Forcing's sampler). same_level needs no pass: denoising step i sees step i of the earlier chunks (LiveAvatar
    2512.04677), which is what diffusion forcing at one sigma trains.

    With `refine_every` every N-th finished chunk is noised to the sigma `refine_level` once it was shown, and denoised once
    more, seeing the context alone, before it becomes context (FlowAct-R1's memory refinement, 2601.10103; its period and level are
    not published).

    Self Forcing is History(sinks=0, window=None); LiveTalk's Anchor-Heavy Identity Sinks (9 sink frames of 15 that include the
    current chunk) is History(sinks=3, window=1) with chunks of 3 frames.

    `positions`: relative counts rotary positions over what is seen, so a stream has no last one. absolute counts them from the
    start of the stream, as the published code of LiveTalk and Self Forcing does: the distance to the sinks grows with every chunk,
    and the stream ends with the network's table (1024 latent frames). Both are the same until a chunk leaves the window, and
    without sinks. For weights that were published so; measured in docs/parity.md.

    `anchors_ahead`: of a network with anchors (Wan2.2-S2V), how many latent frames ahead of a chunk's first frame the reference
    lies at least; before, it is where the training clip has it. LiveAvatar draws 4 to 30 anew for every step. `anchors_roll`: so
    many latent frames into a stream the anchors are made again of what it drew, the first frame and the newest ones (LiveAvatar's
    rolling sink: 12, the length of its clips; 0: never).

    `reference_chunks`: of a network with channels for the reference, how many first chunks are given it (null: all, as OmniAvatar
    and LiveTalk do). Later ones have zeros there, as in image-to-video, and know the face from the context alone.
    """

    sinks: int = 1
    window: int | tuple[int, ...] | None = 2
    memory: int = 0
    memory_every: int = 4
    commit: Literal["clean", "same_level"] = "clean"
    level: float = 0.0
    refine_every: int = 0
    refine_level: float = 0.25
    positions: Literal["relative", "absolute"] = "relative"
    anchors_ahead: int = 12
    anchors_roll: int = 0
    reference_chunks: int | None = None

    def __post_init__(self):
        if self.window == ():
            raise UserError(
                "student.history.window: got []; give chunks, a number for all blocks or a list over blocks"
            )
        least = min(self.window) if isinstance(self.window, tuple) else self.window or 0
        counts = {"sinks": self.sinks, "window": least, "memory": self.memory}
        if self.anchors_ahead < 1:
            raise UserError(f"student.history.anchors_ahead: got {self.anchors_ahead}; it counts latent frames, from 1")
        if self.anchors_roll < 0 or (self.anchors_roll and self.commit != "same_level"):
            raise UserError(
                f"student.history.anchors_roll: got {self.anchors_roll} with commit={self.commit}; it counts latent frames of a "
                "same_level history, 0 is never"
            )
        for name, count in counts.items():
            if count < 0:
                raise UserError(f"student.history.{name}: got {count}; it counts chunks, from 0")
        if self.reference_chunks is not None and self.reference_chunks < 1:
            raise UserError(f"student.history.reference_chunks: got {self.reference_chunks}; it counts chunks, from 1")
        if self.memory_every < 1:
            raise UserError(f"student.history.memory_every: got {self.memory_every}; every chunk is 1")
        if not 0.0 <= self.level < 1.0:
            raise UserError(f"student.history.level: got {self.level}; a context level is a sigma in [0, 1)")
        if self.commit == "same_level" and self.level:
            raise UserError(f"student.history.level: got {self.level}; same_level has no pass of its own, set it to 0")
        if self.refine_every < 0 or not 0.0 < self.refine_level <= 1.0:
            raise UserError(
                f"student.history.refine_every, refine_level: got {self.refine_every}, {self.refine_level}; every N-th "
                "chunk, 0 is off, at a sigma in (0, 1]"
            )
        if self.commit == "same_level" and self.refine_every:
            raise UserError("student.history.refine_every: same_level keeps the steps as they were; set it to 0")

    def is_refined(self, chunk: int) -> bool:
        """Whether chunk number `chunk` is denoised once more before it becomes context, where any is."""
        return (chunk + 1) % self.refine_every == 0

    @cached_property
    def parts(self) -> tuple["History", ...]:
        """For each different window of a cycle a history with it, in order of first use; without a cycle this one alone."""
        if not isinstance(self.window, tuple):
            return (self,)
        return tuple(replace(self, window=window) for window in dict.fromkeys(self.window))

    def part_of(self, num_blocks: int) -> tuple[int, ...]:
        """Of each of so many blocks the index of its part; UserError where they are fewer than the cycle."""
        if not isinstance(self.window, tuple):
            return (0,) * num_blocks
        if num_blocks < len(self.window):
            raise UserError(
                f"student.history.window: got {len(self.window)} windows for a network of {num_blocks} blocks; give fewer"
            )
        windows = [part.window for part in self.parts]
        return tuple(windows.index(self.window[i % len(self.window)]) for i in range(num_blocks))

    @property
    def widest(self) -> "History":
        """The part of the largest window, which sees whatever any block sees."""
        return max(self.parts, key=lambda part: part.window or 0)

    def visible(self, chunk: int) -> tuple[int, ...]:
        """Indices of the earlier chunks that chunk number `chunk` sees (of a cycle: in any block), in order of time."""
        if self.window is None:
            return tuple(range(chunk))
        if isinstance(self.window, tuple):
            return self.widest.visible(chunk)
        recent = max(min(self.sinks, chunk), chunk - self.window)
        old = range(self._first_remembered, recent, self.memory_every)
        return (*range(min(self.sinks, chunk)), *old[max(0, len(old) - self.memory) :], *range(recent, chunk))

    def slot(self, index: int, chunk: int) -> int:
        """Place of the visible chunk `index` in a buffer of fixed size, when number `chunk` is up: sinks, then the window as a
        ring, then the memory as a ring. Places fill from 0 without a gap, and a chunk keeps its place while it is in the window. Of
        a cycle, each part has its own."""
        assert not isinstance(self.window, tuple)
        if self.window is None or index < self.sinks:
            return index
        if index >= chunk - self.window:
            return self.sinks + (index - self.sinks) % self.window
        return self.sinks + self.window + (index - self._first_remembered) // self.memory_every % self.memory

    def place(self, chunk: int, rank: int) -> int:
        """Rotary position, in chunks, of chunk number `chunk`, where `rank` others before it are seen."""
        return rank if self.positions == "relative" else chunk

    @property
    def _first_remembered(self) -> int:
        return -(-self.sinks // self.memory_every) * self.memory_every

    @property
    def capacity(self) -> int | None:
        """Chunks seen at most (of a cycle: in any block); None grows without end."""
        if isinstance(self.window, tuple):
            return self.widest.capacity
        return None if self.window is None else self.sinks + self.window + self.memory

    def mean_visible(self, chunk: int, num_blocks: int) -> float:
        """Chunks that chunk number `chunk` sees, as a mean over so many blocks."""
        if not isinstance(self.window, tuple):
            return len(self.visible(chunk))
        seen = [len(part.visible(chunk)) for part in self.parts]
        return sum(seen[i] for i in self.part_of(num_blocks)) / num_blocks


@dataclass(frozen=True, kw_only=True)
class HistoryNoise:
    """Noise on the finished latents that a student is trained on, against errors that add up (MIDAS 2508.19320).

    `buckets` sigmas from 0 to `most`; a chunk's is the first, no noise, with probability `p_clean`, else any of the others. The
    student is conditioned on its bucket. Serving is bucket 0. MIDAS has 20; their spacing and the largest are not published.
    """

    buckets: int = 20
    most: float = 0.5
    p_clean: float = 0.1

    def __post_init__(self):
        if self.buckets < 2 or not 0.0 < self.most < 1.0 or not 0.0 <= self.p_clean <= 1.0:
            raise UserError(
                f"student.history_noise: got buckets={self.buckets}, most={self.most}, p_clean={self.p_clean}; "
                "need buckets from 2, a sigma most in (0, 1) and a probability p_clean"
            )

    def draw(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Sigmas of the buckets that chunks of this shape fall into."""
        index = torch.randint(1, self.buckets, shape, generator=rng)
        index[torch.rand(shape, generator=rng) < self.p_clean] = 0
        return index * (self.most / (self.buckets - 1))

    def bucket(self, level: Tensor) -> Tensor:
        """The buckets of sigmas; ValueError for one that is none of them."""
        index = level.double() * ((self.buckets - 1) / self.most)
        near = index.round()
        if level.is_meta:  # a plan's, without values
            return near.long()
        if (index - near).abs().max() > 1e-3 or near.min() < 0 or near.max() >= self.buckets:
            raise ValueError(
                f"history noise: got sigmas {level.flatten().tolist()[:4]}.., the buckets end at {self.most}"
            )
        return near.long()
