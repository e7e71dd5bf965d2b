"""Several sessions of one student, a chunk of each as one batch."""

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from students.serving.draw import Ready, draw
from students.serving.inputs import Starved
from students.serving.session import Chunk, Session


def step_together(sessions: Sequence[Session]) -> list[Chunk | Starved]:
    """`step` of each of several sessions, in their order.

    Chunks of one `Session.batch_key` are one batch, whatever the ages of the streams: a context is padded to the longest under a
    mask, equal ones are not. The frames of each are those that it draws alone, to rounding. A student whose streams cannot be rows
    of a batch (`Student.one_by_one`), and ranks that share a stream, draw one after the other.
    """
    if len(sessions) == 1 or any(one.bundle.shared or one.bundle.student.one_by_one for one in sessions):
        return [session.step() for session in sessions]
    with ExitStack() as locks, torch.inference_mode():
        for session in sorted(sessions, key=id):  # in one order, whoever else takes several
            locks.enter_context(session.lock)
        found: list[Any] = [session.begin() for session in sessions]
        groups: dict[Hashable, list[int]] = {}
        for i, one in enumerate(found):
            if isinstance(one, Ready):
                groups.setdefault(sessions[i].batch_key, []).append(i)
        for group in groups.values():
            first, ready = sessions[group[0]], [found[i] for i in group]
            drawn = draw(first.bundle, ready, first.beside, first.wait)
            for i, one, made in zip(group, ready, drawn, strict=True):
                found[i] = sessions[i].finish(one, made)
    return found
