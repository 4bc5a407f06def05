"""Values that JSON would change silently, and results of a wrong type, are errors that name the field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypedDict
from uuid import UUID, uuid4

import msgspec
import pytest

from headrace import Headrace, InvalidInput, Retry
from headrace.foundation.settings import load
from headrace.runtime.tasks.value_checks import ResultCodec, ValueRefused
from tests.support import pool_tasks


class Point(msgspec.Struct):
    x: float
    name: str = ""


@dataclass
class Page:
    text: str
    words: int | None = None


class Size(TypedDict):
    width: int


class Pair(NamedTuple):
    left: int
    right: str


def whole(text: str) -> None: ...
def several(text: str, count: float = 1, *, inner: dict[str, Any] | None = None) -> None: ...
def shape(point: Point) -> None: ...
def page(page: Page) -> None: ...
def raw(data: bytes) -> None: ...
def anything(value: Any) -> None: ...
def number(n: float | None) -> None: ...
def texts(items: list[str]) -> None: ...


REFUSED: list[tuple[Any, tuple[Any, ...], str]] = [
    (whole, (b"abc",), "parameter text: Expected `str`, got `bytes`"),
    (several, (b"abc",), "Expected `str`, got `bytes` - at `$.text`"),
    (several, (bytearray(b"abc"), 2), "Expected `str`, got `bytes` - at `$.text`"),
    (several, ("a", math.nan), "Expected a finite number, got nan - at `$.count`"),
    (shape, (Point(math.inf),), "parameter point: Expected a finite number, got inf - at `$.x`"),
    (shape, (Point(1, b"x"),), "Expected `str`, got `bytes` - at `$.name`"),  # type: ignore[arg-type]  # the point
    (page, (Page(b"x"),), "Expected `str`, got `bytes` - at `$.text`"),  # type: ignore[arg-type]  # the point
    (anything, ({"a": [1, -math.inf]},), "Expected a finite number, got -inf - at `$.a[1]`"),
    (number, (math.nan,), "parameter n: Expected a finite number, got nan"),
    (texts, (["a", b"b"],), "Expected `str`, got `bytes` - at `$[1]`"),
]


@pytest.mark.parametrize(("function", "arguments", "message"), REFUSED)
async def test_an_argument_that_json_would_change_is_refused_by_name(
    function: Any, arguments: tuple[Any, ...], message: str
) -> None:
    task = Headrace("values", store="memory://").task(function)
    with pytest.raises(InvalidInput) as raised:
        await task.enqueue(*arguments)
    assert message in raised.value.message


ACCEPTED: list[tuple[Any, tuple[Any, ...]]] = [
    (raw, (b"abc",)),
    (anything, (None,)),
    (anything, ({"a": None, "b": "\xcb\x7f\xff null"},)),
    (number, (None,)),
    (several, ("null", 1.5)),
    (texts, (["null"],)),
    (page, (Page("null", None),)),
    (anything, ({"big": 2**70, "n": None},)),
    (whole, (datetime(2026, 1, 1, tzinfo=UTC),)),
]


@pytest.mark.parametrize(("function", "arguments"), ACCEPTED)
async def test_arguments_that_json_can_hold_are_accepted(function: Any, arguments: tuple[Any, ...]) -> None:
    app = Headrace("values", store="memory://")
    async with app:
        assert (await app.task(function).enqueue(*arguments)).index == 0


async def test_items_of_a_map_that_json_would_change_are_failed_runs() -> None:
    app = Headrace("values", store="memory://")

    @app.task
    async def length(text: str) -> int:
        return len(text)

    @app.task
    async def double(n: float | None) -> float:
        return 2 * (n or 0)

    async with app, app.worker():
        texts = await length.map(["one", b"two", "three"])
        assert [outcome.output async for outcome in texts.results(timeout_s=30)] == [3, None, 5]
        numbers = await double.map([1.0, math.nan, None])
        outcomes = [outcome async for outcome in numbers.results(timeout_s=30)]
    assert [outcome.output for outcome in outcomes] == [2, None, 0]
    assert outcomes[1].failure is not None
    assert "got nan" in outcomes[1].failure.message


WRONG: list[tuple[Any, Any, str]] = [
    (int, "7", "Expected `int`, got `str`"),
    (int, True, "Expected `int`, got `bool`"),
    (int, None, "Expected `int`, got `NoneType`"),
    (str, b"abc", "Expected `str`, got `bytes`"),
    (str, uuid4(), "Expected `str`, got `UUID`"),
    (None, 5, "Expected `null`, got `int`"),
    (float, math.nan, "Expected a finite number, got nan"),
    (int | None, "x", "Expected `int | null`, got `str`"),
    (Any, math.inf, "Expected a finite number, got inf"),
    (Any, [{"a": math.nan}], "Expected a finite number, got nan - at `$[0].a`"),
    (dict[str, int], {"a": "x"}, "Expected `int`, got `str` - at `$[...]`"),
    (dict[str, str], {"a": b"x"}, "Expected `str`, got `bytes` - at `$[...]`"),
    (list[int], {"a": 1}, "Expected `array`, got `object`"),
    (Point, {"x": "wide"}, "Expected `float`, got `str` - at `$.x`"),
    (Point, Point(math.nan), "Expected a finite number, got nan - at `$.x`"),
    (Page, {"words": 1}, "Object missing required field `text`"),
    (Size, {"width": None}, "Expected `int`, got `null` - at `$.width`"),
    (Pair, (1, 2), "Expected `str`, got `int` - at `$[1]`"),
]
RIGHT: list[tuple[Any, Any]] = [
    (int, 7),
    (float, 7),
    (float, 7.5),
    (str, "x"),
    (None, None),
    (int | None, None),
    (bytes, b"x"),
    (Any, {"a": None}),
    (dict[str, int], {"a": 1}),
    (Mapping[str, Any], {"a": None}),
    (Sequence[int], (1, 2)),
    (list[Point], [Point(1)]),
    (Point, Point(1)),
    (Page, Page("x")),
    (Size, {"width": 1}),
    (Pair, Pair(1, "x")),
    (UUID, uuid4()),
    (datetime, datetime(2026, 1, 1, tzinfo=UTC)),
    (object, [1]),
]


def check(annotation: Any, value: Any) -> None:
    codec = ResultCodec(annotation)
    if type(value) not in codec.plain_types:
        codec.check(value, msgspec.json.encode(value))


@pytest.mark.parametrize(("annotation", "value", "message"), WRONG)
def test_a_result_of_another_type_is_refused(annotation: Any, value: Any, message: str) -> None:
    with pytest.raises(ValueRefused) as raised:
        check(annotation, value)
    assert str(raised.value) == message


@pytest.mark.parametrize(("annotation", "value"), RIGHT)
def test_a_result_of_the_annotated_type_is_accepted(annotation: Any, value: Any) -> None:
    check(annotation, value)


async def test_a_wrong_result_fails_the_run_without_a_retry_wherever_the_task_runs(tmp_path: Path) -> None:
    app = Headrace("values", store=f"sqlite:///{tmp_path}/headrace.db")
    wrong: Any = {"x": "wide"}

    @app.task(retry=Retry(attempts=5, delay_s=0))
    async def at_once(_n: int) -> Point:
        return wrong  # type: ignore[no-any-return]  # the point

    @app.task(retry=Retry(attempts=5, delay_s=0))
    def in_a_thread(_n: int) -> Point:
        return wrong  # type: ignore[no-any-return]  # the point

    async with app, app.worker():
        await check_failures(await at_once.map([1, 2]), "$.x")
        await check_failures(await in_a_thread.map([1, 2]), "$.x")
    pool_tasks.app.use(load({"store": f"sqlite:///{tmp_path}/pool.db"}, {}, tmp_path))
    try:
        async with pool_tasks.app, pool_tasks.app.worker(tasks=["wrong_result"]):
            await check_failures(await pool_tasks.wrong_result.map([1, 2]), "Expected `int`, got `str`")
    finally:
        pool_tasks.app._settings = None


async def test_a_nan_of_a_task_without_a_return_annotation_is_refused_without_naming_one() -> None:
    app = Headrace("values", store="memory://")

    @app.task
    async def bare(_n: int):  # type: ignore[no-untyped-def]  # the point
        return {"a": math.nan}

    @app.task
    async def annotated(_n: int) -> dict[str, float]:
        return {"a": math.nan}

    async with app, app.worker():
        for task in (bare, annotated):
            outcomes = [outcome async for outcome in (await task.map([1])).results(timeout_s=30)]
            assert outcomes[0].failure is not None
            message = outcomes[0].failure.message
            assert "Expected a finite number, got nan - at `$.a`" in message
            assert ("annotation" in message) == (task is annotated)


async def check_failures(batch: Any, path: str) -> None:
    async for outcome in batch.results(timeout_s=60):
        assert (outcome.failure.type, outcome.failure.attempts) == ("InvalidResult", 1)
        assert "does not fit the return annotation" in outcome.failure.message
        assert path in outcome.failure.message
