"""What the codec costs: FLOPs and bytes of a clip, and the stand-in for what decodes rollouts in training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from distill.methods import Batch
from distill.methods.rewards import Reward
from distill.planning.live_bytes import LiveBytes
from students.spec import Spec
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


class PlannedReader:
    """A `ClipReader` on the meta device: decoding takes its bytes for a moment, and all clips are worth the same."""

    rank = 0

    def __init__(self, spec: Spec, decode_bytes: float):
        frames = 1 + spec.codec.stride * (spec.horizon_frames - 1)
        self.at_once, self.decode_bytes = clips_at_once(frames, spec.height, spec.width), decode_bytes
        self.reasons: Mapping[str, str] = {}

    def check(self, rewards: Mapping[str, Reward], face: tuple[float, ...] | None) -> None:
        """What a reward needs is looked for where the run starts."""
        del rewards, face

    def read(self, rewards: Mapping[str, Reward], x0: Tensor, conditions: Conditions, batch: Batch) -> Tensor:
        """Zeros [K, B]."""
        del conditions, batch
        size = round(self.decode_bytes * min(self.at_once, len(x0)))
        torch.empty(size, dtype=torch.uint8, device=x0.device)
        return torch.zeros(len(rewards), len(x0), device="cpu")

    def of_all(self, own: Tensor) -> Tensor:
        """Those of two ranks, as one with one clip could not standardise."""
        return torch.cat([own, own], dim=1)
