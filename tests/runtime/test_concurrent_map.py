from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from headrace.foundation.errors import InvalidSetting
from headrace.runtime.clock import ManualClock
from headrace.runtime.concurrent_map import map_concurrently


class Source:
    """A source that counts its pulled items and records whether it was closed."""

    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self.count = count
        self.fails_at = fails_at
        self.pulled = 0
        self.is_closed = False

    async def stream(self) -> AsyncIterator[int]:
        try:
            for number in range(self.count):
                if number == self.fails_at:
                    raise OSError("the source failed")
                self.pulled += 1
                yield number
        finally:
            self.is_closed = True

    def plain(self) -> Iterator[int]:
        try:
            for number in range(self.count):
                self.pulled += 1
                yield number
        finally:
            self.is_closed = True


class Steps:
    """Steps of 10 ms on a manual clock."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.running = 0
        self.running_most = 0
        self.cancelled_count = 0
        self.begun: list[int] = []
        self.fails_at: dict[int, Exception] = {}
        self.seconds: dict[int, float] = {}

    async def __call__(self, number: int) -> int:
        self.begun.append(number)
        self.running += 1
        self.running_most = max(self.running_most, self.running)
        try:
            await self.clock.sleep(self.seconds.get(number, 0.01))
            if number in self.fails_at:
                raise self.fails_at[number]
        except asyncio.CancelledError:
            self.cancelled_count += 1
            raise
        finally:
            self.running -= 1
        return number * 10


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=[True, False], ids=["in order", "as completed"])
def ordered(request: pytest.FixtureRequest) -> bool:
    is_ordered: bool = request.param
    return is_ordered


@pytest.fixture
def steps(clock: ManualClock) -> Steps:
    return Steps(clock)


async def collect(results: AsyncIterator[int], into: list[int]) -> None:
    async for result in results:
        into.append(result)


async def until_done(task: asyncio.Future[Any], clock: ManualClock) -> int:
    """Return the number of 10 ms advances until the task is done."""
    waves = 0
    await clock.settle()
    while not task.done():
        waves += 1
        await clock.advance_async(0.01)
    return waves


@pytest.mark.parametrize("kind", ["stream", "plain"])
@pytest.mark.parametrize(("concurrency", "waves"), [(1, 150), (10, 15), (50, 3), (1_000, 1)])
async def test_a_stream_takes_as_many_waves_as_its_concurrency_allows(
    clock: ManualClock, steps: Steps, concurrency: int, waves: int, kind: str, ordered: bool
) -> None:
    source = Source(150)
    collected: list[int] = []
    items = source.stream() if kind == "stream" else source.plain()
    task = asyncio.create_task(
        collect(map_concurrently(items, steps, concurrency=concurrency, ordered=ordered), collected)
    )
    assert await until_done(task, clock) == waves
    assert collected == [number * 10 for number in range(150)]
    assert steps.running_most == min(concurrency, 150)
    assert source.is_closed


@pytest.mark.parametrize("concurrency", [1, 2, 7])
async def test_items_pulled_are_bounded_by_the_concurrency(clock: ManualClock, steps: Steps, concurrency: int) -> None:
    source = Source(10_000)
    taken = 0
    async with aclosing(map_concurrently(source.stream(), steps, concurrency=concurrency)) as results:
        for _ in range(20):
            waiting = asyncio.ensure_future(anext(results))
            await until_done(waiting, clock)
            assert source.pulled <= taken + concurrency
            taken += 1
            await clock.advance_async(10)
            assert source.pulled <= taken - 1 + concurrency
    assert source.is_closed


async def test_no_item_is_pulled_before_the_first_result_is_requested(steps: Steps, ordered: bool) -> None:
    source = Source(5)
    results = map_concurrently(source.stream(), steps, concurrency=3, ordered=ordered)
    await asyncio.sleep(0)
    assert source.pulled == 0
    await results.aclose()


@pytest.mark.parametrize("seed", range(10))
async def test_results_come_in_the_order_of_the_source(clock: ManualClock, steps: Steps, seed: int) -> None:
    dice = random.Random(seed)
    steps.seconds = {number: dice.choice([0, 0.01, 0.05, 0.2]) for number in range(200)}
    collected: list[int] = []
    task = asyncio.create_task(collect(map_concurrently(range(200), steps, concurrency=dice.randint(2, 20)), collected))
    await until_done(task, clock)
    assert collected == [number * 10 for number in range(200)]


@pytest.mark.parametrize("concurrency", [2, 7])
async def test_without_order_steps_begin_while_finished_results_wait(
    clock: ManualClock, steps: Steps, concurrency: int
) -> None:
    source = Source(10_000)
    async with aclosing(map_concurrently(source.stream(), steps, concurrency=concurrency, ordered=False)) as results:
        for taken in range(1, 20):
            waiting = asyncio.ensure_future(anext(results))
            await until_done(waiting, clock)
            await clock.advance_async(10)
            assert taken + concurrency <= source.pulled <= taken + 2 * concurrency - 1
    assert source.is_closed


async def test_without_order_a_slow_step_delays_no_other_result(clock: ManualClock, steps: Steps) -> None:
    steps.seconds = {0: 1.0}
    collected: list[int] = []
    task = asyncio.create_task(collect(map_concurrently(range(10), steps, concurrency=2, ordered=False), collected))
    await clock.advance_async(0.5)
    assert collected == [number * 10 for number in range(1, 10)]
    await clock.advance_async(0.5)
    await task
    assert collected[-1] == 0


async def test_a_finished_result_does_not_wait_for_a_slow_source(
    clock: ManualClock, steps: Steps, ordered: bool
) -> None:
    async def slow() -> AsyncIterator[int]:
        yield 0
        await clock.sleep(60)
        yield 1

    collected: list[int] = []
    task = asyncio.create_task(collect(map_concurrently(slow(), steps, concurrency=5, ordered=ordered), collected))
    await clock.advance_async(0.01)
    assert collected == [0]
    await clock.advance_async(60.01)
    await task
    assert collected == [0, 10]


@pytest.mark.parametrize("concurrency", [1, 10])
async def test_a_synchronous_step_creates_no_task(concurrency: int, ordered: bool) -> None:
    tasks_most = 0

    def step(number: int) -> int:
        nonlocal tasks_most
        tasks_most = max(tasks_most, len(asyncio.all_tasks()))
        return number + 1

    assert [
        result async for result in map_concurrently(range(100), step, concurrency=concurrency, ordered=ordered)
    ] == [*range(1, 101)]
    assert tasks_most == (1 if concurrency == 1 else 2)


async def test_a_concurrency_of_1_creates_no_task_for_steps_that_wait(clock: ManualClock, steps: Steps) -> None:
    collected: list[int] = []
    task = asyncio.create_task(collect(map_concurrently(range(3), steps, concurrency=1), collected))
    await clock.settle()
    assert len(asyncio.all_tasks()) == 2
    await until_done(task, clock)


async def test_synchronous_and_asynchronous_steps_may_mix(clock: ManualClock, ordered: bool) -> None:
    async def later(number: int) -> int:
        await clock.sleep(0.01)
        return number

    collected: list[int] = []
    results = map_concurrently(
        range(50), lambda number: later(number) if number % 3 else number, concurrency=4, ordered=ordered
    )
    task = asyncio.create_task(collect(results, collected))
    await until_done(task, clock)
    assert (collected if ordered else sorted(collected)) == list(range(50))


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_the_first_error_stops_all_steps_and_is_raised_unchanged(
    clock: ManualClock, steps: Steps, concurrency: int, ordered: bool
) -> None:
    source = Source(1_000)
    error = ValueError("item 6")
    steps.fails_at = {6: error}
    steps.seconds = dict.fromkeys((7, 8, 9), 5.0)
    collected: list[int] = []
    task = asyncio.create_task(
        collect(map_concurrently(source.stream(), steps, concurrency=concurrency, ordered=ordered), collected)
    )
    await clock.advance_async(0.1)
    with pytest.raises(ValueError, match="item 6") as raised:
        await task
    assert raised.value is error
    assert collected == [0, 10, 20, 30, 40, 50]
    assert source.is_closed
    assert steps.running == 0
    assert steps.cancelled_count == source.pulled - 7
    assert source.pulled <= 6 + concurrency
    assert clock.sleepers_count == 0


async def test_an_error_stops_running_steps_while_the_consumer_is_busy(
    clock: ManualClock, steps: Steps, ordered: bool
) -> None:
    error = ValueError("item 2")
    steps.fails_at = {2: error}
    steps.seconds = {2: 0.02, 1: 60.0, 3: 60.0, 4: 60.0}
    results = map_concurrently(range(100), steps, concurrency=4, ordered=ordered)
    first = asyncio.ensure_future(anext(results))
    await clock.advance_async(0.01)
    assert await first == 0
    assert steps.running == (3 if ordered else 4)
    await clock.advance_async(0.01)
    assert steps.running == 0
    with pytest.raises(ValueError, match="item 2") as raised:
        await anext(results)
    assert raised.value is error


async def test_an_error_does_not_wait_for_a_slow_step_before_it(
    clock: ManualClock, steps: Steps, ordered: bool
) -> None:
    steps.seconds = {0: 60.0}
    steps.fails_at = {1: ValueError("item 1")}
    task = asyncio.create_task(collect(map_concurrently(range(10), steps, concurrency=3, ordered=ordered), []))
    await clock.advance_async(0.01)
    with pytest.raises(ValueError, match="item 1"):
        await task
    assert steps.cancelled_count == (1 if ordered else 2)


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_an_error_of_a_synchronous_step_comes_after_the_earlier_results(
    concurrency: int,
    ordered: bool,
) -> None:
    source = Source(100)
    collected: list[int] = []
    with pytest.raises(ZeroDivisionError):
        await collect(
            map_concurrently(
                source.plain(), lambda number: 6 // (3 - number), concurrency=concurrency, ordered=ordered
            ),
            collected,
        )
    assert collected == [2, 3, 6]
    assert source.is_closed


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_source_that_fails_stops_all_steps(
    clock: ManualClock, steps: Steps, concurrency: int, ordered: bool
) -> None:
    source = Source(100, fails_at=5)
    collected: list[int] = []
    task = asyncio.create_task(
        collect(map_concurrently(source.stream(), steps, concurrency=concurrency, ordered=ordered), collected)
    )
    await clock.advance_async(1)
    with pytest.raises(OSError, match="the source failed"):
        await task
    assert collected == [number * 10 for number in range(len(collected))]
    assert steps.running == 0


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_consumer_that_stops_cancels_running_steps_and_closes_the_source(
    clock: ManualClock, steps: Steps, concurrency: int, ordered: bool
) -> None:
    source = Source(100)
    steps.seconds = dict.fromkeys(range(1, 100), 60.0)
    results = map_concurrently(source.stream(), steps, concurrency=concurrency, ordered=ordered)
    first = asyncio.ensure_future(anext(results))
    await clock.advance_async(0.01)
    assert await first == 0
    await results.aclose()
    assert source.is_closed
    assert steps.running == 0
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_consumer_that_is_cancelled_leaves_nothing_running(
    clock: ManualClock, steps: Steps, concurrency: int, ordered: bool
) -> None:
    source = Source(100)
    task = asyncio.create_task(
        collect(map_concurrently(source.stream(), steps, concurrency=concurrency, ordered=ordered), [])
    )
    await clock.advance_async(0.015)
    task.cancel()
    await clock.settle()
    assert task.cancelled()
    assert source.is_closed
    assert steps.running == 0
    assert len(asyncio.all_tasks()) == 1


async def test_a_step_cancelled_before_it_began_emits_no_warning(
    clock: ManualClock, steps: Steps, ordered: bool
) -> None:
    def step(number: int) -> Any:
        if number == 3:
            consuming.cancel()
        return steps(number)

    consuming = asyncio.create_task(collect(map_concurrently(range(10), step, concurrency=5, ordered=ordered), []))
    await clock.settle()
    assert consuming.cancelled()
    assert steps.begun == ([0, 1, 2] if ordered else [0, 1, 2, 3])
    assert steps.running == 0


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_an_error_during_close_does_not_hide_the_first_error(concurrency: int, ordered: bool) -> None:
    async def stubborn() -> AsyncIterator[int]:
        try:
            yield 0
            yield 1
        finally:
            raise OSError("can't close")

    def step(number: int) -> int:
        raise ValueError("the first error")

    with pytest.raises(ValueError, match="the first error") as raised:
        await collect(map_concurrently(stubborn(), step, concurrency=concurrency, ordered=ordered), [])
    assert "can't close" in raised.value.__notes__[0]


@pytest.mark.parametrize("concurrency", [0, -1, 1.5, "ten", True, None])
def test_a_concurrency_that_is_not_a_positive_integer_is_refused_by_name(concurrency: Any) -> None:
    with pytest.raises(InvalidSetting, match="ingest_concurrency"):
        map_concurrently([1], lambda number: number, concurrency=concurrency)
