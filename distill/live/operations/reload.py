"""Another student for a server that goes on: streams that are open keep theirs."""

import asyncio
import signal
import sys
from collections.abc import Callable

from torch import Tensor

from distill.live.operations.capacity import measure
from distill.live.scheduler import Engine
from students.weights.checkpoint import Bundle
from teachers.errors import UserError


def reload_on(number: signal.Signals, engine: Engine, load: Callable[[], Bundle], portrait: Tensor) -> None:
    """At a signal what `load` gives becomes the student of all streams that are opened later. In a running event loop."""
    loop, running = asyncio.get_running_loop(), set[asyncio.Task]()

    def begin() -> None:
        if not running:
            running.add(task := loop.create_task(reload(engine, load, portrait)))
            task.add_done_callback(running.discard)

    loop.add_signal_handler(number, begin)


async def reload(engine: Engine, load: Callable[[], Bundle], portrait: Tensor) -> None:
    """Load, draw a few chunks with it aside, and let the engine take it; a line on stderr says what came of it."""
    try:
        bundle = await asyncio.to_thread(load)
        await asyncio.to_thread(measure, bundle, portrait if bundle.spec.takes_image else None, 1)
        await asyncio.wrap_future(engine.call(engine.adopt, bundle))
    except UserError as error:
        sys.stderr.write(f"distill: the student stays what it was: {error}\n")
    except Exception as error:  # a folder that is being written may be anything
        sys.stderr.write(f"distill: the student stays what it was ({type(error).__name__}: {error})\n")
    else:
        sys.stderr.write(
            f"distill: student {bundle.fingerprint[:12]} is taken by streams that are opened from now on\n"
        )
