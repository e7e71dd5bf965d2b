"""Clips with sound and text, and the protocol of what gives them: the procedural world or a folder."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Clips:
    """video uint8 [N, 3, T, H, W]; audio [N, S], of two speakers [N, 2, S], own voice first; text; labels per frame [N, T] and per
    clip [N], those that are known; pose rows [N, T, P]; what is known besides of a conversation, [N, T]: `turn`, `other_open`.

    `features`: conditions that no encoder makes, by the name that they are declared under, as a network takes them: [N, ..], on the
    latent clock [N, F, ..] (`teachers.conditions.pack_rows` makes latent frames of pixel frames). They are trained on and sampled
    with as they are.
    """

    video: Tensor
    audio: Tensor
    text: list[str]
    labels: dict[str, Tensor]
    pose: Tensor | None = None
    talk: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)

    @property
    def voice(self) -> Tensor:
        """The avatar's own sound [N, S]."""
        return self.audio if self.audio.ndim == 2 else self.audio[:, 0]

    @property
    def mixed(self) -> Tensor:
        """All speakers mixed [N, S]."""
        return self.audio if self.audio.ndim == 2 else self.audio.sum(dim=1).clamp(-1, 1)


class Source(Protocol):
    """Where clips come from: the procedural world (`procedural.source.World`) or a folder (`recorded.Folder`).

    A set of clips has a name; the same seed and name are the same clips. Sets that are compared with each other share no clip.
    """

    num_train: int
    num_shards: int

    @property
    def left_out(self) -> Mapping[str, str]:
        """Measures that cannot be had here, and why."""
        ...

    @property
    def digests(self) -> Mapping[str, str]:
        """Digests of what the clips are read from, for fingerprints."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is worth knowing of the clips, as plain data."""
        ...

    @property
    def description(self) -> str:
        """The clips in words, for a model card."""
        ...

    def verify(self, rank: int, world_size: int) -> None:
        """UserError where files differ from their checksums; processes share the work."""
        ...

    def draw(self, seed: int, name: str, num: int, motion: int = 0) -> Clips:
        """`num` clips (or fewer, where there are no more) of the set `name`; another `motion` is the same conditions again."""
        ...

    def train(self, seed: int, numbers: Sequence[int], workers: int = 0) -> Iterator[Clips]:
        """The clips of these training shards, `world.shard_clips` each, the last one of `num_shards` shorter."""
        ...

    def meanings(self, clips: Clips) -> dict[str, tuple[Tensor, int]]:
        """What a text encoder is taught to tell apart: name -> class of each clip [N], and how many classes there are."""
        ...
