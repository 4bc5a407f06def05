"""Scripts of SQL statements: `rows = yield from fetch("lock_spans", ids=…)`."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")
RowT = TypeVar("RowT")


class TransactionConflict(Exception):
    """A concurrent transaction changed rows that this one had read: roll back, and run the script again."""


class Query(NamedTuple):
    """A named statement and its values by name."""

    name: str
    values: dict[str, Any]


Rows: TypeAlias = list[tuple[Any, ...]]
Script: TypeAlias = Generator[Query, Rows, T]


def fetch(name: str, /, **values: Any) -> Script[Rows]:
    """Return all rows of a statement. A statement with RETURNING returns a row for each row that it changed."""
    return (yield Query(name, values))


def fetch_as(row_type: Callable[..., RowT], name: str, /, **values: Any) -> Script[list[RowT]]:
    """Return all rows of a statement as NamedTuples, whose fields are the statement's columns in order."""
    rows = yield Query(name, values)
    return [row_type(*row) for row in rows]


def fetch_column(name: str, /, **values: Any) -> Script[list[Any]]:
    """Return the values of a statement that has one column."""
    rows = yield Query(name, values)
    return [value for (value,) in rows]


def fetch_one(name: str, /, **values: Any) -> Script[tuple[Any, ...] | None]:
    """Return the first row, or None."""
    rows = yield Query(name, values)
    return rows[0] if rows else None


def fetch_first(name: str, /, **values: Any) -> Script[tuple[Any, ...]]:
    """Return the row of a statement that always has one."""
    rows = yield Query(name, values)
    return rows[0]
