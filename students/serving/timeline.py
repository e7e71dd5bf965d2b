"""What a person does when: texts by time from a YAML file, or from a planner that is called on the chunk clock.

    behaviours:                      # name -> text; added to the defaults (BEHAVIOURS), or in their place
      wave: a person smiles and waves
    timeline:
      - {at: 0, do: listen}
      - {at: 2.5, do: speak, how: recache}
      - {at: 7, do: a person laughs and shakes the head}

An entry holds from the chunk on in which its time lies: a chunk is drawn under one text. In the place of `timeline` there may be
`planner: {name: "my_file:Thing", ...}`, a class of the user's own that chooses among the behaviours: examples/own_planner is a
chat model (FlowAct-R1 2601.10103's planner).
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from students.serving.session import Chunk, Session, Starved
from students.spec import Spec
from teachers.config import convert, nearest
from teachers.disk.read import read_yaml
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError
from teachers.registry import Registry

BEHAVIOURS = {
    "speak": "the speaker with a warm smile talks and keeps the head steady",
    "listen": "someone nods along while talking, with a calm face",
    "think": "someone tilts the head while talking, frowning",
    "idle": "someone sits motionless while talking, looking neutral",
    "gesture": "a presenter with raised brows talks and turns left and right",
}
"""What the five names of FlowAct-R1 mean, in words that the embedded world's students were taught."""


@dataclass(frozen=True)
class Cue:
    """A text that takes effect, and what becomes of the context then (see Session.set)."""

    text: str
    how: Literal["keep", "recache"] = "keep"


class Planner(Protocol):
    """Chooses what happens next. Called at the first chunk of every `every` seconds (0: at each chunk). Equal questions have equal
    answers, so that a stream may be cut, saved and taken back."""

    @property
    def every(self) -> Fraction: ...

    def next(self, seconds: Fraction, recent_audio: Tensor, reference: Tensor | None) -> Cue | None:
        """The text of the chunk that ends at `seconds` of the stream, None: the present one stays. `recent_audio` [S] at 16 kHz is
        what was played in the last `every` seconds before the chunk, `reference` [3, H, W] in [-1, 1] the person."""
        ...


@dataclass(frozen=True, kw_only=True)
class TimelineEntry:
    """From `at` seconds on the person does `do`: a behaviour's name, or a text."""

    at: Fraction
    do: str
    how: Literal["keep", "recache"] = "keep"


PLANNERS = Registry(
    kind="planner",
    group="planners",
    default=False,
    methods={"load": "def load(self, behaviours: dict[str, str]) -> Planner"},
)


@dataclass(frozen=True, kw_only=True)
class Script:
    """A timeline file. `behaviours` hold the defaults too; either `timeline` or `planner` is there."""

    behaviours: dict[str, str] = field(default_factory=dict)
    timeline: tuple[TimelineEntry, ...] = ()
    planner: Any = field(default=None, metadata={"kinds": PLANNERS})

    @property
    def begins(self) -> bool:
        """The timeline says what happens from the start."""
        return bool(self.timeline) and self.timeline[0].at == 0

    def check(self, spec: Spec, file: Path) -> None:
        """UserError for what this student cannot follow."""
        asked = [(f"timeline[{i}].how", entry.how) for i, entry in enumerate(self.timeline)]
        asked += [("planner.how", getattr(self.planner, "how", "keep"))]
        for key, how in asked:
            if how == "recache" and spec.history.commit != "clean":
                raise UserError(
                    f"{key}: recache in {file}; this student's history has no clean pass to repeat, use keep"
                )
        chunks = [chunk_at(spec, entry.at) for entry in self.timeline]
        for i, (entry, before, chunk) in enumerate(zip(self.timeline[1:], chunks, chunks[1:], strict=False), start=1):
            if chunk == before:
                start, stop = (float(frame / spec.fps) for frame in spec.pixel_frames(chunk))
                raise UserError(
                    f"timeline[{i}].at: {float(entry.at):g} s lies in the chunk of the entry before ({start:.2f} to "
                    f"{stop:.2f} s) in {file}; a chunk is drawn under one text, put them further apart"
                )


def read_script(file: Path) -> Script:
    """The script of a YAML file, read strictly; UserError that names file and key."""
    values = read_yaml(file, "give a YAML file of a timeline")
    if not isinstance(values, dict):
        raise UserError(f"timeline: {file} holds no mapping; write 'timeline:' and a list of {{at: SECONDS, do: TEXT}}")
    given = convert(Script, values, locate=lambda _: str(file), folder=file.parent.resolve())
    if bool(given.timeline) == (given.planner is not None):
        raise UserError(f"timeline: {file} must hold either timeline, with an entry, or planner; write one of them")
    behaviours = BEHAVIOURS | given.behaviours
    for name, text in given.behaviours.items():
        if len(name.split()) != 1 or not text.strip():
            raise UserError(f"behaviours.{name!s}: {file}; a behaviour is one word with a text that is not empty")
    entries = tuple(_resolved(entry, i, behaviours, file) for i, entry in enumerate(given.timeline))
    for i, (before, entry) in enumerate(zip((None, *entries), entries, strict=False)):
        if entry.at < 0 or (before is not None and entry.at <= before.at):
            raise UserError(f"timeline[{i}].at: got {float(entry.at):g} s in {file}; times start from 0 and must rise")
    return replace(given, behaviours=behaviours, timeline=entries)


def _resolved(entry: TimelineEntry, i: int, behaviours: Mapping[str, str], file: Path) -> TimelineEntry:
    """The entry with the text that its `do` means. One word that is no name is refused, since it is most often a slip."""
    if entry.do in behaviours:
        return replace(entry, do=behaviours[entry.do])
    if len(entry.do.split()) < 2:
        hint = nearest(entry.do, behaviours)
        raise UserError(f"timeline[{i}].do: no behaviour {entry.do!r} in {file}; {hint}, or a text of several words")
    return entry


@dataclass(frozen=True)
class Timeline:
    """Entries with their texts in order of time, as a planner."""

    entries: tuple[TimelineEntry, ...]
    every: Fraction = Fraction(0)

    def next(self, seconds: Fraction, recent_audio: Tensor, reference: Tensor | None) -> Cue | None:  # noqa: ARG002
        """The last entry before `seconds`."""
        begun = [entry for entry in self.entries if entry.at < seconds]
        return Cue(begun[-1].do, begun[-1].how) if begun else None


def chunk_at(spec: Spec, seconds: Fraction) -> int:
    """The chunk in which a time lies."""
    first, second = (spec.pixel_frames(chunk)[1] for chunk in (0, 1))
    return max(0, 1 + (int(seconds * spec.fps) - first) // (second - first))


class Director:
    """A session whose texts a planner chooses: `step`, `frames` and `skip` in the place of the session's, everything else stays
    there.

    A text that was set by hand holds until the planner is called next. What was played is not in a saved session: a planner that
    uses it begins anew after a load, a Timeline goes on as if nothing was.
    """

    def __init__(self, session: Session, planner: Planner, reference: Tensor | None = None):
        self.session, self.planner, self.reference = session, planner, reference
        self.called = -1  # the last chunk that the planner was called for
        self.planned: set[int] = set()  # those that got a text of it
        first, second = (session.spec.pixel_frames(chunk)[1] for chunk in (0, 1))
        count = -(-planner.every * session.spec.fps // (second - first))
        self.played: deque[tuple[int, Tensor]] = deque(maxlen=int(count) + 1 + (session.lead or 0))

    def step(self) -> Chunk | Starved:
        """The next chunk under the text that the planner wants, or why there is none."""
        point = self.session.point
        self._take_back()
        if point.chunk < self.called:
            self.called = -1
        if self._due(point.chunk):
            self._ask()
        chunk = self.session.step()
        if isinstance(chunk, Chunk) and self.planner.every:
            self.played.append((chunk.first_frame, chunk.audio))
        return chunk

    def frames(self) -> Iterator[Chunk]:
        """Every chunk that can be drawn now."""
        while isinstance(chunk := self.step(), Chunk):
            yield chunk

    def skip(self, frame: int) -> None:
        """`Session.skip`, and what was not played is forgotten."""
        self._take_back()
        self.session.skip(frame)
        if len(self.played) > 1:
            (_, last), (began, cut) = self.played.pop(), self.played.pop()
            self.played.append((began, cut[: (frame - began) * self.session.spec.samples_per_frame]))
            self.played.append((frame, last))

    def _take_back(self) -> None:
        while self.played and self.played[-1][0] >= self.session.point.frame:
            self.played.pop()

    def _due(self, chunk: int) -> bool:
        """A function of the chunk's number alone, and once a chunk; one that takes audio is not called before there is some."""
        if chunk == self.called:
            return False
        if not self.planner.every:
            return True
        period = self.planner.every * self.session.spec.fps
        start, before = (self.session.spec.pixel_frames(max(k, 0))[0] for k in (chunk, chunk - 1))
        return start // period > before // period

    def _ask(self) -> None:
        session = self.session
        self.called = session.point.chunk
        wanted = int(self.planner.every * SAMPLE_RATE)
        played = torch.cat([torch.zeros(0), *(audio for _, audio in self.played)])
        stop = session.spec.pixel_frames(self.called)[1] / session.spec.fps
        cue = self.planner.next(stop, played[max(0, len(played) - wanted) :], self.reference)
        if cue is not None and cue.text != session.point.text:
            session.set(cue.text, how=cue.how)
            self.planned.add(self.called)
        elif self.called in self.planned:  # before it was taken back, another answer was given
            session.set(session.point.text)
        self.planned = {chunk for chunk in self.planned if chunk >= session.points[0].chunk}
