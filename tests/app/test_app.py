"""The public API: apps opened and closed, moved between event loops, and used from scripts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace import Headrace
from headrace.foundation.errors import InvalidInput, InvalidSetting, NotFound
from headrace.runtime.clock import SystemClock


def made(folder: Path, **more: Any) -> tuple[Headrace, Any]:
    app = Headrace("own", store=f"sqlite:///{folder / 'headrace.db'}", **more)

    @app.task
    async def double(item: int) -> int:
        return item * 2

    return app, double


@pytest.fixture
def script(tmp_path: Path) -> Iterator[tuple[Headrace, Any]]:
    app, double = made(tmp_path)
    yield app, double
    app.close_sync()


def test_a_task_can_be_called_as_a_function() -> None:
    app = Headrace()

    @app.task(name="other")
    def add(a: int, b: int = 1) -> int:
        """Adds."""
        return a + b

    assert (add(1), add(1, b=2), add.name, add.__doc__) == (2, 3, "other", "Adds.")
    with pytest.raises(InvalidSetting, match="two tasks"):
        app.task(name="other")(lambda item: item)
    decorate = app.task(name="first")
    decorate(lambda item: item)
    with pytest.raises(InvalidSetting, match="two tasks"):
        decorate(lambda item: item)
    with pytest.raises(InvalidSetting, match="expected a function, got 5"):
        app.task(5)  # type: ignore[call-overload]  # what the test is about


async def test_an_app_is_closed_twice_and_opened_again(tmp_path: Path) -> None:
    app, double = made(tmp_path)
    async with app:
        first = await double.enqueue(1)
    await app.close()
    async with app, app.worker():
        assert await (await app.get_run(first.id)).result() == 2
        assert await (await double.enqueue(2)).result() == 4
    assert list(tmp_path.glob("headrace.db.live/*")) == []


async def test_unknown_ids_are_not_found(tmp_path: Path) -> None:
    app, _ = made(tmp_path)
    async with app:
        with pytest.raises(NotFound):
            await app.get_batch("batch_00000000000000000000000000")
        with pytest.raises(NotFound):
            await app.get_run("run_00000000000000000000000000_5")
        with pytest.raises(InvalidInput, match="expected a run id such as"):
            await app.get_run("run_1")


async def test_settings_come_before_the_app_is_opened(tmp_path: Path) -> None:
    app, _ = made(tmp_path)
    async with app:
        with pytest.raises(InvalidSetting, match="open already"):
            app.use(app.settings)
    with pytest.raises(InvalidSetting, match="flush_sise"):
        await Headrace(flush_sise=5).open()


def test_a_script_enqueues_maps_works_and_iterates(script: tuple[Headrace, Any]) -> None:
    app, double = script
    with app.within_sync(app.worker()) as worker:
        assert app.run_sync(app.run_sync(double.enqueue(4)).result()) == 8
        batch = app.run_sync(double.map(range(100)))
        assert [outcome.output for outcome in app.iter_sync(batch.results())] == [2 * item for item in range(100)]
        assert app.run_sync(batch.wait()).ledger.completed == 100
    assert worker.stats.completed == 101
    app.close_sync()
    assert app.run_sync(app.run_sync(double.map([1])).view()).ledger.waiting == 1


def test_leaving_iter_sync_early_closes_the_iterator(script: tuple[Headrace, Any]) -> None:
    app, _ = script
    closed: list[bool] = []

    async def endless() -> Any:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    for _ in app.iter_sync(endless()):
        break
    import gc

    gc.collect()
    assert closed == [True]


def test_an_error_inside_within_sync_ends_the_worker_and_is_raised(script: tuple[Headrace, Any]) -> None:
    app, double = script
    app.run_sync(double.enqueue(1))
    with pytest.raises(ZeroDivisionError), app.within_sync(app.worker()):
        _ = 1 / 0
    engine = app.run_sync(app.open())
    assert [session.kind for session in app.run_sync(engine.maintenance.sessions())] == ["producer"]


async def test_run_sync_inside_a_loop_is_refused(tmp_path: Path) -> None:
    app, double = made(tmp_path)
    with pytest.raises(InvalidInput, match="inside a running event loop"):
        app.run_sync(double.enqueue(1))


def test_two_apps_on_two_loops_share_one_file(tmp_path: Path) -> None:
    def work(base: int, results: list[int]) -> None:
        async def main() -> None:
            app, double = made(tmp_path, poll_interval_ms=5)
            async with app, app.worker():
                runs = [await double.enqueue(base + item) for item in range(20)]
                results.extend([await run.result() for run in runs])

        asyncio.run(main())

    results_by_thread: list[list[int]] = [[], []]
    threads = [threading.Thread(target=work, args=(100 * number, results_by_thread[number])) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results_by_thread == [[2 * item for item in range(20)], [2 * (100 + item) for item in range(20)]]


def test_an_app_works_on_a_new_loop_after_one_that_ended_without_close(tmp_path: Path) -> None:
    app, double = made(tmp_path)
    first = asyncio.run(double.enqueue(1))

    async def rest() -> None:
        second = await double.enqueue(2)
        assert second.batch_id != first.batch_id
        async with app.worker():
            assert await second.result() == 4
            handle = await app.get_run(first.id)
            assert await handle.result() == 2
            engine = await app.open()
            while (await engine.store.batch(first.batch_id))[0].state != "completed":
                await SystemClock().sleep(0.005)  # its stream is sealed by the process that finds the loop gone
        await app.close()

    asyncio.run(rest())


class Point(msgspec.Struct):
    """A result of a task."""

    x: int
    seen: datetime


async def test_a_result_is_decoded_as_the_task_s_return_annotation(tmp_path: Path) -> None:
    app = Headrace("app", store=f"sqlite:///{tmp_path}/typed.db")
    moment = datetime(2026, 1, 2, tzinfo=UTC)

    @app.task
    async def point(x: int) -> Point:
        return Point(x, moment)

    @app.task
    async def changed(x: int):  # type: ignore[no-untyped-def]  # an older version of the task
        return "not an integer"

    async with app, app.worker():
        run = await point.enqueue(1)
        assert await run.result() == Point(1, moment)
        batch = await point.map([2, 3])
        await batch.wait()
        handle = await app.get_batch(batch.id)
        assert [outcome.output async for outcome in handle.results()] == [Point(2, moment), Point(3, moment)]
        assert await (await app.get_run(run.id)).result() == Point(1, moment)
        older = await changed.enqueue(1)
        assert await older.result() == "not an integer"

    newer = Headrace("app", store=f"sqlite:///{tmp_path}/typed.db")

    @newer.task(name="changed")
    async def returns_an_integer(x: int) -> int:
        return x

    async with newer:
        assert await (await newer.get_run(older.id)).result() == "not an integer"
