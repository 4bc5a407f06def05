"""`SqliteEntities`: the tables of indexers, in the file of the batches.

It writes on its own connection, in the committer's thread. SQLite's lock separates it from the writer of batches, and
is waited for as for any busy file. Many rows are one statement with many VALUES (R13, bulk writes are one statement
with one blob): with a statement a row, a CPU-bound handler would run between each two of them. Unlike JSON, a bound
value is exact.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Final, TypeVar

from headrace.core.condition import Condition
from headrace.core.entity import ID, INTEGER, EntityType
from headrace.core.sequencer import Position
from headrace.foundation.errors import StoreUnavailable, StoreUnreachable
from headrace.store.entities.codecs import RowReader, sqlite_ids, sqlite_rows, sqlite_value
from headrace.store.entities.protocol import Commit, EntityPlan, IndexerState, Write
from headrace.store.entities.schema import Change, changes_of, check_names, tables_of
from headrace.store.entities.sql import Dialect
from headrace.store.sqlite.script_runner import run_script
from headrace.store.sqlite.store import SqliteStore
from headrace.store.sqlite.writer import store_error
from headrace.store.transactions import indexer
from headrace.store.transactions.sql_script import Rows, Script, fetch_column

T = TypeVar("T")

VALUES_MAX: Final = 32_766
STATEMENT_ROWS: Final = tuple(2**power for power in range(12, -1, -1))
"""Rows of one statement: few sizes, so that each is compiled once, and any number of rows takes few statements.

Between two statements the handlers run. 28 statements for 7,777 rows (of 1,000, 100, 10 and 1) take a sixth longer than
these 8.
"""
CACHE_KIB: Final = 32 * 1024


class SqliteEntities:
    """Tables of indexers in one SQLite file. It shares nothing but the file with `SqliteStore`."""

    works_beside = True

    def __init__(self, store: SqliteStore, runs_max: int) -> None:
        self._store = store
        self._runs_max = runs_max
        self._dialect = Dialect("sqlite")
        self._local = threading.local()
        self._opened: list[sqlite3.Connection] = []
        self._readers: dict[str, RowReader] = {}
        self._is_open = True

    # -- connections

    def _connection(self) -> sqlite3.Connection:
        """Return this thread's connection."""
        if not self._is_open:
            raise StoreUnavailable("the store is closed")
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._store.connect()
            connection.execute(f"PRAGMA cache_size = -{CACHE_KIB:d}")
            self._local.connection = connection
            self._opened.append(connection)
        return connection

    async def close(self) -> None:
        """Close all connections."""
        self._is_open = False
        for connection in self._opened:
            connection.close()
        self._opened.clear()

    def _within(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run work in one transaction that writes."""
        try:
            connection = self._connection()
            self._store.check_file()
            connection.execute("BEGIN IMMEDIATE")
            try:
                answer = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                # a full disk has ended it already (R12, a failed group is replayed one request at a time)
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            translated = store_error(error, self._store.path)
            if isinstance(translated, StoreUnreachable):
                self._store.reachability.failed(translated)
            raise translated from error
        self._store.reachability.succeeded()
        return answer

    def _script(self, script: Script[T]) -> T:
        return self._within(lambda connection: run_script(connection, script))

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> Rows:
        try:
            return self._connection().execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise store_error(error, self._store.path) from error

    # -- tables

    async def prepare(self, plan: EntityPlan) -> IndexerState:
        """Create or extend the tables, and return the state of the indexer."""
        check_names(plan.entities)
        return self._within(lambda connection: self._prepare(connection, plan))

    def _prepare(self, connection: sqlite3.Connection, plan: EntityPlan) -> IndexerState:
        state = run_script(connection, indexer.find_or_create(plan.environment, plan.indexer))
        kept = run_script(connection, indexer.stored_tables())
        existing = set(run_script(connection, fetch_column("existing_tables")))
        changes = changes_of(plan, kept, existing)
        if any(change.creates_history for change in changes):
            run_script(connection, indexer.start_history(plan, state))
        for change in changes:
            self._change(connection, plan, change, has_indexes=state.is_caught_up or not plan.defer_indexes)
            run_script(connection, indexer.store_table(plan, change.entity))
        return run_script(connection, indexer.find(plan.environment, plan.indexer))

    def _change(self, connection: sqlite3.Connection, plan: EntityPlan, change: Change, *, has_indexes: bool) -> None:
        entity, dialect = change.entity, self._dialect
        if change.creates:
            connection.execute(dialect.create(entity))
        if change.drops_history:
            connection.execute(dialect.drop(f"{entity.table}_history"))
        tables = [entity.table, *([f"{entity.table}_history"] if plan.keeps_history(entity) else [])]
        for table in tables[:1] if change.creates_history else tables:
            for column in change.adds:
                connection.execute(dialect.add_column(table, column))
                if not column.is_optional or column.default is not None:
                    connection.execute(dialect.fill_column(table, column), (sqlite_value(column, column.default),))
        if change.creates_history:
            for sql in dialect.create_history(entity):
                connection.execute(sql)
        for column in entity.columns:
            if column.is_indexed and has_indexes:
                connection.execute(dialect.create_index(entity, column))

    async def build_index(self, entity: EntityType, field: str) -> None:
        """Create the index over a field."""
        sql = self._dialect.create_index(entity, entity.column(field))
        self._within(lambda connection: connection.execute(sql))

    async def reset(self, environment: str, name: str) -> list[str]:
        """Drop all tables of an indexer, and return their names."""

        def work(connection: sqlite3.Connection) -> list[str]:
            tables = tables_of(run_script(connection, indexer.forget(environment, name)))
            for table in tables:
                connection.execute(self._dialect.drop(table))
            return tables

        return self._within(work)

    # -- the lease

    async def indexer_states(self, environment: str) -> list[IndexerState]:
        """List the indexers of an environment, by name."""
        return self._script(indexer.indexer_states(environment))

    async def take(self, seen: IndexerState, holder: str) -> int | None:
        """Lease an indexer as it was seen."""
        return self._script(indexer.take(seen, holder))

    async def beat(self, environment: str, name: str, token: int) -> bool:
        """Renew the lease."""
        return self._script(indexer.beat(environment, name, token))

    async def leave(self, environment: str, name: str, token: int) -> None:
        """Release the lease."""
        self._script(indexer.leave(environment, name, token))

    # -- commits

    async def commit(self, commit: Commit, *, now_us: int) -> None:
        """Commit: the guard first, then what may still be refused (the runs), then the rows."""

        def work(connection: sqlite3.Connection) -> None:
            if not run_script(connection, indexer.move(commit, now_us)):
                return
            run_script(connection, indexer.note(commit))
            if commit.enqueued is not None:
                batch_id, chunks = commit.enqueued
                run_script(connection, indexer.enqueue(commit.plan, batch_id, chunks, self._runs_max, now_us))
            for write in commit.writes:
                self._write(connection, write, keeps_history=commit.plan.keeps_history(write.entity))
            if commit.floor_no is not None:
                run_script(connection, indexer.move_floor(commit, commit.floor_no))
                for entity in commit.plan.entities:
                    if commit.plan.keeps_history(entity):
                        connection.execute(self._dialect.prune(entity), (commit.floor_no,))

        self._within(work)

    def _write(self, connection: sqlite3.Connection, write: Write, *, keeps_history: bool) -> None:
        entity, dialect = write.entity, self._dialect
        if keeps_history:
            self._keep(connection, write)
        rows = sqlite_rows(entity, write.rows)
        for piece in _pieces(rows, len(entity.columns)):
            connection.execute(dialect.upsert(entity, _values(len(piece), len(entity.columns))), _flat(piece))
        for ids in _pieces(sqlite_ids(entity, write.deleted), 1):
            connection.execute(dialect.delete(entity, len(ids)), _flat(ids))

    def _keep(self, connection: sqlite3.Connection, write: Write) -> None:
        entity, dialect = write.entity, self._dialect
        ids = sqlite_ids(entity, dict.fromkeys(row_id for row_id, _, _ in write.changes))
        for piece in _pieces(ids, 1):
            connection.execute(dialect.anchor(entity, len(piece)), _flat(piece))
        width = len(entity.columns) + 2
        existing = [(no, row) for _, no, row in write.changes if row is not None]
        rows = sqlite_rows(entity, [row for _, row in existing]) if existing else []
        kept = [(*row, no, 0) for row, (no, _) in zip(rows, existing, strict=True)]
        for row_id, no, row in write.changes:
            if row is None:
                bound_id = sqlite_value(entity.id_column, row_id)
                kept.append((*(bound_id if name == ID else None for name in entity.names), no, 1))
        for piece in _pieces(kept, width):
            connection.execute(dialect.insert_history(entity, _values(len(piece), width)), _flat(piece))

    async def rollback(
        self, plan: EntityPlan, token: int, *, old_no: int, source: str, to: Position | None
    ) -> IndexerState:
        """Roll back to the last checkpoint at or before a position."""

        def work(connection: sqlite3.Connection) -> IndexerState:
            state = run_script(connection, indexer.roll_back(plan, token, old_no, source, to))
            for entity in plan.entities:
                if plan.keeps_history(entity):
                    for sql in self._dialect.restore(entity):
                        connection.execute(sql, (state.no,))
            return state

        return self._within(work)

    # -- reading

    def _reader(self, entity: EntityType) -> RowReader:
        reader = self._readers.get(entity.table)
        if reader is None:
            reader = self._readers[entity.table] = RowReader(entity, is_postgres=False)
        return reader

    async def load(self, entity: EntityType, ids: Sequence[Any]) -> list[Any]:
        """Return the rows with these ids."""
        rows: list[Any] = []
        for piece in _pieces(sqlite_ids(entity, ids), 1):
            rows += self._rows(self._dialect.select_ids(entity, len(piece)), _flat(piece))
        return self._reader(entity).rows(rows)

    async def find(self, entity: EntityType, conditions: Sequence[Condition]) -> list[Any]:
        """Return at least the rows that fulfil the conditions, by id."""
        if conditions:
            question = self._dialect.select_where(entity, conditions)
            selected = self._rows(question.sql, [sqlite_value(column, value) for column, value in question.values])
        else:
            selected = self._rows(self._dialect.select(entity))
        rows = self._reader(entity).rows(selected)
        if entity.id_column.kind == INTEGER:  # numbers over 64 bits are stored as text, which sorts differently
            rows.sort(key=lambda row: row.id)
        return rows

    async def history(self, entity: EntityType) -> list[tuple[Any, int, Any]]:
        """Return all rows of the history."""
        rows = self._rows(self._dialect.select_history(entity))
        return self._reader(entity).history(rows)

    async def checkpoints(self, environment: str, name: str) -> list[tuple[int, str, Position]]:
        """Return the events that are kept."""
        return self._script(indexer.checkpoints(environment, name))


def _pieces(rows: Sequence[tuple[Any, ...]], width: int) -> Iterator[Sequence[tuple[Any, ...]]]:
    """Split rows into the few sizes of statements."""
    start = 0
    for size in STATEMENT_ROWS:
        if size * width > VALUES_MAX:
            continue
        while len(rows) - start >= size:
            yield rows[start : start + size]
            start += size


def _values(count: int, width: int) -> str:
    row = f"({','.join('?' * width)})"
    return f"VALUES {','.join([row] * count)}"


def _flat(rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    return list(chain.from_iterable(rows))
