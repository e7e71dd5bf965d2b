"""One rank of many in this process: torch's fake process group, and a count of what it would send.

    with fake_ranks(8) as counted: ...
    counted["all_gather"].sizes  # bytes -> calls

Collectives return at once and what they give is not meant to be read, so only numbers and sizes are tested here.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.training.config import EngineConfig
from distill.training.engines.engine import Engine

NAMES = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}


@dataclass
class Sent:
    """How many collectives there were of each size: bytes of the larger side, which is the whole tensor."""

    sizes: Counter[int] = field(default_factory=Counter)


class Counted(TorchDispatchMode):
    """Collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = {name: Sent() for name in NAMES.values()}

    def __getitem__(self, name: str) -> Sent:
        return self.sent[name]

    def clear(self) -> None:
        self.sent = {name: Sent() for name in NAMES.values()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.name().split("::")[1]
            found = self.sent[NAMES[name]] if name in NAMES else Sent()
            sizes = [x.numel() * x.element_size() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            found.sizes[max(sizes, default=0)] += 1
        return func(*args, **(kwargs or {}))


class RankOfMany:
    """What an engine's roles ask of it."""

    device, rank, is_main, kind = torch.device("cpu"), 0, True, "fsdp2"

    def __init__(self, world_size: int, config: EngineConfig):
        self.world_size, self.config = world_size, config

    def autocast(self):
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    freeze = Engine.freeze

    def split(self, net):
        """Every rank has whole sequences."""
        return net

    def all_reduce_mean(self, tensors) -> None:
        """Not of a micro-step."""


@contextmanager
def fake_ranks(world_size: int) -> Iterator[Counted]:
    """Inside, this process is rank 0 of so many."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        with Counted() as counted:
            yield counted
    finally:
        dist.destroy_process_group()
