"""A scripted conversation with a server of the protocol, in real time, by a client that plays it: answers, and interruptions.

A turn is typed, and the server's talker answers it; or its sound is sent, which the avatar says: then two systems say the same.
"""

import http.client
import json
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from teachers import media
from teachers.errors import UserError

if TYPE_CHECKING:
    from distill.live.client import Answer, Client

PAUSE, MORE = 0.6, 0.5  # seconds between an answer's end and the next turn: at least, and spread over so many more
TALKS, SETTLES = 0.6, 1.5  # seconds that an avatar talks before it is interrupted, and that are listened to after it
PINGS = 5
LOUD = 0.01  # from which on a sample is heard
LONG = (
    "I will go on talking for a while now, so that there is time enough to interrupt me in the middle of this sentence, "
    "and I will not stop by myself before you do."
)
MOST_BYTES = 2**26
TOKEN = "AVATAR_TOKEN"  # the name of a variable


@dataclass(frozen=True)
class Script:
    """One conversation: what the user types."""

    name: str
    turns: tuple[str, ...]
    portrait: int = 0
    condition: str = "a person talks"
    seed: int = 0


@dataclass(frozen=True)
class Interruption:
    """An interruption of a talking avatar, in seconds. stopped: from the interrupt to the end of the last old frame as it was seen
    (None: it went on talking); after: so much sound was heard behind that."""

    stopped: float | None
    after: float


@dataclass
class Played:
    """A conversation as the viewer had it: frames uint8 [T, H, W, 3], sound [T * samples], and its answers."""

    script: Script
    portrait: Tensor
    frames: np.ndarray
    sound: np.ndarray
    answers: "list[Answer]"
    stalled: list[float]  # seconds that the video stood still, turn by turn
    interruptions: list[Interruption] = field(default_factory=list)
    line: dict[str, float] = field(default_factory=dict)  # seconds: connect, open, round_trip
    fps: float = 25.0


@dataclass(frozen=True)
class Server:
    """A server to talk with: its WebSocket's address, and what it says of itself (`hello`). `own`: one in this process."""

    name: str
    url: str
    hello: dict[str, Any]
    own: bool = False

    def portrait(self, number: int) -> Tensor:
        """Its portrait of that number [3, H, W] in [-1, 1]; UserError where it has none."""
        pixels = media.decode_image(_get(self.url, f"/portraits/{number}.png"))
        return torch.as_tensor(np.asarray(pixels)).permute(2, 0, 1).float() / 127.5 - 1


def reach(word: str) -> Server:
    """The server of an option `[NAME=]ws://HOST[:PORT][/PATH]`; UserError for another form, and where none answers."""
    name, _, url = word.rpartition("=") if "=" in word.partition("://")[0] else ("", "", word)
    if not url.startswith(("ws://", "wss://")):
        raise UserError(f"--server {word}: give [NAME=]ws://HOST:PORT, or wss://")
    host = url.partition("://")[2].partition("/")[0]
    url = url if url.rstrip("/").count("/") > 2 else f"{url.rstrip('/')}/live"
    said = _get(url, "/hello")
    try:
        hello = json.loads(said)
        known = hello["type"] == "hello" and int(hello["portraits"]) > 0
    except (ValueError, LookupError, TypeError):
        known = False
    if not known:
        raise UserError(f"--server {word}: what answers there does not speak the protocol; see docs/serving.md")
    return Server(name or host, url, hello)


def converse(
    server: Server, script: Script, bar: tqdm, portrait: Tensor, voice: Any = None, interruptions: int = 0
) -> Played:
    """One conversation in real time, each turn after the answer to the last one, then so many interruptions. `voice`: text -> sound
    [n] at 16 kHz, which is sent in the place of the text."""
    from distill.live.client import Client

    began = time.monotonic()
    with Client(server.url, strict=True, additional_headers=_headers()) as client:
        line = {"connect": time.monotonic() - began, "round_trip": min(client.round_trip() for _ in range(PINGS))}
        began = time.monotonic()
        client.open(script.portrait, script.condition, script.seed)
        line["open"] = time.monotonic() - began
        client.pump(PAUSE)
        answers, stalled, cut_off = [], [], []
        for number, text in enumerate(script.turns, start=1):
            before = client.stalled
            answers.append(client.converse(text if voice is None else voice(text)))
            stalled.append(client.stalled - before)
            bar.update()
            bar.set_postfix_str(f"{server.name}: answer after {answers[-1].latency:.2f} s")
            client.pump(PAUSE + MORE * (0.618 * number % 1))
        for _ in range(interruptions):
            cut_off.append(interrupt(client, LONG if voice is None else voice(LONG)))
        numbers, fps = range(client.last + 1), float(client.fps)
    frames, sound = np.stack([client.frames[n] for n in numbers]), np.concatenate([client.sound[n] for n in numbers])
    return Played(script, portrait, frames, sound, answers, stalled, cut_off, line, fps)


def interrupt(client: "Client", turn: str | np.ndarray) -> Interruption:
    """Let the avatar begin a long turn, and interrupt it once it talks. What is measured is what this client showed and played: old
    frames up to the one at which new ones begin (the server's `rewind`), or up to where it was when that message came."""
    answer = client.answers[client.ask(turn) if isinstance(turn, str) else client.tell(turn)]
    client.until(lambda: answer.seen is not None, 30.0)
    client.pump(TALKS)
    began, before = time.monotonic(), len(client.rewinds)
    client.interrupt()
    client.pump(SETTLES)
    assert client.origin is not None
    cuts, stopped = client.rewinds[before:], None
    cut = min((frame for _, frame in cuts), default=answer.end)
    if cut is not None:
        stopped = max(client.origin + cut / client.fps, cuts[0][0] if cuts else began) - began
        stopped = None if stopped > SETTLES else max(stopped, 0.0)
    first = int((began - client.origin + (stopped or 0.0)) * client.fps) if cut is None else cut
    heard = [client.sound[n] for n in range(first, client.last + 1)]
    loud = np.abs(np.concatenate(heard)) > LOUD if heard else np.zeros(0)
    client.pump(PAUSE)
    return Interruption(stopped, float(np.count_nonzero(loud)) / (client.samples * client.fps))


def _headers() -> dict[str, str]:
    token = os.environ.get(TOKEN)
    return {"Authorization": f"Bearer {token}"} if token else {}


def _get(url: str, path: str) -> bytes:
    """What a server answers beside its WebSocket; no redirect is followed, which would take the token elsewhere. UserError where it
    does not answer, or refuses."""
    scheme, _, rest = url.partition("://")
    host = rest.partition("/")[0]
    kind = http.client.HTTPSConnection if scheme == "wss" else http.client.HTTPConnection
    try:
        connection = kind(host, timeout=10)
        try:
            connection.request("GET", path, headers=_headers())
            answer = connection.getresponse()
            if answer.status != 200:
                raise OSError(f"{answer.status} {answer.reason}")
            return answer.read(MOST_BYTES)
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"no server at {host}{path} ({error}); start one, and give its token as {TOKEN} where it has one"
        ) from error
