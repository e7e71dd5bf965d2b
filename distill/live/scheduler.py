"""One thread that draws for many viewers, several chunks as one batch: whose video would freeze first is served first."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from distill.live.operations.capacity import LARGEST, Capacity, measure
from distill.live.operations.metrics import Histogram
from distill.live.talkers import Talker, Words, spoken
from distill.live.turns import Turn
from distill.live.viewer import Viewer
from eval.speed.latency import percentile
from students.serving.session import Chunk
from students.serving.together import step_together
from students.weights.checkpoint import Bundle
from teachers.errors import UserError

TICK = 0.02  # seconds; the longest that a deadline is slept over
PANEL_EVERY = 1.0
SPENT_SECONDS = 5.0  # after which what a viewer has cost counts a third
GREEDY = 2.0  # times the mean of all, from which on a viewer waits until nobody else does
ALONE = 4  # chunks drawn for one viewer alone, up to which it is not greedy: who joins first, or is answered, has some
log = logging.getLogger(__name__)


@dataclass
class Totals:
    """Counted since the start; read by /metrics."""

    chunks: int = 0
    turns: int = 0
    stalls: int = 0
    opened: int = 0
    errors: int = 0
    busy: float = 0.0  # seconds of drawing and of what viewers ask for
    refused: dict[str, int] = field(default_factory=lambda: {"full": 0, "closing": 0})
    seconds: Histogram = field(default_factory=lambda: Histogram(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28))
    answers: Histogram = field(default_factory=lambda: Histogram(0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 2.4))
    batches: Histogram = field(default_factory=lambda: Histogram(1, 2, 4, 8, 16, 32))


class Engine:
    """Viewers are touched by its thread alone; everybody else asks through `call`. `max_viewers` None: as many as `warm_up` finds
    that the machine draws in real time, by what batches cost since. `mark` changes the frames [t, H, W, 3] of all."""

    def __init__(
        self,
        bundle: Bundle,
        talker: Talker,
        max_viewers: int | None = None,
        lead: int = 2,
        mark: Callable[[Tensor], Tensor] | None = None,
    ):
        self.bundle, self.talker, self.fixed, self.lead, self.mark = bundle, talker, max_viewers, lead, mark
        self.viewers: list[Viewer] = []
        self.totals = Totals()
        self.capacity = Capacity(bundle.spec.codec.stride * bundle.spec.chunk_frames / float(bundle.spec.fps))
        self.calls: deque[tuple[Future, Callable[[], Any], Viewer | None]] = deque()
        self.woken, self.stopping, self.closing = threading.Event(), False, False
        self.talking = ThreadPoolExecutor(max_viewers or 256, thread_name_prefix="talker")
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.recent: deque[float] = deque([0.05], maxlen=100)  # seconds of batches
        self.next_panel = 0.0

    @property
    def max_viewers(self) -> int:
        """How many there may be now."""
        return self.capacity.viewers if self.fixed is None else self.fixed

    def warm_up(self, reference: Tensor | None) -> None:
        """Draw chunks, so that the first viewer does not pay for what a process does once, and measure what batches cost."""
        self.capacity = measure(self.bundle, reference, min(LARGEST, self.fixed or LARGEST))
        self.recent[0] = self.capacity.cost(1)

    def start(self) -> None:
        """Begin to draw."""
        self.thread.start()

    def stop(self) -> None:
        """End the thread; every viewer is closed."""
        self.stopping = True
        self.woken.set()
        self.thread.join()
        self.talking.shutdown(wait=False, cancel_futures=True)

    def call(self, function: Callable[..., Any], *given: Any, of: Viewer | None = None) -> Future:
        """Run `function(*given)` on the engine's thread between two batches, at the cost `of` a viewer."""
        future: Future = Future()
        self.calls.append((future, lambda: function(*given), of))
        self.woken.set()
        return future

    def full(self) -> str:
        """Why no viewer more is let in, in one line; empty where one is."""
        if self.closing:
            return "this server is closing; connect again in a moment"
        if len(self.viewers) < self.max_viewers:
            return ""
        return limit_reached(self.max_viewers, self.fixed is None)

    def join(self, emit: Callable[[Any], None], **options: Any) -> Viewer | None:
        """A new viewer with `options` of its own, None where there is no room (`full`). On the engine's thread."""
        if self.full():
            self.totals.refused["closing" if self.closing else "full"] += 1
            return None
        conversation = self.talker.conversation()

        def talk(turn: Turn, utterance: str | Tensor) -> None:
            self.call(self._count_turn)
            tell = self._teller(turn, emit)
            self.talking.submit(turn.fill, lambda: spoken(conversation.turn(utterance), tell), self.woken.set)

        options = {"lead": self.lead, "margin": self._margin, **options}
        viewer = Viewer(self.bundle, emit=emit, start=talk, **options)
        self.viewers.append(viewer)
        self.totals.opened += 1
        return viewer

    def _count_turn(self) -> None:
        self.totals.turns += 1

    def _teller(self, turn: Turn, emit: Callable[[Any], None]) -> Callable[[Words], None]:
        """Takes the words of a turn from its talker's thread, and sends them behind its announcement, none after its end."""
        waiting: deque[Words] = deque()

        def send() -> None:
            while waiting and turn.number and not turn.cancelled.is_set():
                words = waiting.popleft()
                emit({"type": "words", "turn": turn.number, "who": words.who, "text": words.text})
            if waiting and not turn.cancelled.is_set():
                self.call(send)

        def tell(words: Words) -> None:
            waiting.append(words)
            self.call(send)

        return tell

    def leave(self, viewer: Viewer) -> None:
        """Free a viewer's session. On the engine's thread."""
        viewer.close()
        self.viewers.remove(viewer)

    def close(self) -> None:
        """Let nobody in any more. On the engine's thread."""
        self.closing = True

    @property
    def talked_out(self) -> bool:
        """Whether no avatar is in the middle of a turn."""
        return all(viewer.turn is None for viewer in self.viewers)

    def adopt(self, bundle: Bundle) -> None:
        """Draw all streams that are opened from now on with another student; UserError for one that does not fit. On the engine's
        thread."""
        if differing := misfit(self.bundle, bundle):
            raise UserError(f"another student's {differing}: viewers who are here could not go on; restart the server")
        self.bundle = bundle
        for viewer in self.viewers:
            viewer.bundle = bundle

    # ---- inside

    def _margin(self) -> float:
        """A batch that is being drawn, and the own one."""
        return percentile(self.recent, 90) + self.capacity.cost(1)

    def _run(self) -> None:
        while not self.stopping:
            self.woken.clear()
            self._answer()
            if not self._serve():
                for viewer in self.viewers:
                    viewer.settle()
                self.woken.wait(TICK)
        for viewer in list(self.viewers):
            self.leave(viewer)
        while self.calls:
            self.calls.popleft()[0].cancel()

    def _answer(self) -> None:
        """What was asked until now: whoever goes on asking waits for a batch."""
        for _ in range(len(self.calls)):
            future, call, viewer = self.calls.popleft()
            if future.set_running_or_notify_cancel():
                began = time.monotonic()
                try:
                    future.set_result(call())
                except BaseException as error:  # its asker gets it
                    future.set_exception(error)
                self._charge([viewer] if viewer is not None else [], time.monotonic() - began)

    def _charge(self, viewers: Sequence[Viewer], seconds: float) -> None:
        """So many seconds were for these viewers."""
        self.totals.busy += seconds
        for viewer in viewers:
            viewer.spent += seconds / len(viewers)

    def _serve(self) -> bool:
        """A batch of chunks for whom it is most urgent; whether anything was done."""
        now = time.monotonic()
        if now >= self.next_panel:
            self._send_panels(now)
        batch = self._choose(now)
        if batch:
            self._draw(batch, now)
        return bool(batch)

    def _send_panels(self, now: float) -> None:
        self.next_panel = now + PANEL_EVERY
        for viewer in self.viewers:
            viewer.spent *= math.exp(-PANEL_EVERY / SPENT_SECONDS)
            if viewer.session is not None:
                viewer.emit({**viewer.panel(now), "viewers": len(self.viewers)})

    def _choose(self, now: float) -> list[Viewer]:
        """The most urgent viewer, and those whose next chunks can be of its batch: as many as it has time for, and all whose own
        chunk would be late behind this batch. Who is greedy comes after all others."""
        mean = sum(viewer.spent for viewer in self.viewers) / max(len(self.viewers), 1)
        least = self.capacity.cost(1)
        waiting = []
        for viewer in self.viewers:
            if (due := viewer.due(now)) is not None:
                greedy = viewer.spent > GREEDY * mean + ALONE * least and len(self.viewers) > 2
                waiting.append((greedy, due, len(waiting), viewer))
        if not waiting:
            return []
        waiting.sort(key=lambda one: one[:3])
        (greedy, first, _, viewer), *others = waiting
        key = viewer.session.batch_key if others and not self.bundle.student.one_by_one else None
        batch, largest = [viewer], self.capacity.largest
        for other_greedy, due, _, other in others:
            done = now + self.capacity.cost(len(batch) + 1)
            if len(batch) >= largest or key is None or other_greedy != greedy:
                break
            if (done <= first or due <= done + least) and other.session.batch_key == key:
                batch.append(other)
        return batch

    def _draw(self, batch: list[Viewer], now: float) -> None:
        """The next chunk of each, handed over."""
        try:
            sessions = [viewer.prepare(now) for viewer in batch]
            began = time.monotonic()
            found = step_together(sessions)
        except Exception as error:  # one viewer's fault must not end the others'
            if len(batch) > 1:
                for viewer in batch:
                    self._draw([viewer], now)
            else:
                self._fail(batch[0], error)
            return
        ended = time.monotonic()
        if self.mark is not None:
            found = [replace(one, frames=self.mark(one.frames)) if isinstance(one, Chunk) else one for one in found]
        drawn = sum(isinstance(one, Chunk) for one in found)
        if drawn:
            self.recent.append(ended - began)
            self.totals.batches.add(drawn)
        for viewer, one in zip(batch, found, strict=True):
            stalls = viewer.stalls
            chunk = viewer.deliver(one, now, began, time.monotonic())
            if chunk is not None:
                self.totals.chunks += 1
                self.totals.stalls += viewer.stalls - stalls
                self.totals.seconds.add(ended - began)
            for seconds in viewer.answered.values():
                self.totals.answers.add(seconds)
            viewer.answered.clear()
        handed_over = time.monotonic()
        if drawn:
            self.capacity.note(drawn, handed_over - began)  # frames to JPEGs count too
        self._charge(batch, handed_over - now)

    def _fail(self, viewer: Viewer, error: Exception) -> None:
        log.error("a viewer's stream failed", exc_info=error)
        self.totals.errors += 1
        viewer.close()
        viewer.emit({"type": "error", "message": f"the stream failed ({type(error).__name__}); open it again"})


def limit_reached(limit: int, measured: bool) -> str:
    """The message to a viewer beyond the limit; `measured`: it was not given by an option."""
    why = ", as many as this machine draws in real time" if measured else ""
    return f"maximum number of viewers reached ({limit}{why}); try again later"


def misfit(before: Bundle, after: Bundle) -> str:
    """What of another student would not go on where the first one's viewers are; empty where all does."""
    parts = {
        "size": lambda b: (b.spec.height, b.spec.width),
        "frame rate": lambda b: b.spec.fps,
        "length of chunks": lambda b: (b.spec.chunk_frames, b.spec.codec.stride, b.spec.schedule),
        "speakers": lambda b: b.spec.speakers,
        "portrait": lambda b: b.spec.takes_image,
        "guidance": lambda b: b.spec.guidance,
    }
    return ", ".join(name for name, part in parts.items() if part(before) != part(after))
