"""Hours: constant memory, constant step time, no last position."""

import os
import statistics
import time
from dataclasses import replace

import psutil
import pytest
from jaxtyping import config

from students.history import History
from students.schedule import Schedule
from students.serving.session import Session
from teachers.networks.wan import NetworkConfig
from tests.support.tiny import MIDAS, NETWORK, a_bundle, a_portrait, some_sound

pytestmark = [pytest.mark.slow, pytest.mark.long]

PER_FRAME, CHUNKS = 1280, os.environ.get("ENDURANCE_CHUNKS")
ONE_BLOCK = {"network": NetworkConfig(**(NETWORK | {"num_layers": 1}), audio_blocks=(0,), prediction="reference")}
STUDENTS = {  # and chunks of each: the first is twice as long as its network's table of positions
    "sequential": (1100, History(sinks=1, window=2), ONE_BLOCK),
    "diagonal": (
        850,
        History(sinks=1, window=1, memory=2, memory_every=2),
        {"schedule": Schedule(depth=3), **ONE_BLOCK},
    ),
    "midas": (
        850,
        History(sinks=1, window=2),
        {"network": replace(MIDAS, num_layers=1, head_layers=1), "chunk_frames": 1},
    ),
}


def timed_step(session: Session, sound) -> tuple[float, int]:
    """One chunk shown and the next one's sound pushed; seconds of the step, the chunk's index."""
    began = time.perf_counter()
    chunk = session.step()
    seconds = time.perf_counter() - began
    session.played(chunk.first_frame + len(chunk.frames))
    session.push(sound)
    return seconds, chunk.index


@pytest.mark.parametrize("kind", STUDENTS)
def test_thousands_of_chunks_in_constant_memory_and_time(kind, monkeypatch):
    """RSS grows < 0.5 MB per 500 chunks after warm-up, whatever the kind of student (ENDURANCE_CHUNKS=10000: that many of each).
    The last 100 steps of the old session are timed in turn with a young session's, so other work slows both."""
    usual, history, others = STUDENTS[kind]
    count, bundle = int(CHUNKS or usual), a_bundle(history, **others)
    old, young = (Session(bundle, a_portrait(), "a person nods", lead=2) for _ in range(2))
    spec, process, resident = bundle.spec, psutil.Process(), []
    sound = some_sound(spec.chunk_frames * spec.codec.stride * PER_FRAME)
    for session in (old, young):
        session.push(some_sound(spec.pixel_frames(spec.schedule.ahead)[1] * PER_FRAME + bundle.audio_encoder.lookahead))
    for _ in range(100):
        timed_step(young, sound)
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # the same shapes from here on
    rope_table = len(bundle.student.net._rope_cache)
    for i in range(count - 100):
        timed_step(old, sound)
        if i % 250 == 249:
            resident.append(process.memory_info().rss)
    pairs = [(timed_step(old, sound), timed_step(young, sound)) for _ in range(100)]
    assert pairs[-1][0][1] == count - 1
    assert (resident[-1] - resident[1]) / (len(resident) - 2) < 2**18, [size >> 10 for size in resident]
    late, early = (statistics.median(seconds for seconds, _ in steps) for steps in zip(*pairs, strict=True))
    print(f"{kind}: step {count} takes {late / early:.3f} of step 200")
    assert late < 1.25 * early, (late, early)
    assert len(bundle.student.net._rope_cache) == rope_table, (
        "a position's angles are kept, and there are only so many places"
    )
    if kind == "sequential":
        assert count * spec.chunk_frames > 2 * bundle.student.net.rope.max_seq_len
