"""Who speaks: the end of the user's spoken turn, the avatar's turn as its sound comes, and where the viewer is."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from teachers.encoders.small import SAMPLE_RATE

MAX_HELD = 20 * SAMPLE_RATE  # samples of a turn that may wait; its talker then waits too
NETWORK = 0.03  # least seconds for a message to the page and one back
AT_FIRST = 0.08  # what is taken until some were measured
TRIPS = 8  # measured ones that count


@dataclass
class Playhead:
    """Where the viewer is, from its last report: frames seen `frame`, at the time `at`; runs on by itself. `local` gives the frames
    that a player in this process has shown by now, so that nothing has to be guessed."""

    fps: Fraction
    local: Callable[[], int] | None = None
    frame: int = 0
    at: float | None = None
    asked: float | None = None  # when something was sent that the next report answers
    trips: deque[float] = field(default_factory=lambda: deque(maxlen=TRIPS))

    def ask(self, now: float) -> None:
        """Something was sent that the next report answers."""
        self.asked = now

    def update(self, frame: int, now: float) -> None:
        """The viewer reports `frame` frames seen."""
        if self.asked is not None:
            self.trips.append(now - self.asked)
        self.frame, self.at, self.asked = frame, now, None

    @property
    def trip(self) -> float:
        """Seconds for a message to the viewer and its answer, at most: the time between two reports is in them."""
        if self.local is not None:
            return 0.0
        return max(NETWORK, min(self.trips)) if len(self.trips) > 1 else AT_FIRST

    def place(self, now: float, drawn: int) -> float:
        """Frames seen by now, no more than were drawn."""
        if self.local is not None:
            return float(min(self.local(), drawn))
        if self.at is None:
            return 0.0
        return min(self.frame + (now - self.at) * float(self.fps), float(drawn))

    def dry(self, drawn: int) -> float | None:
        """The time at which the last drawn frame has been shown; None before the viewer's first report."""
        return None if self.at is None else self.at + (drawn - self.frame) / float(self.fps)


class Turn:
    """The avatar's turn, `number` of the stream's: a talker's pieces on their way to the session. `cancel` makes the talker stop at
    its next piece."""

    def __init__(self, number: int, ended: float):
        self.number, self.ended = number, ended  # ended: when the user's turn did
        self.pieces: deque[Tensor] = deque()
        self.held = 0
        self.first_piece: float | None = None
        self.finished = self.begun = self.shown = False
        self.failed = ""
        self.first_frame = 0
        self.end: int | None = None  # past its last frame, once that is known
        self.cancelled = threading.Event()
        self.parts: dict[str, float] = {}

    def fill(self, pieces: Callable[[], Iterator[Tensor]], woken: Callable[[], None], clock=time.monotonic) -> None:
        """Run the talker (in a thread of its own) until it is done or cancelled."""
        try:
            for piece in pieces():
                while self.held > MAX_HELD and not self.cancelled.is_set():
                    time.sleep(0.05)
                if self.cancelled.is_set():
                    break
                self.put(piece, clock())
                woken()
        except Exception as error:  # a talker is a plug-in: whatever it raises ends its turn alone
            self.failed = f"{type(error).__name__}: {error}"
        self.finished = True
        woken()

    def put(self, piece: Tensor, now: float) -> None:
        """Append samples [n]."""
        if len(piece):
            self.first_piece = now if self.first_piece is None else self.first_piece
            self.pieces.append(piece)
            self.held += len(piece)

    def take(self) -> Tensor:
        """The oldest piece."""
        piece = self.pieces.popleft()
        self.held -= len(piece)
        return piece

    def cancel(self) -> None:
        self.cancelled.set()

    @property
    def over(self) -> bool:
        """Nothing more will come."""
        return self.finished and not self.pieces


class Listening:
    """What the user says, on its way to a student of two speakers: at most `slack` samples later than it was said."""

    def __init__(self, slack: int = SAMPLE_RATE // 4):
        self.slack, self.kept = slack, torch.zeros(0)

    def put(self, samples: Tensor) -> None:
        """Append samples [n] as they come; of what is not taken the last second is kept."""
        self.kept = torch.cat([self.kept, samples])[-SAMPLE_RATE:]

    def take(self, count: int) -> Tensor:
        """The next `count` samples; silence before them where so many have not come, and the oldest are left out where they have
        waited too long."""
        kept = self.kept[-(count + self.slack) :]
        self.kept = kept[count:]
        return torch.nn.functional.pad(kept[:count], (count - len(kept[:count]), 0))


@dataclass
class Endpointer:
    """Begin and end of a spoken turn by energy: it begins when 100 ms are 12 dB above the noise floor and above -50 dBFS, and ends
    after 500 ms below that. `feed` gives "begin", then the turn's samples with 200 ms before them."""

    window: int = SAMPLE_RATE // 50
    begin_windows: int = 5
    end_windows: int = 25
    above: float = 10 ** (12 / 20)
    least: float = 10 ** (-50 / 20)
    longest: int = 30 * SAMPLE_RATE
    floor: float = 1e-4
    speaking: bool = False
    _loud: int = 0
    _quiet: int = 0
    _rest: Tensor = field(default_factory=lambda: torch.zeros(0))
    _kept: deque = field(default_factory=deque)

    def feed(self, samples: Tensor) -> list[str | Tensor]:
        """Microphone samples [n] -> what happened, in order."""
        samples = torch.cat([self._rest, samples])
        whole = len(samples) // self.window * self.window
        self._rest, found = samples[whole:], []
        for window in samples[:whole].split(self.window) if whole else ():
            found += self._window(window)
        return found

    def _window(self, window: Tensor) -> list[str | Tensor]:
        level = math.sqrt(float(window.square().mean()))
        loud = level > max(self.least, self.floor * self.above)
        self._kept.append(window)
        self._loud, self._quiet = (self._loud + 1, 0) if loud else (0, self._quiet + 1)
        if not self.speaking:
            rate = 0.005 if level > self.floor else 0.3  # noise rises slower than a voice begins
            self.floor += (level - self.floor) * rate
            while len(self._kept) > self.begin_windows + 10:
                self._kept.popleft()
            if self._loud < self.begin_windows:
                return []
            self.speaking = True
            return ["begin"]
        if self._quiet < self.end_windows and len(self._kept) * self.window < self.longest:
            return []
        speech = torch.cat(list(self._kept))
        self._kept.clear()
        self.speaking, self._loud = False, 0
        return [speech[: len(speech) - (self._quiet - 5) * self.window] if self._quiet > 5 else speech]
