"""Frechet distance of one feature a clip: FVD with I3D (Unterthiner et al. 1812.01717), or with a run's clip probe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eval.metric import Clip, Features, Metric, Score, stacked
from eval.metrics.fid import LEAST_FLOOR, ranks_degraded
from eval.metrics.frechet import Moments, frechet_distance, frechet_floor, frechet_with_error, paired_difference
from eval.networks.i3d import MIN_FRAMES
from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FVD(Metric):
    """extractor: I3D Kinetics-400 logits [400], or a run's clip probe [64], over all frames; resize, ddof: as in `FID`."""

    extractor: Literal["i3d", "probes"]
    resize: Literal["stylegan_v", "common_metrics", "none"]
    ddof: Literal[0, 1]

    name, label, better, plot = "fvd", "FVD", "lower", True
    against = "real"

    def __post_init__(self):
        if (self.resize == "none") != (self.extractor == "probes"):
            raise ValueError(f"resize {self.resize} is not for {self.extractor}")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.extractor,)

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        if self.extractor == "probes":
            return {"clip": networks.reading(clip).clip_features}
        if clip.video.shape[1] < MIN_FRAMES:
            raise UserError(f"FVD needs clips of at least {MIN_FRAMES} frames: got {clip.video.shape[1]}")
        return {"clip": networks.i3d.features(clip.video[None], 1, self.resize)[0]}

    def _reference(self, rows: Tensor) -> Tensor | Moments:
        """Rows [M, 400] as they are: exact for fewer clips than dimensions, as papers have them."""
        return rows if self.extractor == "i3d" else Moments.of(rows)

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        if reference is None:
            return {}
        base = self._reference(stacked(reference, "clip"))
        return {"fvd": Score(*frechet_with_error(stacked(features, "clip"), base, self.ddof))}

    def floor(self, real: Sequence[Features], splits: int):
        if len(real) < LEAST_FLOOR:
            return None
        generator = torch.Generator().manual_seed(0)
        value, spread, num = frechet_floor(stacked(real, "clip"), generator, splits, self.ddof)
        return {"fvd": (value, spread)}, num

    def difference(self, ours: Sequence[Features], others: Sequence[Features], real: Sequence[Features]):
        one, two, base = (stacked(side, "clip") for side in (ours, others, real))
        return paired_difference(one, two, self._reference(base), self.ddof)

    def admit(self, cases) -> tuple[dict[str, float], bool]:
        """As `FID.admit`, and decoded < frozen, shuffled."""
        base = stacked(cases.reference(self), "clip")
        values = {name: frechet_distance(stacked(cases.features(self, name), "clip"), base) for name in cases.names}
        error = frechet_with_error(stacked(cases.features(self, "real"), "clip"), Moments.of(base))[1]
        return values, ranks_degraded(values, error) and values["decoded"] < min(values["frozen"], values["shuffled"])
