"""An avatar that is given speech: every sample comes out with its frame, sentences end in order, an interrupt leaves nothing."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager

import numpy as np
import pytest

from distill.live.doors.stream import AvatarStream, Beat
from distill.live.scheduler import Engine
from distill.live.talkers import Echo
from teachers.errors import UserError
from tests.support import tiny
from tests.support.live.lag import Lag, run_in_time
from tests.support.live.serving import a_puppet

FPS = 12.5


def tone(seconds: float, rate: int, hertz: float = 400) -> np.ndarray:
    """int16 [n]; no two cycles of it are alike, so that a sample that is missing or twice there is seen."""
    time_ = np.arange(round(seconds * rate)) / rate
    return (12000 * np.sin(2 * np.pi * (hertz * time_ + 30 * time_**2))).astype(np.int16)


@asynccontextmanager
async def a_stream(rate: int = 24_000, viewers: int = 2, **options):
    engine = Engine(a_puppet(), Echo(), viewers)
    engine.start()
    stream = await AvatarStream.open(engine, tiny.a_portrait(), "a person nods", 7, rate, **options)
    stream.lag = Lag()
    try:
        yield stream
    finally:
        await stream.close()
        assert engine.viewers == []
        await asyncio.to_thread(engine.stop)


async def beats(stream: AvatarStream, seconds: float) -> list[tuple[float, Beat]]:
    """What comes out in so long, each with its time."""
    got, end = [], time.monotonic() + seconds
    async for beat in stream:
        got.append((time.monotonic(), beat))
        if time.monotonic() >= end:
            return got
    return got


@contextmanager
def at_once(stream: AvatarStream) -> Iterator[None]:
    """The engine draws nothing between what is pushed inside: speech that stalls is played with a gap."""
    gate = threading.Event()
    stream.engine.call(gate.wait)
    try:
        yield
    finally:
        gate.set()


def mouth_open(beat: Beat) -> bool:
    return beat.picture[11, 8, 0] > 60


@pytest.mark.parametrize(("source", "rate"), [(24_000, 24_000), (16_000, 48_000), (22_050, 22_050)])
def test_every_sample_comes_out_with_its_frame_in_real_time(source, rate):
    async def run():
        async with a_stream(rate) as stream:
            await beats(stream, 0.3)
            said = tone(1.1, source)
            with at_once(stream):
                for i, piece in enumerate(np.array_split(said, 9)):  # every other one in stereo, which is mixed
                    stream.push(np.stack([piece + 100, piece - 100], 1) if i % 2 else piece, source)
                stream.end()
            return said, await beats(stream, 1.9), stream.lag

    said, got, lag = run_in_time(run())
    loud = [i for i, (_, beat) in enumerate(got) if len(beat.sound)]
    assert loud == list(range(loud[0], loud[-1] + 1))
    heard = np.concatenate([beat.sound for _, beat in got])
    assert abs(len(heard) - len(said) * rate / source) <= 1
    if source == rate:
        assert np.array_equal(heard, said)
    assert [mouth_open(beat) for _, beat in got[2:]] == [len(beat.sound) > 0 for _, beat in got[2:]]
    assert sum(beat.ended for _, beat in got) == 1
    assert got[loud[-1] + 1][1].ended == 1
    lag.skip_if_busy()
    times = np.array([at for at, _ in got])
    assert times[-1] - times[0] == pytest.approx((len(got) - 1) / FPS, abs=0.1)
    assert np.allclose(np.diff(times[loud[1:]]), 1 / FPS, atol=0.04)


def test_speech_is_heard_with_the_next_frame_once_it_is_drawn():
    """What is handed out is known when the chunk arrives, so no frame is waited for that the guess before had given away."""

    async def run():
        async with a_stream() as stream:
            waits = []
            for i in range(5):
                await beats(stream, 0.9 + 0.03 * i)
                with at_once(stream):
                    stream.push(tone(0.4, 24_000), 24_000)
                    stream.end()
                got = await beats(stream, 0.9)
                waits.append(next(i for i, (_, beat) in enumerate(got) if len(beat.sound)))
            return waits, stream.lag

    waits, lag = run_in_time(run())
    lag.skip_if_busy()
    assert sum(waits) <= 6, f"{waits} frames without sound after the speech came"


def test_sentences_follow_each_other_and_end_in_order():
    async def run():
        async with a_stream() as stream:
            await beats(stream, 0.3)
            sentences = [tone(0.5, 24_000), tone(0.74, 24_000, 300), tone(0.31, 24_000, 200)]
            with at_once(stream):
                for sentence in sentences[:2]:
                    stream.push(sentence, 24_000)
                    stream.end()
                    stream.end()  # of nothing
            assert stream.speaking
            got = await beats(stream, 1.1)  # the second is being shown to its end
            with at_once(stream):
                stream.push(sentences[2], 24_000)
                stream.end()
            got += await beats(stream, 1.6)
            assert not stream.speaking
            return sentences, got

    sentences, got = run_in_time(run())
    assert np.array_equal(np.concatenate([beat.sound for _, beat in got]), np.concatenate(sentences))
    assert sum(beat.ended for _, beat in got) == 3
    assert [mouth_open(beat) for _, beat in got[2:]] == [len(beat.sound) > 0 for _, beat in got[2:]]


def test_after_an_interrupt_nothing_of_the_old_sentence_is_heard_or_seen():
    async def run():
        async with a_stream() as stream:
            await beats(stream, 0.3)
            stream.push(tone(20.0, 24_000), 24_000)
            before = await beats(stream, 1.0)
            cut = stream.interrupt()
            stream.end()  # of what was dropped
            at = time.monotonic()
            assert not stream.speaking
            quiet = await beats(stream, 1.0)
            assert cut.done()
            new = tone(0.4, 24_000, 300)
            with at_once(stream):
                stream.push(new, 24_000)
                stream.end()
            return before, at, quiet, new, await beats(stream, 1.2), stream.lag

    before, at, quiet, new, after, lag = run_in_time(run())
    assert len(before[-1][1].sound)
    assert not any(len(beat.sound) or beat.ended for _, beat in quiet)
    assert not any(mouth_open(beat) for _, beat in quiet[1:])  # the window of the first one's features reaches back
    assert np.array_equal(np.concatenate([beat.sound for _, beat in after]), new)
    assert sum(beat.ended for _, beat in after) == 1
    lag.skip_if_busy()
    assert quiet[0][0] - at < 0.2  # the picture goes on once a chunk is drawn
    assert len(quiet) >= 11, "the picture stood still"


def test_interrupted_again_and_again_it_says_the_last_sentence_alone():
    async def run():
        async with a_stream() as stream:
            for i in range(12):
                stream.push(tone(3.0, 24_000), 24_000)
                await asyncio.sleep(0.017 * i)
                stream.interrupt()
            last = tone(0.5, 24_000, 300)
            with at_once(stream):
                stream.push(last, 24_000)
                stream.end()
            return last, await beats(stream, 1.5)

    last, got = run_in_time(run())
    played = np.concatenate([beat.sound for _, beat in got])
    assert np.array_equal(played, last)


def test_speech_that_stalls_leaves_silence_in_the_picture_too_and_goes_on():
    async def run():
        async with a_stream() as stream:
            await beats(stream, 0.3)
            said = tone(1.2, 24_000)
            stream.push(said[:14_400], 24_000)
            got = await beats(stream, 1.6)
            stream.push(said[14_400:], 24_000)
            stream.end()
            return said, got + await beats(stream, 1.6)

    said, got = run_in_time(run())
    heard = np.concatenate([beat.sound for _, beat in got])
    assert np.array_equal(heard[heard != 0], said[said != 0])
    open_ = [mouth_open(beat) for _, beat in got[2:]]
    assert open_ == [bool(np.abs(beat.sound.astype(int)).max(initial=0) > 1000) for _, beat in got[2:]]


def test_one_too_many_and_what_the_engine_refuses_is_said_in_one_line():
    async def run():
        async with a_stream(viewers=1) as stream:
            with pytest.raises(UserError, match=r"maximum number of viewers reached \(1\)"):
                await AvatarStream.open(stream.engine, tiny.a_portrait(), "x")
            stream.push(np.zeros(2000 * 16_000, np.int16), 16_000)
            with pytest.raises(UserError, match="more than 1800 s of speech"):
                await beats(stream, 2.0)

    run_in_time(run())
