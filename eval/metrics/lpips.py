"""Perceptual distance of clips frame by frame: LPIPS (Zhang et al. 1801.03924, v0.1, AlexNet)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from eval.metric import Clip, Features, Metric, Score


@dataclass(frozen=True, kw_only=True)
class LPIPS(Metric):
    """Mean over the frames after the given ones, and over clips."""

    name, label, better, needs = "lpips", "LPIPS", "lower", ("alexnet",)
    table, paired = "Against the real frames", True

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        ours, theirs = clip.video[:, clip.given :], real.video[:, clip.given :]
        return {"lpips": networks.alexnet.distance(ours, theirs, networks.batch_size)}

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        return {"lpips": Score.over([clip["lpips"].double().mean() for clip in features])}
