"""Conversion between rows and the values of a driver, a column at a time: the loops run inside map, join and zip."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from datetime import date, datetime
from decimal import Decimal
from functools import partial
from typing import Any, Final
from uuid import UUID

import msgspec
from msgspec.structs import astuple

from headrace.core import entity as kinds
from headrace.core.entity import INT64, Column, EntityType

_LEAST, _MOST = INT64[0], INT64[-1]
_encode: Final = msgspec.json.Encoder().encode
NULL: Final = "\\N"
_ESCAPES: Final = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"})

Encode = Callable[[Any], Any]


def json_text(value: Any) -> str:
    """Encode a value of a JSON column as text."""
    return _encode(value).decode()


def _small_or_text(value: int) -> int | str:
    return value if _LEAST <= value <= _MOST else str(value)


def _moment(value: datetime) -> str:
    return value.isoformat(timespec="microseconds")


def _plain_decimal(value: Decimal) -> str:
    return format(value, "f")


def _value_of(value: Any) -> Any:
    return value.value


_SQLITE: Final[dict[str, Encode]] = {
    kinds.INTEGER: _small_or_text, kinds.DECIMAL: _plain_decimal, kinds.MOMENT: _moment, kinds.DATE: date.isoformat,
    kinds.IDENTIFIER: str, kinds.JSON: json_text,
}  # fmt: skip


def sqlite_encoder(column: Column) -> Encode | None:
    """Return the function that converts values of a column for SQLite, or None if they need no conversion. None stays
    None.
    """
    return _value_of if column.enum is not None else _SQLITE.get(column.kind)


def sqlite_value(column: Column, value: Any) -> Any:
    """Convert one value for SQLite."""
    encode = sqlite_encoder(column)
    return value if encode is None or value is None else encode(value)


def sqlite_ids(entity: EntityType, ids: Iterable[Any]) -> list[tuple[Any]]:
    """Convert ids for SQLite, each as a row with one column."""
    encode = sqlite_encoder(entity.id_column)
    return list(zip(ids if encode is None else map(encode, ids), strict=True))


def sqlite_rows(entity: EntityType, rows: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Convert rows for SQLite."""
    tuples = list(map(astuple, rows))
    encoders = [sqlite_encoder(column) for column in entity.columns]
    if not entity.has_large:  # then whole numbers need no conversion
        encoders = [None if encode is _small_or_text else encode for encode in encoders]
    if not tuples or not any(encoders):
        return tuples
    columns = zip(*tuples, strict=True)
    return list(
        zip(
            *(
                values if encode is None else [None if value is None else encode(value) for value in values]
                for encode, values in zip(encoders, columns, strict=True)
            ),
            strict=True,
        )
    )


def _decoders(entity: EntityType, by_kind: dict[str, Callable[[Any], Any]]) -> list[tuple[int, Callable[[Any], Any]]]:
    decoders: list[tuple[int, Callable[[Any], Any]]] = []
    for at, column in enumerate(entity.columns):
        if column.enum is not None:
            decoders.append((at, column.enum))
        elif column.kind == kinds.JSON:
            decoders.append((at, partial(entity.decoded, column.name)))
        elif column.kind in by_kind:
            decoders.append((at, by_kind[column.kind]))
    return decoders


class RowReader:
    """Converter of a driver's rows, whose columns are in the order of the struct's fields."""

    def __init__(self, entity: EntityType, *, is_postgres: bool) -> None:
        self._decoders = _decoders(entity, _FROM_POSTGRES if is_postgres else _FROM_SQLITE)
        self._cls = entity.cls
        self._names = entity.names
        self._id_at = entity.names.index(kinds.ID)
        parameters = inspect.signature(entity.cls).parameters.values()
        order = [parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]
        self._is_by_place = order == list(entity.names)

    def rows(self, driver_rows: Iterable[Sequence[Any]]) -> list[Any]:
        """Convert all rows."""
        return [self.row(values) for values in driver_rows]

    def history(self, driver_rows: Iterable[Sequence[Any]]) -> list[tuple[Any, int, Any]]:
        """Convert rows of the history; their last columns are the checkpoint, and True for a deletion."""
        return [
            (self._id(values[self._id_at]), values[-2], None) if values[-1]
            else ((row := self.row(values[:-2])).id, values[-2], row)
            for values in driver_rows
        ]  # fmt: skip

    def _id(self, value: Any) -> Any:
        for at, decode in self._decoders:
            if at == self._id_at:
                return decode(value)
        return value

    def row(self, values: Sequence[Any]) -> Any:
        """Convert one row."""
        if self._decoders:
            decoded = list(values)
            for at, decode in self._decoders:
                if decoded[at] is not None:
                    decoded[at] = decode(decoded[at])
            values = decoded
        if self._is_by_place:
            return self._cls(*values)
        return self._cls(**dict(zip(self._names, values, strict=True)))


_FROM_SQLITE: Final[dict[str, Callable[[Any], Any]]] = {
    kinds.INTEGER: int, kinds.BOOL: bool, kinds.DECIMAL: Decimal, kinds.MOMENT: datetime.fromisoformat,
    kinds.DATE: date.fromisoformat, kinds.IDENTIFIER: UUID,
}  # fmt: skip

_FROM_POSTGRES: Final[dict[str, Callable[[Any], Any]]] = {
    kinds.INTEGER: int, kinds.IDENTIFIER: lambda value: UUID(int=value.int),
}  # fmt: skip


# -- the text format of COPY


def _bytes_text(value: bytes) -> str:
    return f"\\\\x{value.hex()}"


def _bool_text(value: bool) -> str:
    return "t" if value else "f"


_COPIED: Final[dict[str, Callable[[Any], str]]] = {
    kinds.INTEGER: str, kinds.BIGINT: str, kinds.FLOAT: repr, kinds.BOOL: _bool_text, kinds.BYTES: _bytes_text,
    kinds.DECIMAL: _plain_decimal, kinds.MOMENT: _moment, kinds.DATE: date.isoformat, kinds.IDENTIFIER: str,
    kinds.JSON: json_text,
}  # fmt: skip


def copy_column(column: Column, values: Sequence[Any]) -> Iterable[str]:
    """Encode a column for COPY, escaped."""
    if column.enum is not None:
        values = [None if value is None else value.value for value in values]
    if None in values:
        rest = iter(copy_column(column._replace(enum=None), [value for value in values if value is not None]))
        return [NULL if value is None else next(rest) for value in values]
    encode = _COPIED.get(column.kind)
    texts: Sequence[str] = values if encode is None else list(map(encode, values))
    if column.kind in (kinds.TEXT, kinds.JSON):
        joined = "".join(texts)
        if "\\" in joined or "\n" in joined or "\r" in joined or "\t" in joined:
            return [text.translate(_ESCAPES) for text in texts]
    return texts


def copy_rows(entity: EntityType, rows: Sequence[Any], *more: Sequence[str]) -> bytes:
    """Encode rows for COPY, with more columns at the end."""
    columns = zip(*map(astuple, rows), strict=True)
    texts = [copy_column(column, values) for column, values in zip(entity.columns, columns, strict=True)]
    return ("\n".join(map("\t".join, zip(*texts, *more, strict=True))) + "\n").encode()
