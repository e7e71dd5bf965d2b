"""The order of training data: rows of a batch as a function of seed, position and rank."""

import torch
from jaxtyping import Int
from torch import Tensor

from teachers.flow import keyed_generator


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
