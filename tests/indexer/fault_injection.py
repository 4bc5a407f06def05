"""Fault injection into the commits of an indexer: a callback sees each statement before it is sent."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg

from headrace.store.entities.protocol import Commit
from headrace.store.postgres.pool import PostgresConnection
from headrace.store.sqlite.entities import SqliteEntities

BeforeStatement = Callable[[str, Any], Awaitable[None] | None]
"""Called with a statement and the driver's connection. Its awaitable is not awaited for a statement of SQLite."""
COMMITTED = "committed"
"""Passed instead of a statement when the commit is durable and its caller has not been notified yet."""


class _WatchedConnection:
    """A connection of SQLite that passes each statement to a callback first."""

    def __init__(self, connection: sqlite3.Connection, before: Callable[[str, Any], object]) -> None:
        self._connection = connection
        self._before = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, sql: str, *values: Any) -> Any:
        if sql != "ROLLBACK":
            self._before(sql, self._connection)
        return self._connection.execute(sql, *values)


@contextmanager
def watched_commits(entities: Any, before: BeforeStatement) -> Iterator[None]:
    """Call `before` with each statement of a commit, and with `COMMITTED` after it, for the duration of a block.

    Use it with an indexer of depth 0 only: reads of the tables during a commit are passed to `before` too.
    """
    original_commit = entities.commit
    is_committing = False

    async def watched_commit(commit: Commit, *, now_us: int) -> None:
        nonlocal is_committing
        is_committing = True
        try:
            await original_commit(commit, now_us=now_us)
        finally:
            is_committing = False
        wait = before(COMMITTED, None)
        if wait is not None:
            await wait

    def before_statement(sql: str, connection: Any) -> Awaitable[None] | None:
        return before(sql, connection) if is_committing else None

    is_sqlite = isinstance(entities, SqliteEntities)
    entities.commit = watched_commit
    try:
        with _watched_sqlite(entities, before_statement) if is_sqlite else _watched_postgres(before_statement):
            yield
    finally:
        del entities.commit


@contextmanager
def _watched_sqlite(entities: Any, before: BeforeStatement) -> Iterator[None]:
    connection_of = entities._connection
    entities._connection = lambda: _WatchedConnection(connection_of(), before)
    try:
        yield
    finally:
        del entities._connection


@contextmanager
def _watched_postgres(before: BeforeStatement) -> Iterator[None]:
    fetch, execute, copy = PostgresConnection.fetch, asyncpg.Connection.execute, asyncpg.Connection.copy_to_table

    async def call_before(sql: str, connection: Any) -> None:
        wait = None if sql.startswith("ROLLBACK;") or sql == "ROLLBACK" else before(sql, connection)
        if wait is not None:
            await wait

    async def watched_fetch(self: Any, statement: Any, *args: Any, **kwargs: Any) -> Any:
        await call_before(statement.sql, self.raw)
        return await fetch(self, statement, *args, **kwargs)

    async def watched_execute(self: Any, sql: str, *args: Any, **kwargs: Any) -> Any:
        await call_before(sql, self)
        return await execute(self, sql, *args, **kwargs)

    async def watched_copy(self: Any, table: str, *args: Any, **kwargs: Any) -> Any:
        await call_before(f"COPY {table}", self)
        return await copy(self, table, *args, **kwargs)

    driver: Any = asyncpg.Connection
    pooled: Any = PostgresConnection
    pooled.fetch, driver.execute, driver.copy_to_table = watched_fetch, watched_execute, watched_copy
    try:
        yield
    finally:
        pooled.fetch, driver.execute, driver.copy_to_table = fetch, execute, copy
