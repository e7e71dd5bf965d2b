"""Peak signal-to-noise ratio of clips frame by frame: a reconstruction or a re-enactment against the real clip (torchmetrics)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from eval.metric import Clip, Features, Metric, Score
from teachers.errors import UserError


class FramePairs(Metric):
    """Shared by PSNR, SSIM and LPIPS: the mean over the frames after the given ones, and over clips."""

    table, paired = "Against the real frames", True

    def compare(self, ours: Tensor, theirs: Tensor, networks) -> Tensor:
        """A value for each pair of frames [T] of two clips uint8 [3, T, H, W]."""
        raise NotImplementedError

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        return {self.name: self.compare(clip.video[:, clip.given :], real.video[:, clip.given :], networks)}

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        return {self.name: Score.over([clip[self.name].double().mean() for clip in features])}


@dataclass(frozen=True, kw_only=True)
class PSNR(FramePairs):
    """10 log10(255^2 / mean squared error) of each frame, in dB; infinite where the two are equal."""

    name, label, better = "psnr", "PSNR, dB", "higher"

    def compare(
        self, ours: UInt8[Tensor, "3 t h w"], theirs: UInt8[Tensor, "3 t h w"], networks
    ) -> Float[Tensor, " t"]:
        from torchmetrics.functional.image import peak_signal_noise_ratio

        parts = [
            peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3)).reshape(-1)
            for x, y in frame_pairs(ours, theirs)
        ]
        return torch.cat(parts).cpu()


def frame_pairs(a: Tensor, b: Tensor, size: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Both clips as pairs of fp32 batches [n, 3, h, w]; UserError unless they are of one shape."""
    if a.shape != b.shape or a.dtype != torch.uint8 or b.dtype != torch.uint8 or a.ndim != 4 or a.shape[0] != 3:
        raise UserError(
            f"frames are compared in pairs, uint8 [3, T, H, W]: got {a.dtype} {tuple(a.shape)} and {b.dtype} "
            f"{tuple(b.shape)}; bring both to one size and length"
        )
    pairs = zip(a.transpose(0, 1).split(size), b.transpose(0, 1).split(size), strict=True)
    return ((x.float(), y.float()) for x, y in pairs)
