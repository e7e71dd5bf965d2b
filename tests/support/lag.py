"""How long an event loop stood still: what a test of times cannot be held to on a machine that is that busy."""

import asyncio
import time

import pytest

STEP, MOST = 0.005, 0.04  # seconds


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
