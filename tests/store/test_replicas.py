"""A standby: it serves reads, refuses writes with a clear error, and takes over when it is promoted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.foundation.errors import InvalidSetting, StoreBroken, StoreUnavailable
from headrace.foundation.limits import DEFAULT
from headrace.store.postgres import PostgresNotifier, PostgresStore
from headrace.store.postgres.dsn import address
from headrace.store.protocol import NewBatch
from tests.support.postgres_observer import other_connection
from tests.support.postgres_server import Server
from tests.support.store_rig import START_US, StoreRig, fresh_schema


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    """Start a primary and its standby."""
    primary = Server()
    standby = Server(primary=primary)
    yield primary, standby
    standby.remove()
    primary.remove()


async def caught_up(primary: Server, standby: Server) -> None:
    """Return when the standby has everything that the primary has now."""
    async with other_connection(primary.dsn) as primary_connection, other_connection(standby.dsn) as standby_connection:
        position = await primary_connection.fetchval("SELECT pg_current_wal_flush_lsn()::text")
        while not await standby_connection.fetchval("SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", position):
            pass


async def test_a_standby_serves_reads_refuses_writes_and_can_be_promoted(
    pair: tuple[Server, Server], tmp_path: Path
) -> None:
    primary, standby = pair
    async with StoreRig(PostgresStore(fresh_schema(tmp_path, primary.dsn), DEFAULT)) as rig:
        batch_id, session = await rig.filled(600), await rig.session()
        first, *rest = await rig.claim(session)
        await rig.settle(first)
        await caught_up(primary, standby)

        for word in ("", "&read_only=true"):
            store = PostgresStore(fresh_schema(tmp_path, standby.dsn) + word, DEFAULT)
            await store.open()
            assert (await store.check())["standby"] is True
            batch, ledger = await store.batch(batch_id)
            assert (batch.state, ledger.completed, ledger.leased) == ("sealed", 256, 344)
            assert [outcome.index for outcome in await store.outcomes(batch_id, 0, 10_000)] == list(range(256))
            assert len(await store.runs("default", batch_id=batch_id, limit=1_000)) == 600
            assert (await store.verify(batch_id)).differences == []
            assert await store.queues("default")
            assert await store.next_due_us("default", ["task"]) is None
            assert [session_row.id for session_row in await store.sessions()] == [session]
            kind = InvalidSetting if word else StoreUnavailable
            with pytest.raises(kind, match="read") as refused:
                await store.create_batch(NewBatch(id="b" * 32), now_us=START_US)
            assert "primary" in refused.value.hint
            with pytest.raises(kind, match="read"):
                await store.heartbeat(session, now_us=START_US)
            await store.close()

        notifier = PostgresNotifier(address(standby.dsn), "any")
        with notifier.awaited():
            pass  # it can't listen on a standby, and polls
        await notifier.close()

        primary.stop("immediate")
        with pytest.raises(StoreUnavailable):
            await rig.settle(rest[0])
        standby.promote()
        async with StoreRig(PostgresStore(fresh_schema(tmp_path, standby.dsn), DEFAULT)) as after:
            for lease in rest:
                assert await after.settle(lease) == "settled"
            batch, ledger = await after.store.batch(batch_id)
            assert (batch.state, ledger.completed) == ("completed", 600)
        rig.was_tampered_with = True  # its server is stopped


async def test_a_replica_with_another_schema_version_is_refused_with_a_hint(tmp_path: Path) -> None:
    store = PostgresStore(f"{fresh_schema(tmp_path)}&read_only=true", DEFAULT)
    with pytest.raises(StoreBroken, match="expected the tables of Headrace in schema") as refused:
        await store.open()
    assert "headrace migrate" in refused.value.hint
    with pytest.raises(InvalidSetting, match=r"expected read_only=true.false in the URL"):
        PostgresStore(f"{fresh_schema(tmp_path)}&read_only=yes", DEFAULT)
