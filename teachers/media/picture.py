"""Still pictures to upright RGB pixels, through Pillow: the one reader of `sample`, `AvatarPipeline` and `serve`.

Shape and area are checked in the header, before a pixel is decoded; a large picture is reduced while it is read. Side chunks
(colour profiles, texts, EXIF) that are damaged are passed over: only the pixels must be whole.
"""

import io
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from teachers.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
HINT = "give a whole png, jpeg, webp, bmp, gif, tiff or avif file"
MAX_BYTES = 2**28
MAX_PIXELS = 50_000_000
MAX_PIXELS_OF = {"WEBP": 25_000_000, "AVIF": 25_000_000}  # their decoders hold several copies
MAX_RATIO = 10  # of the longer side to the shorter
KEPT_PIXELS = 9_000_000  # a larger picture is reduced by the least whole factor
BAND_PIXELS = 2**21
ORIENTATION = 0x0112  # EXIF tag
TURNS = {  # the transformation that sets a picture of this EXIF orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_MARK = b"\x89PNG\r\n\x1a\n"
PNG_NEEDED = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
PNG_USED = (*PNG_NEEDED, b"tRNS", b"eXIf")
PNG_FEW_GREYS = (b"\2\0", b"\4\0")  # depth and colour type in IHDR

warnings.filterwarnings("ignore", module=r"PIL\.")  # of damage that costs no pixel; what matters is refused in words


def check_size(height: int, width: int, where: str, most: int = MAX_PIXELS) -> None:
    """UserError for a picture or a frame that is too thin or has more than `most` pixels."""
    size = f"{width} x {height} pixels: {where}"
    if min(height, width) < 1 or max(height, width) > MAX_RATIO * min(height, width):
        raise UserError(f"{size}; its sides may differ {MAX_RATIO} to 1 at most, crop it to the person")
    if height * width > most:
        raise UserError(f"{size}; {most // 10**6} megapixels are allowed, make it smaller")


def decode_image(source: Path | bytes | Image.Image) -> UInt8[Tensor, "h w 3"]:
    """A picture as uint8 [h, w, 3]: a file, the content of one, or a PIL image; the first one of an animation.

    It is upright (all eight orientations of EXIF), transparency is laid on white, 16-bit grey keeps its levels, and above 9
    megapixels it is reduced. UserError when it is missing, empty, cut short, no picture, too thin or too large (`check_size`).
    """
    if isinstance(source, Image.Image):
        return _decoded(lambda: source, "the image")
    where = "the picture" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else _read(Path(source))
    whole = _png_core(data, where) if data.startswith(PNG_MARK) else data
    pixels = _decoded(lambda: Image.open(io.BytesIO(whole), formats=FORMATS), where)
    if data.startswith(b"\xff\xd8") and not _jpeg_is_whole(data):
        raise UserError(f"image file is cut short: {where}; export or download it again")
    return pixels


def _decoded(opened: Callable[[], Image.Image], where: str) -> Tensor:
    """The pixels of what `opened` gives; one UserError for whatever Pillow raises."""
    try:
        image = opened()
        check_size(image.height, image.width, where, MAX_PIXELS_OF.get(image.format or "", MAX_PIXELS))
        _reduce_jpeg(image)
        image.load()
        return _pixels(image, where)
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError(f"image cannot be read (no known kind): {where}; {HINT}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"picture of more than {MAX_PIXELS // 10**6} megapixels: {where}; make it smaller") from error
    except Exception as error:  # Pillow raises what it likes on a hostile file
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(f"image file cannot be read ({reason}): {where}; {HINT}") from error


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise UserError(f"image file {'is not a file' if path.exists() else 'not found'}: {path}; check the path")
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"image file is empty (0 bytes): {path}; export or download it again")
        if size > MAX_BYTES:
            raise UserError(f"image file of {size / 2**20:.0f} MiB: {path}; {MAX_BYTES // 2**20} are allowed")
        return path.read_bytes()
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"image file cannot be read ({reason}): {path}; check the path") from error


def _png_core(data: bytes, where: str) -> bytes:
    """The chunks of a PNG that its pixels need, and of the others those that are used and whole. UserError where one of the former
    is damaged, or the end is missing."""
    kept, place, kind = [PNG_MARK], len(PNG_MARK), b""
    while place + 12 <= len(data) and kind != b"IEND":
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        end = place + 12 + length
        whole = end <= len(data) and zlib.crc32(data[place + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
        if kind in PNG_NEEDED and not whole:
            break
        if kind in PNG_USED and whole:
            grey = kind == b"tRNS" and kept[1][16:18]
            kept.append(_scaled(data[place:end], grey[0]) if grey in PNG_FEW_GREYS else data[place:end])
        place = end
    else:
        if kind == b"IEND":
            return b"".join(kept)
    raise UserError(f"image file is damaged or cut short: {where}; export or download it again")


def _scaled(chunk: bytes, depth: int) -> bytes:
    """The transparent level of a grey PNG of 2 or 4 bits as one of 8 bits, which Pillow compares it with."""
    body = b"tRNS" + (int.from_bytes(chunk[8:10], "big") * 255 // (2**depth - 1) % 2**16).to_bytes(2, "big")
    return (2).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def _jpeg_is_whole(data: bytes) -> bool:
    """Whether an end marker follows the first scan (the decoder accepts files that lack a few of their last lines)."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:
            return data.find(b"\xff\xd9", position) >= 0
        position += 1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def _factor(image: Image.Image) -> int:
    """The least whole factor by which a picture is reduced to `KEPT_PIXELS`."""
    factor = 1
    while image.width * image.height > KEPT_PIXELS * factor**2:
        factor += 1
    return factor


def _reduce_jpeg(image: Image.Image) -> None:
    """Have a large JPEG decoded at 1/2, 1/4 or 1/8 of its size, no smaller than wanted; other kinds are left as they are."""
    factor = _factor(image)
    if factor > 1 and image.format in ("JPEG", "MPO"):
        image.draft(image.mode, (image.width // factor, image.height // factor))


def _pixels(image: Image.Image, where: str) -> Tensor:
    """Upright RGB uint8 [h, w, 3] of a loaded picture of any mode; only a band of it is held twice."""
    if image.mode in ("I", "F"):
        raise UserError(f"pixels of 32 bits each: {where}; save the picture with 8 or 16 bits a channel")
    factor = _factor(image)
    step = factor * max(1, BAND_PIXELS // (factor * image.width))
    bands = (image.crop((0, y, image.width, min(y + step, image.height))) for y in range(0, image.height, step))
    whole = Image.fromarray(np.concatenate([_flat(band, factor) for band in bands]))
    if (orientation := _orientation(image)) in TURNS:
        whole = whole.transpose(TURNS[orientation])
    return torch.from_numpy(np.array(whole))


def _flat(image: Image.Image, factor: int) -> np.ndarray:
    """RGB uint8 [h, w, 3] of a band, reduced, laid on white."""
    if image.mode.startswith("I;16"):
        levels, hidden = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray((levels.astype(np.float32) / 257).round().astype(np.uint8))  # 65535 is 255
        if isinstance(hidden, int):
            image.putalpha(Image.fromarray(np.where(levels == hidden, 0, 255).astype(np.uint8)))
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB").reduce(factor))
    pixels = np.asarray(image.convert("RGBA").convert("RGBa").reduce(factor))  # colours times alpha
    return pixels[..., :3] + (255 - pixels[..., 3:])


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF
        return 1
