"""A commit that breaks in the middle, at every one of its statements: nothing of it is there, and trying again works."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from headrace.foundation.errors import StoreBroken, StoreUnavailable
from tests.indexer.doomed import BATCH, Deadly, pruned
from tests.indexer.harm import ANSWERED, commits_told
from tests.indexer.houses import opened
from tests.indexer.programs import busy, make
from tests.indexer.rig import Left, Listed, Rig, rig
from tests.support.fork_server import forks_of
from tests.support.postgres_server import server

LOG = busy(4)
LONG = busy(60)
DEATHS = 220


async def whole(log: list[Any]) -> Left:
    """What a run leaves that nothing disturbs."""
    async with rig("memory", Path(), make) as plain:
        return await plain.left(await plain.run(Listed(log)))


async def checkpoints(folder: Path) -> dict[int, Left]:
    """What a run that nothing disturbs has left at each of its checkpoints."""
    straight: dict[int, Left] = {}
    async with rig("memory", folder, pruned) as plain:
        for count in range(BATCH, DEATHS + 1, BATCH):
            indexing = await plain.run(Listed(busy(count)), index_batch_events_max=BATCH, index_depth_max=0)
            straight[count] = await plain.left(indexing)
    return straight


def full_sqlite() -> sqlite3.Error:
    """What SQLite says on a full disk."""
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorname = "SQLITE_FULL"
    return error


def full_postgres() -> asyncpg.PostgresError:
    """What PostgreSQL says."""
    return asyncpg.DiskFullError("could not extend file: No space left on device")


@pytest.mark.parametrize(("name", "full"), [("sqlite", full_sqlite), ("postgres", full_postgres)])
async def test_a_full_disk_at_any_statement_of_a_commit_leaves_a_checkpoint_and_the_next_run_goes_on(
    name: str, full: Callable[[], Exception], tmp_path: Path
) -> None:
    straight = await checkpoints(tmp_path)
    async with rig(name, tmp_path, pruned) as own:
        for at in range(1, 100):
            deadly = Deadly(at)

            def fail(sql: str, _: Any, deadly: Deadly = deadly) -> None:
                if deadly.is_here(sql) and sql != ANSWERED:
                    raise full()

            async with own.running(
                Listed(busy(DEATHS)), index_batch_events_max=BATCH, index_depth_max=0, index_retries_max=0
            ) as indexing:
                with commits_told(own.house.entities, fail), suppress(StoreUnavailable, StoreBroken):
                    await indexing.run()
            left = await own.left(indexing)
            assert left == straight[left.no], f"the disk was full at statement {at}"
            if indexing._failure is None:
                break  # the last one was its answer
            assert "full" in str(indexing._failure)
            assert left.no < DEATHS - 2 * BATCH, "the log is long enough for every statement"
        assert 25 < at < 99, "every statement of a commit failed once"
        assert await own.left(await own.run(Listed(busy(DEATHS)), index_batch_events_max=BATCH)) == straight[DEATHS]


async def test_a_disk_that_is_really_full_leaves_the_last_checkpoint_and_room_mends_it(tmp_path: Path) -> None:
    async with rig("sqlite", tmp_path, make) as own:
        await own.run(Listed(LOG))
        pages = 0

        def fill(sql: str, connection: Any) -> None:
            nonlocal pages
            if sql.startswith("BEGIN"):
                (pages,) = connection.execute("PRAGMA page_count").fetchone()
                connection.execute(f"PRAGMA max_page_count = {pages:d}")

        large = [(n, event) for n, event in busy(400) if n > 4]
        async with own.running(Listed(large), index_depth_max=0, index_retries_max=0) as indexing:
            with commits_told(own.house.entities, fill), pytest.raises(StoreUnavailable, match="full"):
                await indexing.run()
        assert pages
        assert (await own.left(indexing)).no == 4
    async with rig("sqlite", tmp_path, make) as own:  # the limit was the connection's
        left = await own.left(await own.run(Listed(large)))
    assert left == await whole(busy(400))


async def test_a_connection_lost_at_any_statement_of_a_commit_is_tried_again(tmp_path: Path) -> None:
    at, left, spared = 0, 0, 0

    async def lose(sql: str, connection: Any) -> None:
        """The n-th commit loses its connection before its n-th statement."""
        nonlocal at, left, spared
        if sql == ANSWERED:
            spared = spared or (at if left > 0 else 0)
            at = left = at + 1
            return
        left -= 1
        if not left:
            left = -1
            killer = await asyncpg.connect(server().dsn)
            await killer.fetchval("SELECT pg_terminate_backend($1, 5000)", connection.get_server_pid())
            await killer.close()

    async with rig("postgres", tmp_path, make) as own:
        wanted = await whole(LONG)
        with commits_told(own.house.entities, lose):
            indexing = await own.run(Listed(LONG), index_batch_events_max=1, index_depth_max=0)
        assert await own.left(indexing) == wanted
    assert spared > 15, "a commit has more statements than that, and each was the first that failed in one"


@pytest.mark.journey
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["sqlite", "postgres"])
async def test_a_process_killed_at_any_statement_of_a_commit_leaves_a_checkpoint_and_the_next_goes_on(
    name: str, tmp_path: Path
) -> None:
    straight = await checkpoints(tmp_path)
    async with opened(name, tmp_path) as house, forks_of("tests.indexer.doomed") as forks:
        own = Rig(house, pruned)
        for at in range(1, 100):
            if await forks.live(url=house.url, count=DEATHS, at=at) == "told":
                break
            left = await own.left(own.indexing(Listed()))
            assert left == straight[left.no], f"killed before statement {at}"
            assert left.no < DEATHS - 2 * BATCH, "the log is long enough for every statement"
        assert 25 < at < 99, "a commit has as many statements, and a process died before each"
        assert await own.left(await own.run(Listed(busy(DEATHS)))) == straight[DEATHS]
