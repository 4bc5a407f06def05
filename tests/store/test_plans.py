"""Query plans of each statement, on tables about which the database has almost no statistics.

On PostgreSQL that is the generic plan that is kept: made at the first use of a statement, on almost empty tables, and
used until the tables are analysed. What it reads must not grow with the tables, so each growing table is read by an
index on what the statement looks for, and not by an index on the environment alone.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest

from headrace.core.span import Key
from headrace.foundation.limits import DEFAULT
from headrace.store.postgres import PostgresStore
from headrace.store.postgres.pool import SETTINGS, compiled
from headrace.store.sqlite import SqliteStore
from headrace.store.sqlite.script_runner import SQL
from headrace.store.statements import statements
from tests.support.postgres_observer import other_connection, schema_of
from tests.support.store_rig import StoreRig, fresh_schema

GROWING: Final = frozenset(
    {
        "batch",
        "block",
        "span",
        "part",
        "idempotency",
        "tag",
        "object",
        "cancellation",
        "dead_letter",
        "session",
        "checkpoint",
    }
)
ALIVE: Final = "as many as there are running ones: an index on those alone"
PAGED: Final = "read in order from the end of the last page, at most up to the limit"
NOT_NAMED: Final = {
    ("delete_sessions", "session_pkey"): "as many as there were processes in the last hour",
    ("lease_loads", "span_leased"): ALIVE,
    ("leases_without_session", "span_leased"): ALIVE,
    ("list_batches", "batch_listed"): PAGED,
    ("list_queues", "span_unsettled"): ALIVE,
    ("list_spans", "batch_listed"): PAGED,
    ("next_due", "span_delayed"): PAGED,
    ("sessions", "session_pkey"): "as many as there were processes in the last hour",
}


SCANNED: Final = {
    ("delete_sessions", "SCAN session"),
    ("lease_loads", "SCAN span USING INDEX span_leased"),
    ("leases_without_session", "SCAN span USING INDEX span_leased"),
    ("list_batches", "SEARCH batch USING INDEX batch_listed (environment=?)"),
    ("list_queues", "SCAN span USING INDEX span_unsettled"),
    ("list_spans", "SEARCH batch USING COVERING INDEX batch_listed (environment=?)"),
    ("moving_blocks", "SEARCH block USING INTEGER PRIMARY KEY (rowid>?)"),
    ("moving_total", "SCAN batch"),
    ("sessions", "SCAN session"),
}
"""The same on SQLite, and the statements of a store copy."""


@pytest.fixture
def rig(tmp_path: Path) -> StoreRig:
    """Return a rig on an empty schema of its own."""
    return StoreRig(PostgresStore(fresh_schema(tmp_path), DEFAULT))


def scans(plan: dict[str, Any], table: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield `(table, index, condition)` for each read of a table; the index is empty for a sequential scan."""
    table = plan.get("Relation Name", table)
    kind = plan["Node Type"]
    if table in GROWING and ("Index Name" in plan or kind == "Seq Scan"):
        yield table, plan.get("Index Name", ""), plan.get("Index Cond", "")
    for part in plan.get("Plans", ()):
        yield from scans(part, table if kind == "Bitmap Heap Scan" else "")


async def first_columns(connection: Any, schema: str) -> dict[str, str]:
    """Return for each index the first column that is not the environment."""
    rows = await connection.fetch(
        "SELECT relname, attname FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid "
        "JOIN pg_attribute ON attrelid = indexrelid WHERE relnamespace = $1::regnamespace AND attname <> 'environment' "
        "ORDER BY relname, attnum DESC",
        f'"{schema}"',
    )
    return {row["relname"]: row["attname"] for row in rows}


async def test_no_statement_reads_all_of_a_table_that_grows_on_postgres(rig: StoreRig) -> None:
    await rig.filled(10)
    schema, plans = schema_of(rig), set()
    async with other_connection(server_settings=SETTINGS | {"plan_cache_mode": "force_generic_plan"}) as connection:
        columns = await first_columns(connection, schema)
        for name, statement in compiled(schema).items():
            if not re.match(r"\s*(WITH|SELECT|INSERT|UPDATE|DELETE)\b", statement.sql):
                continue
            await connection.execute(f"PREPARE asked AS {statement.sql}")
            values = f"({', '.join(['NULL'] * len(statement.names))})" if statement.names else ""
            ((answer,),) = await connection.fetch(f"EXPLAIN (FORMAT JSON) EXECUTE asked{values}")
            await connection.execute("DEALLOCATE asked")
            for table, index, condition in scans(json.loads(answer)[0]["Plan"]):
                if not re.search(rf"\b{columns.get(index, '')}\b", condition) or not index:
                    plans.add((name, index or table))
    assert plans == set(NOT_NAMED)


async def test_no_statement_reads_all_of_a_table_that_grows_on_sqlite(tmp_path: Path) -> None:
    async with StoreRig(SqliteStore(tmp_path / "db", DEFAULT)):
        connection = sqlite3.connect(tmp_path / "db")
        names = set()
        for name, statement in statements("headrace.store.sqlite").items():
            if re.match(r"\s*(WITH|SELECT|INSERT|UPDATE|DELETE)\b", statement.sql):
                values = dict.fromkeys(re.findall(r":([a-z_]+)", statement.sql), "[]")
                for *_, plan in connection.execute(f"EXPLAIN QUERY PLAN {statement.sql}", values):
                    step = plan.replace("headrace_", "")
                    words = re.match(r"(SCAN|SEARCH) (\w+)( USING .*\((environment=\?|rowid>\?)\))?", step)
                    if words and words[2] in GROWING and (words[1] == "SCAN" or words[3]):
                        names.add((name, step))
        connection.close()
    assert names == SCANNED


async def steps_of_a_listing(folder: Path, queues_count: int) -> int:
    """Return how many thousand steps SQLite takes to list queues with one waiting run each."""
    async with StoreRig(SqliteStore(folder / f"{queues_count}.db", DEFAULT)) as rig:
        batch_id = await rig.batch()
        await rig.append(batch_id, range(queues_count), key=lambda index: Key("task", queue=f"q{index}"))
        with closing(sqlite3.connect(folder / f"{queues_count}.db")) as connection:
            steps = [0]

            def count() -> int:
                steps[0] += 1
                return 0

            connection.set_progress_handler(count, 1_000)
            rows = connection.execute(SQL["list_queues"], {"environment": "default"}).fetchall()
            assert len(rows) == queues_count
            return steps[0]


async def test_listing_queues_takes_steps_in_proportion_to_their_number(tmp_path: Path) -> None:
    few, many = await steps_of_a_listing(tmp_path, 200), await steps_of_a_listing(tmp_path, 2_000)
    assert many <= 15 * max(few, 1), "ten times as many queues, ten times the work"
