"""The baseline of `append` and `drain` on SQLite: the same statements, without the framework.

The schema, the SQL text, the chunk size (256 runs), the encoding of a chunk and the number of chunks per transaction
are the product's; every commit is durable (WAL, `synchronous=FULL`). One thread and one straight line of code: no loop,
no limits, no error handling and no decisions; rows that decisions would need are fetched and ignored. The difference to
Headrace is the cost of the framework.

A slow baseline would flatter the product. `check_baseline` therefore compares the baselines with a prototype that was
measured on a machine whose rate of single-row inserts is known, scaled by this machine's rate.
"""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

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

PEER_RAW_ROWS_S: Final = 255_000
"""Rows per second of single-row inserts (sqlite3, FULL) on the machine on which the peers were measured."""
PEER_APPEND_ITEMS_S: Final = 420_000
PEER_DRAIN_RUNS_S: Final = 340_000
"""Best rates of the prototype with this schema on that machine: 240-420 k and 250-340 k."""
FLOOR_RATIO_MIN: Final = 0.5

STORE: Final = Path(__file__).parents[2] / "store" / "sqlite"


SQL: Final = statements(STORE / "sql")
SCHEMA: Final = "".join(file.read_text(encoding="utf-8") for file in sorted((STORE / "migrations").glob("*.sql")))
BATCH: Final = "batch_00000000000000000000000000"
LANE: Final = {"environment": "default", "queue": "default", "task": "nothing"}
TOKEN_AT: Final = 21
"""Column of the token in a row of a claim."""


def raw_insert_rate(rows_count: int = 100_000, directory: Path | None = None) -> float:
    """Return the rows per second of a queue with one row per job: 100 bytes each, 1,000 per transaction."""
    with _database(directory) as db:
        db.execute("CREATE TABLE job (id INTEGER PRIMARY KEY, state INTEGER NOT NULL, payload BLOB NOT NULL)")
        payload = b"x" * ITEM_BYTES
        started = time.perf_counter()
        for first in range(0, rows_count, 1_000):
            db.execute("BEGIN IMMEDIATE")
            rows = ((0, payload) for _ in range(min(1_000, rows_count - first)))
            db.executemany("INSERT INTO job (state, payload) VALUES (?, ?)", rows)
            db.execute("COMMIT")
        return rows_count / (time.perf_counter() - started)


def measure_append(items_count: int, directory: Path | None = None) -> float:
    """Return the items per second from Python objects to durable chunks."""
    with _database(directory) as db:
        db.executescript(SCHEMA)
        started = time.perf_counter()
        _append(db, items_count)
        return items_count / (time.perf_counter() - started)


def measure_drain(runs_count: int, directory: Path | None = None) -> float:
    """Return the runs per second of a no-op coroutine, from claim to durable result."""
    with _database(directory) as db:
        db.executescript(SCHEMA)
        _append(db, runs_count)
        started = time.perf_counter()
        settled_count = _drain(db)
        elapsed_s = time.perf_counter() - started
        (completed_count,) = db.execute("SELECT completed_count FROM headrace_batch").fetchone()
        assert settled_count == completed_count == runs_count
        return runs_count / elapsed_s


def check_baseline(raw_rate: float, append_rate: float, drain_rate: float) -> None:
    """Raise `AssertionError` if a baseline is slow for a machine that inserts `raw_rate` rows per second."""
    scale = FLOOR_RATIO_MIN * raw_rate / PEER_RAW_ROWS_S
    for name, rate, peer in (
        ("append", append_rate, PEER_APPEND_ITEMS_S),
        ("drain", drain_rate, PEER_DRAIN_RUNS_S),
    ):
        assert rate >= scale * peer, (
            f"the {name} baseline is slow: {rate:,.0f}/s, at least {scale * peer:,.0f}/s expected of a machine "
            f"that inserts {raw_rate:,.0f} rows/s"
        )


@contextmanager
def _database(directory: Path | None) -> Iterator[sqlite3.Connection]:
    with tempfile.TemporaryDirectory(dir=directory, prefix="baseline-") as folder:
        path = Path(folder) / "baseline.db"
        with closing(sqlite3.connect(path, isolation_level=None, cached_statements=64)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            yield db


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _update_batch(db: sqlite3.Connection, *, received: int) -> None:
    db.execute(
        SQL["update_batch"],
        {
            "id": BATCH, "state": "open", "expected_count": None, "received_count": received,
            "completed_count": 0, "failed_count": 0, "cancelled_count": 0, "expired_count": 0,
            "order_bases": '{"default":0}', "cursor": b"", "appended_us": received, "sealed_us": 0, "finished_us": 0,
        },
    )  # fmt: skip


def _append(db: sqlite3.Connection, items_count: int) -> None:
    encode = msgspec.json.Encoder().encode
    new = {
        "id": BATCH, "environment": "default", "key": None, "kind": "batch", "task": "nothing", "state": "open",
        "expected_count": None, "metadata": "{}", "session_id": "", "created_us": 0, "seal_timeout_ms": 0,
    }  # fmt: skip
    db.execute(SQL["insert_batch"], new)
    step = CHUNK_RUNS * CHUNKS_A_COMMIT
    for first in range(0, items_count, step):
        chunks = []
        for start in range(first, min(first + step, items_count), CHUNK_RUNS):
            encoded = [encode(Item(n, PAD)) for n in range(start, min(start + CHUNK_RUNS, items_count))]
            chunks.append((start, len(encoded), pack(encoded)))
        db.execute("BEGIN IMMEDIATE")
        db.execute(SQL["lock_batch"], {"id": BATCH}).fetchone()
        db.execute(SQL["received"], {"id": BATCH}).fetchone()
        db.execute(SQL["know_queue"], {"environment": "default", "name": "default"})
        db.execute(SQL["know_lanes"], {"environment": "default", "rows": '[["default","nothing"]]'})
        db.execute(SQL["environment_clock"], {"environment": "default"}).fetchall()
        ids = {"blocks_count": len(chunks), "spans_count": len(chunks)}
        block_id, span_id = db.execute(SQL["take_ids"], ids).fetchone()
        _insert_chunks(db, chunks, block_id, span_id)
        last = first + sum(count for _, count, _ in chunks)
        db.execute(SQL["update_received"], {"id": BATCH, "received": b"", "block_width": CHUNK_RUNS})
        _update_batch(db, received=last)
        db.execute("COMMIT")


def _insert_chunks(db: sqlite3.Connection, chunks: list[tuple[int, int, bytes]], block_id: int, span_id: int) -> None:
    blocks, spans, items_at, states_at = [], [], 1, 1
    for number, (start, count, items) in enumerate(chunks):
        blocks.append((block_id + number, start, start + count - 1, count, 0, -1, 0, -1, items_at, len(items)))
        spans.append(
            (
                span_id + number, block_id + number, BATCH, "default", "default", "nothing", 0, 0, 0, 0, start, start,
                1,
                0, 0, count, "waiting", "", 0, 0, 0, -1, states_at, count, 0, "", 1, 0,
            )
        )  # fmt: skip
        items_at += len(items)
        states_at += count
    blob = b"".join(items for _, _, items in chunks)
    db.execute(SQL["insert_blocks"], {"batch_id": BATCH, "rows": _json(blocks), "blob": blob})
    db.execute(SQL["insert_spans"], {"rows": _json(spans), "blob": b"w" * (states_at - 1)})


def _drain(db: sqlite3.Connection) -> int:
    db.execute(SQL["insert_session"], SESSION_ROW)
    settled_count, claim_no = 0, 0
    while True:
        claim_no += 1
        spans, blocks = _claim(db, claim_no)
        if not spans:
            return settled_count
        results = [run(blocks[span[1]]) for span in spans]
        _settle(db, spans, results)
        settled_count += sum(map(len, results))


def _claim(db: sqlite3.Connection, claim_no: int) -> tuple[list[tuple[int, int, int]], dict[int, bytes]]:
    """Claim spans; return `(span id, block id, token)` of each, and the items of their blocks."""
    tasks = {"environment": "default", "tasks": '["nothing"]', "queues": None, "queue_prefix": ""}
    db.execute("BEGIN IMMEDIATE")
    db.execute(SQL["live_session"], {"id": SESSION, "environment": "default", "key_id": ""}).fetchone()
    db.execute(SQL["claimed_before"], {"session_id": SESSION, "claim_no": claim_no}).fetchall()
    db.execute(SQL["due_spans"], {"now_us": 1, "rows_max": 1_000}).fetchall()
    db.execute(SQL["open_lanes"], tasks).fetchall()
    rows = db.execute(SQL["claim_candidates"], LANE | {"now_us": 1, "rows_max": CHUNKS_A_COMMIT}).fetchall()
    db.execute(SQL["stopped_batches"], {"ids": _json([BATCH])}).fetchall()
    ids = _json([row[0] for row in rows])
    db.execute(SQL["lease_spans"], {"session_id": SESSION, "claim_no": claim_no, "ids": ids, "now_us": 1})
    if rows:
        db.execute(SQL["advance_clock"], {"environment": "default", "name": "default", "order_no": rows[-1][10]})
    block_rows = db.execute(SQL["blocks"], {"ids": _json([row[1] for row in rows])}).fetchall()
    db.execute("COMMIT")
    return [(row[0], row[1], row[TOKEN_AT] + 1) for row in rows], {row[0]: row[4] for row in block_rows}


def _settle(db: sqlite3.Connection, spans: list[tuple[int, int, int]], results: list[list[bytes]]) -> None:
    updates, parts, states_at, parts_at = [], [], 1, 1
    pieces = []
    for (span_id, block_id, token), encoded in zip(spans, results, strict=True):
        count, packed = len(encoded), pack(encoded)
        updates.append((span_id, 0, 0, 0, 0, "done", "", 0, token, states_at, count, 1))
        parts.append((block_id, span_id, token, 0, 1, 0, -1, parts_at, count, parts_at + count, len(packed)))
        pieces += [b"c" * count, packed]
        states_at += count
        parts_at += count + len(packed)
    db.execute("BEGIN IMMEDIATE")
    db.execute(SQL["lock_spans"], {"ids": _json([span[0] for span in spans])}).fetchall()
    db.execute(SQL["update_spans"], {"rows": _json(updates), "blob": b"c" * (states_at - 1)})
    db.execute(SQL["insert_parts"], {"rows": _json(parts), "blob": b"".join(pieces)})
    counts = {"completed": states_at - 1, "failed": 0, "cancelled": 0, "expired": 0}
    db.execute(SQL["count_outcomes"], {"id": BATCH} | counts).fetchall()
    db.execute("COMMIT")
