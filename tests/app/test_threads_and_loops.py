"""Blocking calls from everywhere: threads, several event loops, `def` tasks, notebooks, the testing mode."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from headrace import Headrace, Run
from headrace.foundation.errors import InvalidInput, InvalidSetting, StoreUnavailable
from headrace.foundation.settings import load
from headrace.indexer import Entity, ndjson
from headrace.testing import in_memory
from tests.support import pool_tasks
from tests.support.store_rig import fresh_schema

T = TypeVar("T")


class Book(Entity):
    """A row of an indexer."""

    id: str


def made(store: str, **settings: Any) -> tuple[Headrace, Any, Any]:
    app = Headrace("threads", store=store, **settings)

    @app.task
    def child(n: int) -> int:
        return n * 2

    @app.task
    def parent(n: int) -> int:
        runs = [child.enqueue_sync(number) for number in range(n)]
        batch = child.map_sync(number for number in range(n))
        outputs = [outcome.output or 0 for outcome in batch.results_sync(timeout_s=60)]
        return sum(run.result_sync(timeout_s=60) for run in runs) + sum(outputs)

    return app, child, parent


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/headrace.db" if request.param == "sqlite" else fresh_schema(tmp_path)


@contextmanager
def loop_in_a_thread() -> Iterator[Callable[[Any], Any]]:
    """Run an event loop in another thread; yields a function that runs a coroutine there."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def test_a_plain_task_of_a_worker_enqueues_maps_and_waits(store: str) -> None:
    app, _, parent = made(store)
    async with app, app.worker(concurrency=8):
        run = await parent.enqueue(3)
        assert await run.result(timeout_s=60) == 12


async def test_threads_use_the_app_while_its_own_loop_uses_it(store: str) -> None:
    app, child, _ = made(store)

    def route(n: int) -> int:
        return int(child.enqueue_sync(n).result_sync(timeout_s=60))

    async with app, app.worker():
        sync = [asyncio.to_thread(route, n) for n in range(8)]
        runs = [await child.enqueue(n) for n in range(8)]
        assert await asyncio.gather(*sync) == [2 * n for n in range(8)]
        assert [await run.result(timeout_s=60) for run in runs] == [2 * n for n in range(8)]


def test_many_threads_open_the_app_at_once(store: str) -> None:
    app, child, _ = made(store)
    barrier = threading.Barrier(8)

    def call(n: int) -> Run[int]:
        barrier.wait()
        run: Run[int] = child.enqueue_sync(n)
        return run

    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(call, range(8)))
    assert len({run.batch_id for run in runs}) == 1, "one producer served all of them"
    with app.within_sync(app.worker()):
        assert [run.result_sync(timeout_s=60) for run in runs] == [2 * n for n in range(8)]
    app.close_sync()


def test_async_code_uses_an_app_that_a_thread_opened_first(store: str) -> None:
    app, child, _ = made(store)
    first = child.enqueue_sync(1)

    async def main() -> None:
        second = await child.enqueue(2)
        assert second.batch_id == first.batch_id
        batch = await child.map(numbers())
        assert (await app.get_run(first.id)).id == first.id
        assert len(await app.batches()) == 2
        with pytest.raises(InvalidSetting, match="another event loop") as raised:
            async with app.worker():
                pass
        assert "close" in raised.value.hint
        await asyncio.to_thread(worker.__enter__)
        assert await second.result(timeout_s=60) == 4
        assert [outcome.output async for outcome in batch.results(timeout_s=60)] == [0, 2, 4]
        assert (await batch.wait(timeout_s=60)).completed == 3
        await asyncio.to_thread(worker.__exit__, None, None, None)
        await app.close()

    async def numbers() -> AsyncIterator[int]:
        loop = asyncio.get_running_loop()
        for number in range(3):
            await asyncio.sleep(0)
            assert asyncio.get_running_loop() is loop
            yield number

    worker = app.within_sync(app.worker())
    asyncio.run(main())


async def test_a_second_event_loop_shares_the_app_of_the_first(store: str) -> None:
    app, child, _ = made(store)
    async with app, app.worker():
        first = await child.enqueue(1)

        async def elsewhere() -> tuple[Run[int], int]:
            run = await child.enqueue(2)
            return run, await run.result(timeout_s=60)

        with loop_in_a_thread() as on_other_loop:
            second, result = await asyncio.to_thread(on_other_loop, elsewhere())
        assert (second.batch_id, result) == (first.batch_id, 4)


def test_an_app_left_open_on_a_loop_that_stands_still_says_so(tmp_path: Path) -> None:
    app, child, _ = made(f"sqlite:///{tmp_path}/headrace.db")
    with asyncio.Runner() as runner:
        run = runner.run(child.enqueue(1))
        assert run.view_sync().input == 1, "its own thread may run the loop"

        def call() -> None:
            with pytest.raises(InvalidSetting, match="an event loop that is not running") as raised:
                child.enqueue_sync(2)
            assert "close" in raised.value.hint

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        runner.run(app.close())


async def test_a_call_that_would_block_its_own_event_loop_is_refused(tmp_path: Path) -> None:
    app, child, _ = made(f"sqlite:///{tmp_path}/headrace.db")
    async with app:
        calls: list[Callable[[], object]] = [
            lambda: child.enqueue_sync(1),
            lambda: child.map_sync([1]),
            app.batches_sync,
            app.close_sync,
        ]
        for call in calls:
            with pytest.raises(InvalidInput, match="inside a running event loop") as raised:
                call()
            assert "await" in raised.value.hint
            assert "asyncio.to_thread" in raised.value.hint


def test_a_thread_whose_app_s_loop_ends_gets_an_error(tmp_path: Path) -> None:
    app, child, _ = made(f"sqlite:///{tmp_path}/headrace.db")
    waiting = threading.Event()
    errors: list[BaseException] = []

    def wait(run: Run[int]) -> None:
        waiting.set()
        try:
            run.result_sync()
        except StoreUnavailable as error:
            errors.append(error)

    async def main() -> threading.Thread:
        thread = threading.Thread(target=wait, args=(await child.enqueue(1),))
        thread.start()
        await asyncio.to_thread(waiting.wait)
        return thread

    asyncio.run(main()).join()
    assert "event loop" in str(errors[0])
    app.close_sync()


def test_a_map_of_a_thread_takes_its_items_in_that_thread(tmp_path: Path) -> None:
    app, child, _ = made(f"sqlite:///{tmp_path}/headrace.db")
    threads: set[int] = set()

    def items(source: Any) -> Iterator[int]:
        for outcome in source.results_sync():  # a blocking call inside the items of another
            threads.add(threading.get_ident())
            yield outcome.output

    with app.within_sync(app.worker()):
        first = child.map_sync(range(1_000))
        second = child.options(priority=1).map_sync(items(first))
        assert second.wait_sync(timeout_s=60).completed == 1_000
    assert threads == {threading.get_ident()}

    def broken() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        child.map_sync(broken())
    app.close_sync()


async def test_threads_use_an_app_in_testing_mode_and_leaving_it_ends() -> None:
    app, child, parent = made("sqlite:////nowhere/at/all.db")
    async with in_memory(app) as harness:
        run = await asyncio.to_thread(child.enqueue_sync, 4)
        tree = await parent.enqueue(3)
        await harness.drain()
        assert await run.result() == 8
        assert await tree.result() == 12
        assert await asyncio.to_thread(run.result_sync) == 8


def test_an_import_error_after_a_blocking_call_ends_the_program_at_once(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "from headrace import Headrace\n"
        "app = Headrace('a', store='sqlite:///headrace.db', heartbeat_ms=300_000, session_timeout_ms=1_000_000)\n"
        "@app.task\n"
        "def t(n: int) -> int:\n"
        "    return n\n"
        "t.enqueue_sync(1)\n"
        "import no_such_module\n"
    )
    done = subprocess.run(
        [sys.executable, "broken.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    lines = [line for line in done.stderr.splitlines() if line]
    assert (done.returncode, lines[0], "no_such_module" in lines[-1]) == (
        1,
        "Traceback (most recent call last):",
        True,
    ), done.stderr


async def test_a_task_in_a_child_process_enqueues_into_the_store_of_its_worker(store: str, tmp_path: Path) -> None:
    settings = load({"store": store}, {}, tmp_path)
    pool_tasks.app.use(settings)
    try:
        async with pool_tasks.app as app, app.worker(tasks=["enqueues", "pid"]):
            run = await pool_tasks.enqueues.enqueue(3)
            assert await run.result(timeout_s=60) == 3
    finally:
        pool_tasks.app._settings = None


async def test_an_indexer_starts_only_on_the_event_loop_of_its_app(tmp_path: Path) -> None:
    (tmp_path / "events.ndjson").write_text("")
    app, child, _ = made(f"sqlite:///{tmp_path}/headrace.db")
    indexer = app.indexer("books", source=ndjson(tmp_path / "events.ndjson"), entities=[Book])

    @indexer.on("book")
    async def on_book(_event: Any, _context: Any) -> None:
        """Do nothing."""

    await asyncio.to_thread(child.enqueue_sync, 1)
    with pytest.raises(InvalidSetting, match="another event loop") as raised:
        await indexer.run()
    assert "close" in raised.value.hint
    assert await indexer.state() is None, "a call that only reads is run on the app's own loop"
    await app.close()
    await indexer.run()
    await app.close()
