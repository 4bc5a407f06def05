"""`PostgresEntities`: the tables of indexers, in the schema of the batches.

Rows are inserted by COPY. As long as no row of a type was written twice, they are copied into their table directly. If
a row exists already, the piece is rolled back and merged, and so is every later one. All other rows are copied into a
temporary table, which is emptied at COMMIT, and inserted from there in one statement.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from io import BytesIO
from typing import Any, Final, TypeVar

import asyncpg

from headrace.core.condition import Condition
from headrace.core.entity import ID, JSON, Column, EntityType
from headrace.core.sequencer import Position
from headrace.store.entities.codecs import RowReader, copy_column, copy_rows, json_text
from headrace.store.entities.protocol import Commit, EntityPlan, IndexerState, Write
from headrace.store.entities.schema import Change, changes_of, check_names, tables_of
from headrace.store.entities.sql import CHECKPOINT, HISTORY_SUFFIX, IS_DELETED, Dialect
from headrace.store.postgres.pool import PostgresConnection, Prepared, prepared
from headrace.store.postgres.schema_migration import LOCK
from headrace.store.postgres.store import PostgresStore
from headrace.store.transactions import indexer
from headrace.store.transactions.sql_script import Script, fetch, fetch_column

T = TypeVar("T")

COPY_ROWS: Final = 50_000
BULK_TIMEOUT_S: Final = 600


class PostgresEntities:
    """Tables of indexers in one schema, on the connections of a `PostgresStore`."""

    works_beside = True

    def __init__(self, store: PostgresStore, runs_max: int) -> None:
        self._store = store
        self._runs_max = runs_max
        self._dialect = Dialect("postgres", store.schema)
        self._readers: dict[str, RowReader] = {}
        self._prepared: dict[str, Prepared] = {}
        self._rewritten: set[str] = set()

    async def close(self) -> None:
        """Do nothing: the store closes its own connections."""

    async def _script(self, script: Callable[[], Script[T]]) -> T:
        return await self._store.within(lambda _, run: run(script()))

    async def _rows(self, sql: str, *values: Any) -> list[Any]:
        statement = self._prepared.get(sql)
        if statement is None:
            statement = self._prepared[sql] = prepared(sql, [str(number) for number in range(len(values))])
        return await self._store.fetched(statement, {str(number): value for number, value in enumerate(values)})

    # -- tables

    async def prepare(self, plan: EntityPlan) -> IndexerState:
        """Create or extend the tables, and return the state of the indexer."""
        check_names(plan.entities)
        return await self._store.within(lambda connection, run: self._prepare(connection, run, plan))

    async def _prepare(
        self, connection: PostgresConnection, run: Callable[[Script[Any]], Awaitable[Any]], plan: EntityPlan
    ) -> IndexerState:
        await run(fetch("migration_lock", lock=LOCK))
        state: IndexerState = await run(indexer.find_or_create(plan.environment, plan.indexer))
        stored = await run(indexer.stored_tables())
        existing = set(await run(fetch_column("existing_tables", schema=self._store.schema)))
        changes = changes_of(plan, stored, existing)
        if any(change.creates_history for change in changes):
            await run(indexer.start_history(plan, state))
        for change in changes:
            await self._change(connection, plan, change, has_indexes=state.is_caught_up or not plan.defer_indexes)
            await run(indexer.store_table(plan, change.entity))
        prepared: IndexerState = await run(indexer.find(plan.environment, plan.indexer))
        return prepared

    async def _change(
        self, connection: PostgresConnection, plan: EntityPlan, change: Change, *, has_indexes: bool
    ) -> None:
        entity, dialect = change.entity, self._dialect
        if change.creates:
            await connection.raw.execute(dialect.create(entity))
        if change.drops_history:
            await connection.raw.execute(dialect.drop(entity.table + HISTORY_SUFFIX))
        tables = [entity.table, *([entity.table + HISTORY_SUFFIX] if plan.keeps_history(entity) else [])]
        for table in tables[:1] if change.creates_history else tables:
            for column in change.adds:
                await connection.raw.execute(dialect.add_column(table, column))
                if not column.is_optional or column.default is not None:
                    await connection.raw.execute(
                        dialect.fill_column(table, column), _bound(column, column.default), timeout=BULK_TIMEOUT_S
                    )
        if change.creates_history:
            for sql in dialect.create_history(entity):
                await connection.raw.execute(sql)
        for column in entity.columns:
            if column.is_indexed and has_indexes:
                await connection.raw.execute(dialect.create_index(entity, column), timeout=BULK_TIMEOUT_S)

    async def build_index(self, entity: EntityType, field: str) -> None:
        """Create the index over a field."""
        sql = self._dialect.create_index(entity, entity.column(field))
        await self._store.within(lambda connection, _: connection.raw.execute(sql, timeout=BULK_TIMEOUT_S))

    async def reset(self, environment: str, name: str) -> list[str]:
        """Drop all tables of an indexer, and return their names."""

        async def work(connection: PostgresConnection, run: Callable[[Script[Any]], Awaitable[Any]]) -> list[str]:
            tables = tables_of(await run(indexer.forget(environment, name)))
            for table in tables:
                await connection.raw.execute(self._dialect.drop(table))
            return tables

        return await self._store.within(work)

    # -- the lease

    async def indexer_states(self, environment: str) -> list[IndexerState]:
        """List the indexers of an environment, by name."""
        return await self._script(lambda: indexer.indexer_states(environment))

    async def take(self, seen: IndexerState, holder: str) -> int | None:
        """Lease an indexer as it was seen."""
        return await self._script(lambda: indexer.take(seen, holder))

    async def beat(self, environment: str, name: str, token: int) -> bool:
        """Renew the lease."""
        return await self._script(lambda: indexer.beat(environment, name, token))

    async def leave(self, environment: str, name: str, token: int) -> None:
        """Release the lease."""
        await self._script(lambda: indexer.leave(environment, name, token))

    # -- commits

    async def commit(self, commit: Commit, *, now_us: int) -> None:
        """Commit: the guard first, then what may still be refused (the runs), then the rows."""

        async def work(connection: PostgresConnection, run: Callable[[Script[Any]], Awaitable[Any]]) -> None:
            if not await run(indexer.move(commit, now_us)):
                return
            await run(indexer.note(commit))
            if commit.enqueued is not None:
                batch_id, chunks = commit.enqueued
                await run(indexer.enqueue(commit.plan, batch_id, chunks, self._runs_max, now_us))
            for write in commit.writes:
                if commit.plan.keeps_history(write.entity):
                    await self._keep(connection, write)
                await self._write(connection, write)
            if commit.floor_no is not None:
                await run(indexer.move_floor(commit, commit.floor_no))
                for entity in commit.plan.entities:
                    if commit.plan.keeps_history(entity):
                        await connection.raw.execute(
                            self._dialect.prune(entity), commit.floor_no, timeout=BULK_TIMEOUT_S
                        )

        await self._store.within(work)

    async def _write(self, connection: PostgresConnection, write: Write) -> None:
        entity = write.entity
        if write.rows and not await self._inserted(connection, write):
            self._rewritten.add(entity.table)
            await self._merge(connection, write)
        if write.deleted:
            self._rewritten.add(entity.table)
            sql = self._dialect.delete(entity, len(write.deleted))
            await connection.raw.execute(sql, list(write.deleted), timeout=BULK_TIMEOUT_S)

    async def _inserted(self, connection: PostgresConnection, write: Write) -> bool:
        """Copy rows, and return True if all of them were new; else nothing has changed."""
        entity = write.entity
        if entity.table in self._rewritten:
            return False
        await connection.raw.execute("SAVEPOINT before_copy")
        try:
            await self._copy(connection, entity, entity.table, write.rows, schema=self._store.schema)
        except asyncpg.UniqueViolationError:
            await connection.raw.execute("ROLLBACK TO SAVEPOINT before_copy")
            return False
        await connection.raw.execute("RELEASE SAVEPOINT before_copy")
        return True

    async def _merge(self, connection: PostgresConnection, write: Write) -> None:
        entity, dialect = write.entity, self._dialect
        name = dialect.incoming(entity)
        await connection.raw.execute(dialect.create_incoming(entity))
        await self._copy(connection, entity, name, write.rows)
        await connection.raw.execute(dialect.upsert(entity, dialect.select_incoming(entity)), timeout=BULK_TIMEOUT_S)

    async def _copy(
        self,
        connection: PostgresConnection,
        entity: EntityType,
        table: str,
        rows: Sequence[Any],
        *,
        schema: str | None = None,
    ) -> None:
        for start in range(0, len(rows), COPY_ROWS):
            await connection.raw.copy_to_table(
                table,
                source=BytesIO(copy_rows(entity, rows[start : start + COPY_ROWS])),
                columns=list(entity.names),
                schema_name=schema,
                timeout=BULK_TIMEOUT_S,
            )

    async def _keep(self, connection: PostgresConnection, write: Write) -> None:
        """Insert changes into the history, after the state of their rows before the first of them."""
        entity, dialect = write.entity, self._dialect
        ids = list(dict.fromkeys(row_id for row_id, _, _ in write.changes))
        await connection.raw.execute(dialect.anchor(entity, len(ids)), ids, timeout=BULK_TIMEOUT_S)
        existing = [(no, row) for _, no, row in write.changes if row is not None]
        gone = [(row_id, no) for row_id, no, row in write.changes if row is None]
        pieces = []
        if existing:
            nos = [str(no) for no, _ in existing]
            pieces.append(
                (list(entity.names), copy_rows(entity, [row for _, row in existing], nos, ["f"] * len(existing)))
            )
        if gone:
            own_ids = copy_column(entity.id_column, [row_id for row_id, _ in gone])
            lines = [f"{row_id}\t{no}\tt\n" for row_id, (_, no) in zip(own_ids, gone, strict=True)]
            pieces.append(([ID], "".join(lines).encode()))
        for names, data in pieces:
            await connection.raw.copy_to_table(
                entity.table + HISTORY_SUFFIX,
                source=BytesIO(data),
                columns=[*names, CHECKPOINT, IS_DELETED],
                schema_name=self._store.schema,
                timeout=BULK_TIMEOUT_S,
            )

    async def rollback(
        self, plan: EntityPlan, token: int, *, old_no: int, source: str, to: Position | None
    ) -> IndexerState:
        """Roll back to the last checkpoint at or before a position."""

        async def work(connection: PostgresConnection, run: Callable[[Script[Any]], Awaitable[Any]]) -> IndexerState:
            state: IndexerState = await run(indexer.roll_back(plan, token, old_no, source, to))
            for entity in plan.entities:
                if plan.keeps_history(entity):
                    for sql in self._dialect.restore(entity):
                        await connection.raw.execute(sql, state.no, timeout=BULK_TIMEOUT_S)
            return state

        return await self._store.within(work)

    # -- reading

    def _reader(self, entity: EntityType) -> RowReader:
        reader = self._readers.get(entity.table)
        if reader is None:
            reader = self._readers[entity.table] = RowReader(entity, is_postgres=True)
        return reader

    async def load(self, entity: EntityType, ids: Sequence[Any]) -> list[Any]:
        """Return the rows with these ids."""
        return self._reader(entity).rows(await self._rows(self._dialect.select_ids(entity, len(ids)), list(ids)))

    async def find(self, entity: EntityType, conditions: Sequence[Condition]) -> list[Any]:
        """Return at least the rows that fulfil the conditions, by id."""
        if not conditions:
            return self._reader(entity).rows(await self._rows(self._dialect.select(entity)))
        question = self._dialect.select_where(entity, conditions)
        values = [
            [_bound(column, element) for element in value] if isinstance(value, list) else _bound(column, value)
            for column, value in question.values
        ]
        return self._reader(entity).rows(await self._rows(question.sql, *values))

    async def history(self, entity: EntityType) -> list[tuple[Any, int, Any]]:
        """Return all rows of the history."""
        return self._reader(entity).history(await self._rows(self._dialect.select_history(entity)))

    async def checkpoints(self, environment: str, name: str) -> list[tuple[int, str, Position]]:
        """Return the events that are kept."""
        return await self._script(lambda: indexer.checkpoints(environment, name))


def _bound(column: Column, value: Any) -> Any:
    """Return a value as the driver binds it."""
    if value is None:
        return None
    if column.enum is not None:
        return value.value
    if column.kind == JSON:
        return json_text(value)
    return value
