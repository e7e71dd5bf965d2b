"""A teacher of one's own: a small convolutional video denoiser with a condition that the project does not know, emotion."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from teachers.conditions import Conditions, Feature, declare
from teachers.networks.kind import Dims, NetworkKind

EMOTIONS = 4
declare(Feature(name="emotion", clock="stream", size=(EMOTIONS,)))  # [B, 4]: a weight of each, zeros for none


@dataclass(frozen=True, kw_only=True)
class EmotionNet(NetworkKind):
    """`width` channels in `depth` residual blocks."""

    takes: ClassVar = ("text", "audio", "emotion")
    prediction: ClassVar = "reference"
    frame_sigma: ClassVar = True

    width: int = 64
    depth: int = 4

    def build(self, dims: Dims) -> nn.Module:
        return ConvDenoiser(self.width, self.depth, dims)


class Block(nn.Module):
    """Convolution in space and time, scaled by what each frame is conditioned on."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.scale = nn.Linear(width, width)
        self.conv = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        """x [B, width, F, H, W], given [B, F, width]."""
        scale = self.scale(given).transpose(1, 2)[..., None, None]
        return x + self.conv(nn.functional.silu(self.norm(x) * (1 + scale) + scale))


class ConvDenoiser(nn.Module):
    """Latents [B, C, F, H, W] at sigma [B] or [B, F] -> the difference of x0 to the reference, of the same shape."""

    def __init__(self, width: int, depth: int, dims: Dims):
        super().__init__()
        self.register_buffer("frequencies", torch.exp2(torch.arange(8.0)))
        self.stem = nn.Conv3d(2 * dims.latent_channels, width, 3, padding=1)
        self.time, self.emotion = nn.Linear(16, width), nn.Linear(EMOTIONS, width)
        self.text, self.audio = nn.Linear(dims.text_dim, width), nn.Linear(dims.stride * dims.audio_dim, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.out = nn.Conv3d(width, dims.latent_channels, 1)

    def forward(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        frames = x.shape[2]
        levels = (sigma if sigma.ndim == 2 else sigma[:, None].expand(-1, frames)).unsqueeze(-1) * self.frequencies
        given = self.time(torch.cat([levels.cos(), levels.sin()], dim=-1)) + self.audio(conditions.audio.flatten(2))
        given = given + (self.text(conditions.text.mean(dim=1)) + self.emotion(conditions.emotion))[:, None]
        x = self.stem(torch.cat([x, conditions.reference.expand_as(x)], dim=1))
        for block in self.blocks:
            x = block(x, given)
        return self.out(x)
