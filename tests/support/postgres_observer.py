"""Behind a Postgres store's back: other connections, the statements it sends, who waits for whom."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import asyncpg
import pytest

from headrace.store.postgres import PostgresStore
from headrace.store.postgres.pool import PostgresConnection
from headrace.store.transactions.sql_script import Rows
from tests.support.postgres_server import server
from tests.support.store_rig import World

T = TypeVar("T")


def house(world: World) -> PostgresStore:
    """The store of a world, as what it is."""
    assert isinstance(world.store, PostgresStore)
    return world.store


@asynccontextmanager
async def beside(dsn: str | None = None, **more: Any) -> AsyncIterator[Any]:
    """A connection that is not the store's."""
    connection = await asyncpg.connect(dsn or server().dsn, **more)
    try:
        yield connection
    finally:
        await connection.close()


def schema_of(world: World) -> str:
    """The schema's name."""
    return house(world)._schema


async def waiting_for_a_lock(world: World, watcher: Any) -> int:
    """The backend of the store that waits for a lock, as soon as there is one."""
    while True:
        pid = await watcher.fetchval(
            "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE $1",
            f'%"{schema_of(world)}"%',
        )
        if pid is not None:
            return int(pid)


async def statements_of(world: World, work: Callable[[], Awaitable[T]]) -> tuple[T, list[str]]:
    """What some work answers, and the names of the statements it sent, transactions included."""
    sent: list[str] = []
    store = house(world)

    async def fetch(connection: PostgresConnection, name: str, /, **values: Any) -> Rows:
        sent.append(name)
        return await PostgresStore._fetch(store, connection, name, **values)

    async def begin(connection: PostgresConnection, how: str) -> None:
        sent.append("begin")
        await PostgresStore._begin(store, connection, how)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, "_fetch", fetch)
        patched.setattr(store, "_begin", begin)
        return await work(), sent
