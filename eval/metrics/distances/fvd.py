"""Frechet distance of one feature a clip: FVD with I3D (Unterthiner et al. 1812.01717), or with a run's clip probe."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from eval.frechet import Moments, frechet_distance, frechet_without_each
from eval.metric import Clip
from eval.metrics.distances.fid import Distance, check_resize
from eval.networks.i3d import MIN_FRAMES
from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FVD(Distance):
    """extractor: I3D Kinetics-400 logits [400], or a run's clip probe [64], over all frames; resize, ddof: as in `FID`."""

    extractor: Literal["i3d", "probes"]
    resize: Literal["stylegan_v", "common_metrics", "none"]
    ddof: Literal[0, 1]

    name, label, plot, rows = "fvd", "FVD", True, "clip"

    def __post_init__(self):
        check_resize(self)

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        if self.extractor == "probes":
            return {"clip": networks.reading(clip).clip_features}
        if clip.video.shape[1] < MIN_FRAMES:
            raise UserError(f"FVD needs clips of at least {MIN_FRAMES} frames: got {clip.video.shape[1]}")
        return {"clip": networks.i3d.features(clip.video[None], 1, self.resize)[0]}

    def distance(self, a: Tensor, b: Tensor) -> float:
        return frechet_distance(a, b, self.ddof)

    def without_each(self, a: Tensor, reference: Tensor) -> tuple[float, Tensor]:
        """With I3D against the rows [M, 400] as they are: exact for fewer clips than dimensions, as papers have them."""
        base = reference if self.extractor == "i3d" else Moments.of(reference)
        return frechet_without_each(a, base, self.ddof)

    def admit(self, cases) -> tuple[dict[str, float], bool]:
        """As `FID.admit`, and decoded < frozen, shuffled."""
        values, ranked = super().admit(cases)
        return values, ranked and values["decoded"] < min(values["frozen"], values["shuffled"])
