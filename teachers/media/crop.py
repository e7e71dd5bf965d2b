"""The one rule by which a picture is cropped to a student's shape, and the scaling after it.

A crop is the largest part of the picture that has the shape. `face`: placed around the face, `top` and `center`: at the top or in
the middle, in the middle across. Nothing is enlarged before it is cropped, so memory is that of the picture and of the result.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from teachers.errors import UserError

CROPS = ("face", "top", "center")
HAIR, CHIN, EAR = 0.4, 0.08, 0.15  # of a head above, below and beside its face, in units of the face's box
EYE_LINE = 0.42  # where the middle of a face goes, from the top of a crop


@dataclass(frozen=True)
class Box:
    """A face, brow to chin, in fractions of the frame's width and height; confidence 0 to 1, 1 for a box that the user provides."""

    x: float
    y: float
    width: float
    height: float
    confidence: float

    def inside(self, source: tuple[int, int], part: tuple[int, int, int, int]) -> "Box":
        """The same face in fractions of a part (x, y, width, height in pixels) of its frame `source` = (w, h)."""
        x, y, width, height = part
        return Box(
            (self.x * source[0] - x) / width,
            (self.y * source[1] - y) / height,
            self.width * source[0] / width,
            self.height * source[1] / height,
            self.confidence,
        )

    @property
    def cut(self) -> float:
        """The share of the face that lies outside the frame, 0 to 1."""
        across = min(1.0, self.x + self.width) - max(0.0, self.x)
        down = min(1.0, self.y + self.height) - max(0.0, self.y)
        return max(0.0, 1 - max(0.0, across) * max(0.0, down) / (self.width * self.height))


def around(boxes: Iterable[Box]) -> Box | None:
    """The smallest box that holds all of them, None without any; its confidence is their mean."""
    boxes = list(boxes)
    if not boxes:
        return None
    left, top = min(box.x for box in boxes), min(box.y for box in boxes)
    right, bottom = max(box.x + box.width for box in boxes), max(box.y + box.height for box in boxes)
    return Box(left, top, right - left, bottom - top, sum(box.confidence for box in boxes) / len(boxes))


def shape_within(source: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Width and height in pixels of the largest part of `source` = (w, h) that has the shape of `size` = (H, W)."""
    width, height = source
    fitted = max(1, round(Fraction(height * size[1], size[0]))), max(1, round(Fraction(width * size[0], size[1])))
    return min(width, fitted[0]), min(height, fitted[1])


def place(
    source: tuple[int, int], size: tuple[int, int], crop: str = "face", face: Box | None = None
) -> tuple[int, int, int, int]:
    """x, y, width and height in pixels of the part of `source` = (w, h) that is kept for the shape `size` = (H, W).

    `face` without a box is `top`. The whole head is kept where it fits, else the face. UserError for another word than `CROPS`.
    """
    if crop not in CROPS:
        raise UserError(f"crop: got {crop!r}; {', '.join(CROPS)}")
    width, height = shape_within(source, size)
    x, y = (source[0] - width) // 2, (source[1] - height) // 2 if crop == "center" else 0
    if crop == "face" and face is not None:
        across = (face.x * source[0], face.width * source[0])
        down = (face.y * source[1], face.height * source[1])
        x = _around(source[0], width, across, (EAR, EAR), 0.5)
        y = _around(source[1], height, down, (HAIR, CHIN), EYE_LINE)
    return x, y, width, height


def _around(length: int, window: int, face: tuple[float, float], more: tuple[float, float], share: float) -> int:
    """Where a window starts along one side: the middle of the face (start, extent) at `share` of it, moved until the head is
    within, and the face, whatever fits."""
    start, extent = face
    first = start + extent / 2 - share * window
    for before, behind in (more, (0.0, 0.0)):
        low, high = max(0.0, start - before * extent), min(float(length), start + (1 + behind) * extent)
        if high - low <= window:
            first = min(max(first, high - window), low)
    return min(max(0, round(first)), length - window)


def fit_image(
    pixels: UInt8[Tensor, "h w 3"], size: tuple[int, int], crop: str = "center", face: Box | None = None
) -> Float[Tensor, "3 h2 w2"]:
    """`pixels` uint8 [h, w, 3] to [3, H, W] in [-1, 1]: cropped (`place`), then scaled (antialiased bicubic)."""
    x, y, width, height = place((pixels.shape[1], pixels.shape[0]), size, crop, face)
    image = pixels[y : y + height, x : x + width].permute(2, 0, 1)[None].float()
    if (height, width) != tuple(size):
        image = F.interpolate(image, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
    return image[0].contiguous() / 127.5 - 1
