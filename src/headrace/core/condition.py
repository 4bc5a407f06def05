"""Conditions of `where`: equality, membership, a range; conditions on several fields must all hold."""

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
    """From `least` to `most`, both included unless stated otherwise; None is unbounded."""

    least: Any = None
    most: Any = None
    is_above_least: bool = False
    is_below_most: bool = False

    def holds(self, value: Any) -> bool:
        """True if a value is in the range; None is in no range."""
        if value is None:
            return False
        if self.least is not None and (value < self.least or (self.is_above_least and value == self.least)):
            return False
        return self.most is None or not (value > self.most or (self.is_below_most and value == self.most))


class Condition(NamedTuple):
    """The condition on one field: `values` for equality and membership, otherwise `range`."""

    field: str
    values: tuple[Any, ...] | None
    range: Range | None

    def holds(self, row: Any) -> bool:
        """True if a row matches."""
        value = getattr(row, self.field)
        if self.range is not None:
            return self.range.holds(value)
        assert self.values is not None
        return value in self.values


def conditions_of(entity: EntityType, conditions: dict[str, Any]) -> tuple[Condition, ...]:
    """Build the conditions from the arguments of `where`. Raises `InvalidInput` with a hint."""
    name = entity.cls.__name__
    if not conditions:
        raise InvalidInput(
            f"where({name}): expected at least one condition", hint='name a field: where(Account, country="NZ")'
        )
    built = tuple(_condition(entity, field, value) for field, value in conditions.items())
    if sum(len(condition.values or ()) for condition in built) > VALUES_MAX:
        raise InvalidInput(f"where: expected at most {VALUES_MAX} values", hint="split the query")
    return built


def _condition(entity: EntityType, field: str, wanted_value: Any) -> Condition:
    column = entity.column(field)
    if not column.is_indexed:
        hint = "use get or get_many" if field == "id" else f"declare it {field}: Indexed[…]"
        raise InvalidInput(f"where: {entity.cls.__name__}.{field} is not indexed", hint=hint)
    if isinstance(wanted_value, Range):
        if column.enum is not None or column.kind == BOOL:
            raise InvalidInput(
                f"where: {entity.cls.__name__}.{field} has no order, so a range is not possible", hint="use any_of(…)"
            )
        bounds = [
            None if value is None else entity.checked_value(field, value)
            for value in (wanted_value.least, wanted_value.most)
        ]
        if bounds == [None, None]:
            raise InvalidInput(
                f"where: the range of {field} has no bound", hint="use between(least, most), at_least, below, …"
            )
        return Condition(field, None, wanted_value._replace(least=bounds[0], most=bounds[1]))
    if isinstance(wanted_value, AnyOf):
        return Condition(field, tuple(_checked(entity, field, value) for value in wanted_value.values), None)
    return Condition(field, (_checked(entity, field, wanted_value),), None)


def _checked(entity: EntityType, field: str, value: Any) -> Any:
    if value is None and entity.column(field).is_optional:
        return None
    return entity.checked_value(field, value)


def all_hold(conditions: Sequence[Condition], row: Any) -> bool:
    """True if a row matches every condition."""
    return all(condition.holds(row) for condition in conditions)


def any_of(*values: Any) -> Any:
    """Match one of these values."""
    return AnyOf(values)


def between(least: Any, most: Any) -> Any:
    """Match from `least` to `most`, both included."""
    return Range(least, most)


def at_least(least: Any) -> Any:
    """Match `least` or more."""
    return Range(least)


def at_most(most: Any) -> Any:
    """Match `most` or less."""
    return Range(None, most)


def above(least: Any) -> Any:
    """Match more than `least`."""
    return Range(least, is_above_least=True)


def below(most: Any) -> Any:
    """Match less than `most`."""
    return Range(None, most, is_below_most=True)
