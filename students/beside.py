"""Two pieces of work of one chunk side by side: the decoder's, which somebody waits for, and the commit, which nobody does."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

First, Second = TypeVar("First"), TypeVar("Second")


class Beside:
    """On CUDA the first runs on a stream of its own, on a CPU the second in a worker thread."""

    def __init__(self, device: torch.device):
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = None if self.side else ThreadPoolExecutor(1, thread_name_prefix="commit")

    def run(self, first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Callable[[], Second]]:
        """The first one's result as soon as it is there, and what waits for the second one's."""
        if self.pool is not None:
            future = self.pool.submit(torch.inference_mode()(second))
            return first(), future.result
        with torch.cuda.device(self.device):
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                out = first()
            value = second()
            self.side.synchronize()
        return out, lambda: value
