"""Wall time of a callable."""

import statistics
import time
from collections.abc import Callable

import torch

from teachers.errors import UserError


def measure(call: Callable[[], object], warmup: int = 2, runs: int = 9) -> dict[str, float]:
    """Seconds of `call()` after `warmup` unmeasured calls: median, mean, p05, p95, min, max over `runs` (nearest rank).

    Waits for the accelerator before each reading of the clock, so queued kernels are counted.
    """
    if runs < 1:
        raise UserError(f"latency needs at least one run: got {runs}; set eval.latency_runs")
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(runs):
        _wait()
        start = time.perf_counter()
        call()
        _wait()
        seconds.append(time.perf_counter() - start)
    return {
        "runs": float(runs),
        "median": statistics.median(seconds),
        "mean": statistics.fmean(seconds),
        **_ranks(seconds),
    }


def _ranks(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "p05": ordered[round(0.05 * last)],
        "p95": ordered[round(0.95 * last)],
        "min": ordered[0],
        "max": ordered[last],
    }


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
