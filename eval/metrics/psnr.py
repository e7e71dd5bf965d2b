"""Peak signal-to-noise ratio of clips frame by frame: a reconstruction or a re-enactment against the real clip (torchmetrics)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from eval.metric import Clip, Features, Metric, Score
from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PSNR(Metric):
    """Mean over the frames after the given ones, and over clips."""

    name, label, better = "psnr", "PSNR, dB", "higher"
    table, paired = "Against the real frames", True

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        return {"psnr": psnr(clip.video[:, clip.given :], real.video[:, clip.given :])}

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        return {"psnr": Score.over([clip["psnr"].double().mean() for clip in features])}


def psnr(a: UInt8[Tensor, "3 t h w"], b: UInt8[Tensor, "3 t h w"]) -> Float[Tensor, " t"]:
    """10 log10(255^2 / mean squared error) of each frame, in dB; infinite where the two are equal."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    parts = [
        peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3)).reshape(-1)
        for x, y in frame_pairs(a, b)
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
