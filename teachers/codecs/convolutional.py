"""The embedded world's codec: a small convolutional autoencoder of groups of frames.

The first pixel frame alone is the first latent (repeated for `stride` frames), as in Wan's causal VAE; after it, `stride` frames
become one latent of H/patch x W/patch cells. The encoder reads a group alone; the decoder also reads the latent before it, so that
motion is continuous over the seam. Our own architecture.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from teachers.checkpoints.strict import load_strict
from teachers.checkpoints.weights import read_tensors
from teachers.codecs.linear import HINT
from teachers.codecs.streamed import DecoderState, EncoderState, StreamedCodec, check_latents, check_video
from teachers.errors import UserError

GROUPS = 8  # of the normalisation
UNSHUFFLE = 4  # pixels a side that become channels before the first convolution


@dataclass(frozen=True, kw_only=True)
class ConvTrainConfig:
    """Training on the clips: AdamW steps of `batch` windows of `window` latents, learning rate, deviation of the noise that latents
    get before they are decoded, precision of the convolutions. `shards`: training shards that it is trained on.

    `decoder_steps` more train the decoder alone, so that latents, and teachers of them, stay what they are. With `path` training
    begins from the weights there, and `num_steps` may be 0.
    """

    num_steps: int
    decoder_steps: int = 0
    batch: int = 8
    window: int = 4
    lr: float = 1.0e-3
    noise: float = 0.02
    precision: Literal["fp32", "bf16"] = "fp32"
    shards: int = 8

    def __post_init__(self):
        steps = (self.num_steps, self.decoder_steps)
        fine = min(steps) >= 0 and sum(steps) > 0 and min(self.batch, self.window - 1, self.shards) > 0
        if not fine or not self.lr > 0 or not self.noise >= 0:
            raise UserError(
                f"codec.train: got num_steps={self.num_steps}, decoder_steps={self.decoder_steps}, batch={self.batch}, "
                f"window={self.window}, lr={self.lr}, noise={self.noise}, shards={self.shards}; noise and steps from 0, window "
                f"from 2, the others and one of the steps above 0"
            )


@dataclass(frozen=True, kw_only=True)
class ConvCodecConfig:
    """`stride` pixel frames become one latent frame, `patch` x `patch` pixels one cell of `channels`; `widths` of the convolutions
    from fine to coarse, each half the resolution of the one before, with `blocks` residual blocks. All but the last work on each
    pixel frame alone, with the same weights; the last on a group of `stride` frames.

    `path`: a folder with a trained codec.safetensors, which the data stage takes over; without one, or with `train` beside it, the
    codec is trained on the clips. The weights lie in the student's folder either way.
    """

    path: Path | None = None
    stride: int = 4
    patch: int = 16
    channels: int = 32
    widths: tuple[int, ...] = (96, 160, 256)
    blocks: tuple[int, ...] = (1, 2, 2)
    train: ConvTrainConfig | None = None
    fitted: ClassVar[bool] = True
    takes_over: ClassVar[bool] = True

    def __post_init__(self):
        if len(self.widths) != len(self.blocks) or self.patch != UNSHUFFLE * 2 ** (len(self.widths) - 1):
            raise UserError(
                f"codec: got patch={self.patch}, {len(self.widths)} widths, {len(self.blocks)} blocks; give one of each per level, "
                f"and patch={UNSHUFFLE} * 2^(levels - 1)"
            )
        if min(self.stride, self.channels, *self.widths, *(n + 1 for n in self.blocks)) < 1:
            raise UserError(
                f"codec: got stride={self.stride}, channels={self.channels}, widths={list(self.widths)}; from 1"
            )
        if self.path is None and self.train is not None and self.train.num_steps == 0:
            raise UserError(
                "codec.train: num_steps=0 trains no encoder; give codec.path=FOLDER to begin from, or steps"
            )

    def load(self, folder: Path, height: int, width: int) -> "ConvCodec":
        """The frozen codec of `folder`/codec.safetensors, for frames of any size. UserError."""
        path = folder / "codec.safetensors"
        with torch.device("meta"):
            codec = ConvCodec(self)
        load_strict(codec, read_tensors(path, HINT), path, HINT, assign=True)
        return (
            codec.float().to(memory_format=torch.channels_last).eval().requires_grad_(False)
        )  # twice as fast on a CPU


class Residual(nn.Module):
    """x + conv(silu(conv(silu(norm(x))))), zero at the start."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.first, self.second = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)
        for p in self.second.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return x + self.second(functional.silu(self.first(functional.silu(self.norm(x)))))


class Resize(nn.Module):
    """A convolution from `before` to `after` channels, to half the resolution where `scale` is 0.5, to double where it is 2.

    Beside it a shortcut without parameters averages or repeats channels, where one count divides the other (the residual
    autoencoding of DC-AE, 2410.10733).
    """

    def __init__(self, before: int, after: int, scale: float = 1.0):
        super().__init__()
        self.first = nn.PixelUnshuffle(2) if scale == 0.5 else nn.Identity()
        self.last = nn.PixelShuffle(2) if scale == 2.0 else nn.Identity()
        inputs, outputs = before * (4 if scale == 0.5 else 1), after * (4 if scale == 2.0 else 1)
        size = 3 if scale == 1.0 else 1
        self.conv = nn.Conv2d(inputs, outputs, size, 1, size // 2)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d y x"]:
        x = self.first(x)
        y = self.conv(x)
        given, wanted = x.shape[1], y.shape[1]
        if wanted % given == 0:
            y = y + x.repeat_interleave(wanted // given, dim=1)
        elif given % wanted == 0:
            y = y + x.unflatten(1, (wanted, -1)).mean(dim=2)
        return self.last(y)


class ConvCodec(StreamedCodec):
    """Video [B, 3, T, H, W] in [-1, 1], T = 1 + stride (F - 1), <-> latents [B, C, F, H/patch, W/patch].

    Latents are normalised per channel, (z - mean) / std. A decode in chunks equals the whole one; its state is the latent before
    the next. H and W are multiples of `patch`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ConvCodecConfig):
        super().__init__()
        self.config = config
        pixels, widths, blocks, frames = 3 * UNSHUFFLE**2, config.widths, config.blocks, config.stride
        enter: list[nn.Module] = [nn.PixelUnshuffle(UNSHUFFLE), Resize(pixels, widths[0])]
        leave: list[nn.Module] = []
        for i, width in enumerate(widths[:-1]):
            enter += [*([Resize(widths[i - 1], width, 0.5)] if i else []), *(Residual(width) for _ in range(blocks[i]))]
            leave = [
                *(Residual(width) for _ in range(blocks[i])),
                *([Resize(width, widths[i - 1], 2.0)] if i else []),
                *leave,
            ]
        inner = [Residual(widths[-1]) for _ in range(blocks[-1])]
        self.frame_encoder = nn.Sequential(*enter)
        self.encoder = nn.Sequential(
            Resize(frames * widths[-2], widths[-1], 0.5), *inner, Resize(widths[-1], config.channels)
        )
        inner = [Residual(widths[-1]) for _ in range(blocks[-1])]
        self.decoder = nn.Sequential(
            Resize(2 * config.channels, widths[-1]), *inner, Resize(widths[-1], frames * widths[-2], 2.0)
        )
        self.frame_decoder = nn.Sequential(*leave, Resize(widths[0], pixels), nn.PixelShuffle(UNSHUFFLE))
        self.register_buffer("mean", torch.zeros(config.channels))
        self.register_buffer("std", torch.ones(config.channels))

    def encode_chunk(
        self, video: Float[Tensor, "b 3 t h w"], state: EncoderState | None = None
    ) -> tuple[Float[Tensor, "b c f y x"], EncoderState]:
        check_video(video, self.config, begins=state is None)
        raw = self.encode_raw(video.to(self._dtype), begins=state is None)
        return (raw - self._row(self.mean)) / self._row(self.std), ()

    def decode_chunk(
        self, latents: Float[Tensor, "b c f y x"], state: DecoderState | None = None
    ) -> tuple[Float[Tensor, "b 3 t h w"], DecoderState]:
        check_latents(latents, self.config, state or None)
        raw = latents.to(self._dtype) * self._row(self.std) + self._row(self.mean)
        video = self.decode_raw(raw, state[0] if state else None)
        return (video if state else video[:, :, self.config.stride - 1 :]).clamp(-1, 1).float(), (raw[:, :, -1:],)

    def encode_raw(self, video: Tensor, begins: bool = True) -> Tensor:
        """Video [B, 3, T, H, W] -> unnormalised latents; a stream `begins` with one frame in the place of `stride`."""
        stride = self.config.stride
        if begins:
            video = torch.cat([video[:, :, :1].expand(-1, -1, stride - 1, -1, -1), video], dim=2)
        frames = self.frame_encoder(video.transpose(1, 2).flatten(0, 1))
        groups = frames.unflatten(0, (-1, stride)).flatten(1, 2)  # B F, stride channels, h, w
        return self.encoder(groups).unflatten(0, (len(video), -1)).transpose(1, 2)

    def decode_raw(self, latents: Tensor, before: Tensor | None = None) -> Tensor:
        """Unnormalised latents [B, C, F, h, w] after the latent `before` [B, C, 1, h, w] (None: a stream begins) -> pixels
        [B, 3, stride F, H, W], not clamped."""
        past = torch.cat([latents[:, :, :1] if before is None else before, latents[:, :, :-1]], dim=2)
        pair = torch.cat([past, latents], dim=1).transpose(1, 2)
        frames = self.decoder(pair.flatten(0, 1)).unflatten(1, (self.config.stride, -1)).flatten(0, 1)
        return self.frame_decoder(frames).unflatten(0, (len(latents), -1)).transpose(1, 2)

    def _row(self, values: Tensor) -> Tensor:
        return values.view(1, -1, 1, 1, 1)
