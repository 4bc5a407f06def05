"""The test mode: a store in memory, runs executed by `drain`, time moved by `advance`."""

from __future__ import annotations

import asyncio
import threading

import pytest

from headrace import DETACHED, Context, Headrace, Retry
from headrace.testing import in_memory


async def test_nothing_runs_before_it_is_drained() -> None:
    app, ran = Headrace("app"), []

    @app.task
    async def note(item: int) -> None:
        ran.append(item)

    async with in_memory(app) as harness:
        await note.map(range(3))
        assert ran == []
        assert await harness.drain() == 3
        assert ran == [0, 1, 2]


async def test_time_passes_only_by_advance() -> None:
    app = Headrace("app")

    @app.task(retry=Retry(attempts=2, delay_s=100, jitter=0))
    async def second_time_lucky(context: Context = DETACHED) -> int:
        if context.attempt == 1:
            raise ConnectionError
        return context.attempt

    async with in_memory(app) as harness:
        run = await second_time_lucky.options(delay_s=3_600).enqueue()
        assert await harness.drain() == 0
        await harness.advance(3_600)
        assert await harness.drain() == 0, "it failed, and is delayed again"
        await harness.advance(110)
        assert await harness.drain() == 1
        assert await run.result() == 2


async def test_plain_functions_run_one_after_the_other_in_a_thread() -> None:
    app, began = Headrace("app"), []

    @app.task
    def first_task(item: int) -> bool:
        began.append(item)
        return threading.current_thread() is not threading.main_thread()

    @app.task(pool="process")
    def second_task(item: int) -> bool:
        return first_task(item)

    async with in_memory(app) as harness:
        batches = [await task.map(range(50)) for task in (first_task, second_task)]
        assert await harness.drain() == 100
        for batch in batches:
            assert [outcome.output async for outcome in batch.results()] == [True] * 50
    assert began == [*range(50), *range(50)]


async def test_runs_enqueued_by_runs_are_drained_too() -> None:
    app = Headrace("app")

    @app.task
    async def countdown(left: int) -> int:
        if left:
            await countdown.enqueue(left - 1)
        return left

    async with in_memory(app) as harness:
        await countdown.enqueue(5)
        assert await harness.drain() == 1, "only one run existed before"
        batches = await harness.engine.store.batches("default")
        assert sum(ledger.completed for _, ledger in batches) == 6


async def test_a_run_that_waits_for_a_thread_is_waited_for() -> None:
    app = Headrace("app")
    released = threading.Event()

    @app.task
    async def threaded(_item: int) -> bool:
        threading.Timer(0.05, released.set).start()
        return await asyncio.to_thread(released.wait, 5)

    async with in_memory(app) as harness:
        run = await threaded.enqueue(1)
        await harness.drain()
        assert await run.result() is True


async def test_limits_are_set_by_name_and_the_app_is_free_afterwards() -> None:
    app = Headrace("app")

    @app.task
    async def first_task(_item: int) -> int:
        return 1

    for chunk_runs_max in (1, 2):
        async with in_memory(app, chunk_runs_max=chunk_runs_max) as harness:
            assert harness.engine.limits.chunk_runs_max == chunk_runs_max
            batch = await first_task.map(range(5))
            await harness.drain()
            assert (await batch.view()).ledger.completed == 5
    with pytest.raises(TypeError):
        async with in_memory(app, no_such_limit=1):
            pass
