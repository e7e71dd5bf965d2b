"""What Wan2.2-S2V takes of the reference image: clean latents that are tokens of their own, of still films of it."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from teachers.errors import UserError

MOTION = 19
"""Latents before a clip that the network reads."""


@dataclass(frozen=True, kw_only=True)
class AnchorsConfig:
    """The reference is the last latent of a still film of `reference` pixel frames: 1 in Wan2.2-S2V, 5 in LiveAvatar. `motion`:
    what was before the clip is still too, 19 times the last latent of a film of so many frames (0: nothing was, as S2V's first clip
    has it). LiveAvatar encodes 365 frames and keeps the last 19 latents;
    Wan's encoder looks 28 latents back, so from 113 frames on it is the same."""

    reference: int = 1
    motion: int = 0

    def __post_init__(self):
        if self.reference < 1 or self.motion < 0:
            raise UserError(
                f"data.image: got reference={self.reference}, motion={self.motion}; pixel frames of still films, from 1 and from 0"
            )

    @property
    def dim(self) -> int:
        return 0

    @property
    def gives(self) -> tuple[str, ...]:
        return ("anchors",)

    def sizes(self, stride: int, channels: int, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        return {"anchors": (channels, 1 + MOTION * (self.motion > 0), height, width)}

    def load(self) -> "Anchors":
        return Anchors(self)


class Anchors(nn.Module):
    """The reference image -> `anchors` [N, C, 1 or 20, h, w]."""

    def __init__(self, config: AnchorsConfig):
        super().__init__()
        self.config = config

    def forward(self, image: Float[Tensor, "n 3 h w"], codec: Any, num_frames: int) -> dict[str, Tensor]:
        parts = [self._still(image, codec, self.config.reference)]
        if self.config.motion:
            parts += [self._still(image, codec, self.config.motion)] * MOTION
        return {"anchors": torch.cat(parts, dim=2)}

    def _still(self, image: Tensor, codec: Any, frames: int) -> Tensor:
        """The last latent [N, C, 1, h, w] of the image shown for so many pixel frames. UserError for a number that codes to no
        whole number of latents."""
        stride = codec.config.stride
        if (frames - 1) % stride:
            raise UserError(
                f"data.image: a still film of {frames} pixel frames with codec.stride={stride}; give 1 + stride n of them"
            )
        film = image.unsqueeze(2).expand(-1, -1, frames, -1, -1)
        return codec.encode(film.contiguous())[:, :, -1:]
