"""Where each of two speakers is in the reference image: alone (LongCat-Video-Avatar), or beside what Wan's image encoder makes of
it (MultiTalk, InfiniteTalk)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from teachers.encoders.image import WanImage, WanImageConfig
from teachers.errors import UserError

Box = tuple[float, float, float, float]
MARGIN = 0.05
"""Of a half of the image, on each side of it, which is the background's: published."""
HALVES: tuple[Box, ...] = tuple(
    (MARGIN, start + MARGIN / 2, 1 - MARGIN, start + 0.5 - MARGIN / 2) for start in (0.0, 0.5)
)


@dataclass(frozen=True, kw_only=True)
class SpeakersConfig(WanImageConfig):
    """As `wan`, and `regions` too: a box for each speaker, the avatar's own first, (top, left, bottom, right) in parts of the image
    from 0 to 1. `boxes` null: the left and the right half, less a margin. Masks are given to a stream instead
    (`Session(conditions={"regions": ..})`), or by the data's Clips.features."""

    boxes: tuple[Box, ...] | None = None

    def __post_init__(self):
        if self.face != "none":
            raise UserError(f"data.image.face: got {self.face}; the speakers' boxes are given, remove it")
        for box in self.boxes or ():
            check_box(box)

    @property
    def gives(self) -> tuple[str, ...]:
        return ("image", "beside", "regions")

    def sizes(self, stride: int, channels: int, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        count = len(HALVES if self.boxes is None else self.boxes)
        return super().sizes(stride, channels, frames, height, width) | {"regions": (count, height, width)}

    def load(self) -> "Speakers":
        return Speakers(super().load().model, self)


class Speakers(WanImage):
    """The reference image -> its features, and the regions [N, P, H, W] of the speakers."""

    config: SpeakersConfig

    def forward(self, image: Float[Tensor, "n 3 h w"], codec: Any, num_frames: int) -> dict[str, Tensor]:
        found = super().forward(image, codec, num_frames)
        regions = speaker_regions(self.config.boxes, *found["beside"].shape[-2:])
        return found | {"regions": regions.expand(len(image), -1, -1, -1).to(image)}


@dataclass(frozen=True, kw_only=True)
class RegionsConfig:
    """`regions` alone, of `boxes` as `SpeakersConfig` has them; no weights."""

    boxes: tuple[Box, ...] | None = None
    dim: ClassVar[int] = 0
    gives: ClassVar[tuple[str, ...]] = ("regions",)

    def __post_init__(self):
        for box in self.boxes or ():
            check_box(box)

    def sizes(self, stride: int, channels: int, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        return {"regions": (len(HALVES if self.boxes is None else self.boxes), height, width)}

    def load(self) -> "Regions":
        return Regions(self)


class Regions(nn.Module):
    """The reference image -> the regions [N, P, H, W] of the speakers on the latent grid."""

    def __init__(self, config: RegionsConfig):
        super().__init__()
        self.config = config

    def forward(self, image: Float[Tensor, "n 3 h w"], codec: Any, num_frames: int) -> dict[str, Tensor]:
        height, width = (side // codec.config.patch for side in image.shape[-2:])
        regions = speaker_regions(self.config.boxes, height, width)
        return {"regions": regions.expand(len(image), -1, -1, -1).to(image)}


def check_box(box: Sequence[float]) -> None:
    """UserError for a box that is empty or reaches out of the image."""
    top, left, bottom, right = box
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise UserError(
            f"regions: {list(box)} is no box; give [top, left, bottom, right] in parts of the image, from 0 to 1"
        )


def speaker_regions(boxes: Sequence[Sequence[float]] | None, height: int, width: int) -> Tensor:
    """Regions [1, P, height, width], 1 in each speaker's box and 0 elsewhere; None: the halves. UserError for what is no box."""
    boxes = HALVES if boxes is None else boxes
    masks = torch.zeros(1, len(boxes), height, width)
    rows, columns = torch.arange(height) / height, torch.arange(width) / width
    for mask, box in zip(masks[0], boxes, strict=True):
        check_box(box)
        top, left, bottom, right = box
        mask[((rows >= top) & (rows < bottom)).unsqueeze(1) & (columns >= left) & (columns < right)] = 1.0
    return masks
