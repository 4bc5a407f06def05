"""Test mode: runs executed by `drain`, time moved by `advance`, on a store in memory or on a database of the test.

    def test_outlines_are_made() -> None:
        with in_memory_sync(app) as harness:
            batch = outline.map_sync(["a.py", "b.py"])
            assert harness.drain_sync() == 2
            assert [outcome.output for outcome in batch.results_sync()] == [...]

Nothing waits for real time: a run delayed by an hour runs after `harness.advance(3600)`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from headrace.app import Headrace
from headrace.compose import memory_engine, open_engine
from headrace.foundation.limits import TABLE, Limits
from headrace.foundation.settings import check_overrides, load
from headrace.foundation.suggestions import check_names
from headrace.runtime.clock import ManualClock, SystemClock
from headrace.runtime.engine import Engine
from headrace.runtime.owner_loop import OwnerLoop
from headrace.runtime.worker.sequential_threads import SequentialThreads
from headrace.runtime.worker.worker import Worker
from headrace.store.paging import listed_batches
from headrace.twins import blocking

DRAIN_TIMEOUT_S: Final = 10
"""Seconds that `drain` waits for a run in a thread, on a file or on a socket before it reports that the run hangs."""
POLL_S: Final = 0.02
BATCHES_MAX: Final = 1_000_000


class Harness:
    """One app on a store of a test, with a clock that moves only when the test moves it.

    `path`: the SQLite file of `in_database`, for connections of the test; None for another store.
    """

    def __init__(self, app: Headrace, engine: Engine, clock: ManualClock, *, path: Path | None = None) -> None:
        self.app = app
        self.engine = engine
        self.clock = clock
        self.path = path

    @property
    def _owner(self) -> OwnerLoop:
        return self.app.owner_loop

    async def drain(self) -> int:
        """Run everything that is due, and the runs that these enqueue. Return how many runs ended.

        Raises `AssertionError` when a run waits for something that will not come, such as a longer sleep (use
        `advance`).
        """
        before = await self._ended_by_batch()
        worker = Worker(self.engine, self.app.registry, concurrency=100, kind="testing", threads=SequentialThreads())
        await worker.start()
        try:
            for _ in range(int(DRAIN_TIMEOUT_S / POLL_S)):
                await self.clock.settle()
                if not await self._is_due():
                    break
                self.engine.wakeup.notify_local()  # runs of other connections are seen without a wait for the clock
                await self.engine.recorded.wait(SystemClock(), POLL_S)
            else:
                raise AssertionError("expected all runs to end, but some still wait: for time? call harness.advance(…)")
        finally:
            await worker.stop(now=True)
        after = await self._ended_by_batch()
        return sum(count - before.get(batch_id, 0) for batch_id, count in after.items())

    async def advance(self, seconds: float) -> None:
        """Move the clock; runs that become due run at the next `drain`."""
        self.clock.advance(seconds)
        await self.clock.settle()

    drain_sync = blocking(drain)
    advance_sync = blocking(advance)

    async def _is_due(self) -> bool:
        """True if runs are due or running."""
        store, environment = self.engine.store, self.engine.environment
        queues = await store.queues(environment)
        if any(queue.waiting_count or queue.leased_count for queue in queues if not queue.paused):
            return True
        if any(queue.paused for queue in queues):
            return False  # a delayed run of theirs would never begin
        due_us = await store.next_due_us(environment, self.app.registry.names)
        return due_us is not None and due_us <= self.clock.now_us()

    async def _ended_by_batch(self) -> dict[str, int]:
        """Count the runs of each batch that have ended."""
        batches = await listed_batches(self.engine.store, self.engine.environment, limit=BATCHES_MAX)
        return {
            batch.id: ledger.completed + ledger.failed + ledger.cancelled + ledger.expired for batch, ledger in batches
        }


@asynccontextmanager
async def in_memory(app: Headrace, **limits: int) -> AsyncGenerator[Harness, None]:
    """Put `app` on a fresh store in memory while the block lasts; `limits` by name, as in `Headrace(…)`.

    The store has no transactions: code that uses `enqueue_in` is tested with `in_database`.
    """
    check_names("in_memory()", limits, TABLE, "limit")
    check_overrides("in_memory()", limits)
    clock = ManualClock()
    engine = await memory_engine(Limits(**limits), clock)
    app.use_engine(engine)
    try:
        yield Harness(app, engine, clock)
    finally:
        await app.close()


@asynccontextmanager
async def in_database(app: Headrace, url: str | None = None, **limits: int) -> AsyncGenerator[Harness, None]:
    """Put `app` on a database while the block lasts: by default a new SQLite file in a temporary directory, which
    `harness.path` names.

    `url` is the store of a database that belongs to the test; what is in it stays there. Settings of the environment
    and of `headrace.toml` are not used.
    """
    check_overrides("in_database()", limits)
    with TemporaryDirectory(prefix="headrace-") as directory:
        folder = Path(directory)
        path = folder / "headrace.db" if url is None else None
        settings = load({"store": url or f"sqlite:///{path}", **limits}, {}, folder)
        engine = await open_engine(settings)
        clock = ManualClock(engine.clock.now_us())
        engine.clock, engine.beats_beside = clock, False
        app.use_engine(engine)
        try:
            yield Harness(app, engine, clock, path=path)
        finally:
            await app.close()


@contextmanager
def in_memory_sync(app: Headrace, **limits: int) -> Iterator[Harness]:
    """`in_memory` for tests that are not async; they use the blocking forms: `enqueue_sync`, `harness.drain_sync`."""
    with _blocking(app, in_memory(app, **limits)) as harness:
        yield harness


@contextmanager
def in_database_sync(app: Headrace, url: str | None = None, **limits: int) -> Iterator[Harness]:
    """`in_database` for tests that are not async."""
    with _blocking(app, in_database(app, url, **limits)) as harness:
        yield harness


@contextmanager
def _blocking(app: Headrace, context: AbstractAsyncContextManager[Harness]) -> Iterator[Harness]:
    try:
        with app.within_sync(context) as harness:
            yield harness
    finally:
        app.owner_loop.stop_background()
