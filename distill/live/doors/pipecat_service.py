"""A Pipecat video service: TTS audio in, the avatar's frames with that audio out.

Put it between the TTS service and the output transport, which needs `video_out_enabled` and the student's size.
"""

# pyright: reportMissingImports=false
import asyncio
from collections import deque
from typing import Any

import numpy as np
from torch import Tensor

from distill.live.doors.stream import AvatarStream, Beat
from distill.live.scheduler import Engine
from teachers.errors import UserError

try:
    from pipecat.frames.frames import (
        CancelFrame,
        EndFrame,
        Frame,
        InterruptionFrame,
        OutputImageRawFrame,
        StartFrame,
        TTSAudioRawFrame,
        TTSStoppedFrame,
    )
    from pipecat.processors.frame_processor import FrameDirection, FrameProcessorSetup
    from pipecat.services.ai_service import AIService
    from pipecat.services.settings import ServiceSettings
except ImportError as error:
    raise UserError(f"the Pipecat service needs pipecat-ai ({error}): pip install 'avatar-distill[pipecat]'") from error


class AvatarVideoService(AIService):
    """One avatar in a pipeline; pipelines of one process may share a started `Engine`.

    reference [3, H, W] in [-1, 1] (None for a student that draws from text alone), `text` and `seed` as for a Session. TTS audio is
    held until its frame is due; a TTSStoppedFrame and the EndFrame until what came before was shown; an InterruptionFrame drops
    what is held. Images come all the time, with speech a frame ahead of their time, so that a transport never runs dry.
    """

    def __init__(
        self, engine: Engine, reference: Tensor | None, text: str = "a person talks", seed: int = 0, **options: Any
    ):
        super().__init__(settings=ServiceSettings(model=None), **options)
        self._engine, self._given = engine, (reference, text, seed)
        self._rate = 24_000
        self._stream: AvatarStream | None = None
        self._emitting: asyncio.Task | None = None
        # for each sentence that is held to its end, what follows it
        self._stops: deque[list[TTSStoppedFrame]] = deque()
        self._context: str | None = None
        self._passing = asyncio.Lock()  # a beat goes out whole, or not at all
        self._said = asyncio.Event()

    async def setup(self, setup: FrameProcessorSetup) -> None:
        """The rate of the sound that comes out is that of the pipeline."""
        await super().setup(setup)
        self._rate = setup.audio_out_sample_rate or self._rate

    async def start(self, frame: StartFrame) -> None:
        """Begin the stream."""
        await super().start(frame)
        try:
            self._stream = await AvatarStream.open(self._engine, *self._given, rate=self._rate, ahead=1.0)
        except UserError as error:
            await self.push_error(str(error), exception=error)
            return
        self._emitting = self.create_task(self._emit(self._stream))

    async def stop(self, frame: EndFrame) -> None:
        """Show all that was said, then end."""
        await super().stop(frame)
        if self._stream is not None:
            self._stream.end()
        while self._stream is not None and self._stream.speaking and self._stream.fault is None:
            self._said.clear()
            await self._said.wait()
        await self._close()

    async def cancel(self, frame: CancelFrame) -> None:
        """End now."""
        await super().cancel(frame)
        await self._close()

    async def cleanup(self) -> None:
        """End, where nothing else did."""
        await super().cleanup()
        await self._close()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Take speech; pass everything else on, in the order in which it is played."""
        if isinstance(frame, StartFrame):
            await self.push_frame(frame, direction)  # images must not come before it
            await super().process_frame(frame, direction)
            return
        await super().process_frame(frame, direction)
        if self._stream is None:
            await self.push_frame(frame, direction)
        elif isinstance(frame, InterruptionFrame):
            self._stream.interrupt()
            self._stops.clear()
            async with self._passing:
                await self.push_frame(frame, direction)
            self._said.set()
        elif direction == FrameDirection.UPSTREAM:
            await self.push_frame(frame, direction)
        elif isinstance(frame, TTSAudioRawFrame):
            self._context = frame.context_id
            samples = np.frombuffer(frame.audio, np.int16).reshape(-1, frame.num_channels)
            self._stream.push(samples, frame.sample_rate)
        elif isinstance(frame, TTSStoppedFrame) and self._stream.voice.open:
            self._stops.append([frame])
            self._stream.end()
        elif isinstance(frame, TTSStoppedFrame) and self._stops:  # without sound: behind the one before
            self._stops[-1].append(frame)
        else:
            await self.push_frame(frame, direction)

    async def _emit(self, stream: AvatarStream) -> None:
        try:
            async for beat in stream:
                cuts = stream.cuts
                async with self._passing:
                    if cuts == stream.cuts:
                        await self._pass(beat)
                self._said.set()
        except UserError as error:
            await self.push_error(str(error), exception=error)
            self._said.set()

    async def _pass(self, beat: Beat) -> None:
        for _ in range(beat.ended):
            for frame in self._stops.popleft() if self._stops else ():
                await self.push_frame(frame)
        height, width, _ = beat.picture.shape
        image = OutputImageRawFrame(beat.picture.tobytes(), (width, height), "RGB")
        image.sync_with_audio = True
        await self.push_frame(image)
        if len(beat.sound):
            context = self._stops[0][0].context_id if self._stops else self._context
            await self.push_frame(TTSAudioRawFrame(beat.sound.tobytes(), self._rate, 1, context_id=context))

    async def _close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.close()
        task, self._emitting = self._emitting, None
        if task is not None:
            await self.cancel_task(task)
