"""Pixels <-> latents. The embedded codec is linear: principal components of whole frames, fitted in closed form."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from teachers.checkpoints.strict import load_strict
from teachers.checkpoints.weights import read_tensors
from teachers.codecs.streamed import DecoderState, EncoderState, StreamedCodec


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Geometry of a codec: `stride` pixel frames become one latent frame, `patch` x `patch` pixels one cell of `channels`."""

    stride: int = 2
    patch: int = 16
    channels: int = 48

    @property
    def fitted(self) -> bool:
        return True

    def load(self, folder: Path, height: int, width: int) -> "EigenCodec":
        """The codec of `folder`/codec.safetensors; UserError where it is missing, damaged or of another size."""
        codec, path = EigenCodec(self, height, width), folder / "codec.safetensors"
        load_strict(codec, read_tensors(path, HINT), path, HINT, assign=True)
        return codec


HINT = "export the student again"


class EigenCodec(StreamedCodec):
    """Principal components of [3, stride, H, W] frame groups, scaled by eigenvalue^-1/4 (half whitening).

    Video [B, 3, T, H, W] in [-1, 1] with T = 1 + stride (F - 1) <-> latents [B, C, F, H/patch, W/patch]; component i lies in
    cell i mod cells, so each cell has coarse and fine ones. The first pixel frame alone is the first latent (repeated for
    `stride` frames), as in Wan's causal VAE. Decoding is frame-wise: a stream decoded in pieces equals the whole decode. It
    reconstructs clips like those it was fitted on; any other video becomes its projection.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, config: CodecConfig, height: int, width: int):
        super().__init__()
        self.config, self.size = config, (3, config.stride, height, width)
        self.cells = (height // config.patch, width // config.patch)
        count = config.channels * self.cells[0] * self.cells[1]
        self.register_buffer("mean", torch.zeros(3 * config.stride * height * width))
        self.register_buffer("basis", torch.zeros(count, self.mean.shape[0]))
        self.register_buffer("scale", torch.ones(count))

    def _groups(self, video: Tensor, begins: bool = True) -> Tensor:
        """[B, 3, T, H, W] -> [B, F, 3*stride*H*W]; ValueError for a size or length without latents."""
        stride = self.config.stride
        if (video.shape[2] - begins) % stride or (video.shape[1], *video.shape[3:]) != (3, *self.size[2:]):
            size = (3, f"1 + {stride} (F - 1)" if begins else f"{stride} F", *self.size[2:])
            raise ValueError(f"video: got [C, T, H, W] = {tuple(video.shape[1:])}, the codec takes {size}")
        if begins:
            video = torch.cat([video[:, :, :1].expand(-1, -1, stride - 1, -1, -1), video], dim=2)
        return video.unflatten(2, (-1, stride)).transpose(1, 2).flatten(2)

    @torch.no_grad()
    def fit(self, video: Float[Tensor, "n 3 t h w"], seed: int = 0, rounds: int = 4) -> "EigenCodec":
        """Fit principal components to video [N, 3, T, H, W]: randomised subspace iteration (Halko et al. 0909.4061, alg. 4.4)."""
        groups = self._groups(video).flatten(0, 1).float()
        mean = groups.mean(dim=0)
        centred = groups - mean
        count = self.basis.shape[0]
        rng = torch.Generator().manual_seed(seed)
        span = torch.randn(centred.shape[1], min(count + 16, *centred.shape), generator=rng)
        for _ in range(rounds):
            span = torch.linalg.qr(centred.T @ (centred @ span)).Q
        values, vectors = torch.linalg.svd((centred @ span).double(), full_matrices=False)[1:]
        basis = (vectors @ span.T.double())[:count]
        basis = basis * torch.sign(basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)))  # a fixed sign
        values = (values[:count] ** 2 / centred.shape[0]).clamp(min=1e-8)
        # After half whitening a latent's variance is sqrt(eigenvalue); one common factor brings the mean variance to 1.
        half = values.pow(-0.25)
        self.mean.copy_(mean)
        self.basis[: basis.shape[0]] = basis.float()
        self.scale[: basis.shape[0]] = half * (values * half**2).mean().rsqrt()
        return self

    def encode_chunk(
        self, video: Float[Tensor, "b 3 t h w"], state: EncoderState | None = None
    ) -> tuple[Float[Tensor, "b c f y x"], EncoderState]:
        coded = (self._groups(video, begins=state is None) - self.mean) @ self.basis.T * self.scale
        return coded.unflatten(2, (self.config.channels, *self.cells)).transpose(1, 2).contiguous(), ()

    def decode_chunk(
        self, latents: Float[Tensor, "b c f y x"], state: DecoderState | None = None
    ) -> tuple[Float[Tensor, "b 3 t h w"], DecoderState]:
        groups = (latents.transpose(1, 2).flatten(2) / self.scale) @ self.basis + self.mean
        video = groups.unflatten(2, self.size).transpose(1, 2).flatten(2, 3)
        return (video[:, :, self.config.stride - 1 :] if state is None else video).clamp(-1, 1), ()


def to_uint8(video: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """[-1, 1] float -> 0..255."""
    return (video.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def to_float(video: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """0..255 -> [-1, 1] float."""
    return video.float() / 127.5 - 1
