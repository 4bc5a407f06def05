"""The baseline of the indexer's transfers: the same rows by the same statements, without the framework.

JSON lines are decoded, two balances change and one row is added for each, and every 5,000 events are one transaction:
the last state of each account, every transfer, and the checkpoint. There is no staging beside a running commit, no
check, no history, no lease and no retry: each commit is waited for.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, Final

import asyncpg
import msgspec

BATCH: Final = 5_000
STATEMENT_ROWS: Final = 1_000


class Transfer(msgspec.Struct):
    """One event."""

    sender: str
    receiver: str
    amount: int


def run(lines: Sequence[bytes], commit: Callable[[list[tuple[Any, ...]], list[tuple[Any, ...]], int], None]) -> float:
    """Return the events per second, from JSON lines to durable rows."""
    decode = msgspec.json.Decoder(Transfer).decode
    balances: dict[str, int] = {}
    started = time.perf_counter()
    for start in range(0, len(lines), BATCH):
        touched: dict[str, None] = {}
        transfers = []
        for number, line in enumerate(lines[start : start + BATCH], start + 1):
            event = decode(line)
            balances[event.sender] = balances.get(event.sender, 0) - event.amount
            balances[event.receiver] = balances.get(event.receiver, 0) + event.amount
            touched[event.sender] = touched[event.receiver] = None
            transfers.append((number, event.sender, event.receiver, event.amount))
        commit([(name, balances[name], "") for name in touched], transfers, start + len(transfers))
    return len(lines) / (time.perf_counter() - started)


def measure_sqlite(lines: Sequence[bytes], folder: Path) -> float:
    """Measure one SQLite file, WAL, synchronous=FULL."""
    db = sqlite3.connect(folder / "baseline.db", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE account (id TEXT NOT NULL PRIMARY KEY, balance, country TEXT) WITHOUT ROWID")
    db.execute("CREATE INDEX account_by_country ON account (country, id)")
    db.execute("CREATE TABLE transfer (id INTEGER NOT NULL PRIMARY KEY, sender TEXT, receiver TEXT, amount)")
    db.execute("CREATE TABLE checkpoint (no INTEGER)")
    db.execute("INSERT INTO checkpoint VALUES (0)")
    change = "ON CONFLICT (id) DO UPDATE SET balance = excluded.balance, country = excluded.country"

    def put(table: str, rows: Sequence[tuple[Any, ...]], end: str) -> None:
        for start in range(0, len(rows), STATEMENT_ROWS):
            piece = rows[start : start + STATEMENT_ROWS]
            marks = ",".join([f"({','.join('?' * len(piece[0]))})"] * len(piece))
            db.execute(f"INSERT INTO {table} VALUES {marks} {end}", list(chain.from_iterable(piece)))

    def commit(accounts: list[tuple[Any, ...]], transfers: list[tuple[Any, ...]], no: int) -> None:
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE checkpoint SET no = ?", (no,))
        put("account", accounts, change)
        put("transfer", transfers, "")
        db.execute("COMMIT")

    try:
        return run(lines, commit)
    finally:
        db.close()


def measure_postgres(lines: Sequence[bytes], dsn: str) -> float:
    """Measure one schema of PostgreSQL, by COPY and merge."""
    with asyncio.Runner() as runner:
        db = runner.run(asyncpg.connect(dsn))
        runner.run(
            db.execute(
                """DROP SCHEMA IF EXISTS headrace_baseline CASCADE; CREATE SCHEMA headrace_baseline;
                SET search_path = headrace_baseline;
                SET enable_seqscan = off; SET jit = off;
                CREATE TABLE account (id text COLLATE "C" PRIMARY KEY, balance numeric, country text)
                WITH (fillfactor = 80);
                CREATE INDEX account_by_country ON account (country, id);
                CREATE TABLE transfer (id numeric PRIMARY KEY, sender text, receiver text, amount numeric);
                CREATE TABLE checkpoint (no bigint); INSERT INTO checkpoint VALUES (0);
                CREATE TEMPORARY TABLE incoming (id text, balance numeric, country text) ON COMMIT DELETE ROWS"""
            )
        )

        async def work(accounts: list[tuple[Any, ...]], transfers: list[tuple[Any, ...]], no: int) -> None:
            async with db.transaction():
                await db.execute("UPDATE checkpoint SET no = $1", no)
                text = "\n".join([f"{name}\t{balance}\t" for name, balance, _ in accounts]) + "\n"
                await db.copy_to_table("incoming", source=BytesIO(text.encode()))
                await db.execute(
                    "INSERT INTO account SELECT * FROM incoming ORDER BY id ON CONFLICT (id) DO UPDATE "
                    "SET balance = excluded.balance, country = excluded.country"
                )
                text = (
                    "\n".join([f"{number}\t{sender}\t{to}\t{amount}" for number, sender, to, amount in transfers])
                    + "\n"
                )
                await db.copy_to_table("transfer", source=BytesIO(text.encode()))

        try:
            return run(lines, lambda *numbered: runner.run(work(*numbered)))
        finally:
            runner.run(db.execute("DROP SCHEMA headrace_baseline CASCADE"))
            runner.run(db.close())


def lines_of(count: int, accounts: int = 20_000) -> list[bytes]:
    """Return transfers between accounts, the same in every run."""
    state, lines = 12_345, []
    for number in range(count):
        state = (state * 1_103_515_245 + 12_345) & 0x7FFFFFFF
        sender, receiver = state % accounts, (state >> 8) % accounts
        lines.append(
            b'{"type":"transfer","sender":"account%d","receiver":"account%d","amount":%d}'
            % (sender, receiver, number % 100)
        )
    return lines
