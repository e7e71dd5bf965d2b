"""The chunked sampler: push audio, pose and text as they come, get frames, for hours.

One integer clock: a latent frame is a whole number of pixel frames, a pixel frame a whole number of 16 kHz samples. The step
function is the one that training folds (schedule.advance); the order of work is denoise, hand over, commit meanwhile.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from threading import RLock
from typing import Any, Literal

import torch
from torch import Tensor

from students.serving import draw
from students.serving.checked import LARGEST_SEED, check_reference, check_text, whole
from students.serving.draw import Drawn, Event, Point, Ready
from students.serving.dubbing import FilmInput
from students.serving.inputs import SessionInputs, Starved
from students.serving.overlap import Beside, to_device
from students.student import Finished
from students.weights.checkpoint import Bundle
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError
from teachers.flow import keyed_generator
from teachers.guidance import Scales

IDLE = ("live", "hold", "wait")


@dataclass(frozen=True)
class Chunk:
    """Finished frames uint8 [t, H, W, 3] and the 16 kHz samples [t * samples_per_frame] of the avatar's voice with them.

    `first_frame` counts from the start of the stream; `idle`: for want of input, silence was put in (live) or the last frame
    was held (hold). `seconds` of each part of the work; `wait` is for the commit of the chunk before.
    """

    index: int
    first_frame: int
    frames: Tensor
    audio: Tensor
    seconds: dict[str, float]
    idle: Literal["", "live", "hold"] = ""


def alone(method: Callable[..., Any]) -> Any:
    """A method of a session that no other thread's is done beside, and that all ranks do which share its stream."""

    @wraps(method)
    def locked(self: "Session", *given: Any, **named: Any) -> Any:
        shared = self.bundle.shared
        with nullcontext() if shared is None else shared.call(self, method.__name__, given, named), self.lock:
            return method(self, *given, **named)

    return locked


def chunk_noise(spec, seed: int, chunk: int, step: int, batch: int = 1) -> Tensor:
    """Noise [B, C, n, h, w] of one denoising step: a function of (seed, chunk, step), never of call order."""
    channels, height, width = spec.latent_size
    rng = keyed_generator(seed, "session", chunk, step)
    return torch.randn(batch, channels, spec.chunk_frames, height, width, generator=rng)


class Session:
    """One stream of one avatar. Any split of the same input into pushes gives the same frames; memory is bounded. Threads may
    share it: one call is done after the other.

    reference [3, H, W] in [-1, 1] is frame 0 (None for a student that draws from text alone). `lead`: at most so many chunks
    ahead of the viewer, whose place `played` reports; so many can be taken back by `interrupt` (None: no bound, nothing can be).
    `idle`: what a step does while input is missing: wait (nothing), hold the last frame, or live: go on in silence. `drop`:
    modalities that this stream never gets. `timed` waits for the accelerator at each part of the work, so that a chunk's seconds
    are true there. `guidance`: the scales that a guidance-distilled student is conditioned on, within their trained ranges, one
    number for all or by name (None: the spec's). `conditions`: features from outside this package by name, without a batch axis;
    those that run with the latent frames for the whole stream, the last frame held; zeros for those that the network takes and no
    input gives. `film`: the stream dubs one, whose frames are pushed, and draws a region of them alone
    (`students.serving.dubbing`).
    """

    def __init__(
        self,
        bundle: Bundle,
        reference: Tensor | None,
        text: str,
        seed: int = 0,
        *,
        lead: int | None = None,
        idle: Literal["live", "hold", "wait"] = "wait",
        drop: tuple[str, ...] = (),
        timed: bool = False,
        guidance: Scales | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        film: bool = False,
    ):
        spec, self.number = bundle.spec, 0
        if bundle.shared is not None:
            options = {"lead": lead, "idle": idle, "drop": drop, "timed": timed, "guidance": guidance, "film": film}
            bundle.shared.opened(self, (reference, text, seed), {**options, "conditions": conditions})
        check_reference(spec, reference)
        seed = whole("seed", seed, 0)
        lead = None if lead is None else whole("session: lead", lead, 1)
        if idle not in IDLE or isinstance(drop, str):
            raise UserError(
                f"session: got idle={idle!r}, drop={drop!r}; idle is one of {', '.join(IDLE)}, drop a tuple"
            )
        if idle != "wait" and lead is None:
            raise UserError(
                f"session: idle={idle} without end; give lead, the chunks that may be made ahead of the viewer"
            )
        self.bundle, self.spec, self.seed, self.timed = bundle, spec, seed, timed
        self.lead, self.idle, self.drop = lead, idle, tuple(drop)
        self.lock = RLock()
        scales = spec.scales(guidance)
        self.device = next(bundle.student.parameters()).device
        # A decoder that is a network takes long enough to work beside it.
        self.beside = Beside(self.device, threaded=next(bundle.codec.parameters(), None) is not None)
        self.events: tuple[Event, ...] = ()
        self.viewed = 0
        self.committing: Callable[[], tuple[Any, Tensor]] | None = None  # waits for the state that belongs to `point`
        with torch.inference_mode():
            self.reference, made = None, {}
            self.portrait = None  # its latent [1, C, 1, h, w], where it leads the stream
            if reference is not None:
                image = reference[None].float().to(self.device)
                latent = (
                    bundle.codec.encode(image.unsqueeze(2)) if spec.network.reference or spec.network.lead else None
                )
                self.reference = latent if spec.network.reference else None
                self.portrait = latent if spec.network.lead else None
                made = bundle.of_image(image)
            dubbed = FilmInput(spec, bundle.codec) if film else None
            self.inputs = SessionInputs(spec, bundle.audio_encoder, self.drop, conditions, made, dubbed)
            features = self._read(text)
            self.point = Point(0, 0, bundle.student.open(features, cache="inplace"), text, features, guidance=scales)
        self.points = deque([self.point], maxlen=1 + (lead or 0))

    # ---- input

    @alone
    def push(
        self,
        audio: Tensor | None = None,
        pose: Tensor | None = None,
        rate: int = SAMPLE_RATE,
        other: Tensor | None = None,
        film: Tensor | None = None,
        region: Tensor | None = None,
    ) -> None:
        """Append audio [S] or [channels, S] in [-1, 1] at `rate` Hz, and pose rows [T, P], one a pixel frame.

        For a student of two speakers `audio` is its own voice and `other` the other speaker's, of the same length: one that is not
        given is silent meanwhile. To a stream that dubs a `film` its frames uint8 [T, H, W, 3] are pushed, and with them the
        `region` that is drawn anew, a box (left, top, right, bottom) in fractions of the frame [4], or one a frame [T, 4].
        Refused input (UserError) changes nothing.
        """
        self.inputs.push(audio, pose, rate, other, film, region)

    @alone
    def set(self, text: str, at: int | Literal["next"] = "next", how: Literal["keep", "recache"] = "keep") -> None:
        """Another text from chunk `at` on. keep: what was shown stays in the context as it is; recache: the visible chunks are
        committed again under the new text, so the change is quicker."""
        chunk = self._when("text", at)
        if how not in ("keep", "recache"):
            raise UserError(f"text how={how!r}: keep or recache")
        if how == "recache" and self.spec.history.commit != "clean":
            raise UserError("text how=recache: this student's history has no clean pass to repeat; use keep")
        with torch.inference_mode():
            self.events = draw.changed(self.events, Event(chunk, at == "next", text, self._read(text), how))

    @alone
    def guide(self, guidance: Scales, at: int | Literal["next"] = "next") -> None:
        """Other guidance scales from chunk `at` on, for a guidance-distilled student: one number for all, or by name those that
        change. What was shown stays in the context as it is; chunks in flight on a diagonal go on under the new scales."""
        chunk, full = self._when("guidance", at), self.spec.scales(guidance)
        given = guidance if isinstance(guidance, Mapping) else full or {}
        self.events = draw.changed(self.events, Event(chunk, at == "next", guidance=given))

    def _when(self, what: str, at: int | Literal["next"]) -> int:
        """The chunk that a change is for."""
        chunk = self.point.chunk if at == "next" else whole(f"{what} at chunk", at, 0)
        if chunk < self.point.chunk:
            raise UserError(f"{what} at chunk {chunk}: chunk {self.point.chunk - 1} is already drawn; give a later one")
        return chunk

    @alone
    def close(self) -> None:
        """No more input: what is left plays to its end, padded with silence to a whole chunk."""
        self.inputs.close()

    @alone
    def played(self, frame: int) -> None:
        """The viewer has seen all frames before `frame`."""
        self._check_drawn(frame)
        self.viewed = max(self.viewed, frame)

    # ---- output

    @alone
    def step(self) -> Chunk | Starved:
        """The next chunk, or why there is none."""
        with torch.inference_mode():
            ready = self.begin()
            if not isinstance(ready, Ready):
                return ready
            (drawn,) = draw.draw(self.bundle, [ready], self.beside, self.wait)
            return self.finish(ready, drawn)

    def frames(self) -> Iterator[Chunk]:
        """Every chunk that can be drawn now."""
        while isinstance(chunk := self.step(), Chunk):
            yield chunk

    @alone
    def interrupt(self, played: int | None = None, keep_input: bool = False) -> int:
        """Take back what the viewer has not seen: go back to the end of the chunk that holds frame `played` - 1 (default: what
        `played` reported), drop the input after it, and return the frame from which the stream goes on.

        What follows equals a session that never drew the dropped chunks. `keep_input` keeps it, so that a new text may use it.
        Chunks in flight (a diagonal schedule) were denoised with that input and start anew without `keep_input`.
        """
        self.settle()
        viewed = self.viewed if played is None else played
        self._check_drawn(viewed)
        points = [point for point in self.points if point.frame >= viewed]
        if viewed <= points[0].began and points[0].frame > 0:
            raise UserError(
                f"interrupt: frame {viewed} is too long ago, the earliest to return to is {points[0].frame}; "
                "open the session with a larger lead"
            )
        self.point = points[0]
        while self.points[-1] is not self.point:
            self.points.pop()
        self.viewed = min(viewed, self.point.frame)
        if not keep_input:
            start = self.spec.pixel_frames(self.point.chunk)[0]
            state = replace(self.point.state, flight=())  # it was denoised with that input
            self.points[-1] = self.point = replace(self.point, state=state)
            self.inputs.cut(start)
        return self.point.frame

    @alone
    def skip(self, frame: int) -> None:
        """Let the last chunk be frames from `frame` on: what is left of the chunk before it is never shown. For a viewer who has
        seen the frames before `frame` by now, so that what was drawn after an `interrupt` follows at once.

        Numbers alone change: every frame and sample that follows is what it would be without this, so many places earlier. The
        context holds the chunk that was cut short whole.
        """
        frame = whole("skip to frame", frame, 0)
        cut = self.points[-2] if len(self.points) > 1 else self.point
        earliest = max(cut.began, self.viewed)
        if cut is self.point or not earliest <= frame <= cut.frame:
            raise UserError(
                f"skip to frame {frame}: a chunk that is kept, before the last one, has to be cut there, "
                f"not seen any further; it is {earliest}..{cut.frame}"
            )
        count = self.point.frame - self.point.began
        self.points[-2] = replace(cut, frame=frame)
        self.points[-1] = self.point = replace(self.point, frame=frame + count, began=frame)

    @property
    def shift(self) -> int:
        """What is added to a frame's number in the input to get its number in the stream, from the next chunk on: held frames count
        up, skipped ones down."""
        return self.point.frame - self.spec.pixel_frames(self.point.chunk)[0]

    # ---- inside

    def _read(self, text: str) -> Tensor:
        """Features of a text [1, L, D]; a long one is cut at the student's token limit, with a warning."""
        tokens, limit = self.bundle.text.count(check_text(text)), self.spec.text.max_tokens
        if tokens > limit:
            warnings.warn(f"text of {tokens} tokens: the student reads the first {limit}", stacklevel=3)
        return self.bundle.text([text]).to(self.device)

    def _check_drawn(self, frame: int) -> None:
        frame = whole("played", frame, -LARGEST_SEED)
        if not 0 <= frame <= self.point.frame:
            raise UserError(f"played={frame}: {self.point.frame} frames were drawn; give how many of them were seen")

    def _starved(self) -> Starved | None:
        if self.inputs.ended(self.point.chunk):
            return Starved("end")
        if self.lead is not None and sum(point.frame > self.viewed for point in self.points) >= self.lead:
            return Starved("lead")
        return self.inputs.missing(self.point.chunk)

    @property
    def guidance(self) -> Mapping[str, float] | None:
        """The guidance scales of the last chunk by name; None without guidance distillation."""
        return self.point.guidance

    @alone
    def settle(self) -> None:
        """Finish the commit of the last chunk now; the next step does so anyway, so this is for a caller with time to spare."""
        if self.committing is not None:
            state, kept = self.committing()
            last = self.point.chunk - 1
            seen = tuple(replace(past, x0=kept) if past.chunk == last else past for past in self.point.seen)
            settled = replace(self.point, state=state, seen=seen)
            if self.points[-1] is self.point:
                self.points[-1] = settled
            self.point, self.committing = settled, None

    @property
    def batch_key(self) -> Hashable:
        """What sessions have in common whose next chunks `step_together` draws as one batch."""
        return (
            id(self.bundle),
            draw.batch_key(self.bundle, self.point.chunk, self.point.decoder),
            self.point.features.shape,
            self.inputs.film is None,
        )

    def begin(self) -> Ready | Chunk | Starved:
        """The first half of a step: what the next chunk takes, the commit of the one before done; or the last frame held; or why
        there is none. The caller holds the lock."""
        starved = self._starved()
        idle: Literal["", "live"] = ""
        if starved is not None:
            if starved.reason not in ("audio", "pose", "film") or self.idle == "wait":
                return starved
            if self.idle == "hold":
                return self._hold(starved)
            self.inputs.fill(self.point.chunk)
            idle = "live"
        began = self._now()
        self.settle()
        settled = self._now()
        point = draw.in_effect(self.point, self.events, self.bundle.student)
        scales = None if point.guidance is None else to_device(torch.tensor([[*point.guidance.values()]]), self.device)
        ahead = self.inputs.conditions(point.chunk, point.features, self.reference, scales)
        kept, encoder = None, None
        if self.inputs.film is not None:
            stop = self.inputs.span(point.chunk)[1]
            kept, encoder = self.inputs.film.kept(point.chunk, stop, point.encoder, self.device)

        def noise(place: int, step: int) -> Tensor:
            return to_device(chunk_noise(self.spec, self.seed, point.chunk + place, step), self.device)

        seconds = {"wait": settled - began, "encode": self._now() - settled}
        return Ready(point, ahead, noise, self.portrait, idle, seconds, kept, encoder)

    def finish(self, ready: Ready, drawn: Drawn) -> Chunk:
        """The second half: the chunk that was drawn, handed over; its commit is done when it is needed."""
        spec, point, ahead = self.spec, ready.point, ready.conditions
        index = point.chunk
        conditions = ahead.frames(0, spec.chunk_frames) if spec.schedule.ahead else ahead
        visible = spec.history.visible(index + 1)
        seen = tuple(past for past in (*point.seen, Finished(index, drawn.x0, conditions)) if past.chunk in visible)
        audio, frames = self.inputs.voice(index), drawn.frames
        if self.inputs.film is not None:
            frames = self.inputs.film.blend(spec.pixel_frames(index)[0], frames)
        self.committing = drawn.commit
        self.point = replace(
            point,
            chunk=index + 1,
            frame=point.frame + len(frames),
            decoder=drawn.decoder,
            seen=seen,
            last=frames[-1:].clone(),
            began=point.frame,
            encoder=ready.encoder,
        )
        self.points.append(self.point)
        self._forget()
        return Chunk(index, point.frame, frames, audio, {**ready.seconds, **drawn.seconds}, ready.idle)

    def _hold(self, starved: Starved) -> Chunk | Starved:
        """The last frame once more, for as long as a chunk lasts; nothing is drawn."""
        self.settle()
        point, count = self.point, self.spec.codec.stride * self.spec.chunk_frames
        if point.last is None:
            return starved
        frames = point.last.expand(count, -1, -1, -1)
        self.point = replace(point, frame=point.frame + count, began=point.frame)
        self.points.append(self.point)
        silence = torch.zeros(count * self.spec.samples_per_frame)
        return Chunk(point.chunk - 1, point.frame, frames, silence, {}, "hold")

    def _forget(self) -> None:
        """Drop input that no chunk needs any more, not even after an interrupt, and the events before it."""
        oldest = self.points[0].chunk
        self.inputs.forget(oldest)
        self.events = tuple(event for event in self.events if event.at >= oldest)

    def wait(self) -> None:
        """Until the accelerator is done, where the session is timed."""
        if self.timed and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _now(self) -> float:
        self.wait()
        return time.perf_counter()
