"""Pixels <-> latents. The embedded codec is linear: principal components of space-time patches, fitted in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Geometry of a codec: `stride` pixel frames and `patch` x `patch` pixels become one latent of `channels`."""

    stride: int = 2
    patch: int = 8
    channels: int = 48


class PatchCodec(nn.Module):
    """Linear codec of patches [stride, patch, patch, 3]; latents are scaled by eigenvalue^-1/4 (half whitening).

    Video [B, 3, T, H, W] in [-1, 1] with T = 1 + stride (F - 1) <-> latents [B, C, F, H/patch, W/patch]. The first pixel frame
    alone is the first latent (held still for `stride` frames), as in Wan's causal VAE. Decoding is frame-wise, so a stream
    decoded in pieces equals the whole decode.
    """

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.config = config
        size = 3 * config.stride * config.patch**2
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.zeros(config.channels, size))
        self.register_buffer("scale", torch.ones(config.channels))

    def _patches(self, video: Tensor) -> Tensor:
        """[B, 3, F*stride, H, W] -> [B, F, h, w, 3*stride*patch*patch]."""
        p, s = self.config.patch, self.config.stride
        x = video.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, s))
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)

    @torch.no_grad()
    def fit(self, video: Tensor) -> "PatchCodec":
        """Principal components of the patches of video [N, 3, T, H, W] (fp64 eigen-decomposition)."""
        patches = self._patches(self._hold_first(video)).flatten(0, 3).double()
        mean = patches.mean(dim=0)
        centred = patches - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / centred.shape[0])
        keep = torch.arange(values.shape[0] - 1, values.shape[0] - 1 - self.config.channels, -1)
        basis = vectors[:, keep].T
        basis = basis * torch.sign(basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)))  # a fixed sign
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        # After half whitening latent variance would be sqrt(eigenvalue); one common factor brings the mean variance to 1.
        half = values[keep].clamp(min=1e-8).pow(-0.25)
        common = (values[keep] * half**2).mean().rsqrt()
        self.scale.copy_(half * common)
        return self

    def _hold_first(self, video: Tensor) -> Tensor:
        stride = self.config.stride
        if (video.shape[2] - 1) % stride:
            raise ValueError(f"video frames: got T={video.shape[2]}, need T = 1 + {stride} (F - 1)")
        return torch.cat([video[:, :, :1].expand(-1, -1, stride - 1, -1, -1), video], dim=2)

    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> latents [B, C, F, h, w]."""
        coded = (self._patches(self._hold_first(video)) - self.mean) @ self.basis.T * self.scale
        return coded.permute(0, 4, 1, 2, 3).contiguous()

    def decode(self, latents: Tensor, first: bool = True) -> Tensor:
        """Latents -> pixels in [-1, 1]. `first`: the first latent opens the clip and gives one pixel frame, not `stride`."""
        p, s = self.config.patch, self.config.stride
        x = (latents.permute(0, 2, 3, 4, 1) / self.scale) @ self.basis + self.mean
        x = x.unflatten(4, (3, s, p, p)).permute(0, 4, 1, 5, 2, 6, 3, 7)  # B 3 F s h p w p
        video = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return (video[:, :, s - 1 :] if first else video).clamp(-1, 1)


def to_uint8(video: Tensor) -> Tensor:
    """[-1, 1] float -> 0..255."""
    return (video.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def to_float(video: Tensor) -> Tensor:
    """0..255 -> [-1, 1] float."""
    return video.float() / 127.5 - 1
