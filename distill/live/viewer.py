"""One viewer's stream: a session, the avatar's turn, the viewer's playhead. No clock, no threads, no network: `now` is given."""

import math
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distill.live import protocol
from distill.live.operations.limits import Allowance
from distill.live.turns import Endpointer, Listening, Playhead, Turn
from eval.speed.latency import percentile
from students.serving.inputs import Starved
from students.serving.session import Chunk, Session
from students.weights.checkpoint import Bundle
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError

KEPT = 200  # chunk times of the panel
PIECE = SAMPLE_RATE // 10
FIRST_FRAME = 0.4  # seconds after its opening from which on a stream that shows nothing is late
MAX_SPOKEN = 1800 * SAMPLE_RATE  # samples of speech that may wait to be said


class Viewer:
    """`emit` takes what goes to the page: a dict (JSON) or what `pack` makes of a chunk and the epoch. `start` runs a turn's
    talker somewhere else, given the turn and the user's utterance. `margin` gives the seconds until a new chunk is drawn. `local`
    gives the frames that a player in this process has handed out by now; it drops the others when it interrupts.

    Speech, and an interrupt, take effect within a chunk: the viewer goes on to see the one before while the next is drawn, which
    then follows at once (`Session.skip`)."""

    def __init__(
        self,
        bundle: Bundle,
        lead: int,
        emit: Callable[[Any], None],
        start: Callable[[Turn, str | Tensor], None],
        margin: Callable[[], float] = lambda: 0.06,
        pack: Callable[[Chunk, int], Any] = protocol.pack_chunk,
        local: Callable[[], int] | None = None,
    ):
        self.bundle, self.spec, self.lead = bundle, bundle.spec, lead
        self.emit, self.start, self.margin, self.pack = emit, start, margin, pack
        self.session: Session | None = None
        self.turn: Turn | None = None
        self.next: Turn | None = None  # speech that came while the end of the turn before it is being shown
        self.placed: list[
            tuple[int, int]
        ] = []  # place in the stream and number of the samples let in since the last chunk
        self.playhead = Playhead(self.spec.fps, local)
        self.endpointer, self.listening = Endpointer(), Listening()
        self.epoch = self.turns = self.chunks = self.stalls = 0
        self.opened = self.ttff = 0.0
        self.waited = False  # for the viewer's playhead, since the last chunk
        self.resuming = False  # the next chunk is to follow what the viewer has seen by then
        self.seconds: deque[float] = deque(maxlen=KEPT)
        self.allowance, self.mistakes = Allowance(), 0  # what it may still send, and what was refused of what it sent
        self.spent = 0.0  # seconds of the engine, the older the less
        self.answered: dict[int, float] = {}  # seconds from the turn's end to the handing over of its first chunk

    # ---- what the viewer does

    def open(self, reference: Tensor, text: str, seed: int, now: float) -> None:
        """Begin the stream; an earlier one of this viewer ends."""
        self._drop_turn()
        session = self._noting(
            lambda: Session(self.bundle, reference, text, seed, lead=self.lead, idle="live", drop=("pose",))
        )
        self.session, self.playhead = session, Playhead(self.spec.fps, self.playhead.local)
        self.endpointer, self.listening, self.waited, self.resuming = Endpointer(), Listening(), False, False
        self.epoch += 1
        self.opened, self.ttff, self.chunks = now, 0.0, 0
        self.emit({"type": "opened", "epoch": self.epoch, "text": text})

    def answer(self, utterance: str | Tensor, now: float) -> Turn:
        """The user's turn has ended with a sentence or a sound: the talker begins to answer, whatever the engine does meanwhile.
        Any thread's to call; `say` makes it the avatar's turn."""
        turn = Turn(0, now)
        self.start(turn, utterance)
        return turn

    def say(self, turn: Turn, now: float) -> None:
        """The avatar's turn begins with what `answer` gave. What it was saying is broken off."""
        self._open()
        if self.turn is not None:
            self.interrupt(now)
        self.turn = self._announce(turn)

    def speak(self, samples: Tensor, now: float) -> None:
        """Let the avatar say samples [n] at 16 kHz, which come piece by piece: behind what it is saying, else in a new turn."""
        self._open()
        turn = self.next or self.turn
        if turn is None:
            turn = self.turn = self._announce(Turn(0, now))
        elif turn.end is not None:
            turn = self.next = self._announce(Turn(0, now))
        if turn.held + len(samples) > MAX_SPOKEN:
            raise UserError(f"more than {MAX_SPOKEN // SAMPLE_RATE} s of speech wait to be said; send it later")
        turn.finished = False
        for piece in samples.split(PIECE):
            turn.put(piece, now)

    def spoken(self) -> None:
        """The sentence that `speak` was given is complete."""
        turn = self.next or self.turn
        if turn is not None:
            turn.finished = True

    def feed(self, samples: Tensor, now: float) -> None:
        """Microphone samples: a voice interrupts the avatar, its end is the end of a turn. A student of two speakers is given them
        too, while it listens and while it talks."""
        if self.spec.speakers > 1:
            self.listening.put(samples)
        for found in self.endpointer.feed(samples):
            if isinstance(found, Tensor):
                self.say(self.answer(found, now), now)
            elif self.turn is not None:
                self.interrupt(now)

    def microphone(self, on: bool, now: float) -> None:
        """The microphone was switched: a turn that was being spoken ends here."""
        if not on and self.endpointer.speaking:
            self.feed(torch.zeros(self.endpointer.window * (self.endpointer.end_windows + 1)), now)
        self.endpointer = Endpointer()

    def interrupt(self, now: float) -> None:
        """Be quiet from the first frame on that can still reach the viewer; nothing happens where the avatar is."""
        turn = self.turn
        if turn is None and self.playhead.local is None:
            return
        self._drop_turn()
        frame = self._rewind(now, 0.0 if self.playhead.local is not None else self.margin(), keep_input=False)
        self.resuming = True
        if turn is not None:  # also where nothing could be taken back: the page must know that it is over
            self.emit({"type": "done", "turn": turn.number, "frame": frame})

    def set_text(self, text: str, now: float) -> None:
        """Another text condition, felt from the next chunk on that can still reach the viewer."""
        session = self._open()
        how = "recache" if session.spec.history.commit == "clean" else "keep"
        self._rewind(now, self.margin(), keep_input=True)
        self._noting(lambda: session.set(text, how=how))
        self.emit({"type": "text", "text": text})

    def guide(self, scales: dict[str, float], now: float) -> None:
        """Other guidance scales, felt from the next chunk on that can still reach the viewer."""
        session = self._open()
        session.spec.scales(scales)  # a refusal takes nothing back
        self._rewind(now, self.margin(), keep_input=True)
        session.guide(scales)
        self.emit({"type": "guidance", "scales": scales})

    def played(self, frame: int, epoch: int, now: float) -> None:
        """The page has shown all frames before `frame`."""
        if self.session is not None and epoch == self.epoch:
            self.session.played(frame)
            self.playhead.update(frame, now)
            self.waited = False
            if self.turn is not None and self.turn.end is not None and frame >= self.turn.end:
                self.turn, self.next = self.next, None

    def close(self) -> None:
        """Free everything."""
        self._drop_turn()
        self.session = None

    # ---- what the engine asks

    def due(self, now: float) -> float | None:
        """When the next chunk must be there, None while none can or need be drawn."""
        session, turn = self.session, self.turn
        if session is None or self.waited:
            return None
        if self.resuming or (turn is not None and not turn.begun and self._ready(turn)):
            return -math.inf  # an answer is waiting: first of all
        dry = self._dry(session.point.frame)
        if turn is not None and turn.begun and not turn.over and self._missing(turn) > 0:
            # speech that is late is waited for as long as the picture does not stand still
            return None if dry - now > self.margin() + self.playhead.trip else dry
        return dry

    def step(self, now: float, clock: Callable[[], float]) -> Chunk | None:
        """Draw and hand over the next chunk, if the viewer is near enough."""
        session, began = self.prepare(now), clock()
        return self.deliver(session.step(), now, began, clock())

    def prepare(self, now: float) -> Session:
        """The first half of a step: the session, given the sound of its next chunk."""
        session, turn = self._open(), self.turn
        if turn is not None and not turn.begun and self._ready(turn):
            self._begin(turn, now)
        if turn is not None and turn.begun:
            while turn.pieces and self._missing(None) > 0:
                piece = turn.take()
                self._let_in(piece, len(piece))
        elif (missing := self._missing(None)) > 0 and self.spec.speakers > 1:
            self._let_in(None, missing)
        return session

    def deliver(self, found: Chunk | Starved, now: float, began: float, ended: float) -> Chunk | None:
        """The second half: hand over what the session gave; None where that is no chunk. `now` is the first half's, drawing `began`
        and `ended` then, which is now."""
        if not isinstance(found, Chunk):
            self.waited = True
            return None
        dry = self.playhead.dry(found.first_frame)
        if self.resuming:
            found = self._resume(found, ended)
        shift = self._open().shift * self.spec.samples_per_frame
        self.placed = [(at + shift, count) for at, count in self.placed]
        self.emit(self.pack(found, self.epoch))
        self.placed.clear()
        self.seconds.append(ended - began)
        self.chunks += 1
        self.stalls += dry is not None and ended > dry
        self.ttff = self.ttff or ended - self.opened
        if self.turn is not None and self.turn.begun:
            self._send_timing(self.turn, found, now, ended)
        return found

    def settle(self) -> None:
        """Commit the last chunk, off the latency path."""
        if self.session is not None:
            self.session.settle()

    def panel(self, now: float) -> dict[str, Any]:
        """Numbers for the page."""
        drawn = self.session.point.frame if self.session is not None else 0
        mean = sum(self.seconds) / len(self.seconds) if self.seconds else 0.0
        length = self.spec.codec.stride * self.spec.chunk_frames / float(self.spec.fps)
        return {
            "type": "stats",
            "ttff_ms": 1000 * self.ttff,
            "p50_ms": 1000 * percentile(self.seconds, 50) if self.seconds else 0.0,
            "p95_ms": 1000 * percentile(self.seconds, 95) if self.seconds else 0.0,
            "rtf": mean / length,
            "lead_ms": 1000 * (drawn - self.playhead.place(now, drawn)) / float(self.spec.fps),
            "stalls": self.stalls,
        }

    # ---- inside

    def _dry(self, drawn: int) -> float:
        """When the last of the drawn frames has been shown. Until the viewer reports it: as if a player had begun at the first
        chunk; a stream that shows nothing yet may wait for FIRST_FRAME, so that those who join stop nobody's picture."""
        if (reported := self.playhead.dry(drawn)) is not None:
            return reported
        if not self.chunks:
            return self.opened + FIRST_FRAME
        return self.opened + self.ttff + drawn / float(self.spec.fps)

    def _open(self) -> Session:
        if self.session is None:
            raise UserError("no stream yet: send open first")
        return self.session

    def _noting(self, call: Callable[[], Any]) -> Any:
        """`call()`; what it warns of (a text that is cut) is sent to the page."""
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always", UserWarning)
            result = call()
        for note in noted:
            self.emit({"type": "note", "message": str(note.message)})
        return result

    def _announce(self, turn: Turn) -> Turn:
        self.turns = turn.number = self.turns + 1
        self.emit({"type": "thinking", "turn": turn.number})
        return turn

    def _drop_turn(self) -> None:
        if self.turn is not None:
            self.turn.cancel()
        self.turn = self.next = None
        self.placed.clear()

    def _rewind(self, now: float, margin: float, keep_input: bool) -> int:
        """Take back the chunks that cannot have been begun when the next one arrives, `margin` seconds and a way to the viewer
        from now; the frame at which those that are left end."""
        session, drawn, seen = self._open(), self._open().point.frame, self._open().viewed
        frame = session.interrupt(self._reached(now, margin, drawn), keep_input=keep_input)
        if self.playhead.local is not None:
            seen = max(seen, self.playhead.local())  # reports of an earlier epoch do not count
            session.viewed = min(seen, frame)  # that was a guess, and when the next chunk arrives it is known
        if frame < drawn:
            self._send_rewind(frame, now, keep_input)
        self.waited = False
        return frame

    def _resume(self, chunk: Chunk, now: float) -> Chunk:
        """The chunk that was just drawn, from the first frame on that it can still take the place of."""
        session, end = self._open(), chunk.first_frame
        earliest = session.points[-2].began
        frame = max(self._reached(now, 0.0, end), earliest)
        self.resuming = False
        if frame < end:
            session.skip(frame)
            self._send_rewind(frame, now, keep_input=False)
        turn = self.turn
        if turn is not None and turn.begun and not turn.shown:
            turn.first_frame = frame
            self.emit({"type": "turn", "turn": turn.number, "frame": frame})
        return replace(chunk, first_frame=frame)

    def _reached(self, now: float, margin: float, last: int) -> int:
        """Frames that the viewer has begun to see when a chunk arrives that is drawn in `margin` seconds, at most `last`."""
        place = self.playhead.place(now, last) + (margin + self.playhead.trip) * float(self.spec.fps)
        return min(max(math.ceil(place), self._open().viewed), last)

    def _send_rewind(self, frame: int, now: float, keep_input: bool) -> None:
        self.epoch += 1
        self.playhead.ask(now)
        self.emit({"type": "rewind", "frame": frame, "epoch": self.epoch, "speech": keep_input})

    def _let_in(self, own: Tensor | None, count: int) -> None:
        """The next `count` samples: the avatar's own voice, and to a student of two speakers the user's."""
        session = self._open()
        if own is not None:
            self.placed.append((session.inputs.audio.end, count))
        session.push(audio=own, other=self.listening.take(count) if self.spec.speakers > 1 else None)

    def _missing(self, turn: Turn | None) -> int:
        """Samples that the next chunk lacks, those that a turn holds not counted."""
        session = self._open()
        stop = session.inputs.span(session.point.chunk)[1]
        have = session.inputs.audio.end + (turn.held if turn is not None else 0)
        return stop * self.spec.samples_per_frame + session.bundle.audio_encoder.lookahead - have

    def _ready(self, turn: Turn) -> bool:
        """Enough of the answer is there for a chunk, and for those in flight behind it."""
        chunks = 1 + self.spec.schedule.ahead
        length = chunks * self.spec.codec.stride * self.spec.chunk_frames * self.spec.samples_per_frame
        return turn.finished or turn.held >= length + self.bundle.audio_encoder.lookahead

    def _begin(self, turn: Turn, now: float) -> None:
        """The answer takes the place of the idle frames that were not seen."""
        turn.begun = True
        turn.parts["talker"] = (turn.first_piece or now) - turn.ended
        turn.parts["queue"] = now - (turn.first_piece or now)
        if turn.held:
            self._rewind(now, self.margin(), keep_input=False)
            self.resuming = True

    def _send_timing(self, turn: Turn, chunk: Chunk, now: float, ended: float) -> None:
        if not turn.shown and chunk.first_frame >= turn.first_frame and turn.first_piece is not None:
            turn.shown = True
            turn.parts |= {name: chunk.seconds[name] for name in ("wait", "encode", "denoise", "decode")}
            turn.parts["rest"] = ended - now - sum(chunk.seconds.values())
            self.answered[turn.number] = ended - turn.ended
            ms = {name: 1000 * seconds for name, seconds in turn.parts.items()}
            self.emit({"type": "answer", "turn": turn.number, "frame": chunk.first_frame, "parts_ms": ms})
        if turn.over and turn.end is None:
            if turn.failed:
                self.emit({"type": "error", "message": f"the talker failed ({turn.failed[:200]})"})
            turn.end = -(-self._open().inputs.audio.end // self.spec.samples_per_frame) + self._open().shift
            self.emit({"type": "done", "turn": turn.number, "frame": turn.end})
