"""Condition corruption: blurred, badly exposed, off-centre frames and captions without motion, as in uncurated data.

LiveTalk (2512.23576) repairs reference images (super-resolution, regeneration) and rewrites captions for motion before it distils,
and attributes black frames and collapse to uncurated ones. The embedded world is curated by construction; this undoes it.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from distill.data.procedural.render import SUBJECTS
from distill.data.source import Clips
from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CorruptionConfig:
    """Maximum severities; each clip draws its own uniformly up to these, one for all of its frames; 0 is off.

    `blur`: sigma of a Gaussian as a fraction of the frame's height. `exposure`: stops over or under, 1 is twice or half the light.
    `shift`: translation as a fraction of the sides, borders repeated. `static_text`: captions name person and place, no motion.
    """

    blur: float
    exposure: float
    shift: float
    static_text: bool

    def __post_init__(self):
        for name, limit in {"blur": 0.1, "exposure": 4.0, "shift": 0.5}.items():
            if not 0.0 <= getattr(self, name) <= limit:
                raise UserError(f"corruption.{name}: got {getattr(self, name)}; give a number from 0 to {limit}")


def corrupt_clips(config: CorruptionConfig, clips: Clips, rng: torch.Generator) -> Clips:
    """The clips with corrupted video uint8 [N, 3, T, H, W] and text; sound and labels unchanged."""
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
    """Translate each clip of video float [N, 3, T, H, W] by fractions [N] of width and height."""
    flat = video.flatten(1, 2)
    theta = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).repeat(len(flat), 1, 1)
    theta[:, 0, 2], theta[:, 1, 2] = -2 * across, -2 * down  # a side is 2 long
    grid = affine_grid(theta, list(flat.shape), align_corners=False)
    return grid_sample(flat, grid, padding_mode="border", align_corners=False).view_as(video)


def _blur(video: Tensor, sigma: Tensor) -> Tensor:
    """Blur each clip of video float [N, 3, T, H, W] by its sigma [N] in pixels."""
    from torchvision.transforms.v2.functional import gaussian_blur

    out = []
    for clip, width in zip(video, sigma.clamp(min=1e-3).tolist(), strict=True):
        size = 2 * math.ceil(3 * width) + 1
        out.append(gaussian_blur(clip.transpose(0, 1), [size, size], [width, width]).transpose(0, 1))
    return torch.stack(out)


def _static(text: str) -> str:
    subject = next((subject for subject in SUBJECTS if text.startswith(subject)), "a person")
    return f"{subject} in front of a wall"
