"""The LiveKit door over WebRTC: an agent, the avatar of `distill serve` and a user in one room of a server's stand-in."""

import asyncio
import subprocess
import sys
import time

import aiohttp
import numpy as np
import pytest

pytest.importorskip("livekit.agents", reason="the LiveKit door: pip install 'avatar-distill[livekit]'")
pytest.importorskip("aiortc", reason="the stand-in for a LiveKit server: pip install aiortc")

from livekit import api, rtc
from livekit.agents.types import ATTRIBUTE_PUBLISH_ON_BEHALF
from livekit.agents.voice.avatar import DataStreamAudioOutput

from benchmarks.livekit_room import listen, look
from distill.live.doors.livekit import LiveKitDoor
from distill.live.scheduler import Engine
from distill.live.server import Options, running
from distill.live.talkers import Echo
from tests.distill.live.doors.test_livekit import RATE, say
from tests.distill.live.doors.test_stream import tone
from tests.support import tiny
from tests.support.serving import a_puppet, eventually
from tests.support.watched import Watched

FRAME = 0.08


@pytest.fixture
def server():
    command = [sys.executable, "-m", "benchmarks.livekit_server"]
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


def test_an_agent_a_user_and_the_avatar_in_a_room(server):
    engine = Engine(a_puppet(), Echo(), 2)
    portraits = [tiny.a_portrait()]
    finished = []

    async def call(address: str) -> tuple[User, dict[str, float]]:
        agent, user, at = rtc.Room(), User(), {}
        await agent.connect(server, token("agent", "agent"))
        await user.room.connect(server, token("user"))
        asked = {"token": token("avatar", "agent", **{ATTRIBUTE_PUBLISH_ON_BEHALF: "agent"})}
        async with aiohttp.ClientSession() as http, http.post(f"http://{address}/livekit", json=asked) as answer:
            assert (answer.status, await answer.json()) == (200, {"joined": server})
        output = DataStreamAudioOutput(
            agent, destination_identity="avatar", wait_remote_track=rtc.TrackKind.KIND_VIDEO, wait_playback_start=True
        )
        output.on("playback_finished", finished.append)
        async with asyncio.timeout(60):
            while len(user.video) < 10:
                await asyncio.sleep(0.05)
        await say(output, tone(1.5, RATE))
        at["said"] = time.monotonic()
        await asyncio.wait_for(output.wait_for_playout(), 30)
        await asyncio.sleep(1.0)
        await say(output, tone(20.0, RATE))
        await asyncio.sleep(2.0)
        at["cut"] = time.monotonic()
        output.clear_buffer()
        await asyncio.wait_for(output.wait_for_playout(), 30)
        at["told"] = time.monotonic()
        await asyncio.sleep(1.0)
        assert user.room.remote_participants["avatar"].attributes[ATTRIBUTE_PUBLISH_ON_BEHALF] == "agent"
        await agent.disconnect()
        async with asyncio.timeout(10):
            while "avatar" in user.room.remote_participants:
                await asyncio.sleep(0.05)
        await user.leave()
        return user, at

    with running(engine, portraits, Options(doors=[LiveKitDoor(server).open(engine, portraits)])) as address:
        user, at = asyncio.run(asyncio.wait_for(call(address), 120))
        eventually(lambda: not engine.viewers, 10)
    assert [(event.interrupted, round(event.playback_position, 2)) for event in finished[:1]] == [(False, 1.5)]
    assert finished[1].interrupted
    assert at["told"] - at["cut"] < 0.3
    user.lag.skip_if_busy()
    voiced = user.voiced()
    assert at["told"] - at["cut"] < 0.3
    assert len(voiced) == 2
    assert voiced[0, 1] - voiced[0, 0] == pytest.approx(1.5, abs=0.1)
    assert voiced[1, 1] - at["cut"] < 0.4  # the user's own buffer included
    opened = user.turned()[::2, 0]
    apart = [np.abs(opened - begin).min() for begin in voiced[:, 0]]
    assert max(apart) < FRAME + 0.05  # and what the user's two buffers differ by
