"""The LiveKit door with livekit-agents' own classes on both sides of a room without a server."""

import asyncio
import time
from contextlib import asynccontextmanager

import numpy as np
import pytest

pytest.importorskip("livekit.agents", reason="the LiveKit door: pip install 'avatar-distill[livekit]'")

from livekit import rtc
from livekit.agents.voice.avatar import DataStreamAudioOutput

from distill.live.doors import livekit as door
from distill.live.scheduler import Engine
from distill.live.talkers import Echo
from tests.distill.live.doors.test_stream import tone
from tests.support import tiny
from tests.support.livekit_room import Room, Tape, a_room
from tests.support.serving import a_puppet

RATE, FRAME = 24_000, 0.08


@asynccontextmanager
async def a_call(engine: Engine | None = None):
    """An agent's audio output, what the avatar publishes, and its engine."""
    engine = engine or Engine(a_puppet(), Echo(), 2)
    engine.start()
    agent, avatar = a_room()
    receiver = door.receiver_of(avatar, "agent")
    playing = asyncio.create_task(door.play(engine, avatar, receiver, tiny.a_portrait(), "a person nods", 7))
    output = DataStreamAudioOutput(agent, destination_identity="avatar", wait_playback_start=True)
    tape = Tape(avatar.local_participant, RATE, (11, 8))
    try:
        await asyncio.wait_for(avatar.local_participant.published.wait(), 10)
        await asyncio.sleep(0.5)
        yield output, tape, engine
    finally:
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)
        await tape.stop()
        assert engine.viewers == []
        await asyncio.to_thread(engine.stop)


async def say(output: DataStreamAudioOutput, sound: np.ndarray, seconds: float = 0.1) -> None:
    """A sentence, pushed as fast as it goes, in pieces."""
    for piece in np.array_split(sound, max(1, round(len(sound) / RATE / seconds))):
        await output.capture_frame(rtc.AudioFrame(piece.tobytes(), RATE, 1, len(piece)))
    output.flush()


def edges(loud: np.ndarray, gap: float = 0.1) -> np.ndarray:
    """Begin and end [n, 2] of each stretch of times at most `gap` apart."""
    cuts = np.flatnonzero(np.diff(loud) > gap)
    return np.stack([loud[np.r_[0, cuts + 1]], loud[np.r_[cuts, len(loud) - 1]]], 1)


def test_an_agents_sentences_are_heard_whole_and_seen_with_their_sound():
    async def run():
        async with a_call() as (output, tape, _):
            started, finished = [], []
            output.on("playback_started", lambda event: started.append(time.monotonic()))
            output.on("playback_finished", lambda event: finished.append((time.monotonic(), event)))
            asked, said = time.monotonic(), [tone(1.53, RATE), tone(0.9, RATE, 300)]
            await say(output, said[0])
            await output.wait_for_playout()
            await asyncio.sleep(0.4)
            await say(output, said[1])
            await output.wait_for_playout()
            await asyncio.sleep(0.3)
            return asked, said, started, finished, tape

    asked, said, started, finished, tape = asyncio.run(run())
    heard = np.concatenate([block for _, block in tape.sound])
    heard = heard[np.flatnonzero(heard)[0] : np.flatnonzero(heard)[-1] + 1]
    assert len(heard[heard != 0]) == pytest.approx(sum(np.count_nonzero(sound) for sound in said), abs=2)
    first = said[0][np.flatnonzero(said[0])[0] :]
    assert np.array_equal(heard[: len(first) - 10], first[:-10])
    voiced = edges(tape.loud())
    assert len(voiced) == len(finished) == len(started) == 2
    assert voiced[0, 0] - asked < 0.5
    for (begin, end), (at, event), sound, start in zip(voiced, finished, said, started, strict=True):
        assert not event.interrupted
        assert event.playback_position == pytest.approx(len(sound) / RATE, abs=0.001)
        assert abs(at - end) < 2 * FRAME
        assert abs(start - begin) < FRAME
    mouth = tape.open()
    turned = mouth[1:][np.diff(mouth[:, 1]) != 0]
    assert turned[:, 1].tolist() == [1, 0, 1, 0]
    offsets = turned[::2, 0] - voiced[:, 0]
    assert np.abs(offsets).max() <= 0.04, f"video {offsets} s behind the sound"


def test_clear_buffer_is_heard_within_150_ms_and_nothing_of_the_old_sentence_after_it():
    async def run():
        async with a_call() as (output, tape, _):
            finished = []
            output.on("playback_finished", finished.append)
            await say(output, tone(20.0, RATE))
            await asyncio.sleep(1.6)
            at = time.monotonic()
            output.clear_buffer()
            await output.wait_for_playout()
            told = time.monotonic()
            await asyncio.sleep(0.8)
            await say(output, tone(0.5, RATE, 300))
            await output.wait_for_playout()
            await asyncio.sleep(0.2)
            return at, told, finished, tape

    at, told, finished, tape = asyncio.run(run())
    voiced = edges(tape.loud())
    assert len(voiced) == 2
    assert voiced[0, 1] - at < 0.15
    assert told - at < 0.15
    assert [event.interrupted for event in finished] == [True, False]
    assert finished[0].playback_position == pytest.approx(voiced[0, 1] - voiced[0, 0], abs=0.2)
    assert finished[1].playback_position == pytest.approx(0.5, abs=0.001)
    assert voiced[1, 1] - voiced[1, 0] == pytest.approx(0.5, abs=0.03)
    mouth = tape.open()
    between = mouth[(mouth[:, 0] > at + 0.15) & (mouth[:, 0] < voiced[1, 0] - 0.04)]
    assert len(between) > 5
    assert not between[1:, 1].any()


def test_two_agents_of_one_name_in_two_rooms_interrupt_their_own_avatar():
    rooms = [a_room() for _ in range(2)]
    cleared = []

    async def run():
        receivers = [door.receiver_of(avatar, "agent") for _, avatar in rooms]
        for number, receiver in enumerate(receivers):
            await receiver.start()
            receiver.on("clear_buffer", lambda number=number: cleared.append(number))
        for agent, _ in rooms:
            await agent.local_participant.perform_rpc(
                destination_identity="avatar", method="lk.clear_buffer", payload=""
            )
        for receiver in receivers:
            await receiver.aclose()

    asyncio.run(run())
    assert cleared == [0, 1]
    assert isinstance(rooms[0][0], Room)
