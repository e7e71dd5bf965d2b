"""DC-AE (2410.10733) with causal temporal modules, MIDAS' codec (2508.19320): one set of few tokens for every pixel frame.

The image codec is diffusers' AutoencoderDC. The paper specifies a causal temporal convolution after each spatial layer and
attention with rotary positions, trained in three stages (images; the temporal modules; all of it on windows of 8 frames). Our own
choices: convolutions of `temporal_kernel` frames and 1 x 1 pixels, attention over the last `temporal_window` frames at each place
of the deepest stage, both residual and zero-initialised, so that the image codec is unchanged until they are trained; a clip is
padded in front with copies of its first frame.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from teachers.checkpoints.strict import load_strict
from teachers.checkpoints.weights import read_tensors
from teachers.codecs.linear import HINT
from teachers.codecs.streamed import DecoderState, EncoderState, StreamedCodec, check_latents, check_video
from teachers.disk.read import read_json
from teachers.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
WHERE = "get config.json and the weights of huggingface.co/mit-han-lab/dc-ae-f64c128-in-1.0-diffusers"
AT_ONCE = 8  # frames per pass of the network; bounds activations whatever the clip's length
HEAD_DIM = 32


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """The three stages of MIDAS' codec: steps of each, images in a batch (later stages: that many frames in windows of `window`),
    learning rates. `shards`: training shards that it is fitted on. No steps: the codec is used as it is."""

    steps: tuple[int, int, int] = (0, 0, 0)
    batch: int = 32
    window: int = 8
    lr: tuple[float, float, float] = (2.0e-3, 2.0e-3, 5.0e-4)
    shards: int = 4

    def __post_init__(self):
        if min(*self.steps, 0) < 0 or min(self.batch, self.window, self.shards) < 1 or self.batch % self.window:
            raise UserError(
                f"codec.fit: got steps={list(self.steps)}, batch={self.batch}, window={self.window}, shards={self.shards}; "
                "steps from 0, the others from 1, batch a multiple of window"
            )


@dataclass(frozen=True, kw_only=True)
class DCAEConfig:
    """AutoencoderDC's sizes (defaults: f64c128's) and the temporal modules'. The `attention_stages` deepest stages are linear
    attention, the others convolutions; a stage of no layers only changes the resolution.

    `path`: a diffusers folder of published image weights of these sizes. With `fit.steps` the temporal modules are trained on the
    clips, without a path the image codec before them; these weights are stored in the student's folder.
    """

    path: Path | None = None
    stride: int = 1
    patch: int = 64
    channels: int = 128
    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024, 2048)
    encoder_layers: tuple[int, ...] = (0, 4, 8, 2, 2, 2, 2)
    decoder_layers: tuple[int, ...] = (0, 5, 10, 2, 2, 2, 2)
    attention_stages: int = 4
    decoder_norm: Literal["batch_norm", "rms_norm"] = "batch_norm"
    temporal_kernel: int = 3
    temporal_window: int = 8
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self):
        stages = len(self.widths)
        if self.stride != 1 or self.patch != 2 ** (stages - 1):
            raise UserError(
                f"codec: got stride={self.stride}, patch={self.patch}; DC-AE has stride 1 and halves {stages} widths to "
                f"patch {2 ** (stages - 1)}"
            )
        if not stages == len(self.encoder_layers) == len(self.decoder_layers) or stages < 2:
            raise UserError(
                f"codec: got {stages} widths, {len(self.encoder_layers)} encoder_layers, {len(self.decoder_layers)} "
                "decoder_layers; give one value of each per stage, for two stages or more"
            )
        if self.widths[-1] % self.channels or self.widths[-1] % HEAD_DIM:
            raise UserError(
                f"codec.widths: got {self.widths[-1]} at the deepest stage; give a multiple of {HEAD_DIM} and of channels="
                f"{self.channels}"
            )
        if min(self.temporal_kernel, self.temporal_window) < 2:
            raise UserError(
                f"codec: got temporal_kernel={self.temporal_kernel}, temporal_window={self.temporal_window}; both from 2"
            )
        if self.path is None and not self.fitted:
            raise UserError(
                f"codec: dc_ae has no weights; give path=FOLDER ({WHERE}) or fit.steps to train it on the clips"
            )
        if self.path is None and not self.fit.steps[0]:
            raise UserError(
                "codec.fit.steps: the first is 0 without a path; give steps of the image codec, or its weights"
            )

    @property
    def fitted(self) -> bool:
        """Whether the data stage trains weights."""
        return any(self.fit.steps)

    def load(self, folder: Path, height: int, width: int) -> "DCAE":
        """The frozen codec of `folder`/codec.safetensors, where it is fitted, else of `path`, for frames of any size. UserError."""
        if not self.fitted:
            return load_dc_ae(self)
        with torch.device("meta"):
            codec = DCAE(self)
        path = folder / "codec.safetensors"
        load_strict(codec, read_tensors(path, HINT), path, HINT, assign=True)
        return codec.eval().requires_grad_(False)


class TemporalCache:
    """Past frames of the temporal modules in their order: those of the state that one pass starts from and those it ends with."""

    def __init__(self, state: DecoderState | None):
        self.before = iter(state) if state else None
        self.after: list[Tensor] = []

    def extend(self, frames: Tensor, count: int) -> Tensor:
        """[B, T, ...] -> [B, count + T, ...]: prepend the last `count` frames, at the start copies of the first one."""
        past = frames[:, :1].expand(-1, count, *frames.shape[2:]) if self.before is None else next(self.before)
        whole = torch.cat([past, frames], dim=1)
        self.after.append(whole[:, -count:].clone())
        return whole


class TemporalConv(nn.Module):
    """x + W [x_t-k+1, ..., x_t] on [B T, C, H, W]: `kernel` frames at one place, W zero-initialised."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.kernel = kernel
        self.conv = nn.Conv2d(kernel * width, width, 1)
        _zero_init(self.conv)

    def forward(self, x: Tensor, batch: int, cache: TemporalCache) -> Tensor:
        whole = cache.extend(x.unflatten(0, (batch, -1)), self.kernel - 1)
        frames = whole.shape[1] - self.kernel + 1
        near = torch.cat([whole[:, i : i + frames] for i in range(self.kernel)], dim=2)
        return x + self.conv(near.flatten(0, 1))


class TemporalAttention(nn.Module):
    """x + attention of a frame to itself and the `window` - 1 before it, at each place of [B T, C, h, w]; zero-initialised.

    Keys are rotated by their age in frames (RoPE), so the length of a stream is unlimited.
    """

    def __init__(self, width: int, window: int):
        super().__init__()
        self.window, self.heads = window, width // HEAD_DIM
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        _zero_init(self.out)

    def forward(self, x: Tensor, batch: int, cache: TemporalCache) -> Tensor:
        clip = x.unflatten(0, (batch, -1)).permute(0, 1, 3, 4, 2)  # B, T, h, w, C
        query, key, value = self.qkv(self.norm(clip)).chunk(3, dim=-1)
        # [B, T, h, w, C, window], the newest last
        key, value = (cache.extend(part, self.window - 1).unfold(1, self.window, 1) for part in (key, value))
        key, value = (part.unflatten(4, (self.heads, -1)).movedim(-1, -2) for part in (key, value))
        attended = functional.scaled_dot_product_attention(
            query.unflatten(-1, (self.heads, 1, -1)), self._rotated(key), value
        )
        return x + self.out(attended.flatten(-3)).permute(0, 1, 4, 2, 3).flatten(0, 1)

    def _rotated(self, key: Tensor) -> Tensor:
        """Keys [.., window, d] rotated by their age in frames, at frequencies 100^(-2i/d)."""
        half = torch.arange(HEAD_DIM // 2, device=key.device, dtype=key.dtype)
        age = torch.arange(1 - self.window, 1, device=key.device, dtype=key.dtype)
        angle = age[:, None] * 100.0 ** (-2 * half / HEAD_DIM)
        even, odd = key.unflatten(-1, (2, -1)).unbind(-2)
        return torch.cat([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], dim=-1)


class DCAE(StreamedCodec):
    """Video [B, 3, T, H, W] in [-1, 1] <-> latents [B, C, T, H/patch, W/patch], a latent frame for every pixel frame.

    Latents are normalised per channel, (z - mean) / std. Both ways are causal: the first frame alone is the first latent, and a
    decode in chunks equals the whole one to rounding. A clip is processed a few frames at a time; the temporal modules
    cache a few frames each, whatever the length of the stream: a state. Without one, or with an empty one, a stream begins.
    Gradients flow to video and latents.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: DCAEConfig):
        super().__init__()
        self.config = config
        self.network = AutoencoderDC(**diffusers_config(config))
        self.register_buffer("mean", torch.zeros(config.channels))
        self.register_buffer("std", torch.ones(config.channels))
        kernel, window = config.temporal_kernel, config.temporal_window
        self.temporal = nn.ModuleDict()
        for name, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
            widths = [width for width, count in zip(config.widths, layers, strict=True) for _ in range(count)]
            widths = widths if name == "encoder" else widths[::-1]
            self.temporal[f"{name}_convs"] = nn.ModuleList(TemporalConv(width, kernel) for width in widths)
            self.temporal[f"{name}_attention"] = TemporalAttention(config.widths[-1], window)

    def encode_chunk(
        self, video: Float[Tensor, "b 3 t h w"], state: EncoderState | None = None
    ) -> tuple[Float[Tensor, "b c f y x"], EncoderState]:
        check_video(video, self.config, begins=state is None)
        parts = []
        for group in video.to(self._dtype).split(AT_ONCE, dim=2):
            raw, state = self.encode_raw(group, state)
            parts.append(raw)
        assert state is not None
        raw = torch.cat(parts, dim=2)
        return _at_least_fp32(raw.sub(self._row(self.mean)).div(self._row(self.std))), state

    def decode_chunk(
        self, latents: Float[Tensor, "b c f y x"], state: DecoderState | None = None
    ) -> tuple[Float[Tensor, "b 3 t h w"], DecoderState]:
        deepest = (
            (state[0].permute(0, 1, 4, 2, 3),) if state else None
        )  # [B, window - 1, h, w, C] as check_latents has it
        check_latents(latents, self.config, deepest)
        parts = []
        for group in latents.to(self._dtype).split(AT_ONCE, dim=2):
            pixels, state = self.decode_raw(group * self._row(self.std) + self._row(self.mean), state)
            parts.append(pixels)
        assert state is not None
        return _at_least_fp32(torch.cat(parts, dim=2)).clamp(-1, 1), state

    def encode_raw(self, video: Tensor, state: DecoderState | None = None) -> tuple[Tensor, DecoderState]:
        """The next frames [B, 3, n, H, W] of a video -> unnormalised latents, and the state for the frames after."""
        net, batch, cache = self.network.encoder, len(video), TemporalCache(state)
        x = net.conv_in(video.transpose(1, 2).flatten(0, 1))
        x = self._stages(net.down_blocks, "encoder", x, batch, cache)
        x = self.temporal["encoder_attention"](x, batch, cache)
        shortcut = x.unflatten(1, (self.config.channels, -1)).mean(dim=2)
        return (net.conv_out(x) + shortcut).unflatten(0, (batch, -1)).transpose(1, 2), tuple(cache.after)

    def decode_raw(self, latents: Tensor, state: DecoderState | None = None) -> tuple[Tensor, DecoderState]:
        """The next latents, not normalised -> pixels [B, 3, n, H, W], not clamped, and the state for the latents after."""
        net, batch, cache = self.network.decoder, len(latents), TemporalCache(state)
        z = latents.transpose(1, 2).flatten(0, 1)
        x = net.conv_in(z) + z.repeat_interleave(self.config.widths[-1] // self.config.channels, dim=1)
        x = self.temporal["decoder_attention"](x, batch, cache)
        x = self._stages(reversed(net.up_blocks), "decoder", x, batch, cache)
        assert net.conv_out is not None
        x = net.conv_out(net.conv_act(net.norm_out(x.movedim(1, -1)).movedim(-1, 1)))
        return x.unflatten(0, (batch, -1)).transpose(1, 2), tuple(cache.after)

    def _stages(self, stages, name: str, x: Tensor, batch: int, cache: TemporalCache) -> Tensor:
        """Frames [B n, C, H, W] through the spatial layers, a temporal convolution after each that keeps the size."""
        following = self.temporal[f"{name}_convs"].children()
        for stage in stages:
            for layer in stage:
                x = layer(x)
                if not isinstance(layer, DCDownBlock2d | DCUpBlock2d):
                    x = next(following)(x, batch, cache)
        return x

    def _row(self, values: Tensor) -> Tensor:
        return values.view(1, -1, 1, 1, 1)


def diffusers_config(config: DCAEConfig) -> dict:
    """The arguments of diffusers' AutoencoderDC; f64c128's decoder has batch norm and ReLU where it has no attention."""
    linear = config.attention_stages
    convolutional = len(config.widths) - linear
    blocks = ("ResBlock",) * convolutional + ("EfficientViTBlock",) * linear
    is_batch_norm = config.decoder_norm == "batch_norm"
    return {
        "latent_channels": config.channels,
        "encoder_block_types": blocks,
        "decoder_block_types": blocks,
        "encoder_block_out_channels": config.widths,
        "decoder_block_out_channels": config.widths,
        "encoder_layers_per_block": config.encoder_layers,
        "decoder_layers_per_block": config.decoder_layers,
        "encoder_qkv_multiscales": ((),) * len(config.widths),
        "decoder_qkv_multiscales": ((),) * len(config.widths),
        "decoder_norm_types": (config.decoder_norm,) * convolutional + ("rms_norm",) * linear,
        "decoder_act_fns": ("relu" if is_batch_norm else "silu",) * convolutional + ("silu",) * linear,
    }


def load_dc_ae(config: DCAEConfig) -> DCAE:
    """The image codec in `config.path` (config.json and its safetensors, diffusers' layout) with zero-initialised temporal
    modules. Raises UserError for a missing file, other sizes than the config's, and a tensor of another shape."""
    assert config.path is not None
    path = config.path / "vae" if (config.path / "vae" / "config.json").is_file() else config.path
    published = read_json(path / "config.json")
    if published.get("_class_name") != "AutoencoderDC":
        raise UserError(f"no DC-AE: {path} has no config.json of AutoencoderDC; {WHERE}")
    for name, expected in json.loads(json.dumps(diffusers_config(config))).items():
        found = published.get(name, expected)
        if ([found] * len(config.widths) if isinstance(found, str) else found) != expected:
            raise UserError(
                f"codec: {name} is {found} in {path / 'config.json'}, the recipe's sizes give {expected}; use the former"
            )
    tensors = read_tensors(path / WEIGHTS, WHERE)
    codec = DCAE(config)
    load_strict(codec.network, tensors, path / WEIGHTS, WHERE, assign=True)
    codec.std.fill_(1 / published.get("scaling_factor", 1.0))
    return codec.float().eval().requires_grad_(False)


def _zero_init(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _at_least_fp32(value: Tensor) -> Tensor:
    """At least fp32: differences of similar values lose precision in half types."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
