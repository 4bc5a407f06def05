"""What `where` asks for: equality, membership, a range; several fields are all wanted at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from headrace.core.entity import BOOL, EntityType
from headrace.foundation.errors import InvalidInput

VALUES_MAX: Final = 10_000


class AnyOf:
    """One of these values: `where(Account, country=any_of("NZ", "AU"))`."""

    __slots__ = ("values",)

    def __init__(self, values: Iterable[Any]) -> None:
        self.values = tuple(dict.fromkeys(values))


class Range(NamedTuple):
    """From `least` to `most`, both included unless said otherwise; None is unbounded."""

    least: Any = None
    most: Any = None
    is_above_least: bool = False
    is_below_most: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value lies in it; None lies in no range."""
        if value is None:
            return False
        if self.least is not None and (value < self.least or (self.is_above_least and value == self.least)):
            return False
        return self.most is None or not (value > self.most or (self.is_below_most and value == self.most))


class Condition(NamedTuple):
    """One field's part of a question: `values` for equality and membership, else `range`."""

    field: str
    values: tuple[Any, ...] | None
    range: Range | None

    def holds(self, row: Any) -> bool:
        """Whether a row fulfils it."""
        value = getattr(row, self.field)
        if self.range is not None:
            return self.range.holds(value)
        assert self.values is not None
        return value in self.values


def conditions_of(entity: EntityType, wanted: dict[str, Any]) -> tuple[Condition, ...]:
    """What the arguments of `where` ask for. Raises `InvalidInput` that says how to ask."""
    name = entity.cls.__name__
    if not wanted:
        raise InvalidInput(f"where({name}) asks for nothing", hint='say which: where(Account, country="NZ")')
    found = tuple(_condition(entity, field, value) for field, value in wanted.items())
    if sum(len(condition.values or ()) for condition in found) > VALUES_MAX:
        raise InvalidInput(f"where takes at most {VALUES_MAX} values", hint="ask several times")
    return found


def _condition(entity: EntityType, field: str, wanted: Any) -> Condition:
    column = entity.column(field)
    if not column.is_indexed:
        hint = "use get or get_many" if field == "id" else f"declare it {field}: Indexed[…]"
        raise InvalidInput(f"{entity.cls.__name__}.{field} is not indexed, so where can't ask for it", hint=hint)
    if isinstance(wanted, Range):
        if column.enum is not None or column.kind == BOOL:
            raise InvalidInput(f"{entity.cls.__name__}.{field} has no order to take a range of", hint="ask any_of(…)")
        bounds = [
            None if value is None else entity.checked_value(field, value) for value in (wanted.least, wanted.most)
        ]
        if bounds == [None, None]:
            raise InvalidInput(f"a range of {field} has no bound", hint="say between(least, most), at_least, below, …")
        return Condition(field, None, wanted._replace(least=bounds[0], most=bounds[1]))
    if isinstance(wanted, AnyOf):
        return Condition(field, tuple(_checked(entity, field, value) for value in wanted.values), None)
    return Condition(field, (_checked(entity, field, wanted),), None)


def _checked(entity: EntityType, field: str, value: Any) -> Any:
    if value is None and entity.column(field).is_optional:
        return None
    return entity.checked_value(field, value)


def all_hold(conditions: Sequence[Condition], row: Any) -> bool:
    """Whether a row fulfils every condition."""
    return all(condition.holds(row) for condition in conditions)


def any_of(*values: Any) -> Any:
    """One of these values."""
    return AnyOf(values)


def between(least: Any, most: Any) -> Any:
    """From `least` to `most`, both included."""
    return Range(least, most)


def at_least(least: Any) -> Any:
    """This or more."""
    return Range(least)


def at_most(most: Any) -> Any:
    """This or less."""
    return Range(None, most)


def above(least: Any) -> Any:
    """More than this."""
    return Range(least, is_above_least=True)


def below(most: Any) -> Any:
    """Less than this."""
    return Range(None, most, is_below_most=True)
