"""The LiveKit door over WebRTC: an agent, the avatar of `distill serve` and a user in one room of a server's stand-in."""

import asyncio
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("livekit.agents", reason="the LiveKit door: pip install 'avatar-distill[livekit]'")
pytest.importorskip("aiortc", reason="the stand-in for a LiveKit server: pip install aiortc")

import aiohttp
from livekit import api, rtc
from livekit.agents import Agent, AgentSession
from livekit.agents.types import ATTRIBUTE_PUBLISH_ON_BEHALF
from livekit.agents.voice.avatar import DataStreamAudioOutput

from benchmarks.serving.livekit_room import listen, look
from distill.live.doors.livekit_agent import LiveKitDoor
from distill.live.scheduler import Engine
from distill.live.server import Options
from distill.live.talkers import Echo
from tests.distill.live.doors.test_livekit import RATE
from tests.distill.live.doors.test_stream import tone
from tests.support import tiny
from tests.support.live.lag import run_in_time
from tests.support.live.serving import a_puppet, eventually, running
from tests.support.live.watched import Watched

FRAME = 0.08


@pytest.fixture
def server():
    command = [sys.executable, "-m", "benchmarks.serving.livekit_server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().strip()
        process.kill()


def token(identity: str, kind: str = "standard", **attributes: str) -> str:
    made = api.AccessToken("key", "secret" * 8).with_identity(identity).with_kind(kind).with_attributes(attributes)
    return made.with_grants(api.VideoGrants(room_join=True, room="a room")).to_jwt()


class User(Watched):
    """A participant who listens and looks."""

    def __init__(self):
        super().__init__(open_above=110)  # of pixels that have been encoded
        self.room = rtc.Room()
        self.tasks: list[asyncio.Task] = []
        self.room.on("track_subscribed", lambda track, *_: self.tasks.append(asyncio.create_task(self._take(track))))

    async def _take(self, track: rtc.Track) -> None:
        audio = track.kind == rtc.TrackKind.KIND_AUDIO
        await (listen(track, RATE, self.hear) if audio else look(track, self.see))

    async def leave(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.room.disconnect()


async def frames(sound: np.ndarray):
    """A sentence as a TTS gives it, all at once."""
    for piece in np.array_split(sound, max(1, len(sound) // 2400)):
        yield rtc.AudioFrame(piece.tobytes(), RATE, 1, len(piece))


async def a_call(server: str, address: str) -> tuple[User, AgentSession, list, dict[str, float]]:
    """An agent asks for its avatar, says a sentence and another one, which is interrupted, and leaves."""
    room, user, at, handles = rtc.Room(), User(), {}, []
    await room.connect(server, token("agent", "agent"))
    await user.room.connect(server, token("user"))
    asked = {"token": token("avatar", "agent", **{ATTRIBUTE_PUBLISH_ON_BEHALF: "agent"})}
    async with aiohttp.ClientSession() as http, http.post(f"http://{address}/livekit", json=asked) as answer:
        assert (answer.status, await answer.json()) == (200, {"joined": server})
    session = AgentSession()
    session.output.audio = DataStreamAudioOutput(
        room, destination_identity="avatar", wait_remote_track=rtc.TrackKind.KIND_VIDEO, wait_playback_start=True
    )
    await session.start(Agent(instructions=""), room=room)
    async with asyncio.timeout(60):
        while len(user.video) < 10:
            await asyncio.sleep(0.05)
    handles.append(session.say("hello there", audio=frames(tone(1.5, RATE))))
    await asyncio.wait_for(handles[0].wait_for_playout(), 30)
    await asyncio.sleep(1.0)
    handles.append(session.say("a long story of many words", audio=frames(tone(20.0, RATE))))
    while len(user.sound) and np.abs(user.sound[-1][1].astype(int)).max() < 1000:
        await asyncio.sleep(0.02)
    await asyncio.sleep(1.5)
    at["cut"] = time.monotonic()
    await session.interrupt()
    await asyncio.wait_for(handles[1].wait_for_playout(), 30)
    at["reported"] = time.monotonic()
    await asyncio.sleep(1.0)
    assert user.room.remote_participants["avatar"].attributes[ATTRIBUTE_PUBLISH_ON_BEHALF] == "agent"
    await session.aclose()
    await room.disconnect()
    async with asyncio.timeout(20):
        while "avatar" in user.room.remote_participants:
            await asyncio.sleep(0.05)
    await user.leave()
    return user, session, handles, at


def test_an_agent_a_user_and_the_avatar_in_a_room(server):
    engine, portraits = Engine(a_puppet(), Echo(), 2), [tiny.a_portrait()]
    with running(engine, portraits, Options(doors=[LiveKitDoor(server).open(engine, portraits)])) as address:
        user, session, handles, at = run_in_time(a_call(server, address))
        eventually(lambda: not engine.viewers, 20)
    assert [handle.interrupted for handle in handles] == [False, True]
    said = [item for item in session.history.items if item.type == "message"]
    assert said[0].text_content == "hello there"
    assert len(said[1].text_content) < len("a long story of many words")  # the agent knows where it was interrupted
    user.lag.skip_if_busy()
    assert at["reported"] - at["cut"] < 0.3
    voiced = user.voiced()
    assert len(voiced) == 2
    assert voiced[0, 1] - voiced[0, 0] == pytest.approx(1.5, abs=0.1)
    assert voiced[1, 1] - at["cut"] < 0.4  # the user's own buffer included
    opened = user.turned()[::2, 0]
    apart = [np.abs(opened - begin).min() for begin in voiced[:, 0]]
    assert max(apart) < FRAME + 0.05  # and what the user's two buffers differ by
