"""Two sides of a LiveKit room without a server: what livekit-agents' own avatar classes ask of a room, wired to the other side.

Byte streams and RPC go from one side to the other; tracks are the library's own, and what is captured into them is read back from
them with its time, as an encoder would get it.
"""

import asyncio
import time
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


class Tape:
    """What comes out of the published tracks: `sound` (time, int16 [n]) and `video` (time, mouth's grey)."""

    def __init__(self, participant: Participant, rate: int, mouth: tuple[int, int]):
        self.participant, self.rate, self.mouth = participant, rate, mouth
        self.sound: list[tuple[float, np.ndarray]] = []
        self.video: list[tuple[float, int]] = []
        self.task = asyncio.create_task(self._record())

    async def _record(self) -> None:
        await self.participant.published.wait()
        audio, video = self.participant.tracks
        sound = rtc.AudioStream.from_track(track=audio, sample_rate=self.rate, num_channels=1)
        pictures = rtc.VideoStream.from_track(track=video)
        try:
            await asyncio.gather(self._hear(sound), self._see(pictures))
        finally:  # else the library goes on filling their queues
            await sound.aclose()
            await pictures.aclose()

    async def _hear(self, stream: rtc.AudioStream) -> None:
        async for event in stream:
            self.sound.append((time.monotonic(), np.frombuffer(event.frame.data, np.int16).copy()))

    async def _see(self, stream: rtc.VideoStream) -> None:
        async for event in stream:
            frame = event.frame.convert(rtc.VideoBufferType.RGB24)
            picture = np.frombuffer(frame.data, np.uint8).reshape(frame.height, frame.width, 3)
            self.video.append((time.monotonic(), int(picture[(*self.mouth, 0)])))

    def loud(self, above: int = 1000) -> np.ndarray:
        """Times of the blocks of 10 ms in which something is heard."""
        return np.array([at for at, block in self.sound if np.abs(block.astype(int)).max() > above])

    def open(self) -> np.ndarray:
        """Times and states (0, 1) of the mouth."""
        return np.array([(at, grey > 60) for at, grey in self.video], dtype=float)

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
