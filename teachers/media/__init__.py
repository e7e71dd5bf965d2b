"""Reading and writing media: sound as float32 samples, images and video as uint8 or float tensors, H.264 with AAC out."""

from teachers.media.read import (
    AudioReader,
    decode_audio,
    decode_image,
    fit_image,
    read_audio,
    read_video,
)
from teachers.media.streams import resample
from teachers.media.write import VideoWriter, check_output, write_video

__all__ = [
    "AudioReader",
    "VideoWriter",
    "check_output",
    "decode_audio",
    "decode_image",
    "fit_image",
    "read_audio",
    "read_video",
    "resample",
    "write_video",
]
