"""Decoding of payloads for each signature, and the functions that may be a task."""

from __future__ import annotations

import enum
import math
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from headrace.core import pack
from headrace.core.retry import Retry
from headrace.foundation.errors import InvalidInput, InvalidSetting, NotFound
from headrace.runtime.tasks.bounds import check_name, check_priority
from headrace.runtime.tasks.context import Context
from headrace.runtime.tasks.payload_codec import Codec
from headrace.runtime.tasks.superjson import PayloadRefused
from headrace.runtime.tasks.task_registry import Registry
from headrace.runtime.tasks.task_spec import TaskSpec


class Point(msgspec.Struct):
    x: int
    y: int = 0


class Colour(enum.Enum):
    RED = "red"


class Grumpy(msgspec.Struct):
    x: int

    def __post_init__(self) -> None:
        raise KeyError("never")


def whole(item: Any) -> None: ...
def number(item: int) -> None: ...
def point(item: Point) -> None: ...
def two(a: int, b: str = "b") -> None: ...
def nothing() -> None: ...
def single_default(item: int = 7) -> None: ...
def with_context(item: int, context: Context) -> None: ...
def maybe_context(a: int, b: int, context: Context | None = None) -> None: ...
def positional(a: int, b: int = 2, /, c: int = 3) -> None: ...
def single_positional(a: int, /) -> None: ...
def with_keyword(a: int, b: int = 2, *, c: int) -> None: ...
def single_keyword(*, a: int) -> None: ...
def late_default(a: int, b: int = 2, *, c: int = 3) -> None: ...


def called(function: Callable[..., Any], payload: bytes, kind: int = pack.JSON) -> dict[str, Any]:
    """Return the arguments by name, as the function receives them."""
    import inspect

    codec = Codec(function.__name__, function)
    args, kwargs = codec.decode(payload, kind)
    if codec.context_name:
        kwargs = {**kwargs, codec.context_name: "the context"}
    bound = inspect.signature(function).bind(*args, **kwargs)
    return dict(bound.arguments)


def refused(function: Callable[..., Any], payload: bytes, kind: int = pack.JSON) -> str:
    with pytest.raises(PayloadRefused) as caught:
        Codec(function.__name__, function).decode(payload, kind)
    return str(caught.value)


@pytest.mark.parametrize(
    ("function", "payload", "arguments"),
    [
        (whole, b'{"a":[1,2]}', {"item": {"a": [1, 2]}}),
        (whole, b"[1,2]", {"item": [1, 2]}),
        (whole, b"null", {"item": None}),
        (number, b" 5 ", {"item": 5}),
        (point, b'{"x":1}', {"item": Point(1)}),
        (two, b'{"a":1}', {"a": 1}),
        (two, b'{"b":"x","a":1}', {"a": 1, "b": "x"}),
        (two, b' [1,"x"]', {"a": 1, "b": "x"}),
        (two, b"[1]", {"a": 1}),
        (with_context, b"5", {"item": 5, "context": "the context"}),
        (maybe_context, b"[1,2]", {"a": 1, "b": 2, "context": "the context"}),
        (nothing, b"null", {}),
        (nothing, b"{}", {}),
        (nothing, b"[]", {}),
        (nothing, b"", {}),
        (single_default, b"", {}),
        (single_default, b"8", {"item": 8}),
        (positional, b'{"a":1,"c":9}', {"a": 1, "b": 2, "c": 9}),
        (positional, b"[1,5,9]", {"a": 1, "b": 5, "c": 9}),
        (single_positional, b"4", {"a": 4}),
        (with_keyword, b'{"a":1,"c":3}', {"a": 1, "c": 3}),
        (single_keyword, b"4", {"a": 4}),
        (late_default, b"[1,5]", {"a": 1, "b": 5}),
    ],
)
def test_json_fills_a_single_parameter_whole_and_several_by_name_or_position(
    function: Callable[..., Any], payload: bytes, arguments: dict[str, Any]
) -> None:
    assert called(function, payload) == arguments


@pytest.mark.parametrize(
    ("function", "payload", "words"),
    [
        (number, b'"x"', "Expected `int`, got `str`"),
        (point, b'{"x":"1"}', "at `$.x`"),
        (two, b'{"a":"1"}', "at `$.a`"),
        (two, b'["1"]', "at `$[0]`"),
        (two, b'{"a":1,"z":2}', "unknown field `z`"),
        (two, b'[1,"x",3]', "at most length 2"),
        (two, b"[]", "at least length 1"),
        (two, b"{}", "missing required field `a`"),
        (two, b"5", "Expected `object`, got `int`"),
        (two, b"", "truncated"),
        (number, b"", "truncated"),
        (number, b"-", "invalid number"),
        (nothing, b"5", "expected no arguments"),
        (nothing, b"nonsense", "malformed"),
        (with_keyword, b"[1,2,3]", "at most length 2"),
        (with_keyword, b"[1,2]", "keyword-only arguments need an object: c"),
        (number, b"9" * 5_000, "out of range"),
        (whole, b"[" * 100_000, "nested too deeply"),
        (two, b'{"a":' + b"[" * 100_000, "Expected `int`"),
        (whole, b'"\xff"', "utf-8"),
        (whole, rb'"\ud800"', "truncated"),
    ],
)
def test_an_invalid_payload_is_refused_with_the_position(
    function: Callable[..., Any], payload: bytes, words: str
) -> None:
    assert words.lower() in refused(function, payload).lower()


def test_a_type_that_raises_at_construction_refuses_the_payload() -> None:
    def grumpy(item: Grumpy) -> None: ...

    grumpy.__annotations__["item"] = Grumpy
    assert "KeyError" in refused(grumpy, b'{"x":1}')


def test_integers_of_a_hundred_digits_stay_exact() -> None:
    assert called(number, b"9" * 100) == {"item": int("9" * 100)}
    assert Codec("number", number).encode((10**99,), {}) == str(10**99).encode()


def test_text_is_a_string() -> None:
    assert called(whole, "é\0".encode(), pack.TEXT) == {"item": "é\0"}
    assert "utf-8" in refused(whole, b"\xff", pack.TEXT)
    assert "Expected `int`, got `str`" in refused(number, b"5", pack.TEXT)
    assert "Expected `object`, got `str`" in refused(two, b"5", pack.TEXT)


def msgpack(**call: Any) -> bytes:
    return msgspec.msgpack.encode(call)


@pytest.mark.parametrize(
    ("function", "call", "arguments"),
    [
        (two, {"args": [1, "x"]}, {"a": 1, "b": "x"}),
        (two, {"args": [1], "kwargs": {"b": "x"}}, {"a": 1, "b": "x"}),
        (two, {"kwargs": {"a": 1}}, {"a": 1}),
        (number, {"args": [1]}, {"item": 1}),
        (number, {"kwargs": {"item": 1}}, {"item": 1}),
        (whole, {"args": [[1, 2]]}, {"item": [1, 2]}),
        (whole, {"args": [{"item": 1}]}, {"item": {"item": 1}}),
        (single_default, {}, {}),
        (nothing, {}, {}),
        (positional, {"args": [1], "kwargs": {"c": 4}}, {"a": 1, "b": 2, "c": 4}),
        (with_keyword, {"args": [1, 2], "kwargs": {"c": 4}}, {"a": 1, "b": 2, "c": 4}),
    ],
)
def test_messagepack_holds_args_and_kwargs(
    function: Callable[..., Any], call: dict[str, Any], arguments: dict[str, Any]
) -> None:
    assert called(function, msgpack(**call), pack.MSGPACK) == arguments


@pytest.mark.parametrize(
    ("function", "call", "words"),
    [
        (whole, {"args": [1, 2]}, "expected at most 1 positional arguments, got 2"),
        (number, {}, "missing argument: item"),
        (number, {"kwargs": {"other": 1}}, "unknown arguments: other"),
        (two, {"args": [1], "kwargs": {"a": 2}}, "given both by position and by name: a"),
        (two, {"args": ["x"]}, "$.a"),
        (nothing, {"args": [1]}, "expected at most 0 positional arguments, got 1"),
    ],
)
def test_invalid_messagepack_arguments_are_refused(
    function: Callable[..., Any], call: dict[str, Any], words: str
) -> None:
    assert words in refused(function, msgpack(**call), pack.MSGPACK)


def test_invalid_messagepack_bytes_are_refused() -> None:
    assert "malformed" in refused(whole, b"\xc1", pack.MSGPACK)
    assert "unknown payload kind 9" in refused(whole, b"", 9)


def superjson(value: Any, values: Any = None, **meta: Any) -> bytes:
    return msgspec.json.encode({"json": value, "meta": {"values": values, **meta}} if values else {"json": value})


@pytest.mark.parametrize(
    ("value", "values", "item"),
    [
        ({"a": 1}, None, {"a": 1}),
        ("2024-01-02T03:04:05.678Z", ["Date"], datetime(2024, 1, 2, 3, 4, 5, 678_000, UTC)),
        ({"a": "9" * 40}, {"a": ["bigint"]}, {"a": int("9" * 40)}),
        ([1, "2"], {"1": ["bigint"]}, [1, 2]),
        ({"a": [1, 2]}, {"a": ["set"]}, {"a": {1, 2}}),
        ([["k", 1]], ["map"], {"k": 1}),
        ([["k", "2"]], ["map", {"0.1": ["bigint"]}], {"k": 2}),
        (["1", "1"], ["set", {"0": ["bigint"], "1": ["bigint"]}], {1}),
        ({"a": None}, {"a": ["undefined"]}, {"a": None}),
        ({"a": "Infinity", "b": "-Infinity"}, {"a": ["number"], "b": ["number"]}, {"a": math.inf, "b": -math.inf}),
        ({"a.b": {"c": "1"}}, {r"a\.b.c": ["bigint"]}, {"a.b": {"c": 1}}),
        ({r"a\b": "1"}, {r"a\\b": ["bigint"]}, {r"a\b": 1}),
        ({"": "1"}, {"": ["bigint"]}, {"": 1}),
        ({"r": "/a/g"}, {"r": ["regexp"]}, {"r": "/a/g"}),
        ({"d": "1.5"}, {"d": [["custom", "decimal"]]}, {"d": "1.5"}),
        ([{"a": 1}], ["set"], [{"a": 1}]),
    ],
)
def test_superjson_values_are_decoded_to_python_types(value: Any, values: Any, item: Any) -> None:
    assert called(whole, superjson(value, values), pack.SUPER_JSON) == {"item": item}


def test_superjson_decodes_not_a_number() -> None:
    (item,) = called(whole, superjson("NaN", ["number"]), pack.SUPER_JSON).values()
    assert math.isnan(item)


def test_superjson_fills_several_parameters_as_json_does() -> None:
    assert called(two, superjson({"a": "5"}, {"a": ["bigint"]}), pack.SUPER_JSON) == {"a": 5}
    assert called(two, superjson(["5", "b"], {"0": ["bigint"]}), pack.SUPER_JSON) == {"a": 5, "b": "b"}


@pytest.mark.parametrize(
    "payload",
    [
        b"[]",
        b"{}",
        b'{"json":1,"meta":5}',
        b'{"json":{"a":1},"meta":{"values":{"b":["Date"]}}}',
        b'{"json":{"a":1},"meta":{"values":{"a.b.c":["Date"]}}}',
        b'{"json":[1],"meta":{"values":{"7":["bigint"]}}}',
        b'{"json":[1],"meta":{"values":{"x":["bigint"]}}}',
        b'{"json":"no date","meta":{"values":["Date"]}}',
        b'{"json":5,"meta":{"values":["Date"]}}',
        b'{"json":"x","meta":{"values":["number"]}}',
        b'{"json":[1],"meta":{"values":["map"]}}',
        b'{"json":1,"meta":{"values":"Date"}}',
        b'{"json":1,"meta":{"values":[[],[]]}}',
        b"nonsense",
    ],
)
def test_superjson_with_invalid_meta_is_refused(payload: bytes) -> None:
    assert refused(whole, payload, pack.SUPER_JSON)


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "payload"),
    [
        (number, (5,), {}, b"5"),
        (number, (), {"item": 5}, b"5"),
        (single_default, (), {}, b""),
        (two, (1,), {}, b'{"a":1}'),
        (two, (1, "x"), {}, b'{"a":1,"b":"x"}'),
        (with_context, (5,), {}, b"5"),
        (positional, (1, 4), {"c": 2}, b'{"a":1,"b":4,"c":2}'),
        (nothing, (), {}, b"{}"),
        (point, (Point(1, 2),), {}, b'{"x":1,"y":2}'),
        (whole, (Colour.RED,), {}, b'"red"'),
    ],
)
def test_a_call_becomes_json_that_decodes_to_the_same_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], payload: bytes
) -> None:
    codec = Codec("task", function)
    assert codec.encode(args, kwargs) == payload
    codec.decode(payload, pack.JSON)


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "words"),
    [
        (number, ("5",), {}, "Expected `int`, got `str`"),
        (number, (), {}, "missing a required argument"),
        (number, (1, 2), {}, "too many positional"),
        (two, (1,), {"z": 1}, "unexpected keyword"),
        (two, (1, 5), {}, "at `$.b`"),
        (positional, (), {"a": 1}, "positional only"),
        (with_context, (5, None), {}, "too many positional"),
        (whole, (object(),), {}, "can't be encoded as JSON"),
        (whole, ("\ud800",), {}, "surrogates"),
        (whole, ({"\udc00": 1},), {}, "surrogates"),
        (whole, (10**5_000,), {}, "4300 digits"),
        (number, (math.nan,), {}, "got nan"),
    ],
)
def test_an_invalid_call_is_refused_where_it_is_made(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        Codec("task", function).encode(args, kwargs)
    assert words in str(caught.value)
    assert "its signature is (" in caught.value.hint or "plain values" in caught.value.hint


def test_a_recursive_value_is_refused_at_the_call() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(InvalidInput, match="recursion"):
        Codec("whole", whole).encode((endless,), {})


def test_items_checked_together_and_alone_give_the_same_result() -> None:
    cases: list[tuple[Callable[..., Any], list[Any], Any]] = [
        (number, [1, 2], "x"),
        (two, [{"a": 1}, [1, "b"]], {"z": 1}),
        (whole, [1, None], "\ud800"),
    ]
    for function, good, bad in cases:
        codec = Codec("task", function)
        assert codec.encode_values(good) == [codec.encode_value(item) for item in good]
        assert codec.encode_values([*good, bad]) is None
        with pytest.raises(InvalidInput):
            codec.encode_value(bad)


def star_args(*items: int) -> None: ...
def star_kwargs(**items: int) -> None: ...
def unresolved(item: Unknown) -> None: ...  # type: ignore[name-defined]  # noqa: F821 - what the test is about
def two_arrays(item: list[int] | set[int]) -> None: ...
def two_contexts(a: Context, b: Context) -> None: ...
def placed_context(context: Context, /) -> None: ...
def generator() -> Iterator[int]:
    yield 1


async def async_generator() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (star_args, r"\*items"),
        (star_kwargs, r"\*items"),
        (unresolved, "can't be resolved"),
        (two_arrays, "no payload can hold"),
        (two_contexts, "expected one Context parameter"),
        (placed_context, "expected one Context parameter"),
        (generator, "got a generator function"),
        (async_generator, "got a generator function"),
        (Point, "expected a function"),
        (5, "expected a function"),
    ],
)
def test_a_function_that_a_payload_cannot_call_is_refused_at_registration(function: Any, words: str) -> None:
    with pytest.raises(InvalidSetting, match=words):
        TaskSpec("task", function)


async def async_task(item: int) -> None: ...


@pytest.mark.parametrize(
    "options",
    [
        {"name": ""},
        {"name": "a\nb"},
        {"name": "a\0b"},
        {"name": "x" * 201},
        {"name": "\ud800"},
        {"name": 5},
        {"queue": ""},
        {"queue": "x" * 201},
        {"priority": 1_000_001},
        {"priority": -1_000_001},
        {"priority": True},
        {"priority": 1.5},
        {"timeout_s": 0},
        {"timeout_s": -1},
        {"timeout_s": math.nan},
        {"timeout_s": "5"},
        {"timeout_s": True},
        {"timeout_s": 1e12},
        {"retry": 3},
        {"pool": "threads"},
        {"pool": "thread"},
        {"pool": "loop", "function": number},
    ],
)
def test_a_task_out_of_bounds_is_refused_at_registration(options: dict[str, Any]) -> None:
    with pytest.raises((InvalidSetting, InvalidInput)):
        TaskSpec(**{"name": "task", "function": async_task, **options})


def test_names_and_priorities_at_their_bounds_are_accepted() -> None:
    spec = TaskSpec("x" * 200, async_task, priority=-1_000_000, queue="ü n", retry=Retry(attempts=2), timeout_s=0.001)
    assert (spec.is_async, spec.priority, spec.codec.name) == (True, -1_000_000, "x" * 200)
    assert check_name("tag", "a b") == "a b"
    assert check_priority(1_000_000) == 1_000_000


def test_a_task_name_is_unique() -> None:
    registry = Registry()
    registry.add(TaskSpec("b", number))
    registry.add(TaskSpec("a", two))
    with pytest.raises(InvalidSetting, match="two tasks have the name 'a'"):
        registry.add(TaskSpec("a", number))
    assert registry.names == ["a", "b"]
    assert "a" in registry
    with pytest.raises(NotFound, match="registered tasks: a, b"):
        registry.get("c")
