"""Two pieces of work of one chunk side by side: the decoder's, which somebody waits for, and the commit, which nobody does."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

First = TypeVar("First")
Second = TypeVar("Second")


class Beside:
    """On CUDA the first runs on a stream of its own, on a CPU the second in a worker thread."""

    def __init__(self, device: torch.device):
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="commit") if self.side is None else None

    def run(self, first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Callable[[], Second]]:
        """The first one's result as soon as it is there, and what waits for the second one's."""
        return self._on_cuda(self.side, first, second) if self.side else self._on_cpu(first, second)

    def _on_cpu(self, first, second):
        assert self.pool is not None
        future = self.pool.submit(torch.inference_mode()(second))
        return first(), future.result

    def _on_cuda(self, side: torch.cuda.Stream, first, second):
        with torch.cuda.device(self.device):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                out = first()
            value = second()
            side.synchronize()
        return out, lambda: value
