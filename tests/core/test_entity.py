"""The fast and the full check of a row: a row that passes the fast check is not changed by the full check."""

from __future__ import annotations

import enum
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.core.entity import Entity, EntityType, Int64
from headrace.foundation.errors import InvalidInput


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Text(str):
    """A subclass of str: a row that is read back would have another type."""


class Number(int):
    """A subclass of int."""


class Plain(Entity):
    id: str
    name: str = ""
    count: int = 0
    small: Int64 = 0
    ratio: float = 1.5
    is_open: bool = False
    day: date = date(2024, 1, 1)
    at: datetime = datetime(2024, 1, 1, tzinfo=UTC)
    who: UUID = UUID(int=1)
    raw: bytes = b""
    colour: Colour = Colour.RED
    nick: str | None = None
    age: int | None = None
    share: float | None = None


class Narrow(Entity):
    id: int
    percent: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0


class Chosen(Entity):
    id: int
    side: Literal["buy", "sell"] = "buy"
    code: Annotated[str, msgspec.Meta(pattern="^[a-z]+$", max_length=3)] | None = None
    count: Annotated[int, msgspec.Meta(ge=0)] = 0
    share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.5
    raw: Annotated[bytes, msgspec.Meta(max_length=2)] = b""
    at: Annotated[datetime, msgspec.Meta(tz=True)] = datetime(2024, 1, 1, tzinfo=UTC)


class Listed(Entity):
    id: int
    names: list[str] = msgspec.field(default_factory=list)


PLAIN, NARROW, CHOSEN, LISTED = (EntityType(cls, row_bytes_max=100_000) for cls in (Plain, Narrow, Chosen, Listed))

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, 2**63 - 1, -(2**63), -(2**63) - 1, 2**64, Number(3), Text("x"),
        "x" * 300, "a\0b", "é", "\ud800"]),
    st.floats(),
    st.text(max_size=60),
    st.binary(max_size=60),
    st.dates(),
    st.datetimes(timezones=st.sampled_from([None, UTC, timezone(timedelta(hours=2))])),
    st.uuids(),
    st.decimals(),
    st.sampled_from([*Colour, "red", [], [1]]),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(PLAIN.names), values, max_size=4))
@example({"ratio": -0.0})
@example({"ratio": float("nan")})
@example({"ratio": 1})
@example({"count": True})
@example({"raw": b"x" * 300})
@example({"name": "x" * 255})
@example({"nick": "x" * 300})
def test_what_a_glance_lets_through_an_examination_keeps_as_it_is(changes: dict[str, Any]) -> None:
    row = Plain(**({"id": "a"} | changes))
    if not PLAIN.is_usual(row):
        return
    kept, extra = PLAIN._examine(row)
    assert kept is row
    assert extra == 0


def test_a_usual_row_passes_at_a_glance_and_one_that_needs_a_look_does_not() -> None:
    usual = Plain("a", "b", 2**63 - 1, -5, 0.25, True, nick="c", age=3, share=2.5)
    assert PLAIN.is_usual(Plain("a"))
    assert PLAIN.is_usual(usual)
    for change in (
        {"name": "a\0"}, {"name": "é"}, {"name": "x" * 256}, {"name": Text("b")}, {"count": 2**63}, {"count": True},
        {"ratio": 0.0}, {"ratio": float("inf")}, {"ratio": 1}, {"is_open": 1}, {"nick": 3}, {"day": usual.at},
        {"at": usual.at.replace(tzinfo=None)}, {"colour": "red"}, {"id": None}, {"raw": bytearray(b"x")}, {"who": "x"},
    ):  # fmt: skip
        assert not PLAIN.is_usual(msgspec.structs.replace(usual, **change)), change
    assert not PLAIN.is_usual(Narrow(1))


@pytest.mark.parametrize(
    ("entity", "row", "change"),
    [
        (NARROW, Narrow(1), {"percent": 101}),
        (LISTED, Listed(1), {"names": [1]}),
        (CHOSEN, Chosen(1, code="abc", count=10**30), {"side": "hold"}),
        (CHOSEN, Chosen(1), {"code": "abcd"}),
        (CHOSEN, Chosen(1), {"code": "A"}),
        (CHOSEN, Chosen(1), {"count": -1}),
        (CHOSEN, Chosen(1), {"share": 1}),
        (CHOSEN, Chosen(1), {"raw": b"abc"}),
    ],
    ids=str,
)
def test_a_type_that_is_more_than_its_fields_types_is_always_examine(
    entity: EntityType, row: Any, change: dict[str, Any]
) -> None:
    assert not entity.is_usual(row)
    assert entity.checked(row) == (row, 0)
    with pytest.raises(InvalidInput):
        entity.checked(msgspec.structs.replace(row, **change))
