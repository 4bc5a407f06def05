"""Test mode: a store in memory, runs executed by `drain`, time moved by `advance`.

    async def test_outlines_are_made() -> None:
        async with in_memory(app) as harness:
            batch = await outline.map(["a.py", "b.py"])
            await harness.drain()
            assert [outcome.output async for outcome in batch.results()] == [...]

Nothing waits for real time: a run delayed by an hour runs after `harness.advance(3600)`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

from headrace.app import Headrace
from headrace.compose import memory_engine
from headrace.foundation.limits import Limits
from headrace.runtime.clock import ManualClock, SystemClock
from headrace.runtime.engine import Engine
from headrace.runtime.worker.sequential_threads import SequentialThreads
from headrace.runtime.worker.worker import Worker

DRAIN_TIMEOUT_S: Final = 10
"""Seconds that `drain` waits for a run in a thread, on a file or on a socket before it reports that the run hangs."""
POLL_S: Final = 0.02


class Harness:
    """One app on a store in memory, with a clock that moves only when a test moves it."""

    def __init__(self, app: Headrace, engine: Engine, clock: ManualClock) -> None:
        self.app = app
        self.engine = engine
        self.clock = clock

    async def drain(self) -> int:
        """Run everything that is due, and the runs that these enqueue. Return how many runs ended.

        Raises `AssertionError` when a run waits for something that will not come, such as a longer sleep (use
        `advance`).
        """
        before = await self._unsettled()
        worker = Worker(self.engine, self.app.registry, concurrency=100, kind="testing", threads=SequentialThreads())
        await worker.start()
        try:
            for _ in range(int(DRAIN_TIMEOUT_S / POLL_S)):
                await self.clock.settle()
                if not await self._due():
                    break
                await self.engine.recorded.wait(SystemClock(), POLL_S)
            else:
                raise AssertionError("expected all runs to end, but some still wait: for time? call harness.advance(…)")
        finally:
            await worker.stop(now=True)
        return before - await self._unsettled()

    async def advance(self, seconds: float) -> None:
        """Move the clock; runs that become due run at the next `drain`."""
        self.clock.advance(seconds)
        await self.clock.settle()

    async def _due(self) -> int:
        """Count the runs that are due or running."""
        queues = await self.engine.store.queues(self.engine.environment)
        return sum(queue.waiting_count + queue.leased_count for queue in queues if not queue.paused)

    async def _unsettled(self) -> int:
        queues = await self.engine.store.queues(self.engine.environment)
        return sum(queue.waiting_count + queue.leased_count + queue.delayed_count for queue in queues)


@asynccontextmanager
async def in_memory(app: Headrace, **limits: int) -> AsyncGenerator[Harness, None]:
    """Put `app` on a fresh store in memory while the block lasts; `limits` by name, as in `Headrace(…)`."""
    clock = ManualClock()
    engine = await memory_engine(Limits(**limits), clock)
    app.use_engine(engine)
    try:
        yield Harness(app, engine, clock)
    finally:
        await app.close()
