"""Hours: constant memory, constant step time, no last position."""

import os
import statistics
import time

import psutil
from tiny import a_bundle, a_portrait, some_sound

from students.history import History
from students.session import Session

PER_FRAME, CHUNKS = 1280, int(os.environ.get("ENDURANCE_CHUNKS", "3000"))


def timed_step(session: Session, sound) -> tuple[float, int]:
    """One chunk shown and the next one's sound pushed; seconds of the step, the chunk's index."""
    began = time.perf_counter()
    chunk = session.step()
    seconds = time.perf_counter() - began
    session.played(chunk.first_frame + len(chunk.frames))
    session.push(sound)
    return seconds, chunk.index


def test_thousands_of_chunks_in_constant_memory_and_time():
    """6,000 latent frames, six times the position table (ENDURANCE_CHUNKS=10000: twenty times): RSS grows < 1 MB per 1,000 chunks
    after warm-up. The last 100 steps of the old session are timed in turn with a young session's, so other work slows both."""
    bundle = a_bundle(History(sinks=1, window=2))
    old, young = (Session(bundle, a_portrait(), "a person nods", lead=2) for _ in range(2))
    sound, process, resident = some_sound(4 * PER_FRAME), psutil.Process(), []
    for session in (old, young):
        session.push(some_sound(3 * PER_FRAME + bundle.ears.lookahead))
    for _ in range(100):
        timed_step(young, sound)
    for i in range(CHUNKS - 100):
        timed_step(old, sound)
        if i % 500 == 499:
            resident.append(process.memory_info().rss)
    pairs = [(timed_step(old, sound), timed_step(young, sound)) for _ in range(100)]
    assert pairs[-1][0][1] == CHUNKS - 1
    assert CHUNKS * bundle.spec.chunk_frames > 5 * bundle.student.net.rope.max_seq_len
    assert (resident[-1] - resident[1]) / (len(resident) - 2) < 2**19, [size >> 10 for size in resident]
    late, early = (statistics.median(seconds for seconds, _ in steps) for steps in zip(*pairs, strict=True))
    print(f"step {CHUNKS} takes {late / early:.3f} of step 200")
    assert late < 1.25 * early, (late, early)
    assert len(bundle.student.net._turns) <= 4
