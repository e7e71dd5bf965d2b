"""Clips from somewhere else as training data: discs that open with the loudness of a sound, drawn as they are asked for.

A source is a frozen config that inherits from `ClipsConfig` and opens it, and a class with `clips`; a recipe names it `file:Config`
(see discs.yaml). Arrays of your own are read in the place of the drawing.
"""

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from distill.data.config import ClipsConfig
from distill.data.source import Clips, ClipSource
from teachers.flow import keyed_generator

COLOURS = {"red": (230, 60, 50), "green": (60, 200, 90), "blue": (70, 90, 235)}


@dataclass(frozen=True, kw_only=True)
class Config(ClipsConfig):
    """`radius`: of an open disc, in shares of the picture's height."""

    radius: float = 0.4

    def __post_init__(self):
        super().__post_init__()
        self.refuse_directions()

    def open(self) -> "Discs":
        return Discs(self)


class Discs(ClipSource):
    """Syllables of noise; the disc's radius follows their envelope, its colour the text."""

    description = "discs that open with a sound, no people"

    def clips(self, seed: int, name: str, num: int) -> Clips:
        world, rng = self.config.world, keyed_generator(seed, "discs", name)
        frames, rate = world.num_frames, 16_000 / Fraction(world.fps)
        loudness = torch.rand(num, frames, generator=rng) * (torch.rand(num, frames, generator=rng) < 0.7)
        envelope = loudness.repeat_interleave(int(rate), dim=1)
        audio = 0.3 * envelope * torch.randn(envelope.shape, generator=rng)
        names = [tuple(COLOURS)[i] for i in torch.randint(len(COLOURS), (num,), generator=rng).tolist()]
        video = torch.stack([self.film(row, COLOURS[colour]) for row, colour in zip(loudness, names, strict=True)])
        return Clips(video=video, audio=audio.clamp(-1, 1), text=[f"a {name} disc talks" for name in names], labels={})

    def film(self, loudness: Tensor, colour: tuple[int, int, int]) -> Tensor:
        """uint8 [3, T, H, W] of one clip with loudness [T]."""
        height, width = self.config.world.size
        y, x = torch.arange(height).view(-1, 1) - height / 2, torch.arange(width) - width / 2
        radius = self.config.radius * height * (0.3 + 0.7 * loudness).view(-1, 1, 1)
        cover = (radius - (x**2 + y**2).sqrt() + 0.5).clamp(0, 1)
        paint = torch.tensor(colour, dtype=torch.float32).view(3, 1, 1, 1)
        return (20 + cover * (paint - 20)).round().to(torch.uint8)
