"""Frechet distance of frame features: FID with Inception (Heusel et al. 1706.08500), or with a run's frame probe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eval.metric import Clip, Features, Metric, Score, stacked
from eval.metrics.frechet import Moments, frechet_distance, frechet_floor, frechet_with_error, paired_difference

LEAST_FLOOR = 4  # clips


@dataclass(frozen=True, kw_only=True)
class FID(Metric):
    """extractor: TF Inception of 2015, pool3 [2048], or a run's frame probe [64]; resize: as which code scales, without
    antialiasing
    every: each n-th frame after the given ones; pooling: the frames of the whole set in one distance, or a distance for each
    pair of clips and their mean; ddof: covariance over N - ddof (1 in pytorch-fid, clean-fid, torchmetrics; 0 in StyleGAN-V)"""

    extractor: Literal["inception", "probes"]
    resize: Literal["tf1", "pytorch_fid", "none"]
    every: int
    pooling: Literal["set", "pair"]
    ddof: Literal[0, 1]

    name, label, better, plot = "fid", "FID", "lower", True
    against = "real"

    def __post_init__(self):
        check_frames(self)

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.extractor,)

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        return {"frames": networks.frames(clip, self.extractor, self.resize, self.every)}

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        if reference is None:
            return {}
        ours, theirs = stacked(features, "frames"), stacked(reference, "frames")
        if self.pooling == "pair":
            return {"fid": Score.over([frechet_distance(a, b, self.ddof) for a, b in zip(ours, theirs, strict=True)])}
        return {"fid": Score(*frechet_with_error(ours, Moments.of(theirs), self.ddof))}

    def floor(self, real: Sequence[Features], splits: int):
        if self.pooling == "pair" or len(real) < LEAST_FLOOR:
            return None
        generator = torch.Generator().manual_seed(0)
        value, spread, num = frechet_floor(stacked(real, "frames"), generator, splits, self.ddof)
        return {"fid": (value, spread)}, num

    def difference(self, ours: Sequence[Features], others: Sequence[Features], real: Sequence[Features]):
        if self.pooling == "pair":
            return None
        one, two, reference = (stacked(side, "frames") for side in (ours, others, real))
        return paired_difference(one, two, Moments.of(reference), self.ddof)

    def admit(self, cases) -> tuple[dict[str, float], bool]:
        """real < decoded < blurred, static, noisy; real and decoded may tie within one jackknife error, since a good codec
        is invisible to a small extractor."""
        base = stacked(cases.reference(self), "frames")
        values = {name: frechet_distance(stacked(cases.features(self, name), "frames"), base) for name in cases.names}
        error = frechet_with_error(stacked(cases.features(self, "real"), "frames"), Moments.of(base))[1]
        return values, ranks_degraded(values, error)


def check_frames(metric) -> None:
    """ValueError where `every` or `resize` do not fit the extractor."""
    if metric.every < 1:
        raise ValueError(f"every must be at least 1: got {metric.every}")
    if (metric.resize == "none") != (metric.extractor == "probes"):
        raise ValueError(f"resize {metric.resize} is not for {metric.extractor}")


def ranks_degraded(values: dict[str, float], error: float) -> bool:
    """Whether a distance has real and decoded clips below degraded ones."""
    at_floor = values["real"] < values["decoded"] + error
    return at_floor and max(values["real"], values["decoded"]) < min(values[x] for x in ("blurred", "static", "noisy"))
