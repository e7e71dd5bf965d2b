"""Overlap decoding (on the latency path) with the KV-cache commit (off it), and copies that the host does not wait for."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

WORKERS = 4  # threads for commits, of all streams: each new one would keep memory of the math libraries behind it
First = TypeVar("First")
Second = TypeVar("Second")


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """The same values on `device`; from the host's memory to a CUDA device as a queued copy, which no host waits for."""
    if device.type != "cuda" or value.device.type == "cuda":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def to_host(value: Tensor) -> Tensor:
    """The same values in the host's memory; from a CUDA device as a queued copy, there when its stream is waited for."""
    if value.device.type != "cuda":
        return value.cpu()
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)


@cache
def workers() -> ThreadPoolExecutor:
    """The threads that commit while others decode."""
    os.register_at_fork(after_in_child=workers.cache_clear)  # a child has none of them
    return ThreadPoolExecutor(WORKERS, thread_name_prefix="commit")


class Beside:
    """On CUDA the first runs on a stream of its own beside the second. On a CPU the second runs in a worker thread if
    `threaded`, else when its result is needed: where the first is short, changing threads costs more than it hides (LOG.md)."""

    def __init__(self, device: torch.device, threaded: bool):
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = workers() if threaded and self.side is None else None

    def run(self, first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Callable[[], Second]]:
        """The first one's result as soon as it is there, and a function that gives the second one's (called once)."""
        if self.side is not None:
            with torch.cuda.device(self.device):
                self.side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.side):
                    out = first()
                value = second()
                self.side.synchronize()
            return out, lambda: value
        kind = self.device.type  # autocast is a thread's own, and may have ended when the second runs
        narrow = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        second = torch.inference_mode()(narrow(second))
        if self.pool is None:
            return first(), second
        future = self.pool.submit(second)
        return first(), future.result
