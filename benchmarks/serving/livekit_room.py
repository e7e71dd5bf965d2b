"""Two sides of a LiveKit room without a server: what livekit-agents' own avatar classes ask of a room, wired to the other side.

Byte streams and RPC go from one side to the other; tracks are the library's own, and what is captured into them is read back from
them with its time, as an encoder would get it.
"""

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from livekit import rtc


class Reader:
    """Of a byte stream: `info.attributes`, and its pieces."""

    def __init__(self, attributes: dict[str, str]):
        self.info = SimpleNamespace(attributes=attributes, stream_id="stream")
        self.pieces: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def __anext__(self) -> bytes:
        if (piece := await self.pieces.get()) is None:
            raise StopAsyncIteration
        return piece


class Writer:
    """Its other end."""

    def __init__(self, reader: Reader):
        self.reader = reader

    async def write(self, data: bytes) -> None:
        self.reader.pieces.put_nowait(data)

    async def aclose(self) -> None:
        self.reader.pieces.put_nowait(None)


class Participant:
    """The local participant of one side."""

    def __init__(self, identity: str):
        self.identity, self.kind = identity, rtc.ParticipantKind.PARTICIPANT_KIND_AGENT
        self.state, self.attributes = rtc.ParticipantState.PARTICIPANT_STATE_ACTIVE, {}
        self._rpc_handlers: dict = {}
        self.other: Room
        self.tracks: list[rtc.Track] = []
        self.published = asyncio.Event()

    def register_rpc_method(self, name: str, handler) -> None:
        self._rpc_handlers[name] = handler

    async def perform_rpc(self, *, destination_identity: str, method: str, payload: str) -> str:
        there = self.other.local_participant
        assert there.identity == destination_identity
        if method not in there._rpc_handlers:
            raise rtc.RpcError(rtc.RpcError.ErrorCode.UNSUPPORTED_METHOD, "Method not supported at destination")
        return there._rpc_handlers[method](
            rtc.RpcInvocationData(request_id="1", caller_identity=self.identity, payload=payload, response_timeout=1.0)
        )

    async def stream_bytes(
        self, *, name: str, topic: str, destination_identities: list[str], attributes: dict
    ) -> Writer:
        assert destination_identities == [self.other.local_participant.identity]
        reader = Reader(attributes)
        self.other.byte_handlers[topic](reader, self.identity)
        return Writer(reader)

    async def set_attributes(self, attributes: dict[str, str]) -> None:
        self.attributes |= attributes

    async def publish_track(self, track: rtc.Track, options) -> SimpleNamespace:
        self.tracks.append(track)
        if len(self.tracks) == 2:
            self.published.set()
        return SimpleNamespace(wait_for_subscription=lambda: asyncio.sleep(0))


class Room(rtc.EventEmitter):
    """One side."""

    def __init__(self, identity: str):
        super().__init__()
        self.local_participant = Participant(identity)
        self.remote_participants: dict[str, Participant] = {}
        self.byte_handlers: dict = {}
        self.left = False

    def isconnected(self) -> bool:
        return True

    async def connect(self, url: str, token: str) -> None:
        if token == "wrong":
            raise rtc.ConnectError("invalid token")

    async def disconnect(self) -> None:
        self.left = True

    def register_byte_stream_handler(self, topic: str, handler) -> None:
        self.byte_handlers[topic] = handler


def a_room() -> tuple[Room, Room]:
    """The agent's side and the avatar's."""
    agent, avatar = Room("agent"), Room("avatar")
    for here, there in ((agent, avatar), (avatar, agent)):
        here.local_participant.other = there
        here.remote_participants[there.local_participant.identity] = there.local_participant
    return agent, avatar


async def listen(track: rtc.Track, rate: int, hear: Callable[[float, np.ndarray], None]) -> None:
    """`hear` gets the time of each block of a track and its samples, int16 [n] of 10 ms, until this is cancelled."""
    stream = rtc.AudioStream.from_track(track=track, sample_rate=rate, num_channels=1)
    try:
        async for event in stream:
            hear(time.monotonic(), np.frombuffer(event.frame.data, np.int16).copy())
    finally:  # else the library goes on filling its queue
        await stream.aclose()


async def look(track: rtc.Track, see: Callable[[float, np.ndarray], None]) -> None:
    """`see` gets the time of each frame of a track and its pixels, uint8 [H, W, 3]."""
    stream = rtc.VideoStream.from_track(track=track)
    try:
        async for event in stream:
            frame = event.frame.convert(rtc.VideoBufferType.RGB24)
            see(time.monotonic(), np.frombuffer(frame.data, np.uint8).reshape(frame.height, frame.width, 3))
    finally:
        await stream.aclose()


class Tape:
    """Listens to and looks at what a participant publishes, as an encoder gets it."""

    def __init__(
        self,
        participant: Participant,
        rate: int,
        hear: Callable[[float, np.ndarray], None],
        see: Callable[[float, np.ndarray], None],
    ):
        self.participant, self.given = participant, (rate, hear, see)
        self.task = asyncio.create_task(self._record())

    async def _record(self) -> None:
        rate, hear, see = self.given
        await self.participant.published.wait()
        audio, video = self.participant.tracks
        await asyncio.gather(listen(audio, rate, hear), look(video, see))

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
