"""What SoulX-FlashHead takes of the reference image: latents of a still video of it, as channels beside the noise."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class StillConfig:
    """The image in every pixel frame, as SoulX-FlashHead samples; `grey`: in frame 0, and mid-grey behind it, as VideoX-Fun trains
    FlashHead. No weights, no mask."""

    grey: bool = False
    dim: ClassVar[int] = 0
    gives: ClassVar[tuple[str, ...]] = ("beside",)

    def sizes(self, stride: int, channels: int, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        return {"beside": (channels, frames, height, width)}

    def load(self) -> "Still":
        return Still(self)


class Still(nn.Module):
    """The reference image -> `beside` [N, C, F, h, w]."""

    def __init__(self, config: StillConfig):
        super().__init__()
        self.config = config

    def forward(self, image: Float[Tensor, "n 3 h w"], codec: Any, num_frames: int) -> dict[str, Tensor]:
        """image in [-1, 1]; F = num_frames latent frames, the first of one pixel frame."""
        return {"beside": film_latents(image, codec, num_frames, self.config.grey)}


def film_latents(
    image: Float[Tensor, "n 3 h w"], codec: Any, num_frames: int, grey: bool
) -> Float[Tensor, "n channels {num_frames} y x"]:
    """Latents of clips of `num_frames` latent frames: pixel frame 0 is the image, the others too, or mid-grey. One clip's
    pixels are in memory at a time."""
    later = codec.config.stride * (num_frames - 1)

    def encoded(first: Tensor) -> Tensor:
        rest = torch.zeros_like(first) if grey else first
        return codec.encode(torch.cat([first, rest.expand(-1, -1, later, -1, -1)], dim=2))

    return torch.cat([encoded(one) for one in image.unsqueeze(2).split(1)])
