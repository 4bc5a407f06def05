"""Every statement of an indexer's commits, told before it is sent, so that harm can be done just there."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg

from headrace.store.entities.protocol import Commit
from headrace.store.postgres.pool import PostgresConnection
from headrace.store.sqlite.entities import SqliteEntities

Before = Callable[[str, Any], Awaitable[None] | None]
"""Called with a statement and the driver's connection; of SQLite's what it answers is not awaited."""
ANSWERED = "answered"
"""The commit is durable, and nobody has heard of it."""


class _Watched:
    """A connection of SQLite whose statements are told."""

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
def commits_told(entities: Any, before: Before) -> Iterator[None]:
    """For a block, `before` hears of every statement of a commit, and of its answer.

    Meant for an indexer of depth 0: what is asked of the tables while one commits is told too.
    """
    commit = entities.commit
    is_committing = False

    async def told(own: Commit, *, now_us: int) -> None:
        nonlocal is_committing
        is_committing = True
        try:
            await commit(own, now_us=now_us)
        finally:
            is_committing = False
        wait = before(ANSWERED, None)
        if wait is not None:
            await wait

    def heard(sql: str, connection: Any) -> Awaitable[None] | None:
        return before(sql, connection) if is_committing else None

    entities.commit = told
    try:
        with _sqlite_told(entities, heard) if isinstance(entities, SqliteEntities) else _postgres_told(heard):
            yield
    finally:
        del entities.commit


@contextmanager
def _sqlite_told(entities: Any, before: Before) -> Iterator[None]:
    opened = entities._connection
    entities._connection = lambda: _Watched(opened(), before)
    try:
        yield
    finally:
        del entities._connection


@contextmanager
def _postgres_told(before: Before) -> Iterator[None]:
    fetch, execute, copy = PostgresConnection.fetch, asyncpg.Connection.execute, asyncpg.Connection.copy_to_table

    async def told(sql: str, connection: Any) -> None:
        wait = None if sql.startswith("ROLLBACK;") or sql == "ROLLBACK" else before(sql, connection)
        if wait is not None:
            await wait

    async def fetched(self: Any, statement: Any, *own: Any, **more: Any) -> Any:
        await told(statement.sql, self.raw)
        return await fetch(self, statement, *own, **more)

    async def executed(self: Any, sql: str, *own: Any, **more: Any) -> Any:
        await told(sql, self)
        return await execute(self, sql, *own, **more)

    async def copied(self: Any, table: str, *own: Any, **more: Any) -> Any:
        await told(f"COPY {table}", self)
        return await copy(self, table, *own, **more)

    driver: Any = asyncpg.Connection
    room: Any = PostgresConnection
    room.fetch, driver.execute, driver.copy_to_table = fetched, executed, copied
    try:
        yield
    finally:
        room.fetch, driver.execute, driver.copy_to_table = fetch, execute, copy
