"""What the codec costs: FLOPs and bytes of a clip, and the stand-in for what decodes rollouts in training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from distill.methods import Batch
from distill.methods.rewards import Reward
from distill.planning.live_bytes import LiveBytes
from students.spec import Spec
from teachers.codecs.streamed import pull_back
from teachers.codecs.taehv import TAEHV, TAEHVConfig
from teachers.codecs.wan_vae import WanVAE, WanVAEConfig
from teachers.conditions import Conditions
from teachers.machine import clips_at_once

if TYPE_CHECKING:
    from distill.recipe import Recipe

SIDE, GROUPS = 64, (3, 4)  # the codec is traced on small clips of so many latent frames; convolutions follow the pixels


@dataclass(frozen=True)
class CodecCosts:
    """FLOPs and bytes at the peak of one clip, encoded and decoded, and FLOPs of encoding a portrait alone; zeros for a codec
    that is not Wan's."""

    encode: float = 0
    decode: float = 0
    encode_bytes: float = 0
    decode_bytes: float = 0
    encode_portrait: float = 0


def codec_costs(spec: Spec, recipe: "Recipe") -> CodecCosts:
    """Of the recipe's codec at its size; each latent frame costs what the one before cost."""
    if recipe.tiny or not isinstance(recipe.data.codec, WanVAEConfig):
        return CodecCosts()
    with torch.device("meta"):
        vae = WanVAE(AutoencoderKLWan())
    counts = []
    for groups in GROUPS:
        video = torch.empty(1, 3, 1 + 4 * (groups - 1), SIDE, SIDE, device="meta")
        latents = torch.empty(1, 16, groups, SIDE // 8, SIDE // 8, device="meta")
        with LiveBytes() as one:
            vae.encode(video)
        with LiveBytes() as other:
            vae.decode_chunk(latents)
        counts.append((one.flops, other.flops, max(one.points.values()), max(other.points.values())))
    scale = spec.height * spec.width / SIDE**2

    def at(frames: int) -> list[float]:
        more = (frames - GROUPS[1]) / (GROUPS[1] - GROUPS[0])
        return [scale * (b + more * (b - a)) for a, b in zip(*counts, strict=True)]

    return CodecCosts(*at(spec.horizon_frames), encode_portrait=at(1)[0])


class PullBack(NamedTuple):
    """What the gradient of a clip costs that goes through the decoder: bytes at its peak, and FLOPs."""

    bytes: float = 0.0
    flops: float = 0.0


def pull_back_costs(spec: Spec, recipe: "Recipe", decoder: object) -> PullBack:
    """Of one clip of the recipe's size, whose decoding `teachers.codecs.streamed.pull_back` differentiates with `decoder`, None:
    the recipe's codec; zeros for one that is neither Wan's nor TAEHV. Each latent frame adds a state, its pixels and its FLOPs."""
    kind = recipe.data.codec if decoder is None else decoder
    if recipe.tiny or not isinstance(kind, WanVAEConfig | TAEHVConfig):
        return PullBack()
    with torch.device("meta"):
        codec = WanVAE(AutoencoderKLWan()) if isinstance(kind, WanVAEConfig) else TAEHV()
    counts = []
    for frames in GROUPS:
        latents = torch.empty(1, 16, frames, SIDE // 8, SIDE // 8, device="meta")
        with LiveBytes() as live:
            pull_back(codec.decode_chunk, latents, torch.empty_like, 1)
        counts.append((max(live.points.values()), live.flops))
    scale, more = spec.height * spec.width / SIDE**2, spec.horizon_frames - GROUPS[1]
    return PullBack(*(scale * (b + more * (b - a)) for a, b in zip(*counts, strict=True)))


class PlannedReader:
    """A `ClipReader` on the meta device: decoding, and pulling a gradient back through it, take their bytes for a moment, and all
    clips are worth the same."""

    rank = 0

    def __init__(self, spec: Spec, decode_bytes: float, pull_back_bytes: float = 0.0):
        frames = 1 + spec.codec.stride * (spec.horizon_frames - 1)
        self.at_once, self.decode_bytes = clips_at_once(frames, spec.height, spec.width), decode_bytes
        self.pull_back_bytes = pull_back_bytes
        self.reasons: Mapping[str, str] = {}

    def check(self, rewards: Mapping[str, Reward], face: tuple[float, ...] | None) -> None:
        """What a reward needs is looked for where the run starts."""
        del rewards, face

    def differentiate_through(self, decoder: object) -> None:
        """Its bytes are given."""
        del decoder

    def read(self, rewards: Mapping[str, Reward], x0: Tensor, conditions: Conditions, batch: Batch) -> Tensor:
        """Zeros [K, B]."""
        del conditions, batch
        self._take(self.decode_bytes * min(self.at_once, len(x0)), x0)
        return torch.zeros(len(rewards), len(x0), device="cpu")

    def gradient(
        self, rewards: Mapping[str, tuple[Reward, float]], x0: Tensor, conditions: Conditions, batch: Batch
    ) -> Tensor:
        """Zeros like x0."""
        del rewards, conditions, batch
        self._take(self.pull_back_bytes, x0)  # of one clip at a time
        return torch.zeros_like(x0, dtype=torch.float32)

    def _take(self, size: float, x0: Tensor) -> None:
        torch.empty(round(size), dtype=torch.uint8, device=x0.device)

    def of_all(self, own: Tensor) -> Tensor:
        """Those of two ranks, as one with one clip could not standardise."""
        return torch.cat([own, own], dim=1)
