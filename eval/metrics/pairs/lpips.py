"""Perceptual distance of clips frame by frame: LPIPS (Zhang et al. 1801.03924, v0.1, AlexNet)."""

from dataclasses import dataclass

from torch import Tensor

from eval.metrics.pairs.psnr import FramePairs


@dataclass(frozen=True, kw_only=True)
class LPIPS(FramePairs):
    """0 is equal."""

    name, label, better, needs = "lpips", "LPIPS", "lower", ("alexnet",)

    def compare(self, ours: Tensor, theirs: Tensor, networks) -> Tensor:
        return networks.alexnet.distance(ours, theirs, networks.batch_size)
