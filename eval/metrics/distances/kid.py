"""Kernel distance of frame features: KID (Binkowski et al. 1801.01401) with Inception, or with a run's frame probe."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from eval.frechet import kid_without_each
from eval.metrics.distances.fid import FrameDistance


@dataclass(frozen=True, kw_only=True)
class KID(FrameDistance):
    """Unbiased MMD^2 with the kernel (x.y/d + 1)^3; pairs of one clip do not count. Fields are those of `FID`."""

    extractor: Literal["inception", "probes"]
    resize: Literal["tf1", "pytorch_fid", "none"]
    every: int

    name, label, least_half = "kid", "KID", 3

    def distance(self, a: Tensor, b: Tensor) -> float:
        return kid_without_each(a, b)[0]

    def without_each(self, a: Tensor, reference: Tensor) -> tuple[float, Tensor]:
        return kid_without_each(a, reference)
