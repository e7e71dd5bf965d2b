"""How long an event loop stood still: what a test of times cannot be held to on a machine that is that busy."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest

STEP, MOST, LONGEST = 0.005, 0.04, 90.0  # seconds


def run_in_time(work: Coroutine) -> Any:
    """The result of a coroutine in a loop of its own; TimeoutError where it hangs."""
    return asyncio.run(asyncio.wait_for(work, LONGEST))


class Lag:
    """Of the running loop, from now on; its thread may have been waiting for a core, too."""

    def __init__(self):
        self.worst, self.task = 0.0, asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(STEP)
            self.worst = max(self.worst, time.monotonic() - began - STEP)

    def skip_if_busy(self) -> None:
        """Skip what follows, which is about times."""
        if self.worst > MOST:
            pytest.skip(f"the machine is too busy to time anything: a loop stood still for {1000 * self.worst:.0f} ms")
