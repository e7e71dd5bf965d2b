"""One thread that draws for many viewers: the viewer whose video would freeze first is served first."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from distill.live.talkers import Talker
from distill.live.turns import Turn
from distill.live.viewer import Viewer
from eval.speed.latency import percentile
from students.serving.session import Session
from students.weights.checkpoint import Bundle

TICK = 0.02  # seconds; the longest that a deadline is slept over
PANEL_EVERY = 1.0
NETWORK = 0.03  # seconds that a chunk may need to reach the page
log = logging.getLogger(__name__)


@dataclass
class Totals:
    """Counted since the start; read by /metrics."""

    chunks: int = 0
    turns: int = 0
    stalls: int = 0
    opened: int = 0
    refused: int = 0
    errors: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    answers: deque[float] = field(default_factory=lambda: deque(maxlen=1000))


class Engine:
    """Viewers are touched by its thread alone; everybody else asks through `call`."""

    def __init__(self, bundle: Bundle, talker: Talker, max_viewers: int = 8, lead: int = 2):
        self.bundle, self.talker, self.max_viewers, self.lead = bundle, talker, max_viewers, lead
        self.viewers: list[Viewer] = []
        self.totals = Totals()
        self.step_seconds: deque[float] = deque([0.05], maxlen=100)
        self.calls: deque[tuple[Future, Callable[[], Any]]] = deque()
        self.woken, self.stopping = threading.Event(), False
        self.talking = ThreadPoolExecutor(max_viewers, thread_name_prefix="talker")
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.next_panel = 0.0

    def warm_up(self, reference: Tensor | None) -> None:
        """Draw a few chunks, so that the first viewer does not pay for what a process does once."""
        session = Session(self.bundle, reference, "", lead=4, idle="live", drop=("pose",))
        for _ in range(4):
            began = time.monotonic()
            session.step()
            self.step_seconds[0] = time.monotonic() - began

    def start(self) -> None:
        """Begin to draw."""
        self.thread.start()

    def stop(self) -> None:
        """End the thread; every viewer is closed."""
        self.stopping = True
        self.woken.set()
        self.thread.join()
        self.talking.shutdown(wait=False, cancel_futures=True)

    def call(self, function: Callable[..., Any], *given: Any) -> Future:
        """Run `function(*given)` on the engine's thread between two chunks."""
        future: Future = Future()
        self.calls.append((future, lambda: function(*given)))
        self.woken.set()
        return future

    def join(self, emit: Callable[[Any], None], **options: Any) -> Viewer | None:
        """A new viewer with `options` of its own, None when the maximum number of viewers is reached. On the engine's thread."""
        if len(self.viewers) >= self.max_viewers:
            self.totals.refused += 1
            return None
        conversation = self.talker.conversation()

        def talk(turn: Turn, utterance: str | Tensor) -> None:
            self.totals.turns += 1
            self.talking.submit(turn.fill, lambda: conversation.turn(utterance), self.woken.set)

        viewer = Viewer(self.bundle, self.lead, emit, talk, **{"margin": self._margin, **options})
        self.viewers.append(viewer)
        self.totals.opened += 1
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """Free a viewer's session. On the engine's thread."""
        viewer.close()
        self.viewers.remove(viewer)

    # ---- inside

    def _margin(self) -> float:
        """A chunk that is being drawn, its own, and the way to the page."""
        return NETWORK + 2 * percentile(self.step_seconds, 90)

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
        while self.calls:
            future, call = self.calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # its asker gets it
                    future.set_exception(error)

    def _serve(self) -> bool:
        """One chunk for whom it is most urgent; whether anything was done."""
        now = time.monotonic()
        if now >= self.next_panel:
            self.next_panel = now + PANEL_EVERY
            for viewer in self.viewers:
                if viewer.session is not None:
                    viewer.emit({**viewer.panel(now), "viewers": len(self.viewers)})
        waiting = [(due, i) for i, viewer in enumerate(self.viewers) if (due := viewer.due(now)) is not None]
        if not waiting:
            return False
        viewer = self.viewers[min(waiting)[1]]
        stalls = viewer.stalls
        try:
            chunk = viewer.step(now, time.monotonic)
        except Exception as error:  # one viewer's fault must not end the others'
            log.exception("a viewer's stream failed")
            self.totals.errors += 1
            viewer.close()
            viewer.emit({"type": "error", "message": f"the stream failed ({type(error).__name__}); open it again"})
            return True
        if chunk is not None:
            self.totals.chunks += 1
            self.totals.stalls += viewer.stalls - stalls
            self.totals.seconds.append(viewer.seconds[-1])
            self.step_seconds.append(time.monotonic() - now)
            self.totals.answers.extend(viewer.answered.values())
            viewer.answered.clear()
        return True
