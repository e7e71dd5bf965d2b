"""A stream on several ranks: each has a part of the tokens of every forward (`teachers.networks.sequence`).

Rank 0 is asked, reads and writes. Whatever it is asked of a `Session`, a new one included, it sends to the others first, which do
the same with a session of their own (`follow`): a session is a function of what it was given, so that all ranks come to the same
forwards in the same order, whatever clock rank 0 goes by. Rank 0 alone decodes; the encoders, which are short, run on every rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from threading import RLock
from typing import Any
from weakref import finalize

import torch
import torch.distributed as dist

from students.serving.session import Session
from students.weights.checkpoint import Bundle
from teachers.errors import UserError
from teachers.networks.sequence import SequenceGroup

IDLE = timedelta(days=365)
"""How long a rank waits for the next call; one that is killed is noticed otherwise (`distill.training.lifecycle.watch`)."""


class Shared:
    """A bundle's ranks, as `Bundle.shared`. Every rank of the group makes one."""

    def __init__(self, sequence: SequenceGroup):
        ranks = dist.get_process_group_ranks(sequence.group)
        self.is_main, self.source = sequence.rank == 0, ranks[0]
        self.calls: Any = dist.new_group(ranks, backend="gloo", timeout=IDLE)
        self.lock = RLock()
        self.broken = False  # a call has failed halfway: the ranks may no longer agree
        self._number = 0
        self._gone: list[int] = []  # sessions that nobody holds any more
        self._last: Session | None = None  # whose commit may be under way
        self._inside = False

    def opened(self, session: Session, given: Sequence[Any], options: Mapping[str, Any]) -> None:
        """A session is being made of these arguments."""
        with self.lock:
            self._number += 1
            session.number = self._number
            if self.is_main:
                self._send(self._number, "", given, options)
                finalize(session, self._gone.append, self._number)

    @contextmanager
    def call(self, session: Session, name: str, given: Sequence[Any], options: Mapping[str, Any]) -> Iterator[None]:
        """Around a method of a session: no other session's is at work on any rank meanwhile."""
        with self.lock:
            if self._inside:  # a method that another one calls
                yield
                return
            if self.is_main:
                self._send(session.number, name, given, options)
            self._inside = True
            try:
                if self._last is not None and self._last is not session:
                    self._last.settle()
                self._last = session
                yield
            except UserError:
                raise  # on every rank alike
            except BaseException:
                self.broken = True
                raise
            finally:
                self._inside = False

    def end(self) -> None:
        """Rank 0 asks for nothing more."""
        with self.lock:
            if self._last is not None:
                self._last.settle()
            self._broadcast(None)

    def receive(self) -> Any:
        """The next call; None at the end."""
        return self._broadcast(None)

    def _send(self, number: int, name: str, given: Sequence[Any], options: Mapping[str, Any]) -> None:
        if self.broken:
            raise RuntimeError("the ranks that share a stream no longer agree: start the command again")
        gone = [self._gone.pop() for _ in range(len(self._gone))]
        self._broadcast((number, name, tuple(given), dict(options), gone))

    def _broadcast(self, message: Any) -> Any:
        box = [message]
        dist.broadcast_object_list(box, self.source, group=self.calls, device=torch.device("cpu"))
        return box[0]


def follow(bundle: Bundle) -> None:
    """Do what rank 0 does, until it ends; of the other ranks. Refused input is rank 0's to report."""
    shared, sessions = bundle.shared, dict[int, Session]()
    assert shared is not None
    while (message := shared.receive()) is not None:
        number, name, given, options, gone = message
        for old in gone:
            sessions.pop(old, None)
        try:
            if name:
                getattr(sessions[number], name)(*given, **options)
            else:
                sessions[number] = Session(bundle, *given, **options)
        except UserError:
            continue
    if shared._last is not None:
        shared._last.settle()
