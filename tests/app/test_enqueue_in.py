"""A run in the caller's own transaction, with every driver."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiosqlite
import asyncpg
import psycopg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from headrace.app import Headrace
from headrace.foundation.errors import InvalidInput
from tests.support import invariants
from tests.support.postgres_server import server
from tests.support.store_rig import fresh_schema

TABLE = "CREATE TABLE IF NOT EXISTS orders (n bigint)"
ORDER = "INSERT INTO orders (n) VALUES (1)"
COUNT = "SELECT count(*) FROM orders"
Opened = tuple[Any, Callable[[str], Any]]
"""An open transaction of the caller, and a function that runs a statement in it."""


class GivenUp(Exception):
    """The caller's own work failed."""


@asynccontextmanager
async def by_asyncpg(dsn: str) -> AsyncIterator[Opened]:
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            yield connection, connection.execute
    finally:
        await connection.close()


@asynccontextmanager
async def by_psycopg(dsn: str) -> AsyncIterator[Opened]:
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        yield connection, connection.execute


@asynccontextmanager
async def by_psycopg_in_a_block(dsn: str) -> AsyncIterator[Opened]:
    connection = await psycopg.AsyncConnection.connect(dsn, autocommit=True)
    async with connection, connection.transaction():
        yield connection, connection.execute


@asynccontextmanager
async def by_psycopg_sync(dsn: str) -> AsyncIterator[Opened]:
    with psycopg.connect(dsn) as connection:
        yield connection, connection.execute


@asynccontextmanager
async def by_sqlite3(dsn: str) -> AsyncIterator[Opened]:
    connection = sqlite3.connect(dsn)
    try:
        with connection:
            yield connection, connection.execute
    finally:
        connection.close()


@asynccontextmanager
async def by_sqlite3_by_hand(dsn: str) -> AsyncIterator[Opened]:
    connection = sqlite3.connect(dsn, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection, connection.execute
        connection.execute("COMMIT")
    finally:
        connection.close()


@asynccontextmanager
async def by_aiosqlite(dsn: str) -> AsyncIterator[Opened]:
    async with aiosqlite.connect(dsn) as connection:
        yield connection, connection.execute
        await connection.commit()


def by_sqlalchemy(url: str) -> Callable[[str], AbstractAsyncContextManager[Opened]]:
    @asynccontextmanager
    async def opened(dsn: str) -> AsyncIterator[Opened]:
        engine = create_engine(_sqlalchemy_url(url, dsn))
        try:
            with engine.begin() as connection:
                yield connection, lambda sql: connection.execute(text(sql))
        finally:
            engine.dispose()

    return opened


def by_sqlalchemy_async(url: str) -> Callable[[str], AbstractAsyncContextManager[Opened]]:
    @asynccontextmanager
    async def opened(dsn: str) -> AsyncIterator[Opened]:
        engine = create_async_engine(_sqlalchemy_url(url, dsn))
        try:
            async with engine.begin() as connection:
                yield connection, lambda sql: connection.execute(text(sql))
        finally:
            await engine.dispose()

    return opened


@asynccontextmanager
async def by_session(dsn: str) -> AsyncIterator[Opened]:
    engine = create_engine(_sqlalchemy_url("postgresql+psycopg", dsn))
    try:
        with Session(engine) as session, session.begin():
            yield session, lambda sql: session.execute(text(sql))
    finally:
        engine.dispose()


@asynccontextmanager
async def by_async_session(dsn: str) -> AsyncIterator[Opened]:
    engine = create_async_engine(_sqlalchemy_url("postgresql+asyncpg", dsn))
    try:
        async with AsyncSession(engine) as session, session.begin():
            yield session, lambda sql: session.execute(text(sql))
    finally:
        await engine.dispose()


def _sqlalchemy_url(scheme: str, dsn: str) -> str:
    return f"{scheme}:///{dsn}" if scheme.startswith("sqlite") else dsn.replace("postgresql", scheme, 1)


POSTGRES = {
    "asyncpg": by_asyncpg,
    "psycopg": by_psycopg,
    "psycopg-block": by_psycopg_in_a_block,
    "psycopg-sync": by_psycopg_sync,
    "sqlalchemy-asyncpg": by_sqlalchemy_async("postgresql+asyncpg"),
    "sqlalchemy-psycopg-async": by_sqlalchemy_async("postgresql+psycopg"),
    "sqlalchemy-psycopg": by_sqlalchemy("postgresql+psycopg"),
    "session": by_session,
    "async-session": by_async_session,
}
SQLITE = {
    "sqlite3": by_sqlite3,
    "sqlite3-by-hand": by_sqlite3_by_hand,
    "aiosqlite": by_aiosqlite,
    "sqlalchemy-pysqlite": by_sqlalchemy("sqlite+pysqlite"),
    "sqlalchemy-aiosqlite": by_sqlalchemy_async("sqlite+aiosqlite"),
}
SYNC = ("psycopg-sync", "sqlalchemy-psycopg", "session", "sqlite3", "sqlite3-by-hand", "sqlalchemy-pysqlite")


class Shop:
    """An app on a store, and the caller's table in the same database."""

    def __init__(self, driver: str, folder: Path) -> None:
        self.enter = (POSTGRES | SQLITE)[driver]
        self.is_sqlite = driver in SQLITE
        self.dsn = str(folder / "shop.db") if self.is_sqlite else server().dsn
        store = f"sqlite:///{self.dsn}" if self.is_sqlite else fresh_schema(folder)
        self.app = Headrace("shop", store=store, inline_bytes_max=1_000)

        @self.app.task
        async def ship(order: int, note: str = "") -> str:
            return f"{order} {len(note)}"

        self.ship = ship

    async def orders(self) -> int:
        """Return the number of rows in the caller's table."""
        if self.is_sqlite:
            with sqlite3.connect(self.dsn) as connection:
                connection.execute(TABLE)
                return int(connection.execute(COUNT).fetchone()[0])
        connection = await asyncpg.connect(self.dsn)
        try:
            await connection.execute(TABLE)
            return int(await connection.fetchval(COUNT))
        finally:
            await connection.close()

    async def give_up(self) -> None:
        """Insert an order and its run, then fail."""
        async with self.enter(self.dsn) as (connection, execute):
            await self.ship.enqueue_in(connection, 8)
            await _maybe(execute(ORDER))
            raise GivenUp

    async def runs(self) -> int:
        engine = await self.app.open()
        return len(await engine.store.runs("default", limit=1_000))


@pytest.fixture(params=[*POSTGRES, *SQLITE])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Shop:
    return Shop(request.param, tmp_path)


async def _maybe(answer: Any) -> None:
    if hasattr(answer, "__await__"):
        await answer


async def test_a_run_commits_or_rolls_back_with_its_transaction(shop: Shop) -> None:
    async with shop.app:
        await shop.app.open()
        before = await shop.orders()
        async with shop.enter(shop.dsn) as (connection, execute):
            await _maybe(execute(ORDER))
            run = await shop.ship.enqueue_in(connection, 7, note="abc")
            assert await shop.runs() == 0, "no other connection sees it before the commit"
        assert (await shop.orders(), await shop.runs()) == (before + 1, 1)
        with pytest.raises(GivenUp):
            await shop.give_up()
        assert (await shop.orders(), await shop.runs()) == (before + 1, 1)
        async with shop.app.worker():
            assert await run.result(timeout_s=30) == "7 3"
        engine = await shop.app.open()
        batch, ledger = await engine.store.batch(run.batch_id)
        assert (batch.kind, batch.state, ledger.completed) == ("single", "completed", 1)
        assert await invariants.faults(engine.store, "default") == []


async def test_an_idempotency_key_names_one_run_across_enqueue_and_enqueue_in(shop: Shop) -> None:
    async with shop.app:
        call = shop.ship.options(idempotency_key="order-1", tags=["red"], priority=3, queue="express")
        async with shop.enter(shop.dsn) as (connection, _):
            first = await call.enqueue_in(connection, 1)
            assert (await call.enqueue_in(connection, 1)).id == first.id
        async with shop.enter(shop.dsn) as (connection, _):
            assert (await call.enqueue_in(connection, 1)).id == first.id
        assert (await call.enqueue(1)).id == first.id
        engine = await shop.app.open()
        (view,) = await engine.store.runs("default", tag="red")
        assert (view.queue, view.priority, view.batch_id) == ("express", 3, first.batch_id)


async def test_an_idempotency_key_of_a_cancelled_run_starts_a_new_run(shop: Shop) -> None:
    async with shop.app:
        call = shop.ship.options(idempotency_key="order-1")
        async with shop.enter(shop.dsn) as (connection, _):
            first = await call.enqueue_in(connection, 1)
        await first.cancel()
        async with shop.enter(shop.dsn) as (connection, _):
            second = await call.enqueue_in(connection, 1)
        assert second.id != first.id
        async with shop.app.worker():
            assert await second.result(timeout_s=30) == "1 0"


async def test_a_large_payload_is_offloaded(shop: Shop) -> None:
    async with shop.app:
        async with shop.enter(shop.dsn) as (connection, _):
            run = await shop.ship.enqueue_in(connection, 1, note="x" * 5_000)
        engine = await shop.app.open()
        assert len([stored async for stored in engine.payloads.list()]) == 1
        async with shop.app.worker():
            assert await run.result(timeout_s=30) == "1 5000"


async def test_invalid_arguments_leave_the_transaction_usable(shop: Shop) -> None:
    async with shop.app:
        before = await shop.orders()
        async with shop.enter(shop.dsn) as (connection, execute):
            await _maybe(execute(ORDER))
            with pytest.raises(InvalidInput):
                await shop.ship.enqueue_in(connection, "seven")  # type: ignore[arg-type]
        assert (await shop.orders(), await shop.runs()) == (before + 1, 0)


@pytest.mark.parametrize("driver", SYNC)
def test_enqueue_in_sync_stores_a_run_in_the_transaction(driver: str, tmp_path: Path) -> None:
    shop = Shop(driver, tmp_path)
    app = shop.app
    app.run_sync(shop.app.open())
    with asyncio.Runner() as runner:  # in the caller's thread: some drivers bind a connection to its thread
        entered = shop.enter(shop.dsn)
        connection, _ = runner.run(entered.__aenter__())
        run = shop.ship.enqueue_in_sync(connection, 3, note="xy")
        runner.run(entered.__aexit__(None, None, None))
    with app.within_sync(app.worker()):
        assert app.run_sync(run.result(timeout_s=30)) == "3 2"
    app.close_sync()


async def test_a_connection_without_a_transaction_is_refused(tmp_path: Path) -> None:
    for driver in ("asyncpg", "sqlite3"):
        shop = Shop(driver, tmp_path)
        async with shop.app:
            await shop.app.open()
            sync = None
            if driver == "asyncpg":
                outside: list[Any] = [await asyncpg.connect(shop.dsn)]
                outside.append(await psycopg.AsyncConnection.connect(shop.dsn, autocommit=True))
                sync = create_engine(_sqlalchemy_url("postgresql+psycopg", shop.dsn), isolation_level="AUTOCOMMIT")
                outside.append(sync.connect())
            else:
                outside = [sqlite3.connect(shop.dsn, isolation_level=None)]
            for connection in outside:
                with pytest.raises(InvalidInput, match="expected a connection with an open transaction"):
                    await shop.ship.enqueue_in(connection, 1)
                await _maybe(connection.close())
            if sync is not None:
                sync.dispose()
            assert await shop.runs() == 0


async def test_a_connection_to_another_kind_of_database_is_refused(tmp_path: Path) -> None:
    shop, other = Shop("asyncpg", tmp_path), Shop("sqlite3", tmp_path)
    async with shop.app, other.app:
        async with other.enter(other.dsn) as (connection, _):
            with pytest.raises(
                InvalidInput, match="expected a connection to PostgreSQL, where the app's store is, got one to SQLite"
            ):
                await shop.ship.enqueue_in(connection, 1)
        async with shop.enter(shop.dsn) as (connection, _):
            with pytest.raises(
                InvalidInput, match="expected a connection to SQLite, where the app's store is, got one to PostgreSQL"
            ):
                await other.ship.enqueue_in(connection, 1)
        with pytest.raises(InvalidInput, match="expected an asyncpg, psycopg 3"):
            await shop.ship.enqueue_in("postgresql://", 1)
    memory = Headrace("memory", store="memory://")

    @memory.task
    async def task(item: int) -> int:
        return item

    async with memory:
        with pytest.raises(InvalidInput, match="has no transactions"):
            await task.enqueue_in(object(), 1)


async def another_database(shop: Shop, name: str) -> str:
    """Create an empty database beside that of the shop, and return its address."""
    if shop.is_sqlite:
        return str(Path(shop.dsn).with_name("bare.db"))
    connection = await asyncpg.connect(shop.dsn)
    await connection.execute(f"DROP DATABASE IF EXISTS {name}")
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    return shop.dsn.rpartition("/")[0] + f"/{name}"


@pytest.mark.parametrize("driver", [*POSTGRES, *SQLITE])
async def test_a_connection_to_another_headrace_database_is_refused_and_the_transaction_goes_on(
    driver: str, tmp_path: Path
) -> None:
    shop = Shop(driver, tmp_path)
    dsn = await another_database(shop, f"other_{driver.replace('-', '_')}")
    store = shop.app.settings.store
    other = Headrace("other", store=f"sqlite:///{dsn}" if shop.is_sqlite else store.replace(shop.dsn, dsn))
    async with shop.app, other:
        await shop.app.open()
        engine = await other.open()
        async with shop.enter(dsn) as (connection, execute):
            await _maybe(execute(TABLE))
            with pytest.raises(InvalidInput, match="expected a connection to the app's own store") as refused:
                await shop.ship.enqueue_in(connection, 1)
            assert "the app's store" in refused.value.hint
            assert "HEADRACE_STORE" not in refused.value.hint, "the app's code names the store"
            await _maybe(execute(ORDER))
        assert await engine.store.runs("default") == []
        assert await shop.runs() == 0


@pytest.mark.parametrize("driver", [*POSTGRES, *SQLITE])
async def test_a_database_without_headrace_is_named_and_the_transaction_goes_on(driver: str, tmp_path: Path) -> None:
    shop = Shop(driver, tmp_path)
    bare = await another_database(shop, f"bare_{driver.replace('-', '_')}")
    async with shop.app:
        await shop.app.open()
        async with shop.enter(bare) as (connection, execute):
            await _maybe(execute(TABLE))
            with pytest.raises(InvalidInput, match="the database of this connection has no Headrace tables") as refused:
                await shop.ship.enqueue_in(connection, 1)
            assert "the app's store" in refused.value.hint
            assert "HEADRACE_STORE" not in refused.value.hint, "the app's code names the store"
            await _maybe(execute(ORDER))
        assert await shop.runs() == 0


def test_an_async_connection_needs_async_code(tmp_path: Path) -> None:
    shop = Shop("asyncpg", tmp_path)
    with (
        shop.app.within_sync(shop.enter(shop.dsn)) as (connection, _),
        pytest.raises(InvalidInput, match="got an async one"),
    ):
        shop.ship.enqueue_in_sync(connection, 3)
    shop.app.close_sync()
