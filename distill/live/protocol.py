"""What a client and the server say to each other over one WebSocket, and every limit on it; docs/serving.md is for those who write
a client.

The client sends JSON messages (the dataclasses below, `Hello` first) and binary ones, whose first byte says what follows: SOUND,
microphone samples, or SPEECH, what the avatar is to say (both s16le, mono, 16 kHz), IMAGE or FILE, a whole picture or sound file.
No file name is ever sent. The server sends JSON, `hello` first, and one binary message a chunk, laid out by `pack_chunk`.
"""

import base64
import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from students.serving.session import Chunk
from teachers.codecs.linear import to_uint8
from teachers.config import convert
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError
from teachers.media.realtime import Vp8Encoder

VERSION = 1
"""Of all that is below: raised by what a client of before would misread or a server of before refuse, not by a new message of the
server, which clients skip, nor by one of the client that `hello` announces (`guidance`)."""
MAX_JSON = 16_384  # characters
MAX_TEXT = 600
MAX_MESSAGE = 8 * 2**20  # bytes
MAX_SOUND_SAMPLES = SAMPLE_RATE  # of one message of samples
SOUND, IMAGE, FILE, SPEECH = range(4)
RAW, JPEG, VP8 = range(3)
RAW_PIXELS = 128 * 128  # up to here frames are sent as they are
HEADER = struct.Struct("<BBHIII")  # VERSION, frame format, frames, first frame, epoch, samples


class ProtocolError(UserError):
    """The first message does not name this version."""


@dataclass(frozen=True)
class Hello:
    """The first message: the version that the client speaks, and the video codecs that it decodes (`vp8`)."""

    version: int
    video: tuple[str, ...] = ()


@dataclass(frozen=True)
class Open:
    """Begin: portrait number (null: the picture that was sent last), text condition, seed of the noise."""

    portrait: int | None = 0
    text: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Say:
    """A typed turn of the user."""

    text: str


@dataclass(frozen=True)
class SetText:
    """Another text condition from the next chunk on."""

    text: str


@dataclass(frozen=True)
class Guide:
    """Other guidance scales by name from the next chunk on, of a student that takes them: `hello` has their ranges."""

    scales: dict[str, float]


@dataclass(frozen=True)
class Spoken:
    """The sentence that came as SPEECH is complete."""


@dataclass(frozen=True)
class Interrupt:
    """Be quiet and go idle."""


@dataclass(frozen=True)
class Played:
    """All frames before `frame` were seen; `epoch` counts the rewinds that the page knew of."""

    frame: int
    epoch: int


@dataclass(frozen=True)
class Seen:
    """The first talking frame of a turn was drawn `ms` after the user's turn ended, by the page's clock."""

    turn: int
    ms: float


@dataclass(frozen=True)
class Microphone:
    """The microphone was switched."""

    on: bool


MESSAGES = {
    "hello": Hello,
    "open": Open,
    "say": Say,
    "text": SetText,
    "guidance": Guide,
    "spoken": Spoken,
    "interrupt": Interrupt,
    "played": Played,
    "seen": Seen,
    "microphone": Microphone,
}


def parse(text: str) -> Any:
    """One of the messages above; UserError for anything else."""
    if len(text) > MAX_JSON:
        raise UserError(f"message of {len(text)} characters; {MAX_JSON} are allowed")
    try:
        values = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"message is no JSON ({type(error).__name__}); send an object") from error
    if not isinstance(values, dict) or not isinstance(values.get("type"), str) or values["type"] not in MESSAGES:
        raise UserError(f"message needs a type; known: {', '.join(MESSAGES)}")
    kind = values.pop("type")
    message = convert(MESSAGES[kind], values, kind, lambda _: "message")
    words = getattr(message, "text", "")
    if len(words) > MAX_TEXT or "\x00" in words or any("\ud800" <= letter <= "\udfff" for letter in words):
        raise UserError(
            f"text of {len(words)} characters; {MAX_TEXT} are allowed, no zero bytes and no halves of characters"
        )
    if isinstance(message, Open) and not 0 <= message.seed < 2**63:
        raise UserError("seed must lie in 0..2**63-1; choose another")
    return message


def check_hello(text: str | None) -> Hello:
    """A client's first message; ProtocolError, in one line for both sides, unless it is a Hello of this version."""
    try:
        hello = parse(text or "")
    except UserError:
        hello = None
    if not isinstance(hello, Hello):
        raise ProtocolError(f'protocol {VERSION}: the first message must be {{"type": "hello", "version": {VERSION}}}')
    check_version(hello.version, "client")
    return hello


def check_version(version: Any, whose: str) -> None:
    """ProtocolError unless it is this one; `whose`: client or server."""
    if version != VERSION:
        raise ProtocolError(f"the {whose} speaks protocol {version!r:.20}, this side {VERSION}; update the older one")


def _no_constant(name: str) -> None:
    raise ValueError(name)


def unpack(data: bytes) -> tuple[int, bytes]:
    """Kind and content of a binary message of the page; UserError for an unknown or empty one."""
    if len(data) < 2 or data[0] not in (SOUND, IMAGE, FILE, SPEECH):
        raise UserError("binary message needs its kind (0 sound, 1 picture, 2 sound file, 3 speech) and a content")
    if len(data) > MAX_MESSAGE:
        raise UserError(f"file of {len(data) / 2**20:.0f} MiB; {MAX_MESSAGE // 2**20} are allowed")
    return data[0], data[1:]


def to_sound(data: bytes) -> Tensor:
    """Samples [n] in [-1, 1] of a message of samples."""
    if len(data) % 2 or len(data) > 2 * MAX_SOUND_SAMPLES:
        raise UserError(f"sound of {len(data)} bytes in a message; send whole s16 samples, at most a second")
    return torch.from_numpy(np.frombuffer(data, "<i2").astype(np.float32) / 32768)


def pack_chunk(chunk: Chunk, epoch: int, encoder: Vp8Encoder | None = None) -> bytes:
    """HEADER, the frames, the sound (s16le, mono, 16 kHz). Small frames are RGB rows, others each its length (u32) and a packet of
    the viewer's `encoder`, or a JPEG."""
    count, height, width, _ = chunk.frames.shape
    if height * width <= RAW_PIXELS:
        kind, frames = RAW, [chunk.frames.numpy().tobytes()]
    else:
        kind, encode = (JPEG, _jpeg) if encoder is None else (VP8, encoder.encode)
        parts = [encode(frame) for frame in chunk.frames]
        frames = [struct.pack("<I", len(part)) + part for part in parts]
    sound = (chunk.audio.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().astype("<i2").tobytes()
    head = HEADER.pack(VERSION, kind, count, chunk.first_frame, epoch, len(chunk.audio))
    return b"".join([head, *frames, sound])


def packer(hello: Hello, size: tuple[int, int], fps: Fraction) -> Callable[[Chunk, int], bytes]:
    """How chunks of frames (H, W) are packed for a client."""
    moving = "vp8" in hello.video and size[0] * size[1] > RAW_PIXELS
    return partial(pack_chunk, encoder=Vp8Encoder(size, fps)) if moving else pack_chunk


def _jpeg(frame: Tensor) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame.numpy()).save(file, "JPEG", quality=90)
    return file.getvalue()


def to_png(picture: Tensor) -> bytes:
    """A picture [3, H, W] in [-1, 1] as a file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(to_uint8(picture[None])[0].permute(1, 2, 0).numpy())).save(file, "PNG")
    return file.getvalue()


def to_data_url(picture: Tensor) -> str:
    """The same as pages show it."""
    return f"data:image/png;base64,{base64.b64encode(to_png(picture)).decode()}"


@dataclass(frozen=True)
class Received:
    """A chunk message, read: frames uint8 [t, H, W, 3], sound [n] in [-1, 1]."""

    first_frame: int
    epoch: int
    frames: np.ndarray
    sound: np.ndarray


def read_chunk(data: bytes, size: tuple[int, int]) -> Received:
    """The inverse of `pack_chunk`, for a client in Python; `size` is (H, W)."""
    from PIL import Image

    version, kind, count, first, epoch, samples = HEADER.unpack_from(data)
    check_version(version, "server")
    place, pictures = HEADER.size, []
    for _ in range(count):
        length = size[0] * size[1] * 3
        if kind == VP8:
            raise ProtocolError("frames are VP8, which this client did not ask for; update it")
        if kind == JPEG:
            (length,) = struct.unpack_from("<I", data, place)
            place += 4
            pictures.append(np.array(Image.open(io.BytesIO(data[place : place + length]))))
        else:
            pictures.append(np.frombuffer(data, np.uint8, length, place).reshape(*size, 3))
        place += length
    sound = np.frombuffer(data, "<i2", samples, place).astype(np.float32) / 32767
    return Received(first, epoch, np.stack(pictures), sound)
