"""The one place where names are put into SQL.

Everywhere else SQL is fixed text in `.sql` files. Here it can't be: tables and columns are called what the user's
entities are called, and no driver binds a name as a value. So every name passes `quoted`, which lets through lower-case
letters, digits and underscores and nothing else, and the types and operators come from the tables below. Values are
bound, always.
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
        "tag",
        "version",
    ]
)
RESERVED_COLUMNS: Final = frozenset((CHECKPOINT, IS_DELETED))

SQLITE_TYPES: Final = {
    kinds.TEXT: "TEXT", kinds.INTEGER: "", kinds.BIGINT: "INTEGER", kinds.FLOAT: "REAL", kinds.BOOL: "INTEGER",
    kinds.BYTES: "BLOB", kinds.DECIMAL: "TEXT", kinds.MOMENT: "TEXT", kinds.DATE: "TEXT", kinds.IDENTIFIER: "TEXT",
    kinds.JSON: "TEXT",
}  # fmt: skip
"""`integer` has no type: such a column keeps small numbers as they are and large ones as text, both exactly."""

POSTGRES_TYPES: Final = {
    kinds.TEXT: 'text COLLATE "C"', kinds.INTEGER: "numeric", kinds.BIGINT: "bigint", kinds.FLOAT: "double precision",
    kinds.BOOL: "boolean", kinds.BYTES: "bytea", kinds.DECIMAL: "numeric", kinds.MOMENT: "timestamptz",
    kinds.DATE: "date", kinds.IDENTIFIER: "uuid", kinds.JSON: "json",
}  # fmt: skip
"""`json` and not `jsonb`, which orders keys anew: a handler must read what it wrote."""


def quoted(name: str) -> str:
    """A name as SQL takes it. Raises `InvalidInput` for anything but lower-case letters, digits and underscores."""
    if not _NAME.match(name):
        raise InvalidInput(f"{name!r} can't be a name in SQL", hint="lower-case letters, digits and underscores")
    return f'"{name}"'


class Question(NamedTuple):
    """A condition as SQL, and the values it binds, each with its column."""

    sql: str
    values: list[tuple[Column, object]]


class Dialect:
    """Statements over one entity's table and its history. `schema` is empty where there are none."""

    def __init__(self, name: str, schema: str = "") -> None:
        self.name = name
        self.is_postgres = name == "postgres"
        self._types = POSTGRES_TYPES if self.is_postgres else SQLITE_TYPES
        self._prefix = f"{quoted(schema)}." if schema else ""

    def table(self, entity: EntityType) -> str:
        """The table's name."""
        return self.named(entity.table)

    def history(self, entity: EntityType) -> str:
        """The name of the table of its changes."""
        return self.named(entity.table + HISTORY_SUFFIX)

    def named(self, table: str) -> str:
        """Any table's name."""
        return self._prefix + quoted(table)

    def type_of(self, column: Column) -> str:
        """What a column is declared as."""
        return self._types[column.kind]

    # -- making tables

    def create(self, entity: EntityType) -> str:
        """The table of an entity."""
        columns = [f"{quoted(own.name)} {self.type_of(own)}" for own in entity.columns if own.name != kinds.ID]
        key = f"{quoted(kinds.ID)} {self.type_of(entity.id_column)} NOT NULL PRIMARY KEY"
        return f"CREATE TABLE {self.table(entity)} ({', '.join([key, *columns])}){self._end()}"

    def create_history(self, entity: EntityType) -> list[str]:
        """The table of its changes: the row after each, at its checkpoint; 0 is how it stood before the first kept."""
        columns = [f"{quoted(own.name)} {self.type_of(own)}" for own in entity.columns]
        more = [f"{quoted(CHECKPOINT)} bigint NOT NULL", f"{quoted(IS_DELETED)} {self._types[kinds.BOOL]} NOT NULL"]
        key = f"PRIMARY KEY ({quoted(kinds.ID)}, {quoted(CHECKPOINT)})"
        index = quoted(f"{entity.table}_changed")
        end = "" if self.is_postgres else " WITHOUT ROWID"
        return [
            f"CREATE TABLE {self.history(entity)} ({', '.join([*columns, *more, key])}){end}",
            f"CREATE INDEX {index} ON {self.history(entity)} ({quoted(CHECKPOINT)})",
        ]

    def _end(self) -> str:
        # Rows are rewritten in place: with room on its page an update touches no index.
        return " WITH (fillfactor = 80)" if self.is_postgres else " WITHOUT ROWID"

    def add_column(self, table: str, column: Column) -> str:
        """A new column; what existing rows have in it is written after."""
        return f"ALTER TABLE {self.named(table)} ADD COLUMN {quoted(column.name)} {self.type_of(column)}"

    def fill_column(self, table: str, column: Column) -> str:
        """Give every row a value in a column."""
        return f"UPDATE {self.named(table)} SET {quoted(column.name)} = {self._mark(1, column)}"  # noqa: S608 - quoted

    def create_index(self, entity: EntityType, column: Column) -> str:
        """The index that `where` uses."""
        index = quoted(index_name(entity, column))
        columns = f"{self._asked(column)}, {quoted(kinds.ID)}"
        return f"CREATE INDEX IF NOT EXISTS {index} ON {self.table(entity)} ({columns})"

    def drop(self, table: str) -> str:
        """Drop a table that is there or not."""
        return f"DROP TABLE IF EXISTS {self.named(table)}"

    # -- reading

    def select(self, entity: EntityType) -> str:
        """Every row, by id."""
        return f"SELECT {columns_of(entity)} FROM {self.table(entity)} ORDER BY {quoted(kinds.ID)}"  # noqa: S608 - quoted

    def select_ids(self, entity: EntityType, count: int) -> str:
        """Rows by id: one array in PostgreSQL, `count` marks in SQLite."""
        return (
            f"SELECT {columns_of(entity)} FROM {self.table(entity)} "  # noqa: S608 - quoted
            f"WHERE {quoted(kinds.ID)} {self._among(entity.id_column, count, 1)}"
        )

    def select_history(self, entity: EntityType) -> str:
        """Every change, by id and checkpoint."""
        key = f"{quoted(kinds.ID)}, {quoted(CHECKPOINT)}"
        return (
            f"SELECT {columns_of(entity)}, {quoted(CHECKPOINT)}, {quoted(IS_DELETED)} "  # noqa: S608 - quoted
            f"FROM {self.history(entity)} ORDER BY {key}"
        )

    def select_where(self, entity: EntityType, conditions: Sequence[Condition]) -> Question:
        """At least the rows that fulfil every condition, by id."""
        parts: list[str] = []
        values: list[tuple[Column, object]] = []
        for condition in conditions:
            column = entity.column(condition.field)
            parts.append(self._asked_for(column, condition, values))
        sql = f"SELECT {columns_of(entity)} FROM {self.table(entity)} WHERE {' AND '.join(parts)}"  # noqa: S608 - quoted
        return Question(f"{sql} ORDER BY {quoted(kinds.ID)}", values)

    def _asked_for(self, column: Column, condition: Condition, values: list[tuple[Column, object]]) -> str:
        if condition.range is None:
            wanted = [value for value in condition.values or () if value is not None]
            told = [f"{quoted(column.name)} IS NULL"] if len(wanted) < len(condition.values or ()) else []
            if wanted:
                told.append(f"{self._asked(column)} {self._among(column, len(wanted), len(values) + 1)}")
                values += [(column, wanted)] if self.is_postgres else [(column, value) for value in wanted]
            return f"({' OR '.join(told)})" if told else "(1 = 0)"
        told = []
        for value, operator in ((condition.range.least, ">="), (condition.range.most, "<=")):
            if value is not None:
                if column.kind == kinds.INTEGER and not self.is_postgres:
                    value = min(max(value, kinds.INT64[0]), kinds.INT64[-1])
                values.append((column, value))
                told.append(f"{self._asked(column)} {operator} {self._mark(len(values), column)}")
        plain = " AND ".join(told)
        if column.kind == kinds.INTEGER and not self.is_postgres:  # numbers over 64 bits are texts there
            return f"({plain} OR typeof({quoted(column.name)}) = 'text')"
        return f"({plain})"

    def _asked(self, column: Column) -> str:
        """The column as it is compared: SQLite compares decimals as floats, near enough for who looks again."""
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
        """Put rows that `source` gives: VALUES in SQLite, a SELECT in PostgreSQL."""
        rest = [quoted(name) for name in entity.names if name != kinds.ID]
        change = f"UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in rest)}" if rest else "NOTHING"
        return (
            f"INSERT INTO {self.table(entity)} ({columns_of(entity)}) {source} "
            f"ON CONFLICT ({quoted(kinds.ID)}) DO {change}"
        )

    def incoming(self, entity: EntityType) -> str:
        """The name of the temporary table that rows are copied into first.

        It tells what the table looks like: a pooler's connection may still hold one from before columns were added.
        """
        told = f"{self.table(entity)} {[(own.name, own.kind) for own in entity.columns]}"
        return f"incoming_{hashlib.sha256(told.encode()).hexdigest()[:24]}"

    def create_incoming(self, entity: EntityType) -> str:
        """That table; it empties itself at the end of the transaction."""
        columns = ", ".join(f"{quoted(own.name)} {self.type_of(own)}" for own in entity.columns)
        name = quoted(self.incoming(entity))
        return f"CREATE TEMPORARY TABLE IF NOT EXISTS {name} ({columns}) ON COMMIT DELETE ROWS"

    def select_incoming(self, entity: EntityType) -> str:
        """Its rows by id: written in the order of the index."""
        name = quoted(self.incoming(entity))
        return f"SELECT {columns_of(entity)} FROM pg_temp.{name} ORDER BY {quoted(kinds.ID)}"  # noqa: S608 - quoted

    def delete(self, entity: EntityType, count: int) -> str:
        """Delete rows by id."""
        among = self._among(entity.id_column, count, 1)
        return f"DELETE FROM {self.table(entity)} WHERE {quoted(kinds.ID)} {among}"  # noqa: S608 - quoted

    def anchor(self, entity: EntityType, count: int) -> str:
        """Keep how rows stand that are about to change and of which no change is kept."""
        own, past = self.table(entity), self.history(entity)
        false = "false" if self.is_postgres else "0"
        return (
            f"INSERT INTO {past} ({columns_of(entity)}, {quoted(CHECKPOINT)}, {quoted(IS_DELETED)}) "  # noqa: S608 - quoted
            f"SELECT {columns_of(entity)}, 0, {false} FROM {own} AS own "
            f"WHERE {quoted(kinds.ID)} {self._among(entity.id_column, count, 1)} "
            f"AND NOT EXISTS (SELECT 1 FROM {past} AS past WHERE past.{quoted(kinds.ID)} = own.{quoted(kinds.ID)})"
        )

    def insert_history(self, entity: EntityType, source: str) -> str:
        """Keep changes that `source` gives."""
        columns = f"{columns_of(entity)}, {quoted(CHECKPOINT)}, {quoted(IS_DELETED)}"
        return f"INSERT INTO {self.history(entity)} ({columns}) {source}"

    def restore(self, entity: EntityType) -> list[str]:
        """Go back to a checkpoint, three statements of one value each."""
        own, past = self.table(entity), self.history(entity)
        key, no, mark = quoted(kinds.ID), quoted(CHECKPOINT), "$1" if self.is_postgres else "?1"
        later = f"SELECT {key} FROM {past} WHERE {no} > {mark}"  # noqa: S608 - quoted
        newest = f"SELECT {key}, max({no}) FROM {past} WHERE {no} <= {mark} AND {key} IN ({later}) GROUP BY {key}"  # noqa: S608 - quoted
        columns = columns_of(entity)
        if self.is_postgres:  # freshly filled tables have no statistics: nothing is left to be planned
            each = f"SELECT DISTINCT {key} FROM {past} WHERE {no} > {mark}"  # noqa: S608 - quoted
            before = f"SELECT * FROM {past} AS past WHERE past.{key} = later.{key} AND past.{no} <= {mark}"  # noqa: S608 - quoted
            named = ", ".join(f"newest.{quoted(name)}" for name in entity.names)
            return [
                f"DELETE FROM {own} WHERE {key} = ANY(ARRAY({each}))",  # noqa: S608 - quoted
                (
                    f"INSERT INTO {own} ({columns}) SELECT {named} FROM ({each}) AS later "  # noqa: S608 - quoted
                    f"CROSS JOIN LATERAL ({before} ORDER BY past.{no} DESC LIMIT 1) AS newest "
                    f"WHERE NOT newest.{quoted(IS_DELETED)}"
                ),
                f"DELETE FROM {past} WHERE {no} > {mark}",  # noqa: S608 - quoted
            ]
        return [
            f"DELETE FROM {own} WHERE {key} IN ({later})",  # noqa: S608 - quoted
            (
                f"INSERT INTO {own} ({columns}) SELECT {columns} FROM {past} "  # noqa: S608 - quoted
                f"WHERE ({key}, {no}) IN ({newest}) AND NOT {quoted(IS_DELETED)}"
            ),
            f"DELETE FROM {past} WHERE {no} > {mark}",  # noqa: S608 - quoted
        ]

    def prune(self, entity: EntityType) -> str:
        """Drop changes before a checkpoint: of each row the newest of them stays, while later ones build on it."""
        past, key, no = self.history(entity), quoted(kinds.ID), quoted(CHECKPOINT)
        mark = "$1" if self.is_postgres else "?1"
        same = f"SELECT 1 FROM {past} AS other WHERE other.{key} = own.{key}"  # noqa: S608 - quoted
        return (
            f"DELETE FROM {past} AS own WHERE own.{no} <= {mark} AND ("  # noqa: S608 - quoted
            f"EXISTS ({same} AND other.{no} > own.{no} AND other.{no} <= {mark}) "
            f"OR NOT EXISTS ({same} AND other.{no} > {mark}))"
        )


def columns_of(entity: EntityType) -> str:
    """All columns, in the order of the struct's fields."""
    return ", ".join(map(quoted, entity.names))


def index_name(entity: EntityType, column: Column) -> str:
    """What the index over a column is called, at most 63 characters."""
    name = f"{entity.table}_by_{column.name}"
    if len(name) <= 63:
        return name
    return f"{name[:50]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
