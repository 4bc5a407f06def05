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
    """Counts what is pulled from it and sees whether it was closed."""

    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self.count = count
        self.fails_at = fails_at
        self.pulled = 0
        self.is_closed = False

    async def stream(self) -> AsyncIterator[int]:
        try:
            for number in range(self.count):
                if number == self.fails_at:
                    raise OSError("the source broke")
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
    """Steps of 10 ms on a held clock."""

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


@pytest.fixture(params=[True, False], ids=["in order", "as they finish"])
def ordered(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


@pytest.fixture
def steps(clock: ManualClock) -> Steps:
    return Steps(clock)


async def collect(results: AsyncIterator[int], into: list[int]) -> None:
    async for result in results:
        into.append(result)


async def until_done(task: asyncio.Future[Any], clock: ManualClock) -> int:
    """How many waves of 10 ms the task takes."""
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
    got: list[int] = []
    items = source.stream() if kind == "stream" else source.plain()
    task = asyncio.create_task(collect(map_concurrently(items, steps, concurrency=concurrency, ordered=ordered), got))
    assert await until_done(task, clock) == waves
    assert got == [number * 10 for number in range(150)]
    assert steps.running_most == min(concurrency, 150)
    assert source.is_closed


@pytest.mark.parametrize("concurrency", [1, 2, 7])
async def test_no_more_is_pulled_than_may_be_in_flight(clock: ManualClock, steps: Steps, concurrency: int) -> None:
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


async def test_nothing_is_pulled_before_the_first_result_is_asked_for(steps: Steps, ordered: bool) -> None:
    source = Source(5)
    results = map_concurrently(source.stream(), steps, concurrency=3, ordered=ordered)
    await asyncio.sleep(0)
    assert source.pulled == 0
    await results.aclose()


@pytest.mark.parametrize("seed", range(10))
async def test_results_come_in_the_order_of_the_source_whatever_finishes_first(
    clock: ManualClock, steps: Steps, seed: int
) -> None:
    dice = random.Random(seed)
    steps.seconds = {number: dice.choice([0, 0.01, 0.05, 0.2]) for number in range(200)}
    got: list[int] = []
    task = asyncio.create_task(collect(map_concurrently(range(200), steps, concurrency=dice.randint(2, 20)), got))
    await until_done(task, clock)
    assert got == [number * 10 for number in range(200)]


@pytest.mark.parametrize("concurrency", [2, 7])
async def test_without_order_the_next_step_begins_though_nobody_takes_what_is_finished(
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


async def test_without_order_a_slow_step_holds_nobody_up(clock: ManualClock, steps: Steps) -> None:
    steps.seconds = {0: 1.0}
    got: list[int] = []
    task = asyncio.create_task(collect(map_concurrently(range(10), steps, concurrency=2, ordered=False), got))
    await clock.advance_async(0.5)
    assert got == [number * 10 for number in range(1, 10)]
    await clock.advance_async(0.5)
    await task
    assert got[-1] == 0


async def test_a_finished_result_does_not_wait_for_a_slow_source(
    clock: ManualClock, steps: Steps, ordered: bool
) -> None:
    async def slow() -> AsyncIterator[int]:
        yield 0
        await clock.sleep(60)
        yield 1

    got: list[int] = []
    task = asyncio.create_task(collect(map_concurrently(slow(), steps, concurrency=5, ordered=ordered), got))
    await clock.advance_async(0.01)
    assert got == [0]
    await clock.advance_async(60.01)
    await task
    assert got == [0, 10]


@pytest.mark.parametrize("concurrency", [1, 10])
async def test_a_step_that_answers_at_once_costs_no_task(concurrency: int, ordered: bool) -> None:
    tasks_most = 0

    def step(number: int) -> int:
        nonlocal tasks_most
        tasks_most = max(tasks_most, len(asyncio.all_tasks()))
        return number + 1

    assert [
        result async for result in map_concurrently(range(100), step, concurrency=concurrency, ordered=ordered)
    ] == [*range(1, 101)]
    assert tasks_most == (1 if concurrency == 1 else 2)


async def test_one_at_a_time_costs_no_task_even_when_steps_wait(clock: ManualClock, steps: Steps) -> None:
    got: list[int] = []
    task = asyncio.create_task(collect(map_concurrently(range(3), steps, concurrency=1), got))
    await clock.settle()
    assert len(asyncio.all_tasks()) == 2
    await until_done(task, clock)


async def test_steps_that_answer_at_once_and_steps_that_wait_may_mix(clock: ManualClock, ordered: bool) -> None:
    async def later(number: int) -> int:
        await clock.sleep(0.01)
        return number

    got: list[int] = []
    results = map_concurrently(
        range(50), lambda number: later(number) if number % 3 else number, concurrency=4, ordered=ordered
    )
    task = asyncio.create_task(collect(results, got))
    await until_done(task, clock)
    assert (got if ordered else sorted(got)) == list(range(50))


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_the_first_error_stops_everything_and_is_raised_as_it_is(
    clock: ManualClock, steps: Steps, concurrency: int, ordered: bool
) -> None:
    source = Source(1_000)
    error = ValueError("item 6")
    steps.fails_at = {6: error}
    steps.seconds = dict.fromkeys((7, 8, 9), 5.0)
    got: list[int] = []
    task = asyncio.create_task(
        collect(map_concurrently(source.stream(), steps, concurrency=concurrency, ordered=ordered), got)
    )
    await clock.advance_async(0.1)
    with pytest.raises(ValueError, match="item 6") as raised:
        await task
    assert raised.value is error
    assert got == [0, 10, 20, 30, 40, 50]
    assert source.is_closed
    assert steps.running == 0
    assert steps.cancelled_count == source.pulled - 7
    assert source.pulled <= 6 + concurrency
    assert clock.sleepers_count == 0


async def test_an_error_stops_what_runs_while_the_consumer_is_still_busy(
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
async def test_an_error_of_a_step_that_answers_at_once_comes_after_the_results_before_it(
    concurrency: int,
    ordered: bool,
) -> None:
    source = Source(100)
    got: list[int] = []
    with pytest.raises(ZeroDivisionError):
        await collect(
            map_concurrently(
                source.plain(), lambda number: 6 // (3 - number), concurrency=concurrency, ordered=ordered
            ),
            got,
        )
    assert got == [2, 3, 6]
    assert source.is_closed


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_source_that_breaks_stops_everything(
    clock: ManualClock, steps: Steps, concurrency: int, ordered: bool
) -> None:
    source = Source(100, fails_at=5)
    got: list[int] = []
    task = asyncio.create_task(
        collect(map_concurrently(source.stream(), steps, concurrency=concurrency, ordered=ordered), got)
    )
    await clock.advance_async(1)
    with pytest.raises(OSError, match="the source broke"):
        await task
    assert got == [number * 10 for number in range(len(got))]
    assert steps.running == 0


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_consumer_that_stops_cancels_what_runs_and_closes_the_source(
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


async def test_a_step_cancelled_before_it_began_warns_of_nothing(
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
async def test_an_error_while_closing_does_not_hide_the_first_one(concurrency: int, ordered: bool) -> None:
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
def test_a_concurrency_that_is_not_a_whole_number_of_one_or_more_is_refused_by_name(concurrency: Any) -> None:
    with pytest.raises(InvalidSetting, match="ingest_concurrency"):
        map_concurrently([1], lambda number: number, concurrency=concurrency)
