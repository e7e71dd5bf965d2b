"""A Pipecat output transport that plays in real time and says when: what a user would hear and see."""

import asyncio
import time
from collections.abc import Callable

import numpy as np
from pipecat.frames.frames import OutputAudioRawFrame, OutputImageRawFrame, StartFrame
from pipecat.transports.base_output import BaseOutputTransport
from pipecat.transports.base_transport import TransportParams

BUFFER = 0.04  # seconds that it may get a block late without a gap


class Screen(BaseOutputTransport):
    """`hear` gets the time at which a block of sound int16 [n] begins to play, `see` that at which an image uint8 [H, W, 3] is
    drawn; an image is drawn again and again until the next one comes. `size` is (H, W)."""

    def __init__(
        self,
        size: tuple[int, int],
        hear: Callable[[float, np.ndarray], None],
        see: Callable[[float, np.ndarray], None],
    ):
        height, width = size
        params = TransportParams(
            audio_out_enabled=True, video_out_enabled=True, video_out_width=width, video_out_height=height
        )
        super().__init__(params)
        self.hear, self.see, self.free = hear, see, 0.0

    async def start(self, frame: StartFrame) -> None:
        await super().start(frame)
        await self.set_transport_ready(frame)

    async def write_audio_frame(self, frame: OutputAudioRawFrame) -> bool:
        if time.monotonic() - self.free > BUFFER:
            self.free = time.monotonic()
        self.hear(self.free, np.frombuffer(frame.audio, np.int16))
        self.free += frame.num_frames / frame.sample_rate
        await asyncio.sleep(self.free - time.monotonic())
        return True

    async def write_video_frame(self, frame: OutputImageRawFrame) -> bool:
        width, height = frame.size
        self.see(time.monotonic(), np.frombuffer(frame.image, np.uint8).reshape(height, width, 3))
        return True
