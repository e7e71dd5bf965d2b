"""Files that a page sends, decoded: pictures and sound. Runs in a process of its own (`distill.live.apart`) and imports little."""

import torch
from torch import Tensor

from teachers import media
from teachers.errors import UserError
from teachers.media.container import Content
from teachers.media.sound import SAMPLE_RATE, SILENT

MAX_FILE_SECONDS = 120
SOUNDS = "wav,w64,aiff,flac,ogg,mp3,aac,mov,matroska"
"""FFmpeg's names of the containers that are opened: none of them refers to other files."""


def decode_picture(data: bytes, size: tuple[int, int], crop: str = "face") -> tuple[Tensor, str]:
    """A picture file as [3, H, W] in [-1, 1], and a note where no face decided the crop (`media.fit_portrait`). UserError for
    anything else, and for one that is too large, which is known before a pixel is decoded."""
    return media.fit_portrait(media.decode_image(data), size, crop)


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
        raise UserError(f"sound file is silent: audio track {reader.track}; send one with a voice")
    return media.resample(torch.cat(parts), reader.rate, SAMPLE_RATE)
