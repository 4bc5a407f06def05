"""Migrations of a PostgreSQL schema while older processes are running."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from headrace.foundation.errors import SchemaOutdated, StoreBroken, StoreUnavailable
from headrace.foundation.limits import DEFAULT
from headrace.store.postgres import PostgresStore, schema_migration
from headrace.store.statements import migrations
from tests.support.postgres_observer import other_connection, postgres_store, schema_of
from tests.support.postgres_server import server
from tests.support.store_rig import StoreRig, fresh_schema

PACKAGE = "headrace.store.postgres"
GENTLE = """
ALTER TABLE {schema}.batch ADD COLUMN note text NOT NULL DEFAULT '';
CREATE INDEX batch_noted ON {schema}.batch (note) WHERE note <> '';
ALTER TABLE {schema}.span ADD COLUMN hint bigint NOT NULL DEFAULT 0;
"""
BREAKING = "ALTER TABLE {schema}.span RENAME COLUMN order_no TO position_no;"
SLOW = "SELECT pg_sleep(0.3);"


@pytest.fixture
def rig(tmp_path: Path) -> StoreRig:
    """Return a rig of an older version."""
    return StoreRig(PostgresStore(fresh_schema(tmp_path), DEFAULT))


Opening = Callable[[], Awaitable[PostgresStore]]


@asynccontextmanager
async def newer(rig: StoreRig, script: str, **query: str) -> AsyncIterator[Opening]:
    """Return a process of a version with one more migration, opened when it is called."""
    words = "".join(f"&{name}={value}" for name, value in query.items())
    store = PostgresStore(f"{server().dsn}?schema={schema_of(rig)}{words}", DEFAULT)
    numbered = migrations(PACKAGE)

    async def opened() -> PostgresStore:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(schema_migration, "migrations", lambda package: [*numbered, (len(numbered) + 1, script)])
            opening = asyncio.create_task(store.open())
            await asyncio.sleep(0)  # it has read the list of migrations now
        await opening
        return store

    try:
        yield opened
    finally:
        await store.close()


async def test_many_processes_may_migrate_at_once(tmp_path: Path) -> None:
    url = fresh_schema(tmp_path)
    program = (
        "import asyncio, sys\n"
        "from headrace.foundation.limits import DEFAULT\n"
        "from headrace.store.postgres import PostgresStore\n"
        "async def main():\n"
        "    store = PostgresStore(sys.argv[1], DEFAULT)\n"
        "    await store.open()\n"
        "    await store.close()\n"
        "asyncio.run(main())\n"
    )
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", program, url, stderr=asyncio.subprocess.PIPE)
        for _ in range(5)
    ]
    for process in processes:
        _, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
    async with StoreRig(PostgresStore(url, DEFAULT)) as rig:
        assert (await rig.store.check())["schema_version"] == migrations(PACKAGE)[-1][0]


async def test_a_newer_schema_is_refused_and_left_unchanged(rig: StoreRig) -> None:
    async with other_connection() as connection:
        await connection.execute(f'UPDATE "{schema_of(rig)}".version SET number = 999')
        late = PostgresStore(f"{server().dsn}?schema={schema_of(rig)}", DEFAULT)
        with pytest.raises(StoreBroken, match="999") as refused:
            await late.open()
        assert "upgrade" in refused.value.hint
        await late.close()


async def test_older_processes_continue_while_a_newer_one_migrates(rig: StoreRig) -> None:
    batch_id = await rig.filled(6_000, runs_max=20)

    async def work() -> int:
        return len(await rig.run_all(await rig.session(), runs_max=40))

    working = [asyncio.create_task(work()) for _ in range(4)]
    async with newer(rig, GENTLE) as opened:
        store = await opened()
        assert (await store.check())["schema_version"] == migrations(PACKAGE)[-1][0] + 1
        assert sum(await asyncio.gather(*working)) == 6_000
        _, ledger = await rig.store.batch(batch_id)
        assert ledger.completed == 6_000
        later = StoreRig(store)
        await later.filled(100)
        assert len(await rig.run_all(await rig.session())) == 100


async def test_a_process_that_is_older_than_the_schema_reports_it(rig: StoreRig) -> None:
    rig.was_tampered_with = True
    await rig.filled(300)
    session = await rig.session()
    async with newer(rig, BREAKING) as opened:
        await opened()
        with pytest.raises(StoreBroken, match="expected schema version") as overtaken:
            await rig.claim(session)
        assert "upgrade Headrace" in overtaken.value.hint
        assert not overtaken.value.retryable


async def test_a_migration_that_waits_for_a_table_blocks_no_other_transaction(
    rig: StoreRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema_migration, "LOCK_TIMEOUT_MS", "30")
    monkeypatch.setattr(schema_migration, "AGAIN_S", 0.01)
    await rig.filled(300)
    async with newer(rig, GENTLE) as opened, other_connection() as reader:
        reading = reader.transaction()
        await reading.start()
        await reader.execute(f'LOCK TABLE "{schema_of(rig)}".span IN ACCESS SHARE MODE')
        with pytest.raises(StoreUnavailable, match="another transaction holds"):
            await opened()
        assert await rig.run_all(await rig.session()) == list(range(300))
        await reading.rollback()
        store = await opened()
        assert (await store.check())["schema_version"] == migrations(PACKAGE)[-1][0] + 1


async def test_statement_timeout_does_not_end_a_migration(rig: StoreRig) -> None:
    async with newer(rig, SLOW, statement_timeout="100") as opened:
        store = await opened()
        assert (await store.check())["schema_version"] == migrations(PACKAGE)[-1][0] + 1


async def test_a_failed_migration_changes_nothing(rig: StoreRig) -> None:
    async with newer(rig, GENTLE + "SELECT 1 / 0;") as opened:
        with pytest.raises(StoreBroken, match="division by zero"):
            await opened()
    assert (await postgres_store(rig).check())["schema_version"] == migrations(PACKAGE)[-1][0]
    await rig.filled(10)
    assert len(await rig.run_all(await rig.session())) == 10


async def test_a_store_that_must_not_migrate_creates_nothing_and_opens_a_current_schema(tmp_path: Path) -> None:
    url = fresh_schema(tmp_path)
    store = PostgresStore(url, DEFAULT, migrates=False)
    with pytest.raises(
        SchemaOutdated, match=r"expected the tables of Headrace in schema .* of PostgreSQL at"
    ) as refused:
        await store.open()
    assert "headrace migrate" in refused.value.hint
    async with other_connection() as connection:
        schemas = "SELECT count(*) FROM pg_namespace WHERE nspname = $1"
        assert await connection.fetchval(schemas, store.schema) == 0
    migrating = PostgresStore(url, DEFAULT)
    await migrating.open()
    await migrating.close()
    await store.open()
    assert await store.queues("default") == []
    await store.close()


async def test_a_schema_with_tables_of_another_program_is_refused_and_unchanged(tmp_path: Path) -> None:
    store = PostgresStore(fresh_schema(tmp_path), DEFAULT)
    schema = store.schema
    async with other_connection() as connection:
        await connection.execute(f'CREATE SCHEMA "{schema}"; CREATE TABLE "{schema}".batch (title text)')
        with pytest.raises(StoreBroken, match=rf"schema {schema} .*not Headrace's: .*\"batch\"") as error:
            await store.open()
        assert "?schema=NAME" in error.value.hint
        tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = $1", schema)
        assert [name for (name,) in tables] == ["batch"]
        await connection.execute(f'DROP SCHEMA "{schema}" CASCADE')
