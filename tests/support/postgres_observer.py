"""Observation of a PostgreSQL store from outside: other connections, the statements it sends, and lock waits."""

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
from tests.support.store_rig import StoreRig

T = TypeVar("T")


def postgres_store(rig: StoreRig) -> PostgresStore:
    """Return the store of a rig as a PostgresStore."""
    assert isinstance(rig.store, PostgresStore)
    return rig.store


@asynccontextmanager
async def other_connection(dsn: str | None = None, **more: Any) -> AsyncIterator[Any]:
    """Open a connection that does not belong to the store."""
    connection = await asyncpg.connect(dsn or server().dsn, **more)
    try:
        yield connection
    finally:
        await connection.close()


def schema_of(rig: StoreRig) -> str:
    """Return the name of the schema."""
    return postgres_store(rig)._schema


async def pid_waiting_for_a_lock(rig: StoreRig, watcher: Any) -> int:
    """Return the process id of the store's session that waits for a lock, as soon as there is one."""
    while True:
        pid = await watcher.fetchval(
            "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE $1",
            f'%"{schema_of(rig)}"%',
        )
        if pid is not None:
            return int(pid)


async def sent_statements(rig: StoreRig, work: Callable[[], Awaitable[T]]) -> tuple[T, list[str]]:
    """Return the result of some work, and the names of the statements it sent, with `begin` for each transaction."""
    sent: list[str] = []
    store = postgres_store(rig)

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
