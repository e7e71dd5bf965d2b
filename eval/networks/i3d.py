"""FVD's I3D: the TorchScript file of the StyleGAN-V lineage (Unterthiner et al. 1812.01717; Skorokhodov et al. 2112.14683).

The file is a program. It is loaded from bytes whose sha256 was verified, and from nothing else.
"""

import math
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from eval.networks.weights import exact, read
from teachers.errors import UserError

DIM = 400
SIDE = 224
MIN_FRAMES = 10
"""The network's last pool needs two steps of its own clock."""
Variant = Literal["stylegan_v", "common_metrics"]


class I3D:
    """Videos -> logits of 400 Kinetics classes, averaged over time: the features of FVD."""

    def __init__(self, network: Any):
        self.network = network

    @classmethod
    def load(cls, folder: Path | None = None, device: torch.device | str = "cpu") -> "I3D":
        """The published file in `folder`; raises UserError as `eval.networks.weights.locate` does, before any of it runs."""
        content = read("i3d", folder)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)
            return cls(torch.jit.load(content, map_location=device).eval())

    def features(
        self, videos: UInt8[Tensor, "n 3 t h w"], batch_size: int = 8, variant: Variant = "stylegan_v"
    ) -> Float[Tensor, "n 400"]:
        """RGB videos of at least 10 frames -> features, fp32 on the CPU.

        stylegan_v      0..255 as they are: the file itself squeezes frames to 224 x 224 and scales them
        common_metrics  `preprocess_common` before the file, which then does neither
        Raises UserError for other shapes and types, for short videos and for a file that returns something else.
        """
        _check(videos)
        if variant not in ("stylegan_v", "common_metrics"):
            raise UserError(f"unknown preprocessing of I3D: {variant}; use stylegan_v or common_metrics")
        inside = variant == "stylegan_v"
        device = next((x.device for x in self.network.parameters()), torch.device("cpu"))
        found = []
        with exact():
            for part in videos.to(device).split(batch_size):
                x = part.float() if inside else preprocess_common(part)
                logits = self.network(x=x, rescale=inside, resize=inside, return_features=True)
                found.append(logits.float().cpu())
        features = torch.cat(found)
        if features.shape != (len(videos), DIM):
            raise UserError(
                f"I3D returned {tuple(features.shape)} for {len(videos)} videos: this is not the published network"
            )
        return features


def preprocess_common(videos: UInt8[Tensor, "n 3 t h w"]) -> Float[Tensor, "n 3 t 224 224"]:
    """As common_metrics_on_video_quality: short side to 224 (bilinear, half-pixel centres, no antialias), centre crop, [-1, 1]."""
    height, width = videos.shape[-2:]
    scale = SIDE / min(height, width)
    size = (SIDE, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), SIDE)
    frames = videos.transpose(1, 2).flatten(0, 1).float() / 255
    frames = F.interpolate(frames, size, mode="bilinear", align_corners=False)
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    frames = frames[..., top : top + SIDE, left : left + SIDE]
    return ((frames - 0.5) * 2).unflatten(0, (len(videos), -1)).transpose(1, 2).contiguous()


def _check(videos: Tensor) -> None:
    if videos.dtype != torch.uint8 or videos.ndim != 5 or videos.shape[1] != 3:
        raise UserError(
            f"I3D sees uint8 videos [N, 3, T, H, W]: got {videos.dtype} {tuple(videos.shape)}; convert the videos"
        )
    if videos.shape[2] < MIN_FRAMES:
        raise UserError(
            f"FVD with I3D needs at least {MIN_FRAMES} frames: got {videos.shape[2]}; evaluate longer clips"
        )
