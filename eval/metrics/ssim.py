"""Structural similarity of clips frame by frame (Wang et al. 2004; torchmetrics)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from eval.metric import Clip, Features, Metric, Score
from eval.metrics.psnr import frame_pairs
from teachers.errors import UserError

LEAST_SIDE = 12  # the window of 11 pixels must fit


@dataclass(frozen=True, kw_only=True)
class SSIM(Metric):
    """Mean over the frames after the given ones, and over clips."""

    name, label, better, hint = "ssim", "SSIM", 1.0, "1 is equal"
    table, paired = "Against the real frames", True

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        return {"ssim": ssim(clip.video[:, clip.given :], real.video[:, clip.given :])}

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        return {"ssim": Score.over([clip["ssim"].double().mean() for clip in features])}


def ssim(a: UInt8[Tensor, "3 t h w"], b: UInt8[Tensor, "3 t h w"]) -> Float[Tensor, " t"]:
    """Structural similarity of each frame: Gaussian window of 11 pixels, sigma 1.5, edges reflected, mean over RGB.

    Wang et al. 2004, whose own code leaves the edges out instead.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(a.shape[2:]) < LEAST_SIDE:
        raise UserError(f"SSIM needs frames of at least {LEAST_SIDE} pixels: got {tuple(a.shape[2:])}; remove it")
    parts: list[Any] = [
        structural_similarity_index_measure(x, y, data_range=255.0, sigma=1.5, kernel_size=11, reduction="none")
        for x, y in frame_pairs(a, b)
    ]
    return torch.cat([part.reshape(-1) for part in parts]).cpu()
