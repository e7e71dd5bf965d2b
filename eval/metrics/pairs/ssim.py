"""Structural similarity of clips frame by frame (Wang et al. 2004; torchmetrics)."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from eval.metrics.pairs.psnr import FramePairs, frame_pairs
from teachers.errors import UserError

LEAST_SIDE = 12  # the window of 11 pixels must fit


@dataclass(frozen=True, kw_only=True)
class SSIM(FramePairs):
    """Structural similarity of each frame: Gaussian window of 11 pixels, sigma 1.5, edges reflected, mean over RGB.

    Wang et al. 2004, whose own code leaves the edges out instead.
    """

    name, label, better, hint = "ssim", "SSIM", 1.0, "1 is equal"

    def compare(
        self, ours: UInt8[Tensor, "3 t h w"], theirs: UInt8[Tensor, "3 t h w"], networks
    ) -> Float[Tensor, " t"]:
        from torchmetrics.functional.image import structural_similarity_index_measure

        if min(ours.shape[2:]) < LEAST_SIDE:
            raise UserError(
                f"SSIM needs frames of at least {LEAST_SIDE} pixels: got {tuple(ours.shape[2:])}; remove it"
            )
        parts: list[Any] = [
            structural_similarity_index_measure(x, y, data_range=255.0, sigma=1.5, kernel_size=11, reduction="none")
            for x, y in frame_pairs(ours, theirs)
        ]
        return torch.cat([part.reshape(-1) for part in parts]).cpu()
