"""A LiveKit agent's avatar: joins the agent's room, takes its speech by LiveKit's data-stream protocol for avatars, and publishes
synchronised audio and video (`DataStreamAudioReceiver` and `AvatarRunner` of livekit-agents).

The agent's side is livekit-agents' `DataStreamAudioOutput`. It asks for an avatar by POST /livekit with a room token; or the door
waits in one room for whichever agent comes.
"""

# pyright: reportMissingImports=false
import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from distill.live.doors.stream import AvatarStream
from distill.live.scheduler import Engine
from teachers.config import convert
from teachers.errors import UserError

try:
    from livekit import api, rtc
    from livekit.agents import utils
    from livekit.agents.types import ATTRIBUTE_PUBLISH_ON_BEHALF as ON_BEHALF
    from livekit.agents.voice.avatar import (
        AudioReceiver,
        AudioSegmentEnd,
        AvatarOptions,
        AvatarRunner,
        DataStreamAudioReceiver,
        VideoGenerator,
    )
except ImportError as error:
    raise UserError(f"LiveKit needs livekit-agents ({error}): pip install 'avatar-distill[livekit]'") from error

RATE = 24_000
QUEUE_MS = 400  # of the synchroniser: above what comes early, so that it paces and never holds back
JOIN_SECONDS = 20.0
AGAIN_SECONDS = 5.0  # until a room that could not be joined is tried again
AGENT_SECONDS = 60.0  # that an avatar that was asked for waits for its agent
IDENTITY = "avatar"
MAX_REQUEST = 16_384
log = logging.getLogger(__name__)


class Picture(VideoGenerator):
    """A stream as the library's video generator: video in every frame, audio where something is said."""

    def __init__(self, stream: AvatarStream):
        self.stream = stream
        self.sync: rtc.AVSynchronizer | None = None  # the runner's, which empties no queue by itself

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        """Speech, or the end of a sentence."""
        if isinstance(frame, AudioSegmentEnd):
            self.stream.end()
        else:
            samples = np.frombuffer(frame.data, np.int16).reshape(-1, frame.num_channels)
            self.stream.push(samples, frame.sample_rate)

    async def clear_buffer(self) -> None:
        """The agent was interrupted: silence at once."""
        self.stream.interrupt()
        if self.sync is not None:
            await self.sync.clear_queue()  # its `reset` would end it while a frame waits

    async def _beats(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        async for beat in self.stream:
            cuts = self.stream.cuts
            for _ in range(beat.ended):
                yield AudioSegmentEnd()
            if len(beat.sound) and cuts == self.stream.cuts:
                yield rtc.AudioFrame(beat.sound.tobytes(), RATE, 1, len(beat.sound))
                await asyncio.sleep(beat.due - self.stream.loop.time())  # what came early waits in the audio's queue
            if cuts == self.stream.cuts:
                height, width, _ = beat.picture.shape
                yield rtc.VideoFrame(width, height, rtc.VideoBufferType.RGB24, beat.picture.tobytes())

    def __aiter__(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        return self._beats()


async def play(
    engine: Engine, room: Any, receiver: AudioReceiver, portrait: Tensor | None, text: str, seed: int
) -> None:
    """Be the avatar in a room, for the speech of one receiver, until that ends or this is cancelled."""
    spec = engine.bundle.spec
    stream = await AvatarStream.open(engine, portrait, text, seed, RATE)
    try:
        picture = Picture(stream)
        options = AvatarOptions(spec.width, spec.height, float(spec.fps), RATE, 1)
        runner = AvatarRunner(room, audio_recv=receiver, video_gen=picture, options=options, _queue_size_ms=QUEUE_MS)
        picture.sync = runner.av_sync
        await runner.start()
        try:
            await runner.wait_for_complete()
        finally:
            await runner.aclose()
    finally:
        await stream.close()


async def attend(
    engine: Engine,
    url: str,
    token: str,
    portrait: Tensor | None,
    text: str,
    seed: int = 0,
    joined: asyncio.Event | None = None,
    patience: float | None = None,
) -> None:
    """Join a room, set `joined`, and be the avatar of the first agent there until it leaves, the room closes or this is cancelled.
    UserError where the room cannot be joined, and where no agent comes within `patience` seconds."""
    room, over = rtc.Room(), asyncio.Event()
    room.on("disconnected", lambda *_: over.set())
    try:
        await asyncio.wait_for(room.connect(url, token), JOIN_SECONDS)
    except (rtc.ConnectError, TimeoutError) as error:
        raise UserError(f"cannot join a LiveKit room at {url} ({error or 'no answer'}); check URL and token") from error
    try:
        if joined is not None:
            joined.set()
        try:
            agent = await asyncio.wait_for(_unless(over, utils.wait_for_agent(room)), patience)
        except TimeoutError as error:
            raise UserError(f"no agent came to the room within {patience:g} s; the avatar has left") from error
        if agent is None:
            return
        room.on("participant_disconnected", lambda who: over.set() if who.identity == agent.identity else None)
        with suppress(TimeoutError):  # the token may forbid it, and hold it already
            await asyncio.wait_for(room.local_participant.set_attributes({ON_BEHALF: agent.identity}), 2.0)
        await _unless(over, play(engine, room, receiver_of(room, agent.identity), portrait, text, seed))
    finally:
        await room.disconnect()


def receiver_of(room: Any, agent: str) -> DataStreamAudioReceiver:
    """The library's receiver, for one room: it keeps its handlers by the agent's name in its class, whatever the room."""
    own = type("RoomReceiver", (DataStreamAudioReceiver,), {"_clear_buffer_handlers": {}})
    return own(room, sender_identity=agent)


async def _unless(over: asyncio.Event, waiting: Any) -> Any:
    """The result of `waiting`; None, and it is cancelled, where `over` is set before."""
    tasks = [asyncio.ensure_future(waiting), asyncio.ensure_future(over.wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return None if over.is_set() and not tasks[0].done() else tasks[0].result()
    finally:
        await utils.aio.cancel_and_wait(*tasks)


@dataclass(frozen=True)
class Call:
    """What an agent asks for: a token of its room for the avatar, a portrait's number, text condition, seed."""

    token: str
    portrait: int = 0
    text: str = "a person talks"
    seed: int = 0


@dataclass
class LiveKitDoor:
    """`distill serve --livekit URL [--room NAME]`: rooms of one LiveKit server. `key` and `secret` make the token of `room`."""

    url: str
    room: str | None = None
    key: str = field(default_factory=lambda: os.environ.get("LIVEKIT_API_KEY", ""), repr=False)
    secret: str = field(default_factory=lambda: os.environ.get("LIVEKIT_API_SECRET", ""), repr=False)
    calls: set[asyncio.Task] = field(default_factory=set)

    def __post_init__(self):
        if urlsplit(self.url).scheme not in ("ws", "wss", "http", "https"):
            raise UserError(f"--livekit {self.url}: give a URL such as wss://your.livekit.host")
        if self.room is not None and not (self.key and self.secret):
            raise UserError(
                "--room needs LIVEKIT_API_KEY and LIVEKIT_API_SECRET in the environment to join it; set both"
            )

    def open(self, engine: Engine, portraits: list[Tensor]) -> "LiveKitDoor":
        """Lead to this engine, with one of the portraits [3, H, W]."""
        self.engine, self.portraits = engine, portraits
        return self

    def routes(self) -> list[Route]:
        """POST /livekit."""
        return [Route("/livekit", self.answer, methods=["POST"])]

    async def run(self) -> None:
        """Wait in the room, if there is one, for one agent after the other; until it is cancelled."""
        try:
            while self.room is not None:
                try:
                    await attend(self.engine, self.url, self.token(), self._portrait(0), Call.text)
                except Exception as error:  # the room's, the agent's or the library's: the door stays open
                    log.warning("%s: %s; again in %.0f s", type(error).__name__, error, AGAIN_SECONDS)
                    await asyncio.sleep(AGAIN_SECONDS)
            await asyncio.Event().wait()
        finally:
            await utils.aio.cancel_and_wait(*self.calls)

    def token(self) -> str:
        """A token for the room, as an agent's avatar."""
        grants = api.VideoGrants(room_join=True, room=self.room or "", can_update_own_metadata=True)
        token = api.AccessToken(self.key, self.secret).with_identity(IDENTITY).with_kind("agent")
        return token.with_grants(grants).to_jwt()

    async def answer(self, request: Request) -> Response:
        """Join the room of the token that an agent sends; says so once it has."""
        try:
            call = await self._read(request)
            if why := self.engine.full():
                raise UserError(why)
            if len(self.calls) >= self.engine.max_viewers:
                raise UserError(
                    f"as many rooms are attended as there may be viewers ({self.engine.max_viewers}); try again later"
                )
            joined = asyncio.Event()
            portrait = self._portrait(call.portrait)
            task = asyncio.create_task(
                attend(self.engine, self.url, call.token, portrait, call.text, call.seed, joined, AGENT_SECONDS)
            )
            self.calls.add(task)
            task.add_done_callback(self._ended)
            waiting = asyncio.create_task(joined.wait())
            await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if not joined.is_set():
                task.result()
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)
        return JSONResponse({"joined": self.url})

    def _ended(self, task: asyncio.Task) -> None:
        self.calls.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.warning("a LiveKit room ended: %s", fault)

    def _portrait(self, number: int) -> Tensor | None:
        if not self.engine.bundle.spec.takes_image:
            return None
        if not 0 <= number < len(self.portraits):
            raise UserError(f"no portrait {number}: choose 0..{len(self.portraits) - 1}")
        return self.portraits[number]

    @staticmethod
    async def _read(request: Request) -> Call:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_REQUEST:
                raise UserError(f"request of more than {MAX_REQUEST} bytes; send a token and no more")
        try:
            values = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise UserError('request is no JSON; send {"token": "..."}') from error
        if not isinstance(values, dict):
            raise UserError('request is no object; send {"token": "..."}')
        return convert(Call, values, "livekit", lambda _: "request")
