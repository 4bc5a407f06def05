"""A task of one parameter takes a payload whole, or from an object whose only key is the parameter's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace import Headrace
from headrace.core import pack
from headrace.runtime.tasks.payload_codec import Codec
from headrace.runtime.tasks.superjson import PayloadRefused
from headrace.runtime.worker.worker import Worker
from headrace.testing import in_memory
from tests.support.http_server import line, running_server


class Point(msgspec.Struct):
    x: int = 0


class Strict(msgspec.Struct):
    n: int


def whole_number(n: int) -> None: ...


def with_default(n: int = 3) -> None: ...


def positional(n: int, /) -> None: ...


def any_value(n: Any) -> None: ...


def mapping(n: dict[str, int]) -> None: ...


def struct(n: Strict) -> None: ...


def point(point: Point) -> None: ...


def optional(point: Point | None) -> None: ...


@pytest.mark.parametrize(
    ("function", "payload", "argument"),
    [
        (whole_number, b"1", 1),
        (whole_number, b' {"n": 1}', 1),
        (with_default, b'{"n": 1}', 1),
        (positional, b'{"n": 1}', 1),
        (any_value, b'{"n": 1}', {"n": 1}),
        (mapping, b'{"n": 1}', {"n": 1}),
        (mapping, b'{"n": {"a": 1}}', {"a": 1}),
        (struct, b'{"n": 1}', Strict(1)),
        (struct, b'{"n": {"n": 1}}', Strict(1)),
        (point, b'{"point": {"x": 2}}', Point(2)),
        (point, b'{"x": 3}', Point(3)),
        (optional, b'{"point": {"x": 2}}', Point(2)),
    ],
)
def test_an_object_that_does_not_fit_whole_is_taken_by_the_parameter_s_name(
    function: Any, payload: bytes, argument: Any
) -> None:
    codec = Codec("task", function)
    for kind, data in ((pack.JSON, payload), (pack.SUPER_JSON, b'{"json":%b}' % payload)):
        args, kwargs = codec.decode(data, kind)
        assert (*args, *kwargs.values()) == (argument,)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b'{"m": 1}', "Expected `int`, got `object`"),
        (b'{"n": 1, "m": 1}', "Expected `int`, got `object`"),
        (b'{"n": "x"}', "Expected `int`, got `str` - at `$.n`"),
        (b"{}", "Expected `int`, got `object`"),
    ],
)
def test_other_objects_are_refused_with_the_path(payload: bytes, reason: str) -> None:
    with pytest.raises(PayloadRefused) as caught:
        Codec("task", whole_number).decode(payload, pack.JSON)
    assert str(caught.value) == reason


async def test_the_rule_is_the_same_for_map_and_enqueue_and_for_def_and_async_def() -> None:
    app = Headrace("rule")

    @app.task
    async def asynchronous(n: int) -> int:
        return n

    @app.task
    def plain(n: int) -> int:
        return n

    async with in_memory(app) as harness:
        batches = [await task.map([1, {"n": 2}]) for task in (asynchronous, plain)]
        run = await asynchronous.enqueue({"n": 3})  # type: ignore[arg-type]
        await harness.drain()
        for batch in batches:
            assert [outcome.output async for outcome in batch.results()] == [1, 2]
        assert await run.result() == 3


async def test_the_rule_is_the_same_over_http(tmp_path: Path) -> None:
    app = Headrace("rule")

    @app.task(name="task")
    async def number(n: int) -> int:
        return n

    async with running_server(tmp_path, registry=app.registry) as server:
        batch_id = await server.create(2)
        assert (await server.stream(batch_id, [line(0, 1), line(1, {"n": 2})])).status == 200
        worker = Worker(server.engine, app.registry, concurrency=1)
        await worker.start()
        try:
            app.use_engine(server.engine)
            results = (await app.get_batch(batch_id)).results(timeout_s=30)
            assert [outcome.output async for outcome in results] == [1, 2]
        finally:
            await worker.stop()
