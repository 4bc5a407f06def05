"""The baseline of `append` and `drain` on PostgreSQL: the same statements, without the framework.

The schema, the SQL text, the chunk size (256 runs), the encoding of a chunk and the number of chunks per transaction
are the product's. The server keeps its own settings of `fsync` and `synchronous_commit`. One connection, one straight
line of code: no pool, no limits, no error handling and no decisions; rows that decisions would need are fetched and
ignored. The difference to Headrace is the cost of the framework. Headrace can win some of it back because it runs,
claims and settles concurrently, while here client and server wait for each other.
"""

from __future__ import annotations

import re
import time
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import asyncpg
import msgspec

from headrace.benchmarks.baselines.workload import (
    CHUNK_RUNS,
    CHUNKS_A_COMMIT,
    ITEM_BYTES,
    PAD,
    SESSION,
    SESSION_ROW,
    Item,
    pack,
    run,
    statements,
)

PLACES: Final = array("H", range(4_096)).tobytes()

STORE: Final = Path(__file__).parents[2] / "store" / "postgres"
SCHEMA: Final = "headrace_baseline"
BATCH: Final = "batch_00000000000000000000000000"
SETTINGS: Final = {"enable_seqscan": "off", "jit": "off"}


def _statements() -> dict[str, tuple[str, list[str]]]:
    """Return the product's statements by name: `(sql with numbered values, names in that order)`."""
    by_name: dict[str, tuple[str, list[str]]] = {}
    for name, text in statements(STORE / "sql").items():
        names = list(dict.fromkeys(re.findall(r"(?<![:\w]):([a-z_]+)", text)))
        sql = text
        for number, word in enumerate(names, 1):
            sql = re.sub(rf"(?<![:\w]):{word}\b", f"${number}", sql)
        by_name[name] = sql.replace("{schema}", f'"{SCHEMA}"'), names
    return by_name


SQL: Final = _statements()
MIGRATIONS: Final = [
    file.read_text(encoding="utf-8").replace("{schema}", f'"{SCHEMA}"')
    for file in sorted((STORE / "migrations").glob("*.sql"))
]


async def raw_insert_rate(dsn: str, rows_count: int = 100_000) -> float:
    """Return the rows per second of a queue with one row per job: 100 bytes each, 1,000 per transaction."""
    async with _database(dsn) as db:
        await db.execute(
            f'CREATE TABLE "{SCHEMA}".job (id bigint PRIMARY KEY, state int NOT NULL, payload bytea NOT NULL)'
        )
        payload = b"x" * ITEM_BYTES
        started = time.perf_counter()
        for first in range(0, rows_count, 1_000):
            rows = [(number, 0, payload) for number in range(first, min(first + 1_000, rows_count))]
            await db.executemany(f'INSERT INTO "{SCHEMA}".job VALUES ($1, $2, $3)', rows)
        return rows_count / (time.perf_counter() - started)


async def measure_append(dsn: str, items_count: int) -> float:
    """Return the items per second from Python objects to durable chunks."""
    async with _database(dsn) as db:
        started = time.perf_counter()
        await _append(db, items_count)
        return items_count / (time.perf_counter() - started)


async def measure_drain(dsn: str, runs_count: int) -> float:
    """Return the runs per second of a no-op coroutine, from claim to durable result."""
    async with _database(dsn) as db:
        await _append(db, runs_count)
        started = time.perf_counter()
        settled_count = await _drain(db)
        elapsed_s = time.perf_counter() - started
        completed_count = await db.fetchval(f'SELECT completed_count FROM "{SCHEMA}".batch')
        assert settled_count == completed_count == runs_count
        return runs_count / elapsed_s


@asynccontextmanager
async def _database(dsn: str) -> AsyncIterator[Any]:
    db = await asyncpg.connect(dsn, server_settings=SETTINGS)
    try:
        await db.execute(f'DROP SCHEMA IF EXISTS "{SCHEMA}" CASCADE')
        for script in MIGRATIONS:
            await db.execute(script)
        yield db
        await db.execute(f'DROP SCHEMA "{SCHEMA}" CASCADE')
    finally:
        await db.close()


async def _fetch(db: Any, statement: str, /, **values: object) -> list[Any]:
    sql, names = SQL[statement]
    rows: list[Any] = await db.fetch(sql, *(values[name] for name in names))
    return rows


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


async def _append(db: Any, items_count: int) -> None:
    encode = msgspec.json.Encoder().encode
    new = {
        "id": BATCH, "environment": "default", "key": None, "kind": "batch", "task": "nothing", "state": "open",
        "expected_count": None, "metadata": "{}", "session_id": "", "created_us": 0, "seal_timeout_ms": 0,
    }  # fmt: skip
    await _fetch(db, "insert_batch", **new)
    await _fetch(db, "know_queue", environment="default", name="default")
    await _fetch(db, "know_lanes", environment="default", rows='[["default","nothing"]]')
    await db.execute(f'UPDATE "{SCHEMA}".batch SET order_bases = $1', '{"default":0}')
    step = CHUNK_RUNS * CHUNKS_A_COMMIT
    for first in range(0, items_count, step):
        chunks = []
        for start in range(first, min(first + step, items_count), CHUNK_RUNS):
            encoded = [encode(Item(n, PAD)) for n in range(start, min(start + CHUNK_RUNS, items_count))]
            chunks.append((start, len(encoded), pack(encoded)))
        await _append_chunks(db, chunks)


async def _append_chunks(db: Any, chunks: list[tuple[int, int, bytes]]) -> None:
    blocks, spans, at = [], [], 1
    for number, (start, count, items) in enumerate(chunks):
        blocks.append((number, start, count, at, len(items)))
        spans.append((number, number, "default", "nothing", 0, 0, 0, 0, start, start, count, 0, -1, 0))
        at += len(items)
    first, runs_count = chunks[0][0], sum(count for _, count, _ in chunks)
    first_id = first // CHUNK_RUNS + 1
    ((accepted_count,),) = await _fetch(
        db,
        "append_in_order",
        batch_id=BATCH,
        received_before=_received(first),
        received=_received(first + runs_count),
        last_index=first + runs_count - 1,
        runs_max=10_000_000,
        lanes='[["default","nothing"]]',
        block_id=first_id,
        span_id=first_id,
        blocks=_json(blocks),
        spans=_json(spans),
        blob=b"".join(items for _, _, items in chunks),
        runs_count=runs_count,
        block_width=CHUNK_RUNS,
        now_us=1,
        cursor=None,
    )
    assert accepted_count == runs_count


def _received(index: int) -> bytes:
    """Encode the set of indexes from 0 on as the product does: its form, and two bounds as varints."""
    encoded = bytearray((1, 0))
    distance = index
    while distance > 127:
        encoded.append(distance & 127 | 128)
        distance >>= 7
    encoded.append(distance)
    return bytes(encoded) if index else b""


async def _drain(db: Any) -> int:
    await _fetch(db, "insert_session", **SESSION_ROW)
    settled_count, claim_no = 0, 0
    while True:
        claim_no += 1
        rows = await _fetch(
            db,
            "claim_whole",
            session_id=SESSION,
            claim_no=claim_no,
            key_id="",
            environment="default",
            tasks='["nothing"]',
            queues=None,
            queue_prefix="",
            runs_max=CHUNK_RUNS * CHUNKS_A_COMMIT,
            bytes_max=16 * 1024 * 1024,
            rows_max=CHUNKS_A_COMMIT + 2,
            marks="{}",
            due_us=1,
            now_us=1,
            span_slots=PLACES,
            span_id=0,
            clock_step=64,
        )
        leases = [(row[2], row[23], run(row[32])) for row in rows if row[2] is not None]
        if not leases:
            return settled_count
        settled_count += await _settle(db, leases)


async def _settle(db: Any, leases: list[tuple[int, int, list[bytes]]]) -> int:
    rows, pieces, at, runs_count = [], [], 1, 0
    for span_id, token, encoded in leases:
        count, packed = len(encoded), pack(encoded)
        rows.append((span_id, token, count, 0, 0, 1, at, at + count, len(packed), count, 0, 0, 0, 0, count))
        pieces += [b"c" * count, packed]
        at += count + len(packed)
        runs_count += count
    ((spans_count,),) = await _fetch(
        db, "settle_ended", rows=_json(rows), blob=b"".join(pieces), objects="[]", span_slots=PLACES, now_us=1
    )
    assert spans_count == len(leases)
    return runs_count
