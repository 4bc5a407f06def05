"""The way to a store: what shows that it is lost, and that it is there again, for each kind of store."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from headrace.app import Headrace
from headrace.foundation.errors import Conflict, NotFound, StoreUnreachable
from headrace.foundation.limits import DEFAULT
from headrace.foundation.settings import load
from headrace.remote.connection import ServerConnection
from headrace.remote.store import RemoteStore
from headrace.runtime.clock import SystemClock
from headrace.store.postgres import PostgresNotifier, PostgresStore, notifier
from headrace.store.sqlite import SqliteStore
from tests.support.http_server import KEY, LIMITS, RecordingClock, running_server
from tests.support.postgres_server import Server
from tests.support.store_rig import StoreRig, fresh_schema


async def until(is_so: Callable[[], object]) -> None:
    """Wait for a condition that another thread or the network brings about."""
    while not is_so():
        await asyncio.sleep(0)


NEVER_S = (0.0, 3_600.0, 3_600.0, 3_600.0, 3_600.0)


async def test_after_a_restart_of_postgres_the_worker_and_its_listener_continue_with_the_first_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "AGAIN_S", NEVER_S)
    database = Server()
    app = Headrace("restarted")

    @app.task
    async def double(number: int) -> int:
        return 2 * number

    store = fresh_schema(tmp_path, database.dsn)
    app.use(load({"store": store, "poll_interval_ms": 60_000}, {}, tmp_path))
    try:
        async with app, app.worker():
            engine = await app.open()
            listener = engine.notifier
            assert isinstance(listener, PostgresNotifier)
            assert await (await double.enqueue(1)).result(timeout_s=60) == 2
            await until(lambda: listener.is_listening)
            await asyncio.to_thread(database.stop)
            await until(lambda: not listener.is_listening)
            run = asyncio.create_task(double.enqueue(2))
            await until(lambda: not engine.outage.is_over)
            await asyncio.to_thread(database.start)
            assert await (await run).result(timeout_s=60) == 4
            await until(lambda: listener.is_listening)
            assert engine.outage.reachability.outages_count >= 1
    finally:
        database.remove()


async def test_an_error_of_a_statement_does_not_count_as_an_unreachable_database(tmp_path: Path) -> None:
    async with StoreRig(PostgresStore(fresh_schema(tmp_path), DEFAULT)) as rig:
        store = rig.store
        assert isinstance(store, PostgresStore)
        batch_id = await rig.batch()
        await rig.append(batch_id, [0])
        await store.stop_batch(batch_id, "cancelled", now_us=rig.now_us)
        with pytest.raises(Conflict):
            await rig.append(batch_id, [1])
        with pytest.raises(NotFound):
            await store.batch("batch_missing")
        assert store.reachability.outages_count == 0
        store.reachability.failed(StoreUnreachable("lost"))
        with pytest.raises(NotFound):  # it may have been refused before anything was sent
            await store.batch("batch_missing")
        was_reachable = store.reachability.is_reachable
        await store.batch(batch_id)
        assert (was_reachable, store.reachability.is_reachable) == (False, True)


async def test_a_locked_file_is_unreachable_until_it_can_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "headrace.db"
    async with StoreRig(SqliteStore(path, DEFAULT, busy_timeout_ms=1)) as rig:
        store = rig.store
        assert isinstance(store, SqliteStore)
        assert store.reachability.probe is not None
        batch_id = await rig.batch()
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreUnreachable):
                await rig.append(batch_id, [0])
            with pytest.raises(StoreUnreachable):
                await store.reachability.probe()
            await store.batch(batch_id)  # reading works, and shows nothing about writing
            was_reachable = store.reachability.is_reachable
            other.execute("COMMIT")
        await store.reachability.probe()
        assert (was_reachable, store.reachability.is_reachable) == (False, True)
        await rig.append(batch_id, [0])


async def test_a_server_that_went_away_and_came_back_is_found_by_probes(tmp_path: Path) -> None:
    clock = SystemClock()
    async with running_server(tmp_path, "sqlite") as first:
        _, port = first.server.address
        store = RemoteStore(ServerConnection(first.server.url, KEY, attempts=1), LIMITS, wait_s=0)
        await store.open()
    calling = asyncio.create_task(store.next_due_us("default", ["task"]))
    await until(lambda: not store.outage.is_over)
    assert not await store.outage.until_over(clock, 0)
    waiting = asyncio.create_task(store.outage.until_over(clock))
    async with running_server(tmp_path, "sqlite", port=port):
        assert await waiting
        assert await calling is None


async def test_a_server_whose_own_store_is_away_counts_as_away(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        store = RemoteStore(ServerConnection(server.server.url, KEY, attempts=1), LIMITS, wait_s=0)
        await store.open()
        assert store.outage.reachability.probe is not None
        with closing(sqlite3.connect(tmp_path / "headrace.db", isolation_level=None)) as other:
            sqlite_store = server.engine.store
            assert isinstance(sqlite_store, SqliteStore)
            other.execute("BEGIN IMMEDIATE")
            sqlite_store._busy_timeout_ms = 1
            server.engine.outage.reachability.probe = sqlite_store.reachability.probe
            server.engine.outage.reachability.failed(StoreUnreachable("locked"))
            with pytest.raises(StoreUnreachable):
                await store.outage.reachability.probe()
            other.execute("COMMIT")
        assert await server.engine.outage.until_over(server.engine.clock)
        await store.outage.reachability.probe()


async def test_a_store_that_can_t_be_opened_is_an_error_and_no_outage(capsys: pytest.CaptureFixture[str]) -> None:
    for store in (
        PostgresStore("postgresql://nobody@127.0.0.1:1/none", DEFAULT),
        RemoteStore(ServerConnection("http://127.0.0.1:1", KEY, clock=RecordingClock()), LIMITS),
    ):
        with pytest.raises(StoreUnreachable):
            await store.open()
        reachability = store.reachability if isinstance(store, PostgresStore) else store.outage.reachability
        assert reachability.outages_count == 0
    assert "store.unreachable" not in capsys.readouterr().out
