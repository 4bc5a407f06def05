"""The baseline of `sleep100ms`: the same coroutines on the same number of runners, and nothing else.

A fixed set of long-lived tasks takes indexes from one iterator and awaits a sleep: no task per run, no queue, no store.
The limit is concurrency / 0.1 s; the difference to it is the cost of the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Final

SLEEP_S: Final = 0.1


def measure_sleep(runs_count: int, concurrency: int = 1_000) -> float:
    """Return the runs per second of `runs_count` coroutines that sleep 100 ms, `concurrency` at a time."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        started = time.perf_counter()
        runner.run(_all(iter(range(runs_count)), concurrency))
        return runs_count / (time.perf_counter() - started)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return the factory of the event loop that Headrace uses: uvloop if it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


async def _all(indexes: Iterator[int], concurrency: int) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(_runner(indexes))


async def _runner(indexes: Iterator[int]) -> None:
    for _ in indexes:
        await asyncio.sleep(SLEEP_S)
