"""Frechet distance of frame features: FID with Inception (Heusel et al. 1706.08500), or with a run's frame probe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from eval.frechet import (
    Moments,
    difference_with_error,
    floor_of,
    frechet_distance,
    frechet_without_each,
    with_error,
)
from eval.metric import Clip, Features, Metric, Score, stacked


class Distance(Metric):
    """Shared by FID, FVD and KID: a distance between the features of a set and those of the real clips.

    extractor: a published network, or "probes"; rows: the name of a clip's features; least_half: clips in a half of the floor
    """

    extractor: Any
    better, against = "lower", "real"
    rows: ClassVar[str] = "frames"
    least: ClassVar[int] = 3  # of the jackknife, on either side
    least_half: ClassVar[int] = 2

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.extractor,)

    def distance(self, a: Tensor, b: Tensor) -> float:
        """Of two sets of features."""
        raise NotImplementedError

    def without_each(self, a: Tensor, reference: Tensor) -> tuple[float, Tensor]:
        """Distance of a from the reference, and those without each clip of a [N]."""
        raise NotImplementedError

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        if reference is None:
            return {}
        found = self.without_each(stacked(features, self.rows), stacked(reference, self.rows))
        return {self.name: Score.without_each(*found)}

    def floor(self, real: Sequence[Features], splits: int):
        if len(real) < 2 * self.least_half:
            return None
        generator = torch.Generator().manual_seed(0)
        value, spread, num = floor_of(stacked(real, self.rows), generator, self.distance, splits, self.least_half)
        return {self.name: (value, spread)}, num

    def difference(self, ours: Sequence[Features], others: Sequence[Features], real: Sequence[Features]):
        one, two, reference = (stacked(side, self.rows) for side in (ours, others, real))
        return difference_with_error(self.without_each(one, reference), self.without_each(two, reference))

    def admit(self, cases) -> tuple[dict[str, float], bool]:
        """real < decoded < blurred, static, noisy; real and decoded may tie within one jackknife error, since a good codec
        is invisible to a small extractor."""
        base = stacked(cases.reference(self), self.rows)
        values = {name: self.distance(stacked(cases.features(self, name), self.rows), base) for name in cases.names}
        error = with_error(*self.without_each(stacked(cases.features(self, "real"), self.rows), base))[1]
        good, degraded = ("real", "decoded"), ("blurred", "static", "noisy")
        at_floor = values["real"] < values["decoded"] + error
        return values, at_floor and max(values[x] for x in good) < min(values[x] for x in degraded)


class FrameDistance(Distance):
    """Shared by FID and KID: of each `every`-th frame after the given ones."""

    resize: Any
    every: int

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every must be at least 1: got {self.every}")
        check_resize(self)

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        return {"frames": networks.frames(clip, self.extractor, self.resize, self.every)}


def check_resize(metric) -> None:
    """ValueError where `resize` does not fit the extractor."""
    if (metric.resize == "none") != (metric.extractor == "probes"):
        raise ValueError(f"resize {metric.resize} is not for {metric.extractor}")


@dataclass(frozen=True, kw_only=True)
class FID(FrameDistance):
    """extractor: TF Inception of 2015, pool3 [2048], or a run's frame probe [64]; resize: as which code scales, without
    antialiasing
    every: each n-th frame after the given ones; pooling: the frames of the whole set in one distance, or a distance for each
    pair of clips and their mean; ddof: covariance over N - ddof (1 in pytorch-fid, clean-fid, torchmetrics; 0 in StyleGAN-V)"""

    extractor: Literal["inception", "probes"]
    resize: Literal["tf1", "pytorch_fid", "none"]
    every: int
    pooling: Literal["set", "pair"]
    ddof: Literal[0, 1]

    name, label, plot = "fid", "FID", True

    def distance(self, a: Tensor, b: Tensor) -> float:
        return frechet_distance(a, b, self.ddof)

    def without_each(self, a: Tensor, reference: Tensor) -> tuple[float, Tensor]:
        return frechet_without_each(a, Moments.of(reference), self.ddof)

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        if self.pooling == "set" or reference is None:
            return super().score(features, reference)
        pairs = zip(stacked(features, "frames"), stacked(reference, "frames"), strict=True)
        return {"fid": Score.over([self.distance(a, b) for a, b in pairs])}

    def floor(self, real: Sequence[Features], splits: int):
        return None if self.pooling == "pair" else super().floor(real, splits)

    def difference(self, ours: Sequence[Features], others: Sequence[Features], real: Sequence[Features]):
        return None if self.pooling == "pair" else super().difference(ours, others, real)
