"""The order of training data: rows of a batch as a function of seed, position and rank, and batches made before they are needed."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Generic, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from teachers.flow import keyed_generator

AHEAD = 2
"""Batches that are made while the one before is worked on."""
Item = TypeVar("Item")
Made = TypeVar("Made")


def batch_rows(
    size: int, batch: int, position: int, seed: int, rank: int = 0, world: int = 1
) -> Int[Tensor, " {batch}"]:
    """Rows of batch number `position`: an endless shuffled stream of `size` rows, a new permutation each epoch, no rank twice."""
    start = (position * world + rank) * batch
    wanted = torch.arange(start, start + batch)
    rows = torch.empty_like(wanted)
    for epoch in range(start // size, (start + batch - 1) // size + 1):
        order = torch.randperm(size, generator=keyed_generator(seed, "epoch", epoch))
        here = wanted // size == epoch
        rows[here] = order[wanted[here] % size]
    return rows


def made_ahead(
    make: Callable[[Item], Made], items: Iterable[Item], workers: int = 1, ahead: int = AHEAD
) -> Generator[Made]:
    """make(item) of each item, in order; `workers` threads make the next `ahead` of them while one is worked on (0: none, each is
    made when it is asked for). An error of `make` is raised where its item would have come."""
    if not ahead:
        yield from map(make, items)
        return
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(workers, "made-ahead") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class Positions(Generic[Made]):
    """make(position), a pure function, for positions that are asked for one after the other: the next `ahead` are made by a thread
    meanwhile. Another position than the next starts anew, so what is given depends on the position alone.

    Where the training itself computes on the CPU, ahead=0: OpenMP's threads wait for each other at every product, and beside a
    second thread that uses them they sleep there, which took three times as long (LOG.md, 2026-12-01)."""

    def __init__(self, make: Callable[[int], Made], ahead: int = AHEAD):
        self.make, self.ahead, self.next = make, ahead, -1
        self.coming: Generator[Made] | None = None

    def __call__(self, position: int) -> Made:
        if position != self.next:
            self.close()
            self.next, self.coming = position, made_ahead(self.make, count(position), ahead=self.ahead)
        self.next += 1
        assert self.coming is not None
        return next(self.coming)

    def close(self) -> None:
        """End the thread."""
        if self.coming is not None:
            self.coming.close()
