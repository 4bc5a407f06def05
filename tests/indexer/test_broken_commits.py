"""Commits that fail at each of their statements: nothing of a failed commit is stored, and a retry succeeds."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from headrace.foundation.errors import StoreBroken, StoreUnavailable
from tests.indexer.fault_injection import COMMITTED, watched_commits
from tests.indexer.indexer_rig import IndexerContents, IndexerRig, ListSource, open_rig
from tests.indexer.indexer_stores import stores_in
from tests.indexer.killed_indexer import BATCH, StatementTarget, pruning_indexer
from tests.indexer.scripted_handlers import mixed_events, scripted_indexer
from tests.support.fork_server import forks_of
from tests.support.postgres_server import server

LOG = mixed_events(4)
LONG = mixed_events(60)
EVENTS = 220


async def undisturbed_contents(log: list[Any]) -> IndexerContents:
    """Return the contents after an undisturbed run."""
    async with open_rig("memory", Path(), scripted_indexer) as plain:
        return await plain.contents(await plain.run(ListSource(log)))


async def checkpoints(folder: Path) -> dict[int, IndexerContents]:
    """Return the contents of an undisturbed run at each of its checkpoints."""
    undisturbed: dict[int, IndexerContents] = {}
    async with open_rig("memory", folder, pruning_indexer) as plain:
        for count in range(BATCH, EVENTS + 1, BATCH):
            indexing = await plain.run(ListSource(mixed_events(count)), index_batch_events_max=BATCH, index_depth_max=0)
            undisturbed[count] = await plain.contents(indexing)
    return undisturbed


def full_sqlite() -> sqlite3.Error:
    """Return the error that SQLite raises on a full disk."""
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorname = "SQLITE_FULL"
    return error


def full_postgres() -> asyncpg.PostgresError:
    """Return the error that PostgreSQL raises on a full disk."""
    return asyncpg.DiskFullError("could not extend file: No space left on device")


@pytest.mark.parametrize(("name", "full"), [("sqlite", full_sqlite), ("postgres", full_postgres)])
async def test_a_full_disk_at_any_statement_of_a_commit_leaves_a_checkpoint_and_the_next_run_continues(
    name: str, full: Callable[[], Exception], tmp_path: Path
) -> None:
    undisturbed = await checkpoints(tmp_path)
    async with open_rig(name, tmp_path, pruning_indexer) as rig:
        for at in range(1, 100):
            target = StatementTarget(at)

            def fail(sql: str, _: Any, target: StatementTarget = target) -> None:
                if target.is_reached(sql) and sql != COMMITTED:
                    raise full()

            async with rig.running(
                ListSource(mixed_events(EVENTS)), index_batch_events_max=BATCH, index_depth_max=0, index_retries_max=0
            ) as indexing:
                with watched_commits(rig.stores.entities, fail), suppress(StoreUnavailable, StoreBroken):
                    await indexing.run()
            contents = await rig.contents(indexing)
            assert contents == undisturbed[contents.no], f"the disk was full at statement {at}"
            if indexing._failure is None:
                break  # the target was the acknowledgement: no statement is left
            assert "full" in str(indexing._failure)
            assert contents.no < EVENTS - 2 * BATCH, "the log has too few events for all statements of a commit"
        assert 25 < at < 99, "expected each statement of a commit to fail once"
        assert (
            await rig.contents(await rig.run(ListSource(mixed_events(EVENTS)), index_batch_events_max=BATCH))
            == undisturbed[EVENTS]
        )


async def test_a_full_sqlite_file_keeps_the_last_checkpoint_and_indexing_continues_with_more_space(
    tmp_path: Path,
) -> None:
    async with open_rig("sqlite", tmp_path, scripted_indexer) as rig:
        await rig.run(ListSource(LOG))
        pages = 0

        def fill(sql: str, connection: Any) -> None:
            nonlocal pages
            if sql.startswith("BEGIN"):
                (pages,) = connection.execute("PRAGMA page_count").fetchone()
                connection.execute(f"PRAGMA max_page_count = {pages:d}")

        large = [(n, event) for n, event in mixed_events(400) if n > 4]
        async with rig.running(ListSource(large), index_depth_max=0, index_retries_max=0) as indexing:
            with watched_commits(rig.stores.entities, fill), pytest.raises(StoreUnavailable, match="full"):
                await indexing.run()
        assert pages
        assert (await rig.contents(indexing)).no == 4
    async with open_rig("sqlite", tmp_path, scripted_indexer) as rig:  # the page limit ended with its connection
        contents = await rig.contents(await rig.run(ListSource(large)))
    assert contents == await undisturbed_contents(mixed_events(400))


async def test_a_commit_that_loses_its_connection_at_any_statement_is_retried(tmp_path: Path) -> None:
    at, remaining, statements_count = 0, 0, 0

    async def lose(sql: str, connection: Any) -> None:
        """Close the connection of the n-th commit before its n-th statement."""
        nonlocal at, remaining, statements_count
        if sql == COMMITTED:
            statements_count = statements_count or (at if remaining > 0 else 0)
            at = remaining = at + 1
            return
        remaining -= 1
        if not remaining:
            remaining = -1
            killer = await asyncpg.connect(server().dsn)
            await killer.fetchval("SELECT pg_terminate_backend($1, 5000)", connection.get_server_pid())
            await killer.close()

    async with open_rig("postgres", tmp_path, scripted_indexer) as rig:
        expected = await undisturbed_contents(LONG)
        with watched_commits(rig.stores.entities, lose):
            indexing = await rig.run(ListSource(LONG), index_batch_events_max=1, index_depth_max=0)
        assert await rig.contents(indexing) == expected
    assert statements_count > 15, (
        "expected more statements in a commit, each of which was the first to fail in a commit"
    )


@pytest.mark.journey
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["sqlite", "postgres"])
async def test_a_process_killed_at_any_statement_of_a_commit_leaves_a_checkpoint_and_the_next_process_continues(
    name: str, tmp_path: Path
) -> None:
    undisturbed = await checkpoints(tmp_path)
    async with stores_in(name, tmp_path) as stores, forks_of("tests.indexer.killed_indexer") as forks:
        rig = IndexerRig(stores, pruning_indexer)
        for at in range(1, 100):
            if await forks.live(url=stores.url, count=EVENTS, at=at) == "ended":
                break
            contents = await rig.contents(rig.indexing(ListSource()))
            assert contents == undisturbed[contents.no], f"killed before statement {at}"
            assert contents.no < EVENTS - 2 * BATCH, "the log has too few events for all statements of a commit"
        assert 25 < at < 99, "expected a process to be killed before each statement of a commit"
        assert await rig.contents(await rig.run(ListSource(mixed_events(EVENTS)))) == undisturbed[EVENTS]
