"""The floor under `append` and `drain` on SQLite: the same shape of work, without the framework.

Nothing of headrace is imported. Blocks, spans and parts are three tables, a chunk holds 256 runs, an item is
100 bytes of JSON, every commit is durable (WAL, `synchronous=FULL`). One thread, a straight line, no error
paths: what Headrace adds to this is its own cost. Content hashes, sessions and limits are left out on
purpose; they are part of what the ratio measures.

A floor can be made slow, and then flatters what stands on it. So `check_floor` compares the floors with the
figures of a prototype, measured on a machine whose row-a-job insert rate is known, scaled by this machine's.
"""

from __future__ import annotations

import contextvars
import sqlite3
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import msgspec

CHUNK_RUNS: Final = 256
CHUNKS_A_COMMIT: Final = 16
ITEM_BYTES: Final = 100
PAD: Final = "x" * 79

PEER_RAW_ROWS_S: Final = 255_000
"""Row-a-job inserts a second, sqlite3 FULL, of the machine the peers were measured on."""
PEER_APPEND_ITEMS_S: Final = 420_000
PEER_DRAIN_RUNS_S: Final = 340_000
"""The upper ends of what the prototype of this shape reached there: 240-420 k and 250-340 k."""
FLOOR_RATIO_MIN: Final = 0.5

SCHEMA: Final = """
CREATE TABLE batch (
    id INTEGER PRIMARY KEY, received_count INTEGER NOT NULL, completed_count INTEGER NOT NULL
) STRICT;
CREATE TABLE block (
    id INTEGER PRIMARY KEY, batch_id INTEGER NOT NULL, first_index INTEGER NOT NULL,
    runs_count INTEGER NOT NULL, offsets BLOB NOT NULL, items BLOB NOT NULL
) STRICT;
CREATE TABLE span (
    id INTEGER PRIMARY KEY, block_id INTEGER NOT NULL, batch_id INTEGER NOT NULL, order_no INTEGER NOT NULL,
    state INTEGER NOT NULL, token INTEGER NOT NULL, unsettled_count INTEGER NOT NULL, states BLOB NOT NULL
) STRICT;
CREATE INDEX span_claimable ON span (order_no) WHERE state = 0;
CREATE TABLE part (
    span_id INTEGER NOT NULL, token INTEGER NOT NULL, offsets BLOB NOT NULL, results BLOB NOT NULL,
    PRIMARY KEY (span_id, token)
) STRICT, WITHOUT ROWID;
INSERT INTO batch VALUES (1, 0, 0);
"""

CLAIM: Final = """
UPDATE span SET state = 1, token = token + 1
WHERE id IN (SELECT id FROM span WHERE state = 0 ORDER BY order_no LIMIT ?) RETURNING id, block_id, token
"""


class Item(msgspec.Struct):
    """One input: 100 bytes as JSON."""

    n: int
    pad: str


def raw_insert_rate(rows_count: int = 100_000, directory: Path | None = None) -> float:
    """Rows a second of a queue that keeps a row a job: 100 bytes each, 1,000 a transaction."""
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


def append_floor(items_count: int, directory: Path | None = None) -> float:
    """Items a second, from Python objects to durable chunks."""
    with _database(directory) as db:
        db.executescript(SCHEMA)
        started = time.perf_counter()
        _append(db, items_count)
        return items_count / (time.perf_counter() - started)


def drain_floor(runs_count: int, directory: Path | None = None) -> float:
    """Runs a second, from claim to durable result, of a coroutine that does nothing."""
    with _database(directory) as db:
        db.executescript(SCHEMA)
        _append(db, runs_count)
        started = time.perf_counter()
        settled_count = _drain(db)
        elapsed_s = time.perf_counter() - started
        (completed_count,) = db.execute("SELECT completed_count FROM batch").fetchone()
        assert settled_count == completed_count == runs_count
        return runs_count / elapsed_s


def check_floor(raw_rate: float, append_rate: float, drain_rate: float) -> None:
    """Raise `AssertionError` when a floor is slow for a machine that inserts `raw_rate` rows a second."""
    scale = FLOOR_RATIO_MIN * raw_rate / PEER_RAW_ROWS_S
    for name, rate, peer in (
        ("append", append_rate, PEER_APPEND_ITEMS_S),
        ("drain", drain_rate, PEER_DRAIN_RUNS_S),
    ):
        assert rate >= scale * peer, (
            f"the {name} floor is slow: {rate:,.0f}/s, at least {scale * peer:,.0f}/s expected of a machine "
            f"that inserts {raw_rate:,.0f} rows/s"
        )


@contextmanager
def _database(directory: Path | None) -> Iterator[sqlite3.Connection]:
    with tempfile.TemporaryDirectory(dir=directory, prefix="floor-") as folder:
        path = Path(folder) / "floor.db"
        with closing(sqlite3.connect(path, isolation_level=None, cached_statements=64)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            yield db


def _append(db: sqlite3.Connection, items_count: int) -> None:
    encode = msgspec.json.Encoder().encode
    chunks_waiting = 0
    for first in range(0, items_count, CHUNK_RUNS):
        encoded = [encode(Item(n, PAD)) for n in range(first, min(first + CHUNK_RUNS, items_count))]
        runs_count = len(encoded)
        if not chunks_waiting:
            db.execute("BEGIN IMMEDIATE")
        cursor = db.execute(
            "INSERT INTO block (batch_id, first_index, runs_count, offsets, items) VALUES (1, ?, ?, ?, ?)",
            (first, runs_count, _offsets(encoded), b"".join(encoded)),
        )
        db.execute(
            "INSERT INTO span (block_id, batch_id, order_no, state, token, unsettled_count, states) "
            "VALUES (?, 1, ?, 0, 0, ?, ?)",
            (cursor.lastrowid, first, runs_count, bytes(runs_count)),
        )
        db.execute("UPDATE batch SET received_count = received_count + ? WHERE id = 1", (runs_count,))
        chunks_waiting += 1
        if chunks_waiting == CHUNKS_A_COMMIT:
            db.execute("COMMIT")
            chunks_waiting = 0
    if chunks_waiting:
        db.execute("COMMIT")


def _drain(db: sqlite3.Connection) -> int:
    settled_count = 0
    while True:
        spans = db.execute(CLAIM, (CHUNKS_A_COMMIT,)).fetchall()
        if not spans:
            return settled_count
        results = [_run(db, block_id) for _, block_id, _ in spans]
        db.execute("BEGIN IMMEDIATE")
        for (span_id, _, token), encoded in zip(spans, results, strict=True):
            runs_count = len(encoded)
            db.execute(
                "INSERT INTO part (span_id, token, offsets, results) VALUES (?, ?, ?, ?)",
                (span_id, token, _offsets(encoded), b"".join(encoded)),
            )
            db.execute(
                "UPDATE span SET state = 2, unsettled_count = 0, states = ? WHERE id = ? AND token = ?",
                (b"\x02" * runs_count, span_id, token),
            )
            settled_count += runs_count
        db.execute(
            "UPDATE batch SET completed_count = completed_count + ? WHERE id = 1",
            (sum(map(len, results)),),
        )
        db.execute("COMMIT")


def _run(db: sqlite3.Connection, block_id: int) -> list[bytes]:
    """Decode, call and encode every run of one block, each in a context of its own."""
    decode = msgspec.json.Decoder(Item).decode
    encode = msgspec.json.Encoder().encode
    raw_offsets, items = db.execute("SELECT offsets, items FROM block WHERE id = ?", (block_id,)).fetchone()
    offsets = array("I", raw_offsets)
    view = memoryview(items)
    encoded: list[bytes] = []
    start = 0
    for end in offsets:
        coroutine = _nothing(decode(view[start:end]))
        start = end
        try:
            contextvars.copy_context().run(coroutine.send, None)
        except StopIteration as done:
            encoded.append(encode(done.value))
    return encoded


def _offsets(encoded: list[bytes]) -> bytes:
    """Where each item ends in the joined bytes."""
    offsets = array("I")
    end = 0
    for item in encoded:
        end += len(item)
        offsets.append(end)
    return offsets.tobytes()


async def _nothing(item: Item) -> int:
    return item.n


if __name__ == "__main__":
    raw, append, drain = raw_insert_rate(), append_floor(500_000), drain_floor(500_000)
    print(f"raw insert {raw:,.0f} rows/s, append {append:,.0f} items/s, drain {drain:,.0f} runs/s")
    check_floor(raw, append, drain)
