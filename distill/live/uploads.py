"""Files that a page sends, decoded: pictures and sound. Runs in a process of its own (`distill.live.apart`) and imports little."""

import io

import numpy as np
import torch
from torch import Tensor

from teachers import media
from teachers.errors import UserError
from teachers.media.container import Content
from teachers.media.sound import SAMPLE_RATE, SILENT

MAX_PIXELS = 16_000_000
MAX_FILE_SECONDS = 120
PICTURES = ("PNG", "JPEG", "WEBP", "BMP")
SOUNDS = "wav,w64,aiff,flac,ogg,mp3,aac,mov,matroska"
"""FFmpeg's names of the containers that are opened: none of them refers to other files."""


def decode_picture(data: bytes, size: tuple[int, int]) -> Tensor:
    """A picture file as [3, H, W] in [-1, 1]; its size is checked before a pixel is decoded. UserError for anything else."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=PICTURES) as image:
            if image.width * image.height > MAX_PIXELS:
                allowed = f"{MAX_PIXELS // 10**6} megapixels are allowed"
                raise UserError(f"picture of {image.width} x {image.height}; {allowed}")
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except UserError:
        raise
    except Exception as error:  # PIL raises what it likes on a hostile file
        raise UserError("picture cannot be read; give a whole png, jpeg, webp or bmp file") from error
    white = Image.new("RGBA", upright.size, "white")
    pixels = np.array(Image.alpha_composite(white, upright).convert("RGB"))
    return media.fit_image(torch.from_numpy(pixels), size, anchor=0.0)


def decode_file(data: bytes) -> Tensor:
    """A sound file, or a video with sound, as mono [S] at 16 kHz; UserError for what is no common sound file or is too long."""
    parts, count = [], 0
    reader = media.AudioReader(Content(data, "the file that was sent"), formats=SOUNDS)
    for part in reader:
        parts.append(part)
        count += len(part)
        if count > MAX_FILE_SECONDS * reader.rate:
            raise UserError(f"sound file is longer than {MAX_FILE_SECONDS} s; cut it")
    if reader.peak < SILENT:
        raise UserError(f"sound file has nothing to hear in its audio track {reader.track}; send one with a voice")
    return media.resample(torch.cat(parts), reader.rate, SAMPLE_RATE)
