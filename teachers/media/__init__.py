"""Reading and writing media: sound as float32 samples, images and video as uint8 or float tensors, H.264 with AAC out."""

from teachers.media.film import read_video
from teachers.media.read import decode_image, fit_image
from teachers.media.sound import AudioReader, decode_audio, read_audio
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
