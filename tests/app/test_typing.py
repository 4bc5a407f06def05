"""Types that users rely on, checked by mypy as it checks this file, and true when it runs."""

from __future__ import annotations

import inspect
from collections.abc import Coroutine
from typing import Any, assert_type

from headrace import AsyncTask, Batch, BatchView, Headrace, Run, RunView, SyncTask
from headrace.indexer import HandlerContext

app = Headrace("typed", store="memory://")


@app.task
async def fetch(url: str, *, retries: int = 3) -> bytes:
    return f"{url} {retries}".encode()


@app.task
def add(a: int, b: int = 1) -> int:
    return a + b


@app.task(timeout_s=5)
async def slow(n: int) -> str:
    return str(n)


@app.task(pool="thread")
def plain(n: int) -> list[int]:
    return [n]


@app.schedule(every_s=60)
@app.task
def tick() -> None: ...


async def typed() -> None:
    """Assert the types that mypy infers for calls, handles and views; never called."""
    coroutine = fetch("a")
    _ = assert_type(coroutine, Coroutine[Any, Any, bytes])
    await coroutine
    assert_type(await fetch("a", retries=1), bytes)
    assert_type(add(1, b=2), int)
    assert_type(await slow(1), str)
    assert_type(plain(1), list[int])
    assert_type(await fetch.enqueue("a", retries=2), Run[bytes])
    assert_type(await add.options(delay_s=1).enqueue(1), Run[int])
    assert_type(add.enqueue_sync(1), Run[int])
    assert_type(await (await slow.enqueue(1)).result(), str)
    assert_type((await slow.enqueue(1)).result_sync(), str)
    assert_type(await slow.map([1]), Batch[str])
    assert_type(slow.map_sync([1]), Batch[str])
    assert_type(await app.runs(), list[RunView])
    assert_type(app.runs_sync(state="failed"), list[RunView])
    assert_type(app.batches_sync(), list[BatchView])
    assert_type(app.get_run_sync("run"), Run[Any])
    await fetch(1)  # type: ignore[arg-type]  # a wrong argument is seen
    add("a")  # type: ignore[arg-type]  # here too
    await fetch.enqueue(retries=1)  # type: ignore[call-arg]  # and a missing one
    add.enqueue_sync(1, c=2)  # type: ignore[call-arg]  # and one too many
    tick()


def handle(ctx: HandlerContext) -> None:
    """Assert that runs of an indexer are typed as other calls are; never called."""
    ctx.enqueue(fetch, "a", retries=2)
    ctx.enqueue(add.options(delay_s=1), 1)
    ctx.enqueue(fetch, 1)  # type: ignore[arg-type]  # a wrong argument is seen
    ctx.enqueue(add.options(delay_s=1), 1, c=2)  # type: ignore[call-arg]  # and one too many


async def test_a_direct_call_is_the_function_itself() -> None:
    assert await fetch("a", retries=1) == b"a 1"
    assert add(1, b=2) == 3
    assert await slow(5) == "5"
    assert isinstance(fetch, AsyncTask)
    assert isinstance(add, SyncTask)
    assert isinstance(tick, SyncTask)
    assert inspect.signature(add) == inspect.signature(add.spec.function)
    assert inspect.iscoroutinefunction(typed)
