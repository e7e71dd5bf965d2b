"""Conditions that the package does not know, one on every clock."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from teachers.conditions import FEATURES, Feature, declare
from tests.support.tiny import CHANNELS, SIDE, randn

MOOD = (
    Feature(name="mood", clock="stream", size=(7,)),
    Feature(name="mood_track", clock="latent", size=(3,)),
    Feature(name="scenery", clock="grid", size=(2, SIDE, SIDE)),
    Feature(name="idol", clock="anchor", size=(CHANNELS, 1, SIDE, SIDE)),
)


@contextmanager
def declared(*features: Feature) -> Iterator[None]:
    """The features are in the table inside."""
    for feature in features:
        declare(feature)
    try:
        yield
    finally:
        for feature in features:
            FEATURES.pop(feature.name, None)


def some_mood(batch: int, frames: int, seed: int = 0) -> dict[str, Tensor]:
    """Random values of `MOOD`."""
    return {
        "mood": randn(batch, 7, seed=seed + 31),
        "mood_track": randn(batch, frames, 3, seed=seed + 32),
        "scenery": randn(batch, 2, frames, SIDE, SIDE, seed=seed + 33),
        "idol": randn(batch, CHANNELS, 1, SIDE, SIDE, seed=seed + 34),
    }
