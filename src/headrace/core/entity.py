"""Entities: frozen structs with an id that become tables with typed columns.

Rule 1: a staged row is one that every store can keep, and that is read back unchanged. What a database would change
(the zone of a time, the exponent of a decimal) is normalised when the row is set. What it can't store (NUL, a number
that is not finite) is refused there, beside the event that made it. Rule 2: rows are returned as they are, without a
copy. They are frozen, and of rows with lists or other mutable values each reader gets a copy.
"""

from __future__ import annotations

import enum
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, TypeAlias, TypeVar, dataclass_transform
from uuid import UUID

import msgspec
from msgspec.structs import astuple

from headrace.foundation.errors import InvalidInput, InvalidSetting

T = TypeVar("T")

ID: Final = "id"
INTEGER: Final = "integer"
"""An integer of any size."""
BIGINT: Final = "bigint"
"""An integer whose annotation limits it to 64 bits."""
FLOAT: Final = "float"
BOOL: Final = "bool"
TEXT: Final = "text"
BYTES: Final = "bytes"
DECIMAL: Final = "decimal"
MOMENT: Final = "moment"
DATE: Final = "date"
IDENTIFIER: Final = "uuid"
JSON: Final = "json"

ID_KINDS: Final = (TEXT, INTEGER, BIGINT, IDENTIFIER)
INDEX_KINDS: Final = (TEXT, INTEGER, BIGINT, FLOAT, BOOL, DECIMAL, MOMENT, DATE, IDENTIFIER)
KEY_BYTES_MAX: Final = 2_000
"""Limit for ids and indexed strings: an index of PostgreSQL takes no entry over a third of a page."""
COLUMNS_MAX: Final = 200
INT64: Final = range(-(2**63), 2**63)
_LEAST, _MOST = INT64[0], INT64[-1]
DIGITS_MAX: Final = 1_000
"""Digits of an integer or decimal, before and after the point."""
ROW_BYTES: Final = 250
"""Memory of a row beside its strings: the struct, its entry in a dict, its numbers."""
VALUE_BYTES: Final = 40

_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,47}\Z")
_SMALL: Final = 256
"""Bytes of text of a usual row."""
_NUL: Final = b"\\u0000"


class _Index:
    def __repr__(self) -> str:
        return "Indexed"


INDEX: Final = _Index()
Indexed: TypeAlias = Annotated[T, INDEX]
"""A field that `where` may query: `country: Indexed[str] = ""`."""

Int64: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""An integer of 64 bits: `bigint` in PostgreSQL, where a plain `int` is `numeric`."""


def snake_case(name: str) -> str:
    """Convert `DayTotal` to `day_total`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class _EntityMeta(msgspec.StructMeta):
    """Accepts `table=` beside the options of a struct."""

    __table__: str

    def __new__(
        mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], *, table: str | None = None, **options: Any
    ) -> Any:
        cls = super().__new__(mcls, name, bases, namespace, **options)
        cls.__table__ = snake_case(name) if table is None else table
        return cls


class Entity(msgspec.Struct, metaclass=_EntityMeta, frozen=True, gc=False):
    """A row of a table of its own: `class Account(Entity): id: str; balance: int = 0`.

    The table has the class name in snake case, or a name of its own: `class Account(Entity, table="accounts")`. Rows
    are frozen: `msgspec.structs.replace(account, balance=1)` makes the next one.
    """

    if TYPE_CHECKING:

        def __init_subclass__(cls, *, table: str | None = None, kw_only: bool = False) -> None: ...


class Column(NamedTuple):
    """One column. `type` is the annotation without None; `enum` the enumeration of its values."""

    name: str
    kind: str
    is_optional: bool
    is_indexed: bool
    type: Any
    enum: type[enum.Enum] | None
    default: Any

    @property
    def is_narrowed(self) -> bool:
        """True if its annotation allows less than its kind: a `Literal`, or the bounds of a `msgspec.Meta`."""
        return self.enum is None and self.kind != JSON and self.type not in (*_SCALARS, Int64)

    @property
    def form(self) -> str:
        """The form of the column in the stored schema."""
        return f"{self.kind}{'?' if self.is_optional else ''}"


class EntityType:
    """The table of an entity class. Raises `InvalidSetting` for a class that can't be a table."""

    def __init__(self, cls: type[Entity], *, row_bytes_max: int, name: str = "") -> None:
        if not _is_entity(cls):
            raise InvalidSetting(
                f"expected an entity class, got {cls!r}", hint="write class Account(Entity): id: str; …"
            )
        self.cls = cls
        self.table = name or cls.__table__
        if not _NAME.match(self.table):
            raise InvalidSetting(
                f"{self.table!r} is not a valid name of a table",
                hint="use lower-case letters, digits and underscores, at most 48",
            )
        self.columns = _columns(cls)
        self.names = tuple(column.name for column in self.columns)
        self.row_bytes_max = row_bytes_max
        self.is_changeable = any(column.kind == JSON for column in self.columns)
        self.row_bytes = ROW_BYTES + VALUE_BYTES * len(self.columns)
        """Memory of a usual row."""
        self.is_usual = _quick_check(cls, self.columns)
        """A quick check of whether a row can be stored unchanged; rows that it rejects are examined."""
        self.has_large = False
        """True once an integer of more than 64 bits was set."""
        self._id_at = self.names.index(ID)
        self._is_usual_id = _quick_check_of(self.id_column, _SMALL) or _never
        self._narrowed = {column.name for column in self.columns if column.is_narrowed}
        self._decoders = {
            column.name: msgspec.json.Decoder(column.type) for column in self.columns if column.kind == JSON
        }

    def __repr__(self) -> str:
        return f"EntityType({self.cls.__name__})"

    @property
    def id_column(self) -> Column:
        """The column of the row's id."""
        return self.columns[self._id_at]

    def column(self, name: str) -> Column:
        """Return a column by name. Raises `InvalidInput`."""
        if name not in self.names:
            raise InvalidInput(
                f"{self.cls.__name__} has no field {name!r}", hint=f"its fields are: {', '.join(self.names)}"
            )
        return self.columns[self.names.index(name)]

    def checked(self, row: Any) -> tuple[Any, int]:
        """Return the row as every store keeps it, and its bytes beyond `row_bytes`. Raises `InvalidInput`."""
        return (row, 0) if self.is_usual(row) else self._examine(row)

    def checked_id(self, value: Any) -> Any:
        """Return an id of the right type and size. Raises `InvalidInput`."""
        if self._is_usual_id(value):
            return value
        checked, _ = self._value(self.id_column, value, value)
        return checked

    def checked_value(self, name: str, value: Any) -> Any:
        """Return a value that a row may have in a column. Raises `InvalidInput`."""
        checked, _ = self._value(self.column(name), value, None)
        return checked

    def extra_bytes(self, row: Any) -> int:
        """Return the bytes of a row from the store beyond `row_bytes`."""
        extra = sum(map(_size, astuple(row)))
        return extra if extra >= _SMALL else 0

    def copied(self, row: Any) -> Any:
        """Return a row that its reader may change."""
        if row is None or not self.is_changeable:
            return row
        changes = {
            name: decoder.decode(msgspec.json.encode(value))
            for name, decoder in self._decoders.items()
            if (value := getattr(row, name)) is not None
        }
        return msgspec.structs.replace(row, **changes)

    def decoded(self, name: str, text: str | bytes) -> Any:
        """Decode a value of a JSON column."""
        return self._decoders[name].decode(text)

    def _examine(self, row: Any) -> tuple[Any, int]:
        cls: Any = self.cls
        if type(row) is not cls:
            raise self._fault(None, f"was expected, got {_description(row)}", hint=_await_hint(row))
        changes: dict[str, Any] = {}
        extra = 0
        for column, value in zip(self.columns, astuple(row), strict=True):
            checked, size = self._value(column, value, row.id)
            extra += size
            if checked is not value:
                changes[column.name] = checked
        if extra > self.row_bytes_max:
            raise self._fault(
                row.id, f"has {extra:,} bytes, expected at most {self.row_bytes_max:,}",
                hint="store large values elsewhere, or raise index_row_bytes_max",
            )  # fmt: skip
        if changes:
            row = msgspec.structs.replace(row, **changes)
        return row, extra if extra >= _SMALL else 0

    def _value(self, column: Column, value: Any, row_id: Any) -> tuple[Any, int]:
        if value is None:
            if column.is_optional:
                return None, 0
            raise self._fault(row_id, f"has no {column.name}", hint=f"annotate it as optional, or pass a {column.kind}")
        try:
            checked, size = _CHECKS[column.kind](self, column, value)
            if column.name in self._narrowed:
                _check_narrowed(column, checked)
        except _Refused as refused:
            raise self._fault(row_id, f"can't have {column.name} = {_description(value)}: {refused}") from None
        if (column.name == ID or column.is_indexed) and size > KEY_BYTES_MAX:
            raise self._fault(
                row_id if column.name != ID else None,
                f"has {size:,} bytes of {column.name}, expected at most {KEY_BYTES_MAX:,} for an id or indexed string",
            )
        return checked, size

    def _fault(self, row_id: Any, what: str, *, hint: str = "") -> InvalidInput:
        ids = {} if row_id is None else {"id": row_id if isinstance(row_id, int) else _short(row_id)}
        return InvalidInput(f"{self.cls.__name__} {what}", hint=hint, entity=self.cls.__name__, **ids)


def _quick_check(cls: type[Entity], columns: Sequence[Column]) -> Callable[[Any], bool]:
    """Return the quick check for one type: exact types, few bytes, plain characters, no number that needs a conversion.

    Most rows pass, and every row that is set pays for this check. Strings and integers are therefore checked in loops
    of their own instead of by a call per field.
    """
    texts_count = sum(column.kind in (TEXT, BYTES) and column.enum is None for column in columns)
    identifiers_count = sum(column.kind == IDENTIFIER for column in columns)
    share = (_SMALL - 1 - 16 * identifiers_count) // max(texts_count, 1)
    texts: list[int] = []
    numbers: list[int] = []
    others: list[tuple[int, Callable[[Any], bool]]] = []
    for at, column in enumerate(columns):
        fits = _quick_check_of(column, share)
        if fits is None or share < 1:
            return _never
        if column.is_optional or column.enum is not None or column.type not in (str, int, Int64):
            others.append((at, partial(_is_absent_or, fits) if column.is_optional else fits))
        else:
            (texts if column.kind == TEXT else numbers).append(at)

    def is_usual(row: Any) -> bool:
        if type(row) is not cls:
            return False
        values = astuple(row)
        for at in texts:
            text = values[at]
            if type(text) is not str or len(text) > share or not text.isascii() or "\0" in text:
                return False
        for at in numbers:
            number = values[at]
            if type(number) is not int or not _LEAST <= number <= _MOST:
                return False
        for at, fits in others:  # noqa: SIM110 - a generator a row would cost more than the rest
            if not fits(values[at]):
                return False
        return True

    return is_usual


def _quick_check_of(column: Column, share: int) -> Callable[[Any], bool] | None:
    """Return the quick check of a column's values; None if each must be examined."""
    if column.enum is not None:
        return partial(_is_a, column.enum)
    if column.is_narrowed:
        return None
    if column.kind in (BOOL, DATE, IDENTIFIER):
        return partial(_is_a, column.type)
    checks: dict[str, Callable[[Any], bool]] = {
        TEXT: partial(_is_small_text, share), BYTES: partial(_are_few_bytes, share), FLOAT: _is_usual_float,
        INTEGER: _is_small_number, BIGINT: _is_small_number, MOMENT: _is_moment,
    }  # fmt: skip
    return checks.get(column.kind)


def _never(_: Any) -> bool:
    return False


def _is_absent_or(fits: Callable[[Any], bool], value: Any) -> bool:
    return value is None or fits(value)


def _is_a(kind: type, value: Any) -> bool:
    return type(value) is kind


def _is_small_text(share: int, value: Any) -> bool:
    return type(value) is str and len(value) <= share and value.isascii() and "\0" not in value


def _are_few_bytes(share: int, value: Any) -> bool:
    return type(value) is bytes and len(value) <= share


def _is_small_number(value: Any) -> bool:
    return type(value) is int and _LEAST <= value <= _MOST


def _is_usual_float(value: Any) -> bool:
    """False for 0.0, which may be -0.0, for large numbers and for NaN."""
    return type(value) is float and bool(value) and _LEAST <= value <= _MOST


def _is_moment(value: Any) -> bool:
    return type(value) is datetime and value.tzinfo is UTC


def _is_entity(cls: object) -> bool:
    return isinstance(cls, _EntityMeta) and cls is not Entity


class _Refused(Exception):
    """The reason why a value can't be stored."""


def _check_enum(column: Column, value: Any) -> Any:
    assert column.enum is not None
    if type(value) is column.enum:
        return value
    raise _Refused(f"expected a {column.enum.__name__}")


def _check_narrowed(column: Column, value: Any) -> None:
    try:
        msgspec.convert(value, column.type, builtin_types=_KEPT)
    except msgspec.ValidationError as error:
        raise _Refused(str(error)) from None


def _check_text(_: EntityType, column: Column, value: Any) -> tuple[Any, int]:
    if column.enum is not None:
        return _check_enum(column, value), 0
    if type(value) is not str:
        raise _Refused("expected a string")
    if "\0" in value:
        raise _Refused("it contains a NUL character, which no database stores in text")
    try:
        size = len(value) if value.isascii() else len(value.encode())
    except UnicodeEncodeError as error:
        raise _Refused(f"it is not text that can be stored: {error.reason}") from None
    return value, size


def _check_integer(entity: EntityType, column: Column, value: Any) -> tuple[Any, int]:
    if column.enum is not None:
        return _check_enum(column, value), 0
    if type(value) is not int:
        raise _Refused("expected an integer")
    if column.kind == BIGINT and value not in INT64:
        raise _Refused("it needs more than 64 bits")
    bits = value.bit_length()
    if bits > DIGITS_MAX * 3:
        raise _Refused(f"it has more than about {DIGITS_MAX} digits")
    if bits < 64:
        return value, 0
    entity.has_large = True
    return value, bits // 8


def _check_float(_: EntityType, column: Column, value: Any) -> tuple[Any, int]:
    if type(value) is int and column.enum is None:
        try:
            value = float(value)
        except OverflowError:
            raise _Refused("it exceeds the range of a float") from None
    if type(value) is not float:
        raise _Refused("expected a number")
    if not math.isfinite(value):
        raise _Refused("it is not a finite number")
    return (value or 0.0), 0


def _check_bool(_: EntityType, __: Column, value: Any) -> tuple[Any, int]:
    if type(value) is not bool:
        raise _Refused("expected True or False")
    return value, 0


def _check_bytes(_: EntityType, __: Column, value: Any) -> tuple[Any, int]:
    if type(value) is not bytes:
        raise _Refused("expected bytes")
    return value, len(value)


def _check_decimal(_: EntityType, __: Column, value: Any) -> tuple[Any, int]:
    if type(value) is int:
        value = Decimal(value)
    if type(value) is not Decimal:
        raise _Refused("expected a Decimal")
    if not value.is_finite():
        raise _Refused("it is not a finite number")
    sign, digits, exponent = value.as_tuple()
    assert isinstance(exponent, int)
    if len(digits) > DIGITS_MAX or abs(exponent) > DIGITS_MAX:
        raise _Refused(f"it has more than {DIGITS_MAX} digits")
    if exponent > 0:
        value = Decimal((sign, digits + (0,) * exponent, 0))
    if sign and not value:
        value = abs(value)
    return value, len(digits)


def _check_moment(_: EntityType, __: Column, value: Any) -> tuple[Any, int]:
    if type(value) is not datetime:
        raise _Refused("expected a datetime")
    if value.tzinfo is UTC:
        return value, 0
    if value.utcoffset() is None:
        raise _Refused("it has no time zone: write datetime(…, tzinfo=UTC)")
    try:
        return value.astimezone(UTC), 0
    except OverflowError:
        raise _Refused("it is outside the years 1 to 9999 in UTC") from None


def _check_date(_: EntityType, __: Column, value: Any) -> tuple[Any, int]:
    if type(value) is not date:
        raise _Refused("expected a date")
    return value, 0


def _check_uuid(_: EntityType, __: Column, value: Any) -> tuple[Any, int]:
    if type(value) is not UUID:
        raise _Refused("expected a UUID")
    return value, 16


def _check_json(entity: EntityType, column: Column, value: Any) -> tuple[Any, int]:
    """Return a copy in the types of the column's annotation."""
    try:
        text = msgspec.json.encode(value)
        copy = entity.decoded(column.name, text)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _Refused(str(error)) from None
    if _NUL in text:
        raise _Refused("it contains a NUL character, which no database stores in text")
    return copy, len(text)


_CHECKS: Final = {
    TEXT: _check_text, INTEGER: _check_integer, BIGINT: _check_integer, FLOAT: _check_float, BOOL: _check_bool,
    BYTES: _check_bytes, DECIMAL: _check_decimal, MOMENT: _check_moment, DATE: _check_date, IDENTIFIER: _check_uuid,
    JSON: _check_json,
}  # fmt: skip

_KEPT: Final = (bytes, Decimal, datetime, date, UUID)
_SCALARS: Final[dict[Any, str]] = {
    int: INTEGER, float: FLOAT, bool: BOOL, str: TEXT, bytes: BYTES, Decimal: DECIMAL, datetime: MOMENT, date: DATE,
    UUID: IDENTIFIER,
}  # fmt: skip


def _columns(cls: type[Entity]) -> tuple[Column, ...]:
    hints = typing.get_type_hints(cls, include_extras=True)
    columns = []
    for field in msgspec.structs.fields(cls):
        default = field.default if field.default is not msgspec.NODEFAULT else msgspec.NODEFAULT
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        columns.append(_column(cls, field.name, hints[field.name], default))
    names = [column.name for column in columns]
    if ID not in names:
        raise InvalidSetting(f"{cls.__name__} has no id", hint="declare id: str, int or UUID as its first field")
    if len(columns) > COLUMNS_MAX:
        raise InvalidSetting(f"{cls.__name__} has {len(columns)} fields, expected at most {COLUMNS_MAX}")
    return tuple(columns)


def _column(cls: type[Entity], name: str, hint: Any, default: Any) -> Column:
    if not _NAME.match(name):
        raise InvalidSetting(
            f"{cls.__name__}.{name} is not a valid name of a column",
            hint="use lower-case letters, digits and underscores, at most 48",
        )
    is_indexed, is_optional, metas = False, False, []
    while True:
        if typing.get_origin(hint) is Annotated:
            hint, *marks = typing.get_args(hint)
            is_indexed = is_indexed or any(mark is INDEX for mark in marks)
            metas += [mark for mark in marks if isinstance(mark, msgspec.Meta)]
        elif typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint):
            rest = [option for option in typing.get_args(hint) if option is not type(None)]
            is_optional, hint = True, rest[0] if len(rest) == 1 else typing.Union[tuple(rest)]  # noqa: UP007 - made of a list
        else:
            break
    is_optional = is_optional or hint is Any
    kind, enum_type = _column_kind(hint, metas)
    if name == ID and (kind not in ID_KINDS or is_optional or enum_type):
        raise InvalidSetting(
            f"{cls.__name__}.id: expected a str, int or UUID, got {hint}", hint="declare id: str, id: int or id: UUID"
        )
    if is_indexed and kind not in INDEX_KINDS:
        raise InvalidSetting(
            f"{cls.__name__}.{name} can't be indexed", hint=f"indexes are possible for {', '.join(INDEX_KINDS)}"
        )
    annotated = hint
    for meta in metas:
        annotated = Annotated[annotated, meta]
    return Column(name, kind, is_optional, is_indexed and name != ID, annotated, enum_type, default)


def _column_kind(hint: Any, metas: list[msgspec.Meta]) -> tuple[str, type[enum.Enum] | None]:
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        values = [member.value for member in hint]
        if all(type(value) is str for value in values):
            return TEXT, hint
        if all(type(value) is int and value in INT64 for value in values):
            return BIGINT, hint
        return JSON, None
    if hint is int:
        least = [meta.ge if meta.ge is not None else meta.gt for meta in metas]
        most = [meta.le if meta.le is not None else meta.lt for meta in metas]
        is_small = any(map(_is_near, least)) and any(map(_is_near, most))
        return (BIGINT if is_small else INTEGER), None
    if typing.get_origin(hint) is Literal and all(type(value) is str for value in typing.get_args(hint)):
        return TEXT, None
    return _SCALARS.get(hint, JSON), None


def _is_near(bound: float | None) -> bool:
    return bound is not None and _LEAST <= bound <= _MOST  # a range would count up to a bound that is not an int


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list | tuple | dict | set | msgspec.Struct):
        return 4 * len(msgspec.json.encode(value))
    return 0


def _await_hint(value: object) -> str:
    return "was an await forgotten?" if hasattr(value, "__await__") else ""


def _description(value: object) -> str:
    return f"{_short(value)} ({type(value).__name__})"


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - an error's own words must not become another error
        text = object.__repr__(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
