"""The test mode: a store in memory, runs executed by `drain`, time moved by `advance`."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from headrace import DETACHED, Context, Headrace, InvalidSetting, Retry
from headrace.testing import Harness, in_database, in_database_sync, in_memory, in_memory_sync
from tests.support.store_rig import fresh_schema


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
        assert await harness.drain() == 6, "the run and its children"
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
    with pytest.raises(InvalidSetting):
        async with in_memory(app, no_such_limit=1):
            pass


def test_a_test_that_is_not_async_uses_the_blocking_forms() -> None:
    app = Headrace("app")

    @app.task
    def child(n: int) -> int:
        return n

    @app.task
    def parent(n: int) -> int:
        runs = [child.enqueue_sync(number) for number in range(n)]
        return sum(run.result_sync(timeout_s=30) for run in runs)

    for _ in range(2):
        with in_memory_sync(app) as harness:
            run = parent.options(delay_s=3_600).enqueue_sync(4)
            assert harness.drain_sync() == 0
            harness.advance_sync(3_600)
            assert harness.drain_sync() == 5, "a parent and four children"
            assert run.result_sync() == 6
    assert not [thread for thread in threading.enumerate() if thread.name == "headrace-loop"]


def shop_of(app: Headrace) -> Any:
    @app.task(retry=Retry(attempts=2, delay_s=600, jitter=0))
    async def ship(order: int, context: Context = DETACHED) -> str:
        if context.attempt == 1:
            raise ConnectionError
        return f"order {order} shipped"

    return ship


async def check_shipping(harness: Harness, kept: Any) -> None:
    assert (await kept.view()).state == "waiting"
    assert await harness.drain() == 0, "the first attempt failed"
    await harness.advance(660)
    assert await harness.drain() == 1
    assert await kept.result() == "order 1 shipped"
    assert len(await harness.app.runs()) == 1, "the other was rolled back"


async def test_enqueue_in_is_tested_on_a_sqlite_file() -> None:
    app = Headrace("app", store="sqlite:////nowhere/at/all.db")
    ship = shop_of(app)
    async with in_database(app) as harness:
        assert harness.path is not None
        connection = sqlite3.connect(harness.path)
        kept = await ship.enqueue_in(connection, 1)
        connection.commit()
        await ship.enqueue_in(connection, 2)
        connection.rollback()
        connection.close()
        await check_shipping(harness, kept)
    assert not harness.path.exists()


def test_enqueue_in_sync_is_tested_on_a_sqlite_file() -> None:
    app = Headrace("app", store="sqlite:////nowhere/at/all.db")
    ship = shop_of(app)
    with in_database_sync(app) as harness, sqlite3.connect(str(harness.path)) as connection:
        run = ship.enqueue_in_sync(connection, 1)
        connection.commit()
        assert harness.drain_sync() == 0
        harness.advance_sync(660)
        assert (harness.drain_sync(), run.result_sync()) == (1, "order 1 shipped")
    connection.close()


async def test_enqueue_in_is_tested_on_a_database_of_the_test(tmp_path: Path) -> None:
    app = Headrace("app")
    ship, url = shop_of(app), fresh_schema(tmp_path)
    async with in_database(app, url) as harness:
        connection = await asyncpg.connect(url.partition("?")[0])
        await connection.execute(f"SET search_path TO {url.partition('schema=')[2]}")
        async with connection.transaction():
            kept = await ship.enqueue_in(connection, 1)
        transaction = connection.transaction()
        await transaction.start()
        await ship.enqueue_in(connection, 2)
        await transaction.rollback()
        await connection.close()
        await check_shipping(harness, kept)


def test_the_examples_of_the_page_pass_under_plain_pytest(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "testing.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for number, example in enumerate(examples):
        (tmp_path / f"test_example_{number}.py").write_text(example, encoding="utf-8")
    plugins = [option for name in ("anyio", "asyncio", "xdist", "timeout") for option in ("-p", f"no:{name}")]
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", *plugins, "--rootdir", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    tests_count = sum(example.count("def test_") for example in examples)
    assert (done.returncode, f"{tests_count} passed" in done.stdout) == (0, True), done.stdout
    assert tests_count >= 3
