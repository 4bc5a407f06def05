"""Statements with the names of entities: the only place where names are put into SQL.

Everywhere else SQL is fixed text in `.sql` files. Here it can't be, since tables and columns are named by the user's
entities, and no driver binds a name as a value. Every name passes `quoted`, which accepts only lower-case letters,
digits and underscores. Types and operators come from the tables below. Values are always bound.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from headrace.core import entity as kinds
from headrace.core.condition import Condition
from headrace.core.entity import Column, EntityType
from headrace.foundation.errors import InvalidInput

_NAME: Final = re.compile(r"[a-z_][a-z0-9_]{0,62}\Z")
HISTORY_SUFFIX: Final = "_history"
CHECKPOINT: Final = "checkpoint"
IS_DELETED: Final = "is_deleted"
RESERVED: Final = frozenset(
    [
        "api_key",
        "batch",
        "block",
        "block_ids",
        "bucket",
        "cancellation",
        "checkpoint",
        "dead_letter",
        "duty",
        "idempotency",
        "indexer",
        "indexer_table",
        "lane",
        "move",
        "object",
        "part",
        "queue",
        "rule",
        "schedule",
        "sequence",
        "session",
        "signing_key",
        "span",
        "span_ids",
        "stored_object",
        "stored_piece",
        "tag",
        "version",
    ]
)
RESERVED_PREFIX: Final = "headrace_"
"""Names of tables on SQLite begin with it."""
RESERVED_COLUMNS: Final = frozenset((CHECKPOINT, IS_DELETED))

SQLITE_TYPES: Final = {
    kinds.TEXT: "TEXT", kinds.INTEGER: "", kinds.BIGINT: "INTEGER", kinds.FLOAT: "REAL", kinds.BOOL: "INTEGER",
    kinds.BYTES: "BLOB", kinds.DECIMAL: "TEXT", kinds.MOMENT: "TEXT", kinds.DATE: "TEXT", kinds.IDENTIFIER: "TEXT",
    kinds.JSON: "TEXT",
}  # fmt: skip
"""`integer` has no type: such a column stores small numbers as integers and large ones as text, both exactly."""

POSTGRES_TYPES: Final = {
    kinds.TEXT: 'text COLLATE "C"', kinds.INTEGER: "numeric", kinds.BIGINT: "bigint", kinds.FLOAT: "double precision",
    kinds.BOOL: "boolean", kinds.BYTES: "bytea", kinds.DECIMAL: "numeric", kinds.MOMENT: "timestamptz",
    kinds.DATE: "date", kinds.IDENTIFIER: "uuid", kinds.JSON: "json",
}  # fmt: skip
"""`json` and not `jsonb`, which reorders keys: a handler must read what it wrote."""


def quoted(name: str) -> str:
    """Quote a name for SQL. Raises `InvalidInput` for anything but lower-case letters, digits and underscores."""
    if not _NAME.match(name):
        raise InvalidInput(
            f"expected a name for SQL, got {name!r}", hint="write lower-case letters, digits and underscores"
        )
    return f'"{name}"'


class Question(NamedTuple):
    """A condition in SQL, and the values to bind, each with its column."""

    sql: str
    values: list[tuple[Column, object]]


class Dialect:
    """Statements on one entity's table and its history. `schema` is empty in a database without schemas."""

    def __init__(self, name: str, schema: str = "") -> None:
        self.name = name
        self.is_postgres = name == "postgres"
        self._types = POSTGRES_TYPES if self.is_postgres else SQLITE_TYPES
        self._prefix = f"{quoted(schema)}." if schema else ""

    def table(self, entity: EntityType) -> str:
        """Return the quoted name of the entity's table."""
        return self.named(entity.table)

    def history(self, entity: EntityType) -> str:
        """Return the quoted name of the entity's history table."""
        return self.named(entity.table + HISTORY_SUFFIX)

    def named(self, table: str) -> str:
        """Return the quoted name of any table."""
        return self._prefix + quoted(table)

    def type_of(self, column: Column) -> str:
        """Return the type of a column."""
        return self._types[column.kind]

    # -- creating tables

    def create(self, entity: EntityType) -> str:
        """Create the table of an entity."""
        columns = [
            f"{quoted(column.name)} {self.type_of(column)}" for column in entity.columns if column.name != kinds.ID
        ]
        key = f"{quoted(kinds.ID)} {self.type_of(entity.id_column)} NOT NULL PRIMARY KEY"
        return f"CREATE TABLE {self.table(entity)} ({', '.join([key, *columns])}){self._end()}"

    def create_history(self, entity: EntityType) -> list[str]:
        """Create the history: the row after each change, at its checkpoint; checkpoint 0 is the row before the first
        change.
        """
        columns = [f"{quoted(column.name)} {self.type_of(column)}" for column in entity.columns]
        more = [f"{quoted(CHECKPOINT)} bigint NOT NULL", f"{quoted(IS_DELETED)} {self._types[kinds.BOOL]} NOT NULL"]
        key = f"PRIMARY KEY ({quoted(kinds.ID)}, {quoted(CHECKPOINT)})"
        index = quoted(f"{entity.table}_changed")
        end = "" if self.is_postgres else " WITHOUT ROWID"
        return [
            f"CREATE TABLE {self.history(entity)} ({', '.join([*columns, *more, key])}){end}",
            f"CREATE INDEX {index} ON {self.history(entity)} ({quoted(CHECKPOINT)})",
        ]

    def _end(self) -> str:
        # With free space on its page, an updated row stays there and no index changes.
        return " WITH (fillfactor = 80)" if self.is_postgres else " WITHOUT ROWID"

    def add_column(self, table: str, column: Column) -> str:
        """Add a column; the values of existing rows are written after that."""
        return f"ALTER TABLE {self.named(table)} ADD COLUMN {quoted(column.name)} {self.type_of(column)}"

    def fill_column(self, table: str, column: Column) -> str:
        """Set a column of every row."""
        return f"UPDATE {self.named(table)} SET {quoted(column.name)} = {self._mark(1, column)}"  # noqa: S608 - quoted

    def create_index(self, entity: EntityType, column: Column) -> str:
        """Create the index that `where` uses."""
        index = quoted(index_name(entity, column))
        columns = f"{self._asked(column)}, {quoted(kinds.ID)}"
        return f"CREATE INDEX IF NOT EXISTS {index} ON {self.table(entity)} ({columns})"

    def drop(self, table: str) -> str:
        """Drop a table if it exists."""
        return f"DROP TABLE IF EXISTS {self.named(table)}"

    # -- reading

    def select(self, entity: EntityType) -> str:
        """Select every row, by id."""
        return f"SELECT {columns_of(entity)} FROM {self.table(entity)} ORDER BY {quoted(kinds.ID)}"  # noqa: S608 - quoted

    def select_ids(self, entity: EntityType, count: int) -> str:
        """Select rows by id: one array in PostgreSQL, `count` marks in SQLite."""
        return (
            f"SELECT {columns_of(entity)} FROM {self.table(entity)} "  # noqa: S608 - quoted
            f"WHERE {quoted(kinds.ID)} {self._among(entity.id_column, count, 1)}"
        )

    def select_history(self, entity: EntityType) -> str:
        """Select every change, by id and checkpoint."""
        key = f"{quoted(kinds.ID)}, {quoted(CHECKPOINT)}"
        return (
            f"SELECT {columns_of(entity)}, {quoted(CHECKPOINT)}, {quoted(IS_DELETED)} "  # noqa: S608 - quoted
            f"FROM {self.history(entity)} ORDER BY {key}"
        )

    def select_where(self, entity: EntityType, conditions: Sequence[Condition]) -> Question:
        """Select at least the rows that fulfil every condition, by id."""
        parts: list[str] = []
        values: list[tuple[Column, object]] = []
        for condition in conditions:
            column = entity.column(condition.field)
            parts.append(self._asked_for(column, condition, values))
        sql = f"SELECT {columns_of(entity)} FROM {self.table(entity)} WHERE {' AND '.join(parts)}"  # noqa: S608 - quoted
        return Question(f"{sql} ORDER BY {quoted(kinds.ID)}", values)

    def _asked_for(self, column: Column, condition: Condition, values: list[tuple[Column, object]]) -> str:
        if condition.range is None:
            not_null = [value for value in condition.values or () if value is not None]
            parts = [f"{quoted(column.name)} IS NULL"] if len(not_null) < len(condition.values or ()) else []
            if not_null:
                parts.append(f"{self._asked(column)} {self._among(column, len(not_null), len(values) + 1)}")
                values += [(column, not_null)] if self.is_postgres else [(column, value) for value in not_null]
            return f"({' OR '.join(parts)})" if parts else "(1 = 0)"
        parts = []
        for value, operator in ((condition.range.least, ">="), (condition.range.most, "<=")):
            if value is not None:
                if column.kind == kinds.INTEGER and not self.is_postgres:
                    value = min(max(value, kinds.INT64[0]), kinds.INT64[-1])
                values.append((column, value))
                parts.append(f"{self._asked(column)} {operator} {self._mark(len(values), column)}")
        plain = " AND ".join(parts)
        if column.kind == kinds.INTEGER and not self.is_postgres:  # numbers over 64 bits are stored as text
            return f"({plain} OR typeof({quoted(column.name)}) = 'text')"
        return f"({plain})"

    def _asked(self, column: Column) -> str:
        """Return a column as it is compared. SQLite compares decimals as floats; the caller checks the rows again."""
        if column.kind == kinds.DECIMAL and not self.is_postgres:
            return f"CAST({quoted(column.name)} AS REAL)"
        return quoted(column.name)

    def _mark(self, number: int, column: Column) -> str:
        if self.is_postgres:
            return f"${number}::{self._cast(column)}"
        return "CAST(? AS REAL)" if column.kind == kinds.DECIMAL else "?"

    def _among(self, column: Column, count: int, number: int) -> str:
        if self.is_postgres:
            return f"= ANY(${number}::{self._cast(column)}[])"
        return f"IN ({','.join([self._mark(number, column)] * count)})"

    def _cast(self, column: Column) -> str:
        return self._types[column.kind].partition(" COLLATE")[0]

    # -- writing

    def upsert(self, entity: EntityType, source: str) -> str:
        """Upsert rows from `source`: VALUES in SQLite, a SELECT in PostgreSQL."""
        rest = [quoted(name) for name in entity.names if name != kinds.ID]
        change = f"UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in rest)}" if rest else "NOTHING"
        return (
            f"INSERT INTO {self.table(entity)} ({columns_of(entity)}) {source} "
            f"ON CONFLICT ({quoted(kinds.ID)}) DO {change}"
        )

    def incoming(self, entity: EntityType) -> str:
        """Return the name of the temporary table into which rows are copied first.

        The name contains a hash of the columns: a pooler's connection may still have a table from before columns were
        added.
        """
        definition = f"{self.table(entity)} {[(column.name, column.kind) for column in entity.columns]}"
        return f"incoming_{hashlib.sha256(definition.encode()).hexdigest()[:24]}"

    def create_incoming(self, entity: EntityType) -> str:
        """Create that table; it is emptied at the end of the transaction."""
        columns = ", ".join(f"{quoted(column.name)} {self.type_of(column)}" for column in entity.columns)
        name = quoted(self.incoming(entity))
        return f"CREATE TEMPORARY TABLE IF NOT EXISTS {name} ({columns}) ON COMMIT DELETE ROWS"

    def select_incoming(self, entity: EntityType) -> str:
        """Select its rows by id, to write them in the order of the index."""
        name = quoted(self.incoming(entity))
        return f"SELECT {columns_of(entity)} FROM pg_temp.{name} ORDER BY {quoted(kinds.ID)}"  # noqa: S608 - quoted

    def delete(self, entity: EntityType, count: int) -> str:
        """Delete rows by id."""
        among = self._among(entity.id_column, count, 1)
        return f"DELETE FROM {self.table(entity)} WHERE {quoted(kinds.ID)} {among}"  # noqa: S608 - quoted

    def anchor(self, entity: EntityType, count: int) -> str:
        """Store rows in the history before their first change."""
        current, past = self.table(entity), self.history(entity)
        false = "false" if self.is_postgres else "0"
        return (
            f"INSERT INTO {past} ({columns_of(entity)}, {quoted(CHECKPOINT)}, {quoted(IS_DELETED)}) "  # noqa: S608 - quoted
            f"SELECT {columns_of(entity)}, 0, {false} FROM {current} AS kept "
            f"WHERE {quoted(kinds.ID)} {self._among(entity.id_column, count, 1)} "
            f"AND NOT EXISTS (SELECT 1 FROM {past} AS past WHERE past.{quoted(kinds.ID)} = kept.{quoted(kinds.ID)})"
        )

    def insert_history(self, entity: EntityType, source: str) -> str:
        """Insert changes from `source` into the history."""
        columns = f"{columns_of(entity)}, {quoted(CHECKPOINT)}, {quoted(IS_DELETED)}"
        return f"INSERT INTO {self.history(entity)} ({columns}) {source}"

    def restore(self, entity: EntityType) -> list[str]:
        """Roll back to a checkpoint, in three statements with one value each."""
        current, past = self.table(entity), self.history(entity)
        key, no, mark = quoted(kinds.ID), quoted(CHECKPOINT), "$1" if self.is_postgres else "?1"
        later = f"SELECT {key} FROM {past} WHERE {no} > {mark}"  # noqa: S608 - quoted
        newest = f"SELECT {key}, max({no}) FROM {past} WHERE {no} <= {mark} AND {key} IN ({later}) GROUP BY {key}"  # noqa: S608 - quoted
        columns = columns_of(entity)
        if self.is_postgres:  # freshly filled tables have no statistics, so the statements leave the planner no choice
            each = f"SELECT DISTINCT {key} FROM {past} WHERE {no} > {mark}"  # noqa: S608 - quoted
            before = f"SELECT * FROM {past} AS past WHERE past.{key} = later.{key} AND past.{no} <= {mark}"  # noqa: S608 - quoted
            named = ", ".join(f"newest.{quoted(name)}" for name in entity.names)
            return [
                f"DELETE FROM {current} WHERE {key} = ANY(ARRAY({each}))",  # noqa: S608 - quoted
                (
                    f"INSERT INTO {current} ({columns}) SELECT {named} FROM ({each}) AS later "  # noqa: S608 - quoted
                    f"CROSS JOIN LATERAL ({before} ORDER BY past.{no} DESC LIMIT 1) AS newest "
                    f"WHERE NOT newest.{quoted(IS_DELETED)}"
                ),
                f"DELETE FROM {past} WHERE {no} > {mark}",  # noqa: S608 - quoted
            ]
        return [
            f"DELETE FROM {current} WHERE {key} IN ({later})",  # noqa: S608 - quoted
            (
                f"INSERT INTO {current} ({columns}) SELECT {columns} FROM {past} "  # noqa: S608 - quoted
                f"WHERE ({key}, {no}) IN ({newest}) AND NOT {quoted(IS_DELETED)}"
            ),
            f"DELETE FROM {past} WHERE {no} > {mark}",  # noqa: S608 - quoted
        ]

    def prune(self, entity: EntityType) -> str:
        """Delete changes before a checkpoint. The newest one of each row stays, as long as later changes build on
        it.
        """
        past, key, no = self.history(entity), quoted(kinds.ID), quoted(CHECKPOINT)
        mark = "$1" if self.is_postgres else "?1"
        same = f"SELECT 1 FROM {past} AS other WHERE other.{key} = kept.{key}"  # noqa: S608 - quoted
        return (
            f"DELETE FROM {past} AS kept WHERE kept.{no} <= {mark} AND ("  # noqa: S608 - quoted
            f"EXISTS ({same} AND other.{no} > kept.{no} AND other.{no} <= {mark}) "
            f"OR NOT EXISTS ({same} AND other.{no} > {mark}))"
        )


def columns_of(entity: EntityType) -> str:
    """Return all columns, in the order of the struct's fields."""
    return ", ".join(map(quoted, entity.names))


def index_name(entity: EntityType, column: Column) -> str:
    """Return the name of the index over a column, at most 63 characters."""
    name = f"{entity.table}_by_{column.name}"
    if len(name) <= 63:
        return name
    return f"{name[:50]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
