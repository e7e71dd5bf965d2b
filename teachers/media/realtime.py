"""VP8 frame by frame, as a live viewer gets it: nothing is looked ahead, and each frame is a packet."""

from fractions import Fraction

import av
from av.video.codeccontext import VideoCodecContext
from jaxtyping import UInt8
from torch import Tensor

QUALITY = 16  # libvpx's crf, 4 to 63, the lower the better
BITS = 0.4  # a pixel, at most, in the mean
KEY_EVERY = 10_000  # frames


class Vp8Encoder:
    """One viewer's stream of frames `size` = (H, W). A decoder must get every packet, in order, also of frames that it does not
    show."""

    def __init__(self, size: tuple[int, int], fps: Fraction):
        codec = av.CodecContext.create("libvpx", "w")
        assert isinstance(codec, VideoCodecContext)
        codec.height, codec.width, codec.pix_fmt = *size, "yuv420p"
        codec.time_base, codec.framerate, codec.gop_size, codec.thread_count = 1 / fps, fps, KEY_EVERY, 1
        codec.bit_rate = round(BITS * size[0] * size[1] * fps)
        codec.options = {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "crf": str(QUALITY)}
        self._codec, self._count = codec, 0

    def encode(self, frame: UInt8[Tensor, "h w 3"]) -> bytes:
        """The packet of the next frame."""
        image = av.VideoFrame.from_ndarray(frame.contiguous().numpy(), format="rgb24")
        image.pts = self._count
        self._count += 1
        return b"".join(bytes(packet) for packet in self._codec.encode(image))
