"""Reading and writing media: sound as float32 samples, images and video as uint8 or float tensors, H.264 with AAC out."""

from teachers.media.crop import fit_image
from teachers.media.face import fit_portrait
from teachers.media.film import read_video
from teachers.media.picture import decode_image
from teachers.media.sound import AudioReader, read_audio
from teachers.media.streams import resample
from teachers.media.write import VideoWriter, check_output, write_video

__all__ = [
    "AudioReader",
    "VideoWriter",
    "check_output",
    "decode_image",
    "fit_image",
    "fit_portrait",
    "read_audio",
    "read_video",
    "resample",
    "write_video",
]
