"""Coarse face detection without weights: one box for a whole clip, for curation and nothing finer.

A box is the best match of a ratio template (Sinha 1994; Scassellati, AAAI 1998: eyes are darker than forehead, cheeks and nose,
a mouth darker than chin and cheeks) among places that have the chroma of skin (Chai and Ngan 1999: Cb 77 to 127, Cr 133 to 173),
one chroma all over and movement in every part. Limits: one upright, nearly frontal, moving head that stays near its place;
coloured light, a mask or a still image hide it, and similar moving objects are false positives. The sizes of neighbouring
matches differ by 15 %. Of a still picture it knows nothing: a detector (`face`) comes first.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from teachers.media.crop import Box

LONG_SIDE, SHORT_SIDE = 160, 64  # pixels of the image that is searched
NARROWEST, STEP, ASPECT = 10, 1.15, 1.25  # smallest box's width in those pixels, ratio of two sizes, height to width
CONTRAST = 0.12  # (bright - dark) / (bright + dark) that fulfils a relation
CHROMA = 8.0  # levels by which the chroma of skin may differ within a face
FAINT = 8.0  # levels added to a sum of two, so that black has no contrast
PARTS = {  # left, top, right, bottom in units of the box
    "forehead": (0.25, 0.04, 0.75, 0.20),
    "left eye": (0.13, 0.30, 0.42, 0.44),
    "right eye": (0.58, 0.30, 0.87, 0.44),
    "bridge": (0.44, 0.30, 0.56, 0.46),
    "left cheek": (0.12, 0.52, 0.36, 0.68),
    "right cheek": (0.64, 0.52, 0.88, 0.68),
    "nose": (0.40, 0.50, 0.60, 0.62),
    "mouth": (0.30, 0.73, 0.70, 0.83),
    "chin": (0.35, 0.88, 0.65, 0.98),
}
BRIGHTER = {
    "left eye": ("forehead", "left cheek", "bridge", "nose"),
    "right eye": ("forehead", "right cheek", "bridge", "nose"),
    "mouth": ("left cheek", "right cheek", "chin", "nose"),
}
PAIRS = (("left eye", "right eye"), ("left cheek", "right cheek"))
SKIN = ("forehead", "left cheek", "right cheek", "nose")


def locate(frames: UInt8[Tensor, "t h w 3"], motion: Float[Tensor, "h w"]) -> Box | None:
    """The likeliest face of a clip from some of its frames and its mean change (levels a frame); None where nothing fits.

    Its confidence is the product of the four terms: the relations' mean, the share of skin, one chroma, movement.
    """
    image = F.interpolate(frames.permute(0, 3, 1, 2).float(), _size(*frames.shape[1:3]), mode="area")
    change = F.interpolate(motion[None, None].float(), image.shape[2:], mode="area")[0, 0]
    red, green, blue = image.double().unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    cb, cr = 128 + (blue - luma) * 0.564, 128 + (red - luma) * 0.713
    skin = ((cb > 77) & (cb < 127) & (cr > 133) & (cr < 173)).double()
    maps = [_integral(x) for x in (luma, cb, cr, skin, change.double()[None] / (change.double().mean() + 1e-3))]
    height, width = luma.shape[1:]
    best, side = None, float(NARROWEST)
    while side <= min(width, height / ASPECT):
        match = _match(maps, round(side), round(side * ASPECT), height, width)
        value, place = match.flatten().max(0)
        if best is None or value > best.confidence:
            top, left = divmod(int(place), match.shape[1])
            size = (round(side) / width, round(side * ASPECT) / height)
            best = Box(left / width, top / height, *size, float(value))
        side *= STEP
    return best if best is not None and best.confidence > 0 else None


def _size(height: int, width: int) -> tuple[int, int]:
    scale = min(1.0, max(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width)))
    return round(height * scale), round(width * scale)


def _integral(x: Tensor) -> Tensor:
    return F.pad(x.cumsum(-1).cumsum(-2), (1, 0, 1, 0))


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation over the first of a few rows (Tensor.std is many times slower there)."""
    return ((x - x.mean(0)).square().sum(0) / (len(x) - 1)).sqrt()


def _match(maps: list[Tensor], width: int, height: int, frame_height: int, frame_width: int) -> Tensor:
    """How well a box of `width` x `height` pixels fits at each place of its corner, [rows, columns]."""
    rows, columns = frame_height - height + 1, frame_width - width + 1

    def mean(integral: Tensor, left: float, top: float, right: float, bottom: float) -> Tensor:
        x0, y0 = round(left * width), round(top * height)
        x1, y1 = max(x0 + 1, round(right * width)), max(y0 + 1, round(bottom * height))
        corners = [integral[..., y : y + rows, x : x + columns] for y in (y0, y1) for x in (x0, x1)]
        return ((corners[3] - corners[2] - corners[1] + corners[0]) / ((x1 - x0) * (y1 - y0))).float()

    luma, cb, cr, skin, change = maps
    light = {name: mean(luma, *part) for name, part in PARTS.items()}

    def contrast(bright: str, dark: str) -> Tensor:
        return (light[bright] - light[dark]) / (light[bright] + light[dark] + FAINT)

    relations = torch.stack([contrast(bright, dark) for dark, others in BRIGHTER.items() for bright in others])
    like = (relations / CONTRAST).clamp(-1, 1).mean(0).mean(0).clamp_min(0)
    even = (1 - torch.stack([contrast(left, right).abs() for left, right in PAIRS]).sum(0).mean(0)).clamp(0, 1)
    spread = torch.stack([_deviation(torch.stack([mean(x, *PARTS[name]) for name in SKIN])) for x in (cb, cr)]).sum(0)
    coloured = (mean(skin, 0.15, 0.10, 0.85, 0.95) * torch.exp(-spread / CHROMA)).mean(0)
    moving = torch.stack([mean(change, *part)[0] for part in PARTS.values()]).amin(0)
    return like * even * coloured * moving / (1 + moving)
