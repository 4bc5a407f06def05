"""Row versions that single jobs leave behind on PostgreSQL: each update or delete is one, until vacuum removes it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from headrace.core.order import CLOCK_STEP
from headrace.foundation.limits import DEFAULT
from headrace.store.postgres import PostgresStore
from headrace.store.postgres.dsn import address
from tests.support.postgres_observer import other_connection
from tests.support.store_rig import StoreRig, fresh_schema

JOBS = 300
STEP_US = 6_667
"""Time between two groups of jobs: 150 a second."""


async def changed_rows(url: str) -> dict[str, float]:
    """Return the updated and deleted rows for a job, by table, once all server processes of the store have ended."""
    schema = address(url).schema
    async with other_connection() as connection:
        while await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE $1 AND pid <> pg_backend_pid()", f'%"{schema}"%'
        ):
            await asyncio.sleep(0)
        rows = await connection.fetch(
            "SELECT relname, n_tup_upd + n_tup_del AS changed FROM pg_stat_user_tables WHERE schemaname = $1", schema
        )
    return {name: changed / JOBS for name, changed in rows if changed}


@pytest.mark.parametrize("group", [1, 5])
async def test_a_group_of_single_jobs_rewrites_its_span_and_its_stream_twice_and_the_queue_rarely(
    group: int, tmp_path: Path
) -> None:
    url = fresh_schema(tmp_path)
    async with StoreRig(PostgresStore(url, DEFAULT)) as rig:
        batch_id = await rig.batch(kind="stream")
        session_id = await rig.session()
        for first in range(0, JOBS, group):
            rig.later(STEP_US / 1_000_000)
            await rig.append(batch_id, range(first, first + group))
            (lease,) = await rig.claim(session_id, 100)
            assert await rig.settle(lease) == "settled"
    by_table = await changed_rows(url)
    groups_a_job = 1 / group
    assert by_table["span"] <= 2 * groups_a_job + 0.02
    assert by_table["batch"] <= 2 * groups_a_job + 0.02
    assert by_table["queue"] <= 1 / CLOCK_STEP + 0.02
    assert sum(by_table.values()) <= 4 * groups_a_job + 0.1
