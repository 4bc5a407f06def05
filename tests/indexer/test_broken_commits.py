"""A commit that breaks in the middle, at every one of its statements: nothing of it is there, and trying again works."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from headrace.foundation.errors import StoreBroken, StoreUnavailable
from headrace.store.postgres.pool import Connection
from tests.indexer.programs import Op, Ops, make
from tests.indexer.rig import Left, Listed, rig
from tests.postgres import server

LOG = [
    (n, Ops([Op("add", n % 5, n), Op("note", n % 2, n, n), Op("effect", n % 3), Op("enqueue", n), *([Op("delete", 4)] if n % 7 == 0 else [])]))
    for n in range(1, 41)
]  # fmt: skip

LONG: list[Any] = [(n, LOG[n % 40][1]) for n in range(1, 61)]


class Breaking:
    """A connection of SQLite whose statement number `at` fails, once."""

    def __init__(self, connection: sqlite3.Connection, at: int) -> None:
        self._connection = connection
        self.left = at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, sql: str, *values: Any) -> Any:
        self.left -= 1
        if self.left == 0 and sql != "ROLLBACK":
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorname = "SQLITE_FULL"
            raise error
        return self._connection.execute(sql, *values)


async def whole(log: list[Any]) -> Left:
    """What a run leaves that nothing disturbs."""
    async with rig("memory", Path(), make) as plain:
        return await plain.left(await plain.run(Listed(log)))


async def test_a_full_disk_at_any_statement_of_a_commit_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    async with rig("sqlite", tmp_path, make) as own:
        wanted = await whole(LOG)
        entities: Any = own.house.entities
        opened = type(entities)._connection
        at = 1
        while True:
            await own.forget()
            async with own.running(Listed(LOG[:20]), index_batch_events_max=20) as indexing:
                await indexing.run()
            before = await own.left(indexing)
            breaking: list[Breaking] = []

            def broken(self: Any, at: int = at, breaking: list[Breaking] = breaking) -> Any:
                if breaking:
                    return breaking[0]
                breaking.append(Breaking(opened(self), at))
                return breaking[0]

            async with own.running(Listed(LOG), index_batch_events_max=20, index_retries_max=0) as indexing:
                committer = indexing._committer
                assert committer is not None
                own.tables.gate = None
                commit = own.house.entities.commit

                async def once(own_commit: Any, *, now_us: int, broken: Any = broken, commit: Any = commit) -> None:
                    entities._connection = broken.__get__(entities)
                    try:
                        await commit(own_commit, now_us=now_us)
                    finally:
                        del entities._connection

                entities.commit = once
                failed = False
                try:
                    await indexing.run()
                except (StoreUnavailable, StoreBroken):
                    failed = True
                finally:
                    del entities.commit
            if not failed:
                break
            assert (await own.left(indexing))[:6] == before[:6], f"statement {at}"
            assert await own.left(await own.run(Listed(LOG))) == wanted, f"statement {at}, tried again"
            at += 1
        assert at > 15, "every statement of a commit was broken once"


async def test_a_connection_lost_at_any_statement_of_a_commit_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    countdown = [0]

    async def lose(connection: Any) -> None:
        if countdown[0]:
            countdown[0] -= 1
            if not countdown[0]:
                killer = await asyncpg.connect(server().dsn)
                await execute(killer, f"SELECT pg_terminate_backend({connection.get_server_pid()}, 5000)")
                await killer.close()

    fetch, execute, copy = Connection.fetch, asyncpg.Connection.execute, asyncpg.Connection.copy_to_table

    async def fetched(self: Any, *own: Any, **more: Any) -> Any:
        await lose(self.raw)
        return await fetch(self, *own, **more)

    async def executed(self: Any, *own: Any, **more: Any) -> Any:
        await lose(self)
        return await execute(self, *own, **more)

    async def copied(self: Any, *own: Any, **more: Any) -> Any:
        await lose(self)
        return await copy(self, *own, **more)

    async with rig("postgres", tmp_path, make) as own:
        wanted = await whole(LONG)
        monkeypatch.setattr(Connection, "fetch", fetched)
        monkeypatch.setattr(asyncpg.Connection, "execute", executed)
        monkeypatch.setattr(asyncpg.Connection, "copy_to_table", copied)
        commit = own.house.entities.commit
        tables: Any = own.house.entities
        tried: set[int] = set()
        spared: list[int] = []

        async def losing(own_commit: Any, *, now_us: int) -> None:
            """The commit of event n loses its connection before its statement n, the first time."""
            countdown[0] = 0 if own_commit.no in tried else own_commit.no
            tried.add(own_commit.no)
            await commit(own_commit, now_us=now_us)
            if countdown[0]:
                spared.append(own_commit.no)
            countdown[0] = 0

        tables.commit = losing
        indexing = await own.run(Listed(LONG), index_batch_events_max=1, index_depth_max=0)
        assert await own.left(indexing) == wanted
        assert min(spared) > 15, "a commit has more statements than that, and each was the first that failed in one"
