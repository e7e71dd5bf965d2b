"""Counts of a server in Prometheus' text format (version 0.0.4)."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import psutil


class Histogram:
    """How many of the values that were added are no larger than each of the bounds."""

    def __init__(self, *bounds: float):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterable[str]:
        """Buckets, each with those below it, their sum and their number."""
        below = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {round(self.sum, 6)}"
        yield f"{name}_count {below}"


Value = float | Histogram | Mapping[str, float]
"""A number, a histogram, or a number for each value of the label `reason`."""


def exposition(series: Iterable[tuple[str, Literal["counter", "gauge", "histogram"], str, Value]]) -> str:
    """Series (name, type, what it is, value) as the text that Prometheus reads."""
    lines = []
    for name, kind, text, value in series:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        if isinstance(value, Histogram):
            lines += value.lines(name)
        elif isinstance(value, Mapping):
            lines += [f'{name}{{reason="{label}"}} {number}' for label, number in value.items()]
        else:
            lines.append(f"{name} {value}")
    return "\n".join(lines) + "\n"


def report(server: Any) -> str:
    """What is counted of a `distill.live.server.Server` and of its engine."""
    engine, totals = server.engine, server.engine.totals
    return exposition(
        (
            ("distill_viewers", "gauge", "Viewers who are connected.", len(engine.viewers)),
            ("distill_viewers_limit", "gauge", "Viewers there may be now.", engine.max_viewers),
            ("distill_viewers_total", "counter", "Viewers let in.", totals.opened),
            ("distill_viewers_refused_total", "counter", "Viewers for whom there was no room.", totals.refused),
            ("distill_refused_total", "counter", "Requests and connections refused.", server.turned_away),
            ("distill_messages_refused_total", "counter", "Messages of viewers refused.", server.mistakes),
            ("distill_chunks_total", "counter", "Chunks drawn.", totals.chunks),
            ("distill_stalls_total", "counter", "Chunks that came after the video stood still.", totals.stalls),
            ("distill_turns_total", "counter", "Turns of avatars.", totals.turns),
            ("distill_stream_errors_total", "counter", "Streams that failed.", totals.errors),
            ("distill_engine_busy_seconds_total", "counter", "Seconds of the engine at work.", round(totals.busy, 3)),
            ("distill_batch_chunks", "histogram", "Chunks drawn as one batch.", totals.batches),
            ("distill_chunk_seconds", "histogram", "Seconds until a chunk was drawn.", totals.seconds),
            ("distill_answer_seconds", "histogram", "From a turn's end to its answer's first chunk.", totals.answers),
            ("distill_seen_seconds", "histogram", "From a turn's end until the page showed the answer.", server.seen),
            ("process_resident_memory_bytes", "gauge", "Resident memory.", psutil.Process().memory_info().rss),
            ("process_start_time_seconds", "gauge", "Start, since the epoch.", round(server.started, 1)),
        )
    )
