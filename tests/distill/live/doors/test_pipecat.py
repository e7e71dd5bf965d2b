"""The Pipecat service in Pipecat's own test pipeline, and before one of its output transports."""

import asyncio
import time
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("pipecat.frames", reason="the Pipecat service: pip install 'avatar-distill[pipecat]'")

from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    EndFrame,
    InterruptionFrame,
    OutputAudioRawFrame,
    OutputImageRawFrame,
    TextFrame,
    TTSAudioRawFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.tests.utils import SleepFrame, run_test
from pipecat.workers.runner import WorkerRunner

from benchmarks.serving.pipecat_screen import Screen
from distill.live.doors.pipecat_service import AvatarVideoService
from distill.live.scheduler import Engine
from distill.live.talkers import Echo
from tests.distill.live.doors.test_stream import tone
from tests.support import tiny
from tests.support.live.lag import run_in_time
from tests.support.live.serving import a_puppet
from tests.support.live.watched import Watched

RATE, FPS = 24_000, 12.5


@contextmanager
def a_service(viewers: int = 1):
    engine = Engine(a_puppet(), Echo(), viewers)
    engine.start()
    try:
        yield AvatarVideoService(engine, tiny.a_portrait(), "a person nods", 7)
        assert engine.viewers == []
    finally:
        engine.stop()


def speech(sound: np.ndarray, context: str = "one") -> list:
    """A sentence as a TTS service sends it."""
    pieces = np.array_split(sound, max(1, len(sound) // 2400))
    audio = [TTSAudioRawFrame(piece.tobytes(), RATE, 1, context_id=context) for piece in pieces]
    return [TTSStartedFrame(context_id=context), *audio, TTSStoppedFrame(context_id=context)]


def heard(frames: list) -> np.ndarray:
    return np.concatenate(
        [np.zeros(0, np.int16)]
        + [np.frombuffer(frame.audio, np.int16) for frame in frames if isinstance(frame, TTSAudioRawFrame)]
    )


def mouth_open(frame: OutputImageRawFrame) -> bool:
    width, height = frame.size
    return np.frombuffer(frame.image, np.uint8).reshape(height, width, 3)[11, 8, 0] > 60


def test_speech_comes_out_in_order_with_an_image_before_each_piece_and_ends_before_the_end():
    said = [tone(1.13, RATE), tone(0.7, RATE, 300)]
    sent = [SleepFrame(0.3), *speech(said[0]), TextFrame("passes"), *speech(said[1], "two"), TTSStoppedFrame("none")]
    with a_service() as service:
        began = time.monotonic()
        down, _ = run_in_time(run_test(service, frames_to_send=sent))
        took = time.monotonic() - began
    assert np.array_equal(heard(down), np.concatenate(said))
    assert took > 0.3 + 1.83
    media = [frame for frame in down if isinstance(frame, OutputAudioRawFrame | OutputImageRawFrame)]
    for i, frame in enumerate(media):
        if isinstance(frame, OutputAudioRawFrame):
            assert isinstance(media[i - 1], OutputImageRawFrame)
            assert media[i - 1].sync_with_audio
    images = [i for i, frame in enumerate(media) if isinstance(frame, OutputImageRawFrame)]
    with_sound = [isinstance(media[i + 1], OutputAudioRawFrame) for i in images[:-1]]
    assert [bool(mouth_open(media[i])) for i in images[:-1]] == with_sound
    stops = [i for i, frame in enumerate(down) if isinstance(frame, TTSStoppedFrame)]
    assert [down[i].context_id for i in stops] == ["one", "two", "none"]
    assert abs(len(heard(down[: stops[0]])) - len(said[0])) <= RATE / FPS
    assert len(heard(down[stops[1] :])) == 0
    assert any(isinstance(frame, TextFrame) for frame in down[: stops[0]])
    contexts = [frame.context_id for frame in media if isinstance(frame, TTSAudioRawFrame)]
    assert contexts == sorted(contexts)
    assert set(contexts) == {"one", "two"}


def test_after_an_interruption_nothing_of_the_old_sentence_goes_on():
    new = tone(0.5, RATE, 300)
    sent = [
        *speech(tone(20.0, RATE)),
        SleepFrame(1.2),
        InterruptionFrame(),
        TTSStoppedFrame("late"),
        SleepFrame(0.8),
        *speech(new, "new"),
    ]
    with a_service() as service:
        down, _ = run_in_time(run_test(service, frames_to_send=sent))
    cut = next(i for i, frame in enumerate(down) if isinstance(frame, InterruptionFrame))
    assert RATE * 0.5 < len(heard(down[:cut])) < RATE * 1.3
    assert np.array_equal(heard(down[cut:]), new)
    assert [frame.context_id for frame in down if isinstance(frame, TTSStoppedFrame)] == ["late", "new"]
    begin = next(i for i in range(cut, len(down)) if isinstance(down[i], TTSAudioRawFrame))
    quiet = [frame for frame in down[cut : begin - 1] if isinstance(frame, OutputImageRawFrame)]
    assert len(quiet) >= 8, "the picture stood still"
    assert not any(mouth_open(frame) for frame in quiet[1:])


async def through_a_transport(service: AvatarVideoService, sent: list) -> tuple[Watched, dict]:
    """What the transport plays of the frames, and when frames of each type were sent, and came out behind it ("out", type)."""
    screen, times = Watched(), {}
    transport = Screen((16, 16), screen.hear, screen.see)
    worker = PipelineWorker(Pipeline([service, transport]), cancel_on_idle_timeout=False, params=PipelineParams())
    started = asyncio.Event()
    worker.set_reached_downstream_filter((BotStartedSpeakingFrame, BotStoppedSpeakingFrame, InterruptionFrame))

    @worker.event_handler("on_pipeline_started")
    async def _begin(*_) -> None:
        started.set()

    @worker.event_handler("on_frame_reached_downstream")
    async def _note(_, frame) -> None:
        times.setdefault(("out", type(frame)), time.monotonic())

    async def push() -> None:
        await started.wait()
        for frame in sent:
            if isinstance(frame, SleepFrame):
                await asyncio.sleep(frame.sleep)
            else:
                times[type(frame)] = time.monotonic()
                await worker.queue_frame(frame)

    runner = WorkerRunner()
    await runner.add_workers(worker)
    await asyncio.gather(runner.run(), push())
    return screen, times


def test_a_transport_plays_image_and_sound_together_without_a_gap():
    said = tone(2.11, RATE)
    with a_service() as service:
        sent = [SleepFrame(0.5), *speech(said), SleepFrame(3.0), EndFrame()]
        screen, times = run_in_time(through_a_transport(service, sent))
    loud = [(at, block) for at, block in screen.sound if np.abs(block.astype(int)).max() > 1000]
    assert np.array_equal(np.concatenate([block for _, block in screen.sound])[: len(said)], said)
    screen.lag.skip_if_busy()
    gaps = [b - a - len(block) / RATE for (a, block), (b, _) in pairwise(loud[:-1])]
    assert max(gaps) < 0.005, gaps
    opened, closed = screen.turned()[:2, 0]
    assert abs(opened - loud[0][0]) <= 1 / FPS
    assert abs(closed - (loud[0][0] + len(said) / RATE)) <= 2 / FPS  # its last frame is not full of sound
    assert loud[0][0] - times[TTSStartedFrame] < 0.5
    assert abs(times["out", BotStoppedSpeakingFrame] - (loud[0][0] + len(said) / RATE)) < 0.3


def test_an_interruption_is_heard_within_150_ms():
    with a_service() as service:
        sent = [*speech(tone(20.0, RATE)), SleepFrame(1.5), InterruptionFrame(), SleepFrame(1.0), EndFrame()]
        screen, times = run_in_time(through_a_transport(service, sent))
    at, block = [(at, block) for at, block in screen.sound if np.abs(block.astype(int)).max() > 1000][-1]
    assert 0 < len(screen.sound) * 0.04 < 2.0
    screen.lag.skip_if_busy()
    assert at + len(block) / RATE - times[InterruptionFrame] < 0.15


def test_no_room_for_it_is_an_error_in_the_pipeline():
    with a_service() as service:
        service._engine.fixed = 0
        _, up = run_in_time(run_test(service, frames_to_send=[TextFrame("x")]))
    assert any("maximum number of viewers reached (0)" in str(frame) for frame in up)
