"""Still images: files to tensors, through PyAV alone.

A person's mistake (a missing file, a text named .png) raises UserError in one line.
"""

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from teachers.errors import UserError
from teachers.media.container import opened, upright


def decode_image(path: Path) -> Tensor:
    """Image of `path` as uint8 [h, w, 3], upright (camera rotation applied), transparency laid on white.

    Raises UserError when the file is missing, empty, truncated, or no image.
    """
    with opened(path, "image file") as container:
        name = container.format.name
        if not container.streams.video or not (name.endswith("_pipe") or name in ("gif", "apng", "image2")):
            raise UserError(f"not an image (found {name}): {path}; give a png, jpeg, webp or bmp file")
        stream = container.streams.video[0]
        stream.codec_context.options = {"err_detect": "explode"}
        frame = next(container.decode(stream), None)
        if frame is None:
            raise UserError(f"image file holds no image: {path}; give a png, jpeg, webp or bmp file")
        pixels = upright(frame, "rgba").astype(np.uint16)
    data = Path(path).read_bytes()
    if data.startswith(b"\xff\xd8") and not _jpeg_is_whole(data):
        raise UserError(f"image file is cut short: {path}; export or download it again")
    alpha = pixels[..., 3:]
    flat = (pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return torch.from_numpy(flat.astype(np.uint8))


def _jpeg_is_whole(data: bytes) -> bool:
    """Whether an end marker follows the first scan (the decoder accepts files that lack a few of their last lines)."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:
            return data.find(b"\xff\xd9", position) >= 0
        position += 1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def fit_image(pixels: Tensor, size: tuple[int, int], anchor: float = 0.5) -> Tensor:
    """`pixels` uint8 [h, w, 3] to [3, H, W] in [-1, 1]: scaled by max(H/h, W/w) (antialiased bicubic), then cropped.

    The crop is centred across; down the image `anchor` is 0 for its top, 0.5 for its centre, 1 for its bottom.
    """
    height, width = pixels.shape[:2]
    ratio = max(Fraction(size[0], height), Fraction(size[1], width))
    scaled = (max(size[0], round(height * ratio)), max(size[1], round(width * ratio)))
    image = pixels.permute(2, 0, 1)[None].float()
    if scaled != (height, width):
        image = F.interpolate(image, scaled, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
    top, left = int((scaled[0] - size[0]) * anchor), (scaled[1] - size[1]) // 2
    return image[0, :, top : top + size[0], left : left + size[1]].contiguous() / 127.5 - 1
