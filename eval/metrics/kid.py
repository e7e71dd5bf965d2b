"""Kernel distance of frame features: KID (Binkowski et al. 1801.01401) with Inception, or with a run's frame probe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eval.metric import Clip, Features, Metric, Score, stacked
from eval.metrics.fid import check_frames, ranks_degraded
from eval.metrics.frechet import kid_floor, kid_paired_difference, kid_with_error

LEAST_FLOOR = 6  # clips


@dataclass(frozen=True, kw_only=True)
class KID(Metric):
    """Unbiased MMD^2 with the kernel (x.y/d + 1)^3; pairs of one clip do not count. Fields are those of `FID`."""

    extractor: Literal["inception", "probes"]
    resize: Literal["tf1", "pytorch_fid", "none"]
    every: int

    name, label, better = "kid", "KID", "lower"
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
        return {"kid": Score(*kid_with_error(stacked(features, "frames"), stacked(reference, "frames")))}

    def floor(self, real: Sequence[Features], splits: int):
        if len(real) < LEAST_FLOOR:
            return None
        value, spread, num = kid_floor(stacked(real, "frames"), torch.Generator().manual_seed(0), splits)
        return {"kid": (value, spread)}, num

    def difference(self, ours: Sequence[Features], others: Sequence[Features], real: Sequence[Features]):
        one, two, reference = (stacked(side, "frames") for side in (ours, others, real))
        return kid_paired_difference(one, two, reference)

    def admit(self, cases) -> tuple[dict[str, float], bool]:
        """As `FID.admit`."""
        base = stacked(cases.reference(self), "frames")
        found = {name: kid_with_error(stacked(cases.features(self, name), "frames"), base) for name in cases.names}
        values = {name: value for name, (value, _) in found.items()}
        return values, ranks_degraded(values, found["real"][1])
