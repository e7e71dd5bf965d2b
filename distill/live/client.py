"""The client in Python: what the page does, without a screen. For programs that talk through an avatar, benchmarks and tests."""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from distill.live import protocol
from teachers.errors import UserError

TOLD_EVERY = 0.05  # seconds between two reports of the playhead
PIECE = protocol.MAX_SOUND_SAMPLES // 4
BUFFER = 0.03  # seconds between a first chunk's arrival and its sound, as on the page


@dataclass
class Answer:
    """One turn, by this viewer's clock (seconds): when the user's turn ended, when the chunk with the first talking frame came,
    when that frame and the first audible sound were due; its frames; where the time went, in ms."""

    number: int
    asked: float
    frame: int | None = None
    end: int | None = None
    arrived: float | None = None
    seen: float | None = None
    audible: float | None = None
    parts_ms: dict[str, float] = field(default_factory=dict)

    def split(self) -> dict[str, float]:
        """The server's parts, the rest until the chunk was here (`transport`), and until its first frame was due (`playout`)."""
        if self.arrived is None or self.seen is None:
            return self.parts_ms
        transport = 1000 * (self.arrived - self.asked) - sum(self.parts_ms.values())
        return {**self.parts_ms, "transport": transport, "playout": 1000 * (self.seen - self.arrived)}

    @property
    def latency(self) -> float:
        return (self.seen or np.inf) - self.asked

    @property
    def dead(self) -> float:
        return (self.audible or np.inf) - self.asked


class Client:
    """Connects at once; UserError where nothing answers, where it is refused, where the maximum number of viewers is reached, and
    where the server speaks another version of the protocol. `frames` (uint8 [H, W, 3]) and `sound` (float32 [n], 16 kHz) keep
    what was to be seen and heard, by frame number, if `keep`; `strict`: a message of an error raises one. Call `pump` all the
    time: it reads, plays and reports. Closes itself at the end of a `with`."""

    def __init__(self, url: str, keep: bool = True, timeout: float = 10.0, strict: bool = False, **options):
        try:
            socket = connect(url, open_timeout=timeout, max_size=2**26, compression=None, proxy=None, **options)
            self.stack = ExitStack()
            self.socket = self.stack.enter_context(socket)
            self.hello = json.loads(self.socket.recv(timeout=timeout))
        except (OSError, TimeoutError, ConnectionClosed) as error:
            raise UserError(f"no server at {url} ({error}); start distill serve first") from error
        except InvalidStatus as error:
            raise UserError(
                f"{url} refuses this client ({error}); a token goes into additional_headers={{'Authorization': 'Bearer TOKEN'}}"
            ) from error
        if self.hello["type"] != "hello":
            raise UserError(self.hello.get("message", "refused"))
        try:
            protocol.check_version(self.hello.get("version"), "server")
        except UserError:
            self.close()
            raise
        self.send(type="hello", version=protocol.VERSION)
        self.strict = strict
        self.keep, self.fps, self.samples = keep, self.hello["fps"], self.hello["samples_per_frame"]
        self.size = (self.hello["height"], self.hello["width"])
        self.frames: dict[int, np.ndarray] = {}
        self.sound: dict[int, np.ndarray] = {}
        self.answers: dict[int, Answer] = {}
        self.rewinds: list[tuple[float, int]] = []  # when one came, and from which frame on frames were taken back
        self.messages: list[dict] = []  # every other message
        self.origin: float | None = None  # the time at which frame 0 was due
        self.last, self.epoch, self.stalls, self.stalled, self.bytes = -1, 0, 0, 0.0, 0
        self.asked = self.next_report = 0.0

    def send(self, **message) -> None:
        """A JSON message."""
        self.socket.send(json.dumps(message))

    def open(self, portrait: int = 0, text: str = "a person talks", seed: int = 0) -> None:
        """Begin the stream and wait for its first frame."""
        self.send(type="open", portrait=portrait, text=text, seed=seed)
        self.until(lambda: self.origin is not None, 20.0)

    def ask(self, text: str) -> int:
        """A typed turn; its number."""
        before = max(self.answers, default=0)
        self.asked = time.monotonic()
        self.send(type="say", text=text)
        self.until(lambda: max(self.answers, default=0) > before, 10.0)
        return max(self.answers)

    def tell(self, samples: np.ndarray) -> int:
        """A sentence of the avatar, all of its sound [n] at once, as `speak` and `spoken`; its turn's number."""
        before = max(self.answers, default=0)
        self.asked = time.monotonic()
        self.speak(samples)
        self.spoken()
        self.until(lambda: max(self.answers, default=0) > before, 10.0)
        return max(self.answers)

    def converse(self, turn: str | np.ndarray, timeout: float = 60.0) -> Answer:
        """A typed turn, or sound as `tell` takes it, played to its end."""
        answer = self.answers[self.ask(turn) if isinstance(turn, str) else self.tell(turn)]
        self.until(lambda: answer.end is not None and self.place() >= answer.end, timeout)
        return answer

    def round_trip(self, timeout: float = 5.0) -> float:
        """Seconds for a ping to the server and back, which no work of it is in; infinite after `timeout`."""
        began = time.monotonic()
        answered = self.socket.ping()
        return time.monotonic() - began if answered.wait(timeout) else np.inf

    def speak(self, samples: np.ndarray) -> None:
        """Let the avatar say samples [n] in [-1, 1] at 16 kHz, behind those before; `spoken` ends the sentence."""
        pcm = (np.clip(samples, -1, 1) * 32767).round().astype("<i2")
        for first in range(0, len(pcm), PIECE):
            self.socket.send(bytes([protocol.SPEECH]) + pcm[first : first + PIECE].tobytes())

    def spoken(self) -> None:
        """What `speak` was given is complete."""
        self.send(type="spoken")

    def interrupt(self) -> None:
        """Be quiet."""
        self.send(type="interrupt")

    def until(self, ready: Callable[[], bool], timeout: float) -> None:
        """Pump until `ready`; TimeoutError after `timeout` seconds."""
        end = time.monotonic() + timeout
        while not ready():
            if time.monotonic() > end:
                raise TimeoutError(f"nothing after {timeout} s; last messages: {self.messages[-3:]}")
            self.pump(0.01)

    def pump(self, seconds: float) -> None:
        """Read and report for so long."""
        end = time.monotonic() + seconds
        while True:
            now = time.monotonic()
            if now >= self.next_report and self.origin is not None:
                self.next_report = now + TOLD_EVERY
                seen = min(int(self.place()) + 1, self.last + 1)
                self.send(type="played", frame=max(seen, 0), epoch=self.epoch)
            for answer in self.answers.values():
                if answer.frame is not None and answer.seen is None and answer.frame <= min(self.place(), self.last):
                    answer.seen = now
            if now >= end:
                return
            try:
                self._take(self.socket.recv(timeout=min(end - now, 0.01)))
            except TimeoutError:
                continue

    def place(self) -> float:
        """The playhead, in frames."""
        return -1.0 if self.origin is None else (time.monotonic() - self.origin) * self.fps

    def close(self) -> None:
        """Leave."""
        self.stack.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, data: str | bytes) -> None:
        now = time.monotonic()
        if isinstance(data, bytes):
            self.bytes += len(data)
            self._play(protocol.read_chunk(data, self.size), now)
            return
        message = json.loads(data)
        kind, number = message["type"], message.get("turn")
        if kind == "opened":
            self.epoch, self.origin, self.last = message["epoch"], None, -1
        elif kind == "rewind":
            self.epoch, self.last = message["epoch"], message["frame"] - 1
            self.rewinds.append((now, message["frame"]))
            for answer in self.answers.values() if not message["speech"] else ():
                answer.end = None if answer.end is None else min(answer.end, message["frame"])
        elif kind == "thinking":
            self.answers[number] = Answer(number, self.asked or now)
            self.asked = 0.0
        elif kind == "turn":
            self.answers[number].frame = message["frame"]
        elif kind == "answer":
            self.answers[number].parts_ms = message["parts_ms"]
        elif kind == "done":
            self.answers[number].end = message["frame"]
        else:
            self.messages.append(message)
            if kind == "error" and self.strict:
                raise UserError(f"the server refused: {message['message']}")

    def _play(self, chunk: protocol.Received, now: float) -> None:
        if chunk.epoch != self.epoch:
            return
        for answer in self.answers.values():
            if answer.frame == chunk.first_frame and answer.arrived is None:
                answer.arrived = now
        due = chunk.first_frame / self.fps
        if self.origin is None:
            self.origin = now + BUFFER - due
        elif (late := now - self.origin - due) > 0:
            self.stalls, self.stalled, self.origin = self.stalls + 1, self.stalled + late, now - due
        self.last = chunk.first_frame + len(chunk.frames) - 1
        sounds = np.split(chunk.sound, len(chunk.frames))
        for i, (frame, sound) in enumerate(zip(chunk.frames, sounds, strict=True)):
            number = chunk.first_frame + i
            for answer in self.answers.values():
                if answer.frame is not None and answer.audible is None and number >= answer.frame:
                    loud = np.flatnonzero(np.abs(sound) > 0.01)
                    if len(loud):
                        answer.audible = self.origin + (number + loud[0] / self.samples) / self.fps
            if self.keep:
                self.frames[number], self.sound[number] = frame, sound
