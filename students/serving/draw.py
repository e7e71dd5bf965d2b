"""One chunk of one stream, or of several as one batch: denoise, decode, and commit meanwhile."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from students.schedule import Noise, advance, refine_context
from students.serving.checked import MOST_EVENTS
from students.serving.dubbing import Kept
from students.serving.overlap import Beside, to_host
from students.spec import Spec
from students.student import Finished, Joined, Student
from students.weights.checkpoint import Bundle
from teachers.codecs.linear import to_uint8
from teachers.codecs.streamed import DecoderState, EncoderState
from teachers.conditions import Conditions
from teachers.errors import UserError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Point:
    """Everything that a step changes, before chunk number `chunk`: a value, so that going back is taking an earlier one."""

    chunk: int
    frame: int  # handed over so far, held frames counted and skipped ones not
    state: Any  # the student's
    text: str
    features: Tensor  # of the text
    decoder: DecoderState | None = None
    seen: tuple[Finished, ...] = ()
    last: Tensor | None = None  # the last frame [1, H, W, 3]
    began: int = 0  # the first frame of what was handed over last
    encoder: EncoderState | None = None  # of a film that is dubbed
    guidance: Mapping[str, float] | None = None  # scales by name


@dataclass(frozen=True)
class Event:
    """What takes effect at chunk `at`: another text with its features, or guidance scales by name. `soon`: it was meant for the
    next chunk, whichever that was."""

    at: int
    soon: bool = False
    text: str = ""
    features: Tensor | None = None
    how: str = "keep"
    guidance: Mapping[str, float] = field(default_factory=dict)


def changed(events: Sequence[Event], new: Event) -> tuple[Event, ...]:
    """The events with another one in the place of its kind at that chunk; UserError where too many wait. What was meant for the
    next chunk and lies behind it, as the stream has been taken back since, gives way too: the last word holds."""

    def gives_way(event: Event) -> bool:
        same_place = event.at == new.at or (new.soon and event.at > new.at)
        return event.soon == new.soon and (event.features is None) == (new.features is None) and same_place

    others = tuple(event for event in events if not gives_way(event))
    if len(others) >= MOST_EVENTS:
        raise UserError(f"change at chunk {new.at}: {len(others)} changes wait already; make this one later")
    scales: dict[str, float] = {}
    for event in sorted(filter(gives_way, events), key=lambda event: event.at):
        scales |= event.guidance
    return (*others, replace(new, guidance=scales | dict(new.guidance)))


def in_effect(point: Point, events: Sequence[Event], student: Student) -> Point:
    """The point with what takes effect at its chunk."""
    for event in events:
        if event.at != point.chunk:
            continue
        if point.guidance is not None:
            point = replace(point, guidance={**point.guidance, **event.guidance})
        if event.features is None:
            continue
        if event.how == "recache":
            state = student.recommit(event.features, point.seen, point.chunk, cache="inplace")
            state = replace(state, flight=point.state.flight)
        else:
            state = student.set_text(point.state, event.features)
        point = replace(point, state=state, text=event.text, features=event.features)
    return point


@dataclass(frozen=True)
class Ready:
    """What a stream's next chunk takes: the `Point` before it, the conditions of the chunk and of those in flight behind it, the
    noise, and where the portrait leads the stream its latent [1, C, 1, h, w]. `idle` and `seconds` are the `Chunk`'s. Where a film
    is dubbed, what is `kept` of it, and its encoder's state after the chunk."""

    point: Point
    conditions: Conditions
    noise: Noise
    portrait: Tensor | None
    idle: Literal["", "live"]
    seconds: dict[str, float]
    kept: Kept | None = None
    encoder: EncoderState | None = None


@dataclass(frozen=True)
class Drawn:
    """A chunk's latents x0 [1, C, n, h, w], frames uint8 [t, H, W, 3], the decoder's next state, and seconds of each part. `commit`
    waits for the student's next state and for what was put into it [1, C, n, h, w]."""

    x0: Tensor
    frames: Tensor
    decoder: DecoderState | None
    commit: Callable[[], tuple[Any, Tensor]]
    seconds: dict[str, float]


class Once(Generic[Value]):
    """A function that is called when its value is first wanted, by any thread, and never again."""

    def __init__(self, make: Callable[[], Value]):
        self._make: Callable[[], Value] | None = make
        self._lock = Lock()

    def __call__(self) -> Value:
        with self._lock:
            if self._make is not None:
                self._value, self._make = self._make(), None
        return self._value


def batch_key(bundle: Bundle, chunk: int, decoder: DecoderState | None) -> Hashable:
    """What streams whose next chunk is number `chunk` have in common with those that it can be drawn with as one batch."""
    history = bundle.spec.history
    refined = bool(history.refine_every) and history.is_refined(chunk)
    past = None if decoder is None else tuple(part.shape for part in decoder)
    return bundle.student.batch_key(chunk), bundle.spec.steps(chunk), refined, past


def draw(bundle: Bundle, ready: Sequence[Ready], beside: Beside, wait: Callable[[], Any] = lambda: None) -> list[Drawn]:
    """The chunks of streams of one `batch_key` as one batch, or of one stream alone. `wait` is called before the clock is read."""
    student, spec, first = bundle.student, bundle.spec, ready[0]
    index = first.point.chunk

    def now() -> float:
        wait()
        return time.perf_counter()

    began = now()
    alone = len(ready) == 1
    state = first.point.state if alone else student.join([one.point.state for one in ready])
    ahead = first.conditions if alone else Conditions.join_rows([one.conditions for one in ready])

    def noise(place: int, step: int) -> Tensor:
        return first.noise(place, step) if alone else torch.cat([one.noise(place, step) for one in ready])

    plan, levels, film = student.plan(state, ahead), spec.steps(index), Kept.join([one.kept for one in ready])
    x0, steps = advance(student, state, ahead, noise, levels, plan=plan, kept=film)
    conditions = ahead.frames(0, spec.chunk_frames) if spec.schedule.ahead else ahead
    denoised = now()

    def decode() -> tuple[list[Tensor], list[DecoderState | None]]:
        if bundle.shared is not None and not bundle.shared.is_main:
            return [blank_frames(spec, index)], [None]
        return decode_rows(bundle, x0, ready)

    def commit() -> list[tuple[Any, Tensor]]:
        kept = refine_context(student, state, x0, conditions, steps, noise, len(levels), plan)
        kept = kept if film is None else film(kept)
        after = student.commit(state, kept, conditions, steps, plan)
        if not isinstance(after, Joined):
            return [(after, kept)]
        return list(zip(after.rows, rows_of(kept, len(ready)), strict=True))

    (frames, decoders), second = beside.run(decode, commit)
    seconds = {"denoise": denoised - began, "decode": now() - denoised}
    committed = Once(second)
    return [
        Drawn(own, frames[i], decoders[i], lambda i=i: committed()[i], seconds)
        for i, own in enumerate(rows_of(x0, len(ready)))
    ]


def rows_of(x: Tensor, count: int) -> list[Tensor]:
    """The rows [1, ..] of a batch, each with memory of its own."""
    return [x] if count == 1 else [row.clone() for row in x.split(1)]


def blank_frames(spec: Spec, chunk: int) -> Tensor:
    """Frames of a chunk where another rank decodes it."""
    first, last = spec.pixel_frames(chunk)
    return torch.zeros(1, 1, 1, 3, dtype=torch.uint8).expand(last - first, -1, -1, -1)


def lead(x0: Tensor, portraits: Sequence[Tensor | None]) -> Tensor:
    """x0 [B, C, n, h, w] of first chunks as the codec decodes them, behind the portraits where these lead the streams."""
    given = [portrait.to(x0) for portrait in portraits if portrait is not None]
    return torch.cat([torch.cat(given), x0], dim=2) if given else x0


def decode_rows(bundle: Bundle, x0: Tensor, ready: Sequence[Ready]) -> tuple[list[Tensor], list[DecoderState | None]]:
    """Frames uint8 [t, H, W, 3] and the decoder's next state of each row of x0 [B, C, n, h, w]."""
    latents = x0 if ready[0].point.chunk else lead(x0, [one.portrait for one in ready])
    count, states = len(ready), [one.point.decoder for one in ready]
    state = states[0]
    if count > 1 and state is not None:
        state = tuple(torch.cat(parts) if parts[0].numel() else parts[0] for parts in zip(*states, strict=True))
    pixels, after = bundle.codec.decode_chunk(latents, state)
    frames = to_host(to_uint8(pixels).permute(0, 2, 3, 4, 1).contiguous())
    if count == 1:
        return [frames[0]], [after]
    slots = [[part] * count if not part.numel() else rows_of(part, count) for part in after]
    return list(frames), [tuple(slot[i] for slot in slots) for i in range(count)]
