"""An avatar that says what an agent gives it: speech in at any rate and pace, frames with their sound out in real time.

The stream is a viewer of an `Engine` like any page, in the place of whose player it stands: it drops what is taken back, and
reports what it has handed out. The doors are thin: they move its beats to a library's transport.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.live.scheduler import Engine
from distill.live.talkers import Echo
from distill.live.viewer import Viewer
from students import load_student
from students.serving.session import Chunk
from teachers import media
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError
from teachers.media.streams import Resampler

LATE = 0.02  # seconds behind its time from which on a frame sets the clock anew
SILENCE = np.zeros(0, np.int16)


@dataclass(frozen=True)
class Beat:
    """One frame's time: its number in the session, `picture` uint8 [H, W, 3], and `sound` int16 [n] at the stream's rate up to
    the last sample of speech, empty where nothing is said. `due`: the loop's time at which both should come out. `ended`:
    sentences whose last frame was the one before."""

    number: int
    picture: np.ndarray
    sound: np.ndarray
    due: float
    ended: int = 0


class Voice:
    """What was pushed since the last interrupt: the samples as they are to be played, and where the session has put them.

    Places of the session and of the voice count samples at 16 kHz; `rate` is that of the sound that comes out.
    """

    def __init__(self, rate: int):
        self.rate = rate
        self.samples, self.forgotten = bytearray(), 0  # int16 from sample `forgotten` on
        self.pushed = self.placed = 0
        self.spans: deque[tuple[int, int, int]] = deque()  # place in the session and in the voice, length
        self.marks: deque[int] = deque()  # ends of sentences, in the voice
        self.source = 0
        self.resamplers: tuple[Resampler | None, Resampler | None] = (None, None)

    def push(self, pcm: np.ndarray, rate: int) -> Tensor:
        """Append int16 samples [n] at `rate` Hz; gives those at 16 kHz [m] that they complete."""
        before = self._finish() if rate != self.source else torch.zeros(0)
        if rate != self.source:
            self.source = rate
            out, own = (None if rate == target else Resampler(rate, target) for target in (self.rate, SAMPLE_RATE))
            self.resamplers = out, own
        sound = torch.from_numpy(pcm.astype(np.float32) / 32768)
        played, read = (sound if way is None else way.push(sound) for way in self.resamplers)
        self._keep(played)
        read = torch.cat([before, read])
        self.pushed += len(read)
        return read

    def end(self) -> Tensor:
        """The sentence is complete: its last samples at 16 kHz."""
        own = self._finish()
        self.pushed += len(own)
        self.source = 0
        self.marks.append(self.pushed)
        return own

    @property
    def open(self) -> bool:
        """Samples came since the last end of a sentence."""
        return self.source > 0

    def place(self, at: int, count: int) -> None:
        """The next `count` samples of the voice lie in the session from sample `at` on."""
        if self.spans and self.spans[-1][0] + self.spans[-1][2] == at:
            begin, voice, length = self.spans.pop()
            self.spans.append((begin, voice, length + count))
        else:
            self.spans.append((at, self.placed, count))
        self.placed += count

    def between(self, begin: int, end: int) -> tuple[np.ndarray, int]:
        """int16 [n] of the session's samples begin..end-1, up to the last of speech, and how far into the voice that is
        (-1: nowhere)."""
        parts, at, reached = [], begin, -1
        for place, voice, count in self.spans:
            first, last = max(place, begin), min(place + count, end)
            if first < last:
                parts.append(np.zeros(self._out(first) - self._out(at), np.int16))
                parts.append(self._read(voice + first - place, voice + last - place))
                at, reached = last, voice + last - place
        return np.concatenate(parts) if parts else SILENCE, reached

    def forget(self, place: int) -> None:
        """Nothing before this sample of the session is read again."""
        while self.spans and self.spans[0][0] + self.spans[0][2] <= place:
            _, voice, count = self.spans.popleft()
            self._drop(voice + count)
        if self.spans and self.spans[0][0] < place:
            self._drop(self.spans[0][1] + place - self.spans[0][0])

    def _out(self, place: int) -> int:
        return place * self.rate // SAMPLE_RATE

    def _read(self, begin: int, end: int) -> np.ndarray:
        first, last = self._out(begin) - self.forgotten, self._out(end) - self.forgotten
        sound = np.frombuffer(bytes(self.samples[2 * first : 2 * last]), np.int16)
        return np.pad(sound, (0, last - first - len(sound)))  # a resampler may hold the last ones back

    def _drop(self, before: int) -> None:
        count = self._out(before) - self.forgotten
        del self.samples[: 2 * count]
        self.forgotten += count

    def _keep(self, sound: Tensor) -> None:
        self.samples += (sound * 32768).round().clamp(-32768, 32767).to(torch.int16).numpy().tobytes()

    def _finish(self) -> Tensor:
        rest = [torch.zeros(0) if way is None else way.finish() for way in self.resamplers]
        self.resamplers = (None, None)
        self._keep(rest[0])
        return rest[1]


def load_avatar(student: Path, portrait: Path, viewers: int = 8, crop: str = "face") -> tuple[Engine, Tensor]:
    """A started engine for the student of a folder, and a picture fitted to it; stop the engine in the end."""
    bundle = load_student(student)
    reference, _ = media.fit_portrait(media.decode_image(portrait), (bundle.spec.height, bundle.spec.width), crop)
    engine = Engine(bundle, Echo(), viewers)
    engine.warm_up(reference if bundle.spec.takes_image else None)
    engine.start()
    return engine, reference


class AvatarStream:
    """`open` it, `push` speech and `end` sentences as they come, `interrupt`, and read beats with `async for`, each when it is due;
    while sound is played, those after the first come `ahead` frames early, so that a transport never runs dry. All on one loop."""

    def __init__(self, engine: Engine, rate: int, ahead: float):
        self.engine, self.rate = engine, rate
        self.loop = asyncio.get_running_loop()
        self.fps, self.samples = float(engine.bundle.spec.fps), engine.bundle.spec.samples_per_frame
        self.ahead = ahead / self.fps
        self.frames: deque[tuple[int, np.ndarray]] = deque()
        self.voice = Voice(rate)
        self.viewer: Viewer | None = None  # None once it is closed
        self.joined: Viewer | None = None  # the engine's thread's
        self.fault: BaseException | None = None
        self.changed = asyncio.Event()
        self.epoch = self.cuts = self.cutting = self.stalls = self.ended = 0
        self.handed = 0  # frames that were handed out, which the engine's thread reads
        self.due: float | None = None
        self.early = 0.0
        self.interrupted = False  # the picture waits for what follows an interrupt

    @classmethod
    async def open(
        cls, engine: Engine, reference: Tensor | None, text: str, seed: int = 0, rate: int = 24_000, ahead: float = 0.75
    ) -> "AvatarStream":
        """Begin a stream of the portrait [3, H, W] in [-1, 1], which idles. UserError when the maximum number of viewers is
        reached."""
        self = cls(engine, rate, ahead)
        # a lead of one would wait for frames that an interrupt has dropped
        options = {"pack": self._pack, "local": lambda: self.handed, "lead": max(2, engine.lead)}
        self.viewer = self.joined = await self._ask(lambda: engine.join(self._emit, **options))
        if self.viewer is None:
            raise UserError(engine.full() or "the avatar could not join; try again")
        try:
            await self._ask(self.viewer.open, reference, text, seed, time.monotonic())
        except BaseException:
            await self.close()
            raise
        return self

    def push(self, pcm: np.ndarray, rate: int) -> None:
        """Speech to be said behind what was pushed before: int16 samples [n] or [n, channels] at `rate` Hz; never waits."""
        self._raise()
        pcm = pcm if pcm.ndim == 1 else pcm.mean(1).astype(np.int16)
        if len(pcm) and len(own := self.voice.push(pcm, rate)):
            self._tell(self._viewer.speak, own, time.monotonic())

    def end(self) -> None:
        """The sentence is complete; nothing happens where none was begun."""
        self._raise()
        if self.voice.open:
            if len(own := self.voice.end()):
                self._tell(self._viewer.speak, own, time.monotonic())
            self._tell(self._viewer.spoken)

    def interrupt(self) -> Future:
        """Drop at once all that was pushed and drawn and not yet handed out. The Future is done when the engine knows."""
        self.voice = Voice(self.rate)
        self.frames.clear()
        self.cuts, self.cutting = self.cuts + 1, self.cutting + 1
        self.early, self.ended, self.interrupted = 0.0, 0, True
        self.changed.set()
        return self.engine.call(self._cut)

    @property
    def speaking(self) -> bool:
        """Something that was pushed has not been handed out to its end."""
        return bool(self.voice.pushed > self.voice.placed or self.voice.spans or self.voice.marks or self.ended)

    def __aiter__(self) -> "AvatarStream":
        return self

    async def __anext__(self) -> Beat:
        while True:
            self._raise()
            if self.viewer is None:
                raise StopAsyncIteration
            delay = self._delay() if self.frames else None
            if delay is not None and delay <= 0:
                return self._hand_out()
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), delay)
            except TimeoutError:
                continue

    async def close(self) -> None:
        """Leave the engine; reading beats ends."""
        viewer, self.viewer = self.viewer, None
        self.changed.set()
        if viewer is not None and self.engine.thread.is_alive():
            await self._ask(self.engine.leave, viewer)

    # ---- inside

    @property
    def _viewer(self) -> Viewer:
        if self.viewer is None:
            raise UserError("the avatar's stream is closed; open another")
        return self.viewer

    def _delay(self) -> float:
        """Seconds until the first frame is due; one without speech behind one with speech is not early."""
        if self.due is None:
            return 0.0
        number = self.frames[0][0]
        sound, _ = self.voice.between(number * self.samples, (number + 1) * self.samples)
        return self.due - (self.early if len(sound) else 0.0) - self.loop.time()

    def _hand_out(self) -> Beat:
        number, picture = self.frames.popleft()
        self.handed = number + 1
        now = self.loop.time()
        sound, reached = self.voice.between(number * self.samples, (number + 1) * self.samples)
        self.voice.forget((number + 1) * self.samples)
        late = self.due is None or now - self.due > LATE
        self.stalls += late and self.due is not None and not self.interrupted
        due = now if late or self.due is None else self.due
        self.due = due + 1 / self.fps
        self.early = self.ahead if len(sound) else 0.0
        self.interrupted = False
        ended, self.ended = self.ended, 0
        while self.voice.marks and self.voice.marks[0] <= reached:
            self.voice.marks.popleft()
            self.ended += 1
        self._tell(self._viewer.played, number + 1, self.epoch, time.monotonic())
        return Beat(number, picture, sound, due, ended)

    def _cut(self) -> None:  # on the engine's thread
        viewer = self.joined
        if viewer is not None and viewer.session is not None:
            viewer.interrupt(time.monotonic())
        self._emit({"type": "cut"})

    def _pack(self, chunk: Chunk, epoch: int) -> tuple[Chunk, int, tuple[tuple[int, int], ...]]:
        assert self.joined is not None
        return chunk, epoch, tuple(self.joined.placed)

    def _emit(self, message: Any) -> None:  # on the engine's thread
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._take, message)

    def _take(self, message: Any) -> None:
        if isinstance(message, tuple):
            chunk, epoch, placed = message
            if not self.cutting and epoch == self.epoch:
                for at, count in placed:
                    self.voice.place(at, count)
                self.frames.extend(enumerate(chunk.frames.numpy(), chunk.first_frame))
                self.changed.set()
            return
        kind = message["type"]
        if kind == "cut":
            self.cutting -= 1
        elif kind in ("opened", "rewind"):
            self.epoch = message["epoch"]
            self.frames = deque(frame for frame in self.frames if frame[0] < message.get("frame", 0))
        elif kind == "error":
            self._fail(UserError(message["message"]))

    def _fail(self, fault: BaseException) -> None:
        self.fault = self.fault or fault
        self.changed.set()

    def _raise(self) -> None:
        if self.fault is not None:
            raise self.fault

    def _tell(self, function: Callable[..., Any], *given: Any) -> None:
        """Let the engine do it, in order, and do not wait: a chunk may be drawn meanwhile."""

        def done(future: Future) -> None:
            if not future.cancelled() and (fault := future.exception()) is not None and not self.loop.is_closed():
                self.loop.call_soon_threadsafe(self._fail, fault)

        self.engine.call(function, *given, of=self.joined).add_done_callback(done)

    async def _ask(self, function: Callable[..., Any], *given: Any) -> Any:
        return await asyncio.wrap_future(self.engine.call(function, *given, of=self.joined))
