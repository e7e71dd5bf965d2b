"""Conditions as they are found, not curated: blurred, badly exposed, off-centre pictures and texts that say nothing of motion.

LiveTalk (2512.23576) repairs the pictures (super-resolution, regeneration) and rewrites the texts for motion before it distils,
and blames uncurated ones for black frames and collapse. The embedded world is born curated, so here it is undone.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from distill.data.procedural.render import SAY_WHO
from distill.data.source import Clips
from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CorruptionConfig:
    """How bad clips are; each draws its own severity uniformly up to these, one for all of its frames; 0 is off.

    `blur`: sigma of a Gaussian over the picture's height. `exposure`: stops over or under, 1 is twice or half the light. `shift`:
    how far the picture is moved over its sides, its border repeated. `static_text`: texts say who and where, not what they do.
    """

    blur: float
    exposure: float
    shift: float
    static_text: bool

    def __post_init__(self):
        for name, most in {"blur": 0.1, "exposure": 4.0, "shift": 0.5}.items():
            if not 0.0 <= getattr(self, name) <= most:
                raise UserError(f"corruption.{name}: got {getattr(self, name)}; it is a number from 0 to {most}")


def corrupt_clips(config: CorruptionConfig, clips: Clips, rng: torch.Generator) -> Clips:
    """The same clips, worse: video uint8 [N, 3, T, H, W] and text; sound and labels as they were."""
    num = clips.video.shape[0]
    blur, stops, across, down = torch.rand(4, num, generator=rng).unbind()
    video = clips.video.float() / 255
    if config.shift:
        video = _move(video, config.shift * (2 * across - 1), config.shift * (2 * down - 1))
    if config.blur:
        video = _blur(video, config.blur * blur * video.shape[3])
    gain = 2 ** (config.exposure * (2 * stops - 1))
    video = (video * gain.view(-1, 1, 1, 1, 1)).clamp(0, 1).mul(255).round().to(torch.uint8)
    text = [_static(line) for line in clips.text] if config.static_text else clips.text
    return replace(clips, video=video, text=text)


def _move(video: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Each clip by its share of the sides."""
    flat = video.flatten(1, 2)
    ahead = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).repeat(len(flat), 1, 1)
    ahead[:, 0, 2], ahead[:, 1, 2] = -2 * across, -2 * down  # a side is 2 long
    grid = affine_grid(ahead, list(flat.shape), align_corners=False)
    return grid_sample(flat, grid, padding_mode="border", align_corners=False).view_as(video)


def _blur(video: Tensor, sigma: Tensor) -> Tensor:
    """Each clip by its sigma in pixels."""
    from torchvision.transforms.v2.functional import gaussian_blur

    out = []
    for clip, width in zip(video, sigma.clamp(min=1e-3).tolist(), strict=True):
        size = 2 * math.ceil(3 * width) + 1
        out.append(gaussian_blur(clip.transpose(0, 1), [size, size], [width, width]).transpose(0, 1))
    return torch.stack(out)


def _static(text: str) -> str:
    who = next((who for who in SAY_WHO if text.startswith(who)), "a person")
    return f"{who} in front of a wall"
