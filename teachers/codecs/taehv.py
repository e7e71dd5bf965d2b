"""TAEHV, the tiny autoencoder of Ollin Boer Bohan for the latents of large video models (github.com/madebyollin/taehv, MIT).

With Wan2.1's weights, `taew2_1`, decoding is some 25 times cheaper than by Wan's own VAE and a little softer. The network
follows the published layout; layers keep their published positions, which are the names of the weights.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from teachers.checkpoints.strict import load_strict
from teachers.checkpoints.weights import read_tensors
from teachers.codecs.linear import CodecConfig
from teachers.codecs.streamed import DecoderState, EncoderState, StreamedCodec, check_latents, check_video
from teachers.codecs.wan_vae import WanLatentsConfig
from teachers.errors import UserError

FILES = ("taew2_1.safetensors", "taew2_1.pth")
WHERE = "get taew2_1.pth or safetensors/taew2_1.safetensors of github.com/madebyollin/taehv"
OTHERS = ("taehv", "taecvx", "taeos1_3")  # the same names and shapes for the latents of other models


class MemoryBlock(nn.Module):
    """relu(convolutions([x_t, x_t-1]) + x_t): features of a frame and of the frame before it, at this depth."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return torch.relu(x + self.conv(torch.cat((x, before), dim=1)))


class Pool(nn.Module):
    """`stride` frames -> one, [B n, C, H, W] -> [B n / stride, C, H, W]: their channels side by side, then a 1 x 1 convolution."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(stride * width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unflatten(0, (-1, self.stride)).flatten(1, 2))


class Grow(nn.Module):
    """One frame -> `stride` frames, [B n, C, H, W] -> [B n stride, C, H, W]: a 1 x 1 convolution, its channels in order."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, stride * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self.stride, -1)).flatten(0, 1)


class SoftClamp(nn.Module):
    """3 tanh(x / 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


@dataclass(frozen=True, kw_only=True)
class TAEHVConfig(WanLatentsConfig):
    """The tiny autoencoder of Wan2.1's latents in `path`, as `load_taehv` reads it."""

    def load(self, folder: Path, height: int, width: int) -> "TAEHV":
        """The frozen codec, for frames of any size. UserError where it has another geometry."""
        return self.checked(load_taehv(self.path))


class TAEHV(StreamedCodec):
    """Video [B, 3, T, H, W] in [-1, 1] <-> latents [B, 16, F, H/8, W/8], T = 1 + 4 (F - 1), both fp32.

    Latents are the diffusion model's, normalised already: no mean or deviation is applied here. Decoding is causal: each
    latent gives four frames, of which the first latent of a stream keeps its last. Encoding looks ahead: latent i is made of frames
    4i .. 4i + 3 and the past, the last frame repeated after the clip. A clip is processed one latent frame at a time,
    so a decode in chunks equals the whole one bit for bit. The network is frozen. A state has the last
    input frame of each memory block.
    """

    encode_ahead = 3

    def __init__(
        self, widths: tuple[int, int, int, int] = (256, 128, 64, 64), encoder_width: int = 64, channels: int = 16
    ):
        super().__init__()
        self.config = CodecConfig(stride=4, patch=8, channels=channels)
        self.encoder = nn.Sequential(
            _conv(3, encoder_width),
            nn.ReLU(),
            *_down(encoder_width, 2),
            *_down(encoder_width, 2),
            *_down(encoder_width, 1),
            _conv(encoder_width, channels),
        )
        self.decoder = nn.Sequential(
            SoftClamp(),
            _conv(channels, widths[0]),
            nn.ReLU(),
            *_up(widths[0], widths[1], 1),
            *_up(widths[1], widths[2], 2),
            *_up(widths[2], widths[3], 2),
            nn.ReLU(),
            _conv(widths[3], 3),
        )
        self.eval().requires_grad_(False)

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b c f y x"]:
        check_video(video, self.config)
        after = video[:, :, -1:].expand(-1, -1, self.encode_ahead, -1, -1)
        return self.encode_chunk(torch.cat((video, after), dim=2))[0]

    @torch.no_grad()
    def encode_chunk(
        self, video: Float[Tensor, "b 3 t h w"], state: EncoderState | None = None
    ) -> tuple[Float[Tensor, "b c f y x"], EncoderState]:
        check_video(video, self.config, begins=False)  # with the frames ahead
        latents = []
        frames = ((video.float() + 1) / 2).to(self._dtype).transpose(1, 2)
        for group in frames.split(self.config.stride, dim=1):
            latent, state = _run(self.encoder, group, state)
            latents.append(latent.transpose(1, 2))
        assert state is not None
        return torch.cat(latents, dim=2).float(), state

    def decode_chunk(
        self, latents: Float[Tensor, "b c f y x"], state: DecoderState | None = None
    ) -> tuple[Float[Tensor, "b 3 t h w"], DecoderState]:
        check_latents(latents, self.config, state)
        pixels = []
        for latent in latents.to(self._dtype).transpose(1, 2).split(1, dim=1):
            skipped = self.config.stride - 1 if state is None else 0
            frames, state = _run(self.decoder, latent, state)
            pixels.append(frames[:, skipped:].transpose(1, 2))
        assert state is not None
        return torch.cat(pixels, dim=2).float().clamp(0, 1) * 2 - 1, state


def load_taehv(path: str | Path) -> TAEHV:
    """`taew2_1`, a file (.safetensors, .pth) or the folder with it; widths are inferred from its shapes.

    Nothing but tensors is unpickled, and every tensor must fit. The weights are published in fp16 and become fp32.
    Hunyuan's, CogVideoX's and Open-Sora's files have the same names and shapes, so only file names tell them apart. Raises
    UserError.
    """
    path = Path(path)
    options = [path / name for name in FILES] if path.is_dir() else [path]
    file = next((option for option in options if option.is_file()), options[0])
    if file.stem in OTHERS:
        raise UserError(f"weights for another model's latents: {file}; {WHERE}")
    tensors = read_tensors(file, WHERE)
    names = ("decoder.1.weight", "decoder.8.weight", "decoder.14.weight", "decoder.20.weight", "encoder.0.weight")
    ends = [tensors[name] for name in names if name in tensors and tensors[name].ndim == 4]
    if len(ends) < len(names):
        raise UserError(f"not TAEHV's weights: {file} lacks one of {', '.join(names)}; {WHERE}")
    first, second, third, fourth, encoder_width = (len(end) for end in ends)
    with torch.device("meta"):
        codec = TAEHV((first, second, third, fourth), encoder_width, ends[0].shape[1])
    load_strict(codec, tensors, file, WHERE, assign=True)
    return codec.float()


def _conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def _down(width: int, stride: int) -> list[nn.Module]:
    """Five positions: frames / stride, side / 2."""
    halve = _conv(width, width, stride=2, bias=False)
    return [Pool(width, stride), halve, *(MemoryBlock(width) for _ in range(3))]


def _up(width: int, outputs: int, stride: int) -> list[nn.Module]:
    """Six positions: side * 2, frames * stride."""
    blocks = [MemoryBlock(width) for _ in range(3)]
    return [*blocks, nn.Upsample(scale_factor=2), Grow(width, stride), _conv(width, outputs, bias=False)]


def _run(layers: nn.Sequential, frames: Tensor, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
    """Frames [B, n, C, H, W] through the layers; `state`: the last input frame of each memory block, None for zeros."""
    batch, new_state = len(frames), []
    x = frames.contiguous().flatten(0, 1)
    for layer in layers:
        if isinstance(layer, MemoryBlock):
            clip = x.unflatten(0, (batch, -1))
            last = torch.zeros_like(clip[:, :1]) if state is None else state[len(new_state)].unsqueeze(1)
            new_state.append(clip[:, -1].clone())
            x = layer(x, torch.cat((last, clip[:, :-1]), dim=1).flatten(0, 1))
        else:
            x = layer(x)
    return x.unflatten(0, (batch, -1)), tuple(new_state)
