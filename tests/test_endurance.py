"""Hours: constant memory, constant step time, no last position."""

import os
import statistics
import time

import psutil
from tiny import a_bundle, a_portrait, some_sound

from students.history import History
from students.session import Session

PER_FRAME, CHUNKS = 1280, int(os.environ.get("ENDURANCE_CHUNKS", "3000"))


def test_thousands_of_chunks_in_constant_memory_and_time():
    """6,000 latent frames, six times the position table (ENDURANCE_CHUNKS=10000: twenty times): RSS grows < 1 MB per 1,000 chunks
    after warm-up. The time of the last 100 steps is compared loosely, for other work may run; LOG.md has an idle machine's."""
    bundle = a_bundle(History(sinks=1, window=2))
    session = Session(bundle, a_portrait(), "a person nods", lead=2)
    process, resident, seconds = psutil.Process(), [], []
    sound = some_sound(4 * PER_FRAME)
    session.push(some_sound(3 * PER_FRAME + bundle.ears.lookahead))
    for i in range(CHUNKS):
        began = time.perf_counter()
        chunk = session.step()
        seconds.append(time.perf_counter() - began)
        session.played(chunk.first_frame + len(chunk.frames))
        session.push(sound)
        if i % 500 == 499:
            resident.append(process.memory_info().rss)
    assert chunk.index == CHUNKS - 1
    assert CHUNKS * bundle.spec.chunk_frames > 5 * bundle.student.net.rope.max_seq_len
    assert (resident[-1] - resident[1]) / (len(resident) - 2) < 2**19, [size >> 10 for size in resident]
    early, late = statistics.median(seconds[100:200]), statistics.median(seconds[-100:])
    assert late < 1.5 * early, (early, late)
    assert len(bundle.student.net._turns) <= 4
