"""How many viewers a machine draws in real time: what a batch costs is measured before the first comes, and kept up to date."""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from students.serving.session import Session
from students.serving.together import step_together
from students.weights.checkpoint import Bundle

LARGEST = 32  # chunks of a batch
LONGEST = 0.5  # of a chunk's length, that a batch may take: so long an answer waits behind it
WORTH = 1.15  # times the least cost of a chunk that a smaller batch may have, behind which answers wait less
LOAD = 0.75  # of the time that is given away; the rest is for talkers, encoders, pages and rewinds
ROUNDS = 2  # measured, of each size; the least counts
NEW = 0.03  # weight of the newest batch in how much slower all is than it was measured


class Capacity:
    """Seconds that a batch of so many chunks takes, `measured` by size, and how many viewers that is enough for."""

    def __init__(self, chunk_seconds: float, measured: dict[int, float] | None = None):
        self.chunk_seconds, self.measured, self.slowdown = chunk_seconds, measured or {1: 0.05}, 1.0
        self.room = math.inf  # streams that fit into the device's memory

    def cost(self, size: int) -> float:
        """Seconds of a batch, between and beyond measured sizes by a straight line."""
        sizes = sorted(self.measured)
        above = next((i for i, known in enumerate(sizes) if known >= size), len(sizes) - 1)
        low, high = sizes[max(above - 1, 0)], sizes[above]
        slope = (self.measured[high] - self.measured[low]) / (high - low) if high > low else self.measured[high] / high
        return self.slowdown * max(self.measured[high] + slope * (size - high), 0.0)

    def note(self, size: int, seconds: float) -> None:
        """A batch of so many chunks took so long."""
        self.slowdown += NEW * (seconds / max(self.cost(size) / self.slowdown, 1e-6) - self.slowdown)

    @property
    def largest(self) -> int:
        """Chunks of the largest batch: of those that do not take too long the smallest that draws a chunk about as cheaply as
        any."""
        each = {n: self.cost(n) / n for n in self.measured if self.cost(n) <= LONGEST * self.chunk_seconds}
        return min((n for n in each if each[n] <= WORTH * min(each.values())), default=1)

    @property
    def viewers(self) -> int:
        """Streams that can be drawn in real time, one at least."""
        each = min(self.cost(size) / size for size in self.measured if size <= self.largest)
        return max(1, int(min(LOAD * self.chunk_seconds / each, self.room)))


def measure(
    bundle: Bundle, reference: Tensor | None, most: int = LARGEST, clock: Callable[[], float] = time.perf_counter
) -> Capacity:
    """Draw batches of 1, 2, 4, .. at `most` chunks, until one takes too long or does not fit; of 1 alone where streams cannot be
    joined."""
    spec = bundle.spec
    found = Capacity(spec.codec.stride * spec.chunk_frames / float(spec.fps), {})
    sessions: list[Session] = []
    device = next(bundle.student.parameters()).device
    largest, free = 1 if bundle.student.one_by_one or bundle.shared else most, _free(device)
    try:
        for size in (2**i for i in range(largest.bit_length())):
            more = range(len(sessions), size)
            sessions += [Session(bundle, reference, "", i, lead=64, idle="live", drop=("pose",)) for i in more]
            _draw(sessions, 3 if size == 1 else 1, clock)  # what is done once, and the first chunk, are not the rule
            found.measured[size] = min(_draw(sessions, ROUNDS, clock))
            if found.cost(size) > LONGEST * found.chunk_seconds:
                break
    except torch.OutOfMemoryError:
        sessions.clear()
    if free is not None and sessions:
        each = max(free - (_free(device) or 0), 1) / len(sessions)
        found.room = max(1, int(0.9 * free / each))
    return found


def _draw(sessions: Sequence[Session], rounds: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of each of so many steps of all sessions, commits included."""
    seconds = []
    for _ in range(rounds):
        began = clock()
        step_together(sessions)
        for session in sessions:
            session.settle()
        seconds.append(clock() - began)
    return seconds


def _free(device: torch.device) -> int | None:
    """Bytes of an accelerator that nobody uses; None where it does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
