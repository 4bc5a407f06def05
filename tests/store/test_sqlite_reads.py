"""Reads of the SQLite store that take long: their callers may leave, and short reads never wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace.foundation.limits import DEFAULT
from headrace.http.requests import service as http_service
from headrace.store.sqlite import SqliteStore
from headrace.store.sqlite.script_runner import SQL
from tests.support.http_server import running_server

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
ENDLESS_OF_ENVIRONMENT = f"{ENDLESS} WHERE :environment IS NOT NULL"


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[SqliteStore]:
    """Open a store."""
    store = SqliteStore(path / "headrace.db", DEFAULT)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def running(store: SqliteStore, count: int, *reads: Any) -> list[asyncio.Task[Any]]:
    """Start reads, and return when as many readers have a connection."""
    tasks = [asyncio.ensure_future(read) for read in reads]
    while len(store._reading) < count:
        await asyncio.sleep(0)
    return tasks


async def test_a_cancelled_read_frees_its_reader_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as store:
        monkeypatch.setitem(SQL, "any_api_key", ENDLESS)
        for _ in range(5):
            tasks = await running(store, 2, store.has_keys(), store.has_keys(), store.has_keys())
            for task in tasks:
                task.cancel()
            assert await asyncio.gather(*tasks, return_exceptions=True) != []
            assert await store.keys("default") == []
            assert await store.find_key("nothing") is None


async def test_a_read_after_an_interrupted_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as store:
        whole = SQL["any_api_key"]
        for _ in range(50):
            monkeypatch.setitem(SQL, "any_api_key", ENDLESS)
            tasks = await running(store, 1, store.has_keys())
            tasks[0].cancel()
            monkeypatch.setitem(SQL, "any_api_key", whole)
            assert [await store.has_keys() for _ in range(3)] == [False] * 3


async def test_reads_of_the_whole_store_leave_the_readers_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:
        monkeypatch.setitem(SQL, "list_queues", ENDLESS_OF_ENVIRONMENT)
        tasks = await running(store, 1, *(store.queues("default") for _ in range(4)))
        assert await store.batches("default") == []
        assert (await store.check())["store"] == "sqlite"
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await store.size_bytes() > 0


async def test_while_metrics_read_the_queues_other_requests_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_service, "QUEUES_S", 3_600)
    async with running_server(tmp_path, "sqlite") as server:
        monkeypatch.setitem(SQL, "list_queues", ENDLESS_OF_ENVIRONMENT)
        waiting = []
        for _ in range(2):
            server.service._queues_until_us = 0
            waiting.append(asyncio.ensure_future(server.ask("GET", "/metrics")))
            while not server.service._queues_until_us:
                await asyncio.sleep(0)
        assert (await server.ask("GET", "/v1/batches")).status == 200
        assert (await server.ask("GET", "/readyz")).status == 200
        assert not any(task.done() for task in waiting)
        monkeypatch.setitem(SQL, "list_queues", "SELECT 1 WHERE :environment = ''")
        while not all(task.done() for task in waiting):
            for connection in list(_store_of(server)._reading):
                connection.interrupt()
            await asyncio.sleep(0)
        assert {task.result().status for task in waiting} == {200}


async def test_metrics_that_give_up_keep_their_values_and_free_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        await server.filled(3)
        assert b'headrace_queue_runs{queue="default",state="waiting"} 3.0' in (await server.ask("GET", "/metrics")).body
        monkeypatch.setattr(http_service, "QUEUES_S", 0.05)
        whole = SQL["list_queues"]
        monkeypatch.setitem(SQL, "list_queues", ENDLESS_OF_ENVIRONMENT)
        for _ in range(2):
            server.service._queues_until_us = 0
            answer = await server.ask("GET", "/metrics")
            assert b'headrace_queue_runs{queue="default",state="waiting"} 3.0' in answer.body
        monkeypatch.setitem(SQL, "list_queues", whole)
        assert [view.name for view in await server.engine.store.queues("default")] == ["default"]


async def test_a_server_whose_readers_are_all_taken_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_service, "CHECK_S", 0.05)
    async with running_server(tmp_path, "sqlite") as server:
        store = _store_of(server)
        monkeypatch.setitem(SQL, "any_api_key", ENDLESS)
        tasks = await running(store, 2, store.has_keys(), store.has_keys())
        assert (await server.ask("GET", "/readyz")).status == 503
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while (await server.ask("GET", "/readyz")).status != 200:
            pass


def _store_of(server: Any) -> SqliteStore:
    store = server.engine.store
    assert isinstance(store, SqliteStore)
    return store
