"""Wan2.1's causal video autoencoder as a codec: diffusers' network, its feature cache as an immutable state."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from jaxtyping import Float
from torch import Tensor, nn

from teachers.checkpoints.strict import load_strict
from teachers.checkpoints.weights import read_tensors
from teachers.codecs.linear import CodecConfig
from teachers.codecs.streamed import DecoderState, EncoderState, StreamedCodec, check_latents, check_video
from teachers.disk.read import read_json
from teachers.errors import UserError

ORIGINAL = "Wan2.1_VAE.pth"
WHERE = f"get vae/ of huggingface.co/Wan-AI/Wan2.1-T2V-1.3B-Diffusers or {ORIGINAL} of huggingface.co/Wan-AI/Wan2.1-T2V-1.3B"


AnyCodec = TypeVar("AnyCodec", bound=StreamedCodec)


@dataclass(frozen=True, kw_only=True)
class WanLatentsConfig:
    """A published codec of Wan2.1's latents, whose weights are in `path`."""

    path: Path
    stride: int = 4
    patch: int = 8
    channels: int = 16

    @property
    def fitted(self) -> bool:
        return False

    def checked(self, codec: AnyCodec) -> AnyCodec:
        """The codec; UserError where it has another geometry."""
        expected, actual = ((c.stride, c.patch, c.channels) for c in (self, codec.config))
        if expected != actual:
            raise UserError(
                f"codec: (stride, patch, channels) is {expected}, the weights have {actual}: {self.path}; use the latter"
            )
        return codec


@dataclass(frozen=True, kw_only=True)
class WanVAEConfig(WanLatentsConfig):
    """Wan2.1's VAE in `path`, as `load_wan_vae` reads it."""

    def load(self, folder: Path, height: int, width: int) -> "WanVAE":
        """The frozen codec, for frames of any size. UserError where it has another geometry."""
        return self.checked(load_wan_vae(self.path))

    def write_random(self, folder: Path) -> None:
        """A small VAE with random weights in the layout that `load` reads, for recipes with size=tiny."""
        AutoencoderKLWan(base_dim=4, num_res_blocks=1).save_pretrained(folder / "vae")


NOTHING_YET = "Rep"  # diffusers' marker in a temporal upsampler's slot after the first latent; a state has size 0 there


class WanVAE(StreamedCodec):
    """Video [B, 3, T, H, W] in [-1, 1] <-> latents [B, 16, F, H/8, W/8], T = 1 + 4 (F - 1), both fp32.

    Latents are the posterior's mean, normalised per channel as (mu - latents_mean) / latents_std of the network's config, in fp32
    whatever dtype the weights have. The first pixel frame alone is the first latent; both ways are causal. A clip is
    processed one latent frame at a time, never in tiles (they shift the colours at 512 x 512), so activations do not grow with
    its length and a decode in chunks equals the whole one bit for bit. The network is frozen. A state has
    the last one or two input frames of each temporal convolution.
    """

    def __init__(self, network: AutoencoderKLWan):
        super().__init__()
        sizes = network.config
        channels, patch_size = sizes["z_dim"], sizes["patch_size"]
        self.mean, self.std = tuple(sizes["latents_mean"]), tuple(sizes["latents_std"])
        if patch_size is not None or not len(self.mean) == len(self.std) == channels:
            raise UserError(f"not Wan2.1's VAE: patch_size {patch_size}, z_dim {channels}; {WHERE}")
        self.network = network.eval().requires_grad_(False)
        stride, patch = 2 ** sum(sizes["temperal_downsample"]), 2 ** (len(sizes["dim_mult"]) - 1)
        self.config = CodecConfig(stride=stride, patch=patch, channels=channels)

    @torch.no_grad()
    def encode_chunk(
        self, video: Float[Tensor, "b 3 t h w"], state: EncoderState | None = None
    ) -> tuple[Float[Tensor, "b c f y x"], EncoderState]:
        check_video(video, self.config, begins=state is None)
        stride = self.config.stride
        groups = [1] * (state is None) + [stride] * (video.shape[2] // stride)
        cache, means = _cache(self.network.encoder, state or ()), []
        for group in video.to(self._dtype).split(groups, dim=2):
            moments = self.network.encoder(group.contiguous(), feat_cache=cache, feat_idx=[0])
            means.append(self.network.quant_conv(moments)[:, : self.config.channels])
        latents = (torch.cat(means, dim=2).float() - _row(self.mean, video.device)) / _row(self.std, video.device)
        return latents, _state(cache)

    def decode_chunk(
        self, latents: Float[Tensor, "b c f y x"], state: DecoderState | None = None
    ) -> tuple[Float[Tensor, "b 3 t h w"], DecoderState]:
        check_latents(latents, self.config, state)
        pixels = []
        raw = (latents.float() * _row(self.std, latents.device) + _row(self.mean, latents.device)).to(self._dtype)
        for latent in raw.split(1, dim=2):
            cache = _cache(self.network.decoder, state or ())
            latent = self.network.post_quant_conv(latent.contiguous())
            pixels.append(self.network.decoder(latent, feat_cache=cache, feat_idx=[0], first_chunk=state is None))
            state = _state(cache)
        assert state is not None
        return torch.cat(pixels, dim=2).float().clamp(-1, 1), state


def load_wan_vae(path: str | Path) -> WanVAE:
    """A diffusers model folder or its vae/, a folder with Wan2.1_VAE.pth, or one file (.pth, .safetensors) in either naming.

    A single file has no config: widths are by its shapes, the rest is Wan2.1's. Nothing but tensors is unpickled, and every
    tensor must fit. The weights are fp32, as Wan2.1 is published and run. Raises UserError.
    """
    path = Path(path)
    options = (path / "vae" / "config.json", path / ORIGINAL, path / "config.json") if path.is_dir() else (path,)
    file = next((option for option in options if option.is_file()), None)
    if file is None:
        raise UserError(f"no Wan VAE: {path} is no weight file and has no vae/config.json and no {ORIGINAL}; {WHERE}")
    if file.name == "config.json":
        config = read_json(file)
        if config.get("_class_name") != "AutoencoderKLWan":
            raise UserError(f"not the config of a Wan VAE: {file} is not that of AutoencoderKLWan; {WHERE}")
        config = {name: value for name, value in config.items() if not name.startswith("_")}
        file = file.with_name("diffusion_pytorch_model.safetensors")
        tensors = read_tensors(file, WHERE)
    else:
        tensors = convert_wan_vae_to_diffusers(read_tensors(file, WHERE))
        names = ("encoder.conv_in.weight", "decoder.conv_out.weight", "post_quant_conv.weight")
        ends = [tensors[name] for name in names if name in tensors and tensors[name].ndim == 5]
        if len(ends) < len(names):
            raise UserError(f"not a Wan VAE: {file} has no encoder.conv1, decoder.head.2 and conv2 weights; {WHERE}")
        config = {"base_dim": len(ends[0]), "decoder_base_dim": ends[1].shape[1], "z_dim": len(ends[2])}
    try:
        with torch.device("meta"):
            codec = WanVAE(AutoencoderKLWan(**config))
    except TypeError as error:
        raise UserError(f"not the config of a Wan VAE: {path} ({error}); {WHERE}") from error
    load_strict(codec.network, tensors, file, WHERE, assign=True)
    return codec.float()


def _cache(network: nn.Module, state: Sequence[Tensor]) -> list:
    """A feature cache in the network's layout: a slot for each temporal convolution, and some more that stay empty."""
    slots = [slot if slot.numel() else NOTHING_YET for slot in state]
    return slots + [None] * (sum(isinstance(module, nn.Conv3d) for module in network.modules()) - len(slots))


def _state(cache: Sequence) -> tuple[Tensor, ...]:
    """What a cache holds, as `_cache` takes it."""
    like = next(slot for slot in cache if isinstance(slot, Tensor))
    slots = (slot for slot in cache if slot is not None)
    return tuple(like.new_empty(0) if isinstance(slot, str) else slot.contiguous() for slot in slots)


@lru_cache(maxsize=16)
def _row(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One number a channel, fp32 [1, C, 1, 1, 1]; cached for each device, as a copy to it would stall a stream."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1, 1)
