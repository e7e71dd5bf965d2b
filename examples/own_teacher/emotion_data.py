"""The procedural world with one more condition of each clip: its expression, as the feature `emotion` of `emotion_net`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from emotion_net import EMOTIONS
from torch.nn.functional import one_hot

from distill.data.procedural.source import DataConfig, World
from distill.data.source import Clips


@dataclass(frozen=True, kw_only=True)
class EmotionWorld(DataConfig):
    """The keys of the world, unchanged."""

    def open(self) -> "Emotional":
        return Emotional(self)


class Emotional(World):
    """Clips whose features hold an emotion [N, 4]."""

    def draw(self, seed: int, name: str, num: int, motion: int = 0, rows: range | None = None) -> Clips:
        return with_emotion(super().draw(seed, name, num, motion, rows))

    def train(self, seed: int, numbers: Sequence[int], workers: int = 0) -> Iterator[Clips]:
        return map(with_emotion, super().train(seed, numbers, workers))


def with_emotion(clips: Clips) -> Clips:
    """The same clips, each with its expression as an emotion."""
    return replace(clips, features={"emotion": one_hot(clips.labels["expression"], EMOTIONS).float()})
