from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from headrace.foundation.errors import ClientFault, HeadraceError, InvalidSetting, StoreUnavailable
from headrace.runtime.clock import ManualClock
from headrace.runtime.flusher import Flusher, FlusherClosed, UpdatesUnflushed
from tests.support.flush_target import FlushTarget, SeededScenario


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def target() -> FlushTarget:
    return FlushTarget()


@pytest.fixture
def new(clock: ManualClock, target: FlushTarget) -> Callable[..., Flusher[Any]]:
    def build(**settings: Any) -> Flusher[Any]:
        settings = {"size": 4, "interval_ms": 100, "buffer_max": 12} | settings
        return Flusher(target.flush, name="test", clock=clock, on_refused=target.refuse, **settings)

    return build


New = Callable[..., Flusher[Any]]


def fill(flusher: Flusher[Any], updates: Sequence[Any]) -> None:
    for update in updates:
        assert flusher.put_nowait(update)


# When a flush is due


async def test_a_full_flush_does_not_wait_for_its_interval(new: New, clock: ManualClock, target: FlushTarget) -> None:
    flusher = new()
    fill(flusher, range(3))
    await clock.settle()
    assert target.flushes == []
    fill(flusher, [3])
    await clock.settle()
    assert target.flushes == [(0, 1, 2, 3)]


async def test_the_oldest_update_waits_at_most_an_interval(new: New, clock: ManualClock, target: FlushTarget) -> None:
    flusher = new()
    fill(flusher, ["a"])
    await clock.advance_async(0.099)
    assert target.flushes == []
    await clock.advance_async(0.001)
    assert target.flushes == [("a",)]


async def test_a_steady_trickle_of_updates_does_not_postpone_a_flush(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new(size=1_000, buffer_max=2_000)
    arrived_us: dict[int, int] = {}
    seen = 0
    for tick in range(200):
        arrived_us[tick] = clock.now_us()
        fill(flusher, [tick])
        await clock.advance_async(0.01)
        for update in target.landed[seen:]:
            assert clock.now_us() - arrived_us[update] <= 100_000
        seen = len(target.landed)
        assert flusher.depth <= 10
    assert len(target.flushes) == 20


async def test_updates_left_after_a_full_flush_keep_their_interval(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new()
    fill(flusher, range(3))
    await clock.advance_async(0.05)
    fill(flusher, range(3, 6))
    await clock.settle()
    assert target.flushes == [(0, 1, 2, 3)]
    await clock.advance_async(0.1)
    assert target.landed == list(range(6))


async def test_a_flush_is_never_larger_than_its_size(new: New, clock: ManualClock, target: FlushTarget) -> None:
    flusher = new(size=500, buffer_max=1_000_000, interval_ms=None)
    target.gate.clear()
    fill(flusher, range(1_000_000))
    await clock.settle()
    target.gate.set()
    await clock.settle()
    assert {len(flush) for flush in target.flushes} == {500}
    assert target.landed == list(range(1_000_000))
    assert flusher.flushes_count == 2_000
    assert flusher.flushed_count == 1_000_000


async def test_a_lone_update_is_flushed_at_once_and_later_updates_share_the_next_flush(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new(interval_ms=None)
    target.gate.clear()
    fill(flusher, ["lone"])
    await clock.settle()
    assert target.tries == [("lone",)]
    fill(flusher, ["b", "c", "d"])
    await clock.settle()
    assert target.tries == [("lone",)]
    target.gate.set()
    await clock.settle()
    assert target.flushes == [("lone",), ("b", "c", "d")]
    assert clock.sleepers_count == 0


async def test_updates_of_eight_producers_are_flushed_once_and_in_order(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new(size=7, buffer_max=10)
    target.errors = [OSError("once"), StoreUnavailable("twice")]

    async def producer(number: int) -> None:
        for count in range(250):
            await flusher.put((number, count))

    producers = [asyncio.create_task(producer(number)) for number in range(8)]
    while not all(task.done() for task in producers):
        await clock.advance_async(0.05)
        assert flusher.depth <= 10
    await flusher.close()
    assert len(target.landed) == len(set(target.landed)) == 2_000
    for number in range(8):
        assert [count for producer, count in target.landed if producer == number] == list(range(250))
    assert max(map(len, target.flushes)) <= 7
    assert target.in_flight_most == 1


async def test_accepting_an_update_creates_no_task(new: New, clock: ManualClock) -> None:
    flusher = new(size=100, buffer_max=1_000)
    before = len(asyncio.all_tasks())
    fill(flusher, range(500))
    assert len(asyncio.all_tasks()) == before + 1
    await clock.settle()


# When the buffer is full


async def test_a_full_buffer_makes_its_producers_wait(new: New, clock: ManualClock, target: FlushTarget) -> None:
    flusher = new(size=2, buffer_max=3)
    target.gate.clear()
    fill(flusher, [0, 1])
    await clock.settle()
    fill(flusher, [2])
    assert not flusher.put_nowait("refused")
    waiting = [asyncio.create_task(flusher.put(update)) for update in (3, 4)]
    await clock.advance_async(10)
    assert flusher.depth == 3
    assert not any(task.done() for task in waiting)
    target.gate.set()
    await clock.advance_async(1)
    assert all(task.done() for task in waiting)
    assert target.landed == [0, 1, 2, 3, 4]


async def test_no_update_overtakes_a_waiting_producer(new: New, clock: ManualClock, target: FlushTarget) -> None:
    flusher = new(size=1, buffer_max=1, interval_ms=None)
    target.gate.clear()
    fill(flusher, ["first"])
    waiting = asyncio.create_task(flusher.put("waited"))
    await clock.settle()
    refused_count = 0

    async def put_late() -> None:
        nonlocal refused_count
        while not flusher.put_nowait("late"):
            refused_count += 1
            await asyncio.sleep(0)

    target.gate.set()
    await put_late()
    await clock.settle()
    assert waiting.done()
    assert refused_count > 0
    assert target.landed == ["first", "waited", "late"]


async def test_a_producer_cancelled_while_it_waits_leaves_no_update(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new(size=1, buffer_max=1, interval_ms=None)
    target.gate.clear()
    fill(flusher, ["first"])
    gone = asyncio.create_task(flusher.put("gone"))
    stays = asyncio.create_task(flusher.put("stays"))
    await clock.settle()
    gone.cancel()
    await clock.settle()
    assert len(flusher._senders) == 1
    target.gate.set()
    await clock.settle()
    assert gone.cancelled()
    assert stays.done()
    assert target.landed == ["first", "stays"]


async def test_a_producer_cancelled_when_it_is_admitted_passes_its_slot_on(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new(size=1, buffer_max=1, interval_ms=None)
    target.gate.clear()
    fill(flusher, ["first"])
    gone = asyncio.create_task(flusher.put("gone"))
    stays = asyncio.create_task(flusher.put("stays"))
    await clock.settle()
    target.gate.set()
    while not flusher._granted_count:
        await asyncio.sleep(0)
    assert not gone.done()
    gone.cancel()
    await clock.settle()
    assert gone.cancelled()
    assert stays.done()
    assert target.landed == ["first", "stays"]
    fill(flusher, ["accepted again"])
    await flusher.close()


# When a flush fails


@pytest.mark.parametrize("error", [StoreUnavailable("busy"), OSError(28, "disk full"), ValueError("a bug")])
async def test_a_failing_flush_is_retried_unchanged_with_a_doubling_wait(
    new: New, clock: ManualClock, target: FlushTarget, error: Exception
) -> None:
    flusher = new(interval_ms=None, backoff_initial_ms=50, backoff_max_ms=300)
    target.errors = [error] * 6
    fill(flusher, ["a", "b"])
    start_us = clock.now_us()
    tried_ms: list[int] = []
    for _ in range(2_000):
        await clock.settle()
        if len(target.tries) > len(tried_ms):
            tried_ms.append((clock.now_us() - start_us) // 1_000)
            if not target.flushes:
                assert flusher.last_error is error
                assert flusher.flushed_count == 0
                flusher.put_nowait("later")
        clock.advance(0.001)
    assert tried_ms[:7] == [0, 50, 150, 350, 650, 950, 1250]
    assert target.tries[:7] == [("a", "b")] * 7
    assert target.flushes[0] == ("a", "b")
    assert target.landed[2:] == ["later"] * 6
    assert flusher.last_error is None


async def test_the_buffer_does_not_grow_while_the_store_fails(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new(size=4, buffer_max=6)
    target.errors = [OSError("down")] * 1_000
    taken: list[int] = []

    async def producer() -> None:
        for count in range(100):
            await flusher.put(count)
            taken.append(count)

    producing = asyncio.create_task(producer())
    await clock.advance_async(600)
    assert flusher.depth == 6
    assert len(taken) == 6
    assert {len(flush) for flush in target.tries} == {4}
    assert 100 < len(target.tries) < 200
    target.errors.clear()
    await clock.advance_async(60)
    assert producing.done()
    assert target.landed == list(range(100))


async def test_a_permanently_refused_update_is_isolated_and_the_rest_are_flushed_in_order(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new(size=100, buffer_max=200)
    target.poison = {0, 41, 42, 99}
    fill(flusher, range(150))
    await clock.advance_async(1)
    assert [update for update, _ in target.refused] == [0, 41, 42, 99]
    assert all(isinstance(error, ClientFault) for _, error in target.refused)
    assert target.landed == [number for number in range(150) if number not in target.poison]
    assert flusher.flushed_count == 146
    assert flusher.depth == 0
    assert len(target.tries) < 70


async def test_a_store_failure_during_the_isolation_of_a_refused_update_loses_nothing(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new(size=8, buffer_max=16)
    target.poison = {5}
    fill(flusher, range(8))
    target.errors = [ClientFault("in there"), OSError("down"), OSError("still down")]
    await clock.advance_async(5)
    assert [update for update, _ in target.refused] == [5]
    assert target.landed == [0, 1, 2, 3, 4, 6, 7]


async def test_a_failing_refusal_callback_does_not_stop_the_flusher(clock: ManualClock, target: FlushTarget) -> None:
    def report(update: Any, error: HeadraceError) -> None:
        raise RuntimeError("the callback failed")

    flusher: Flusher[Any] = Flusher(target.flush, name="test", clock=clock, on_refused=report, size=4)
    target.poison = {"bad"}
    fill(flusher, ["bad", "good"])
    await flusher.close()
    assert target.landed == ["good"]


async def test_a_cancelled_flush_is_not_counted_and_is_retried(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new(interval_ms=None)
    target.errors = [asyncio.CancelledError()]
    fill(flusher, ["a"])
    await clock.settle()
    assert (flusher.flushes_count, flusher.flushed_count, flusher.depth) == (0, 0, 1)
    await clock.advance_async(1)
    assert target.flushes == [("a",)]


async def test_a_flusher_whose_task_is_cancelled_keeps_its_updates(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new(size=2, buffer_max=3, interval_ms=None)
    target.gate.clear()
    fill(flusher, range(3))
    waiting = asyncio.create_task(flusher.put(3))
    await clock.settle()
    assert flusher._task is not None
    flusher._task.cancel()
    await clock.settle()
    assert flusher.unflushed == (0, 1, 2)
    assert flusher.flushed_count == 0
    with pytest.raises(FlusherClosed):
        await waiting
    with pytest.raises(FlusherClosed):
        flusher.put_nowait(4)
    with pytest.raises(UpdatesUnflushed):
        await flusher.close()


# Closing


async def test_closing_flushes_all_updates_without_waiting_for_the_interval(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new(interval_ms=3_600_000)
    fill(flusher, range(7))
    await flusher.close()
    assert target.flushes == [(0, 1, 2, 3), (4, 5, 6)]
    assert flusher.unflushed == ()


async def test_closing_does_not_wait_for_the_rest_of_a_back_off(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new(interval_ms=None, backoff_initial_ms=60_000, backoff_max_ms=60_000)
    target.errors = [OSError("down")]
    fill(flusher, ["a"])
    await clock.settle()
    assert target.flushes == []
    await flusher.close()
    assert target.flushes == [("a",)]


async def test_a_store_that_fails_during_closing_is_retried_with_pauses(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new(interval_ms=None, backoff_initial_ms=50, backoff_max_ms=50)
    target.errors = [OSError("down")] * 5
    fill(flusher, ["a"])
    await clock.settle()
    closing = asyncio.create_task(flusher.close())
    await clock.settle()
    assert len(target.tries) == 2
    await clock.advance_async(0.05)
    assert len(target.tries) == 3
    await clock.advance_async(1)
    assert closing.done()
    assert target.landed == ["a"]


async def test_a_producer_that_waits_when_the_flusher_closes_is_still_admitted(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new(size=2, buffer_max=2)
    target.gate.clear()
    fill(flusher, [0, 1])
    waiting = [asyncio.create_task(flusher.put(update)) for update in range(2, 9)]
    await clock.settle()
    closing = asyncio.create_task(flusher.close())
    await clock.settle()
    target.gate.set()
    await clock.settle()
    assert closing.done()
    assert all(task.done() and task.exception() is None for task in waiting)
    assert target.landed == list(range(9))


async def test_closing_does_not_wait_for_a_producer_cancelled_when_it_was_admitted(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new(size=1, buffer_max=1, interval_ms=None)
    target.gate.clear()
    fill(flusher, ["first"])
    gone = asyncio.create_task(flusher.put("gone"))
    await clock.settle()
    closing = asyncio.create_task(flusher.close())
    await clock.settle()
    target.gate.set()
    while not flusher._granted_count:
        await asyncio.sleep(0)
    gone.cancel()
    await clock.settle()
    assert closing.done()
    assert target.landed == ["first"]


async def test_a_closed_flusher_refuses_updates(new: New, clock: ManualClock, target: FlushTarget) -> None:
    flusher = new()
    fill(flusher, ["a"])
    closing = asyncio.create_task(flusher.close())
    await asyncio.sleep(0)
    with pytest.raises(FlusherClosed):
        flusher.put_nowait("b")
    with pytest.raises(FlusherClosed):
        await flusher.put("b")
    await closing
    assert target.landed == ["a"]


async def test_closing_may_come_first_or_last_and_be_repeated(new: New, target: FlushTarget) -> None:
    unused = new()
    await unused.close()
    await unused.close(deadline_s=1)
    with pytest.raises(FlusherClosed):
        unused.put_nowait("a")
    used = new()
    fill(used, ["a"])
    await asyncio.gather(used.close(), used.close(deadline_s=5))
    await used.close()
    assert target.landed == ["a"]


async def test_closing_gives_up_after_its_grace_and_returns_the_unflushed_updates(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new(size=2, buffer_max=3)
    target.errors = [OSError("down")] * 1_000
    fill(flusher, [0, 1, 2])
    waiting = asyncio.create_task(flusher.put(3))
    await clock.settle()
    closing = asyncio.create_task(flusher.close(deadline_s=30))
    await clock.advance_async(29.9)
    assert not closing.done()
    await clock.advance_async(0.1)
    with pytest.raises(UpdatesUnflushed, match="3 updates were not written") as raised:
        await closing
    assert raised.value.unflushed == flusher.unflushed == (0, 1, 2)
    assert isinstance(raised.value.__cause__, OSError)
    with pytest.raises(FlusherClosed):
        await waiting
    with pytest.raises(UpdatesUnflushed):
        await flusher.close()


async def test_a_flush_that_hangs_does_not_outlive_the_grace(new: New, clock: ManualClock, target: FlushTarget) -> None:
    flusher = new(interval_ms=None)
    target.gate.clear()
    fill(flusher, ["hangs"])
    closing = asyncio.create_task(flusher.close(deadline_s=1))
    await clock.advance_async(1)
    with pytest.raises(UpdatesUnflushed):
        await closing
    assert flusher.flushed_count == 0
    assert flusher.unflushed == ("hangs",)


async def test_a_close_that_is_cancelled_leaves_the_drain_running(
    new: New, clock: ManualClock, target: FlushTarget
) -> None:
    flusher = new()
    target.gate.clear()
    fill(flusher, ["a"])
    closing = asyncio.create_task(flusher.close())
    await clock.settle()
    closing.cancel()
    target.gate.set()
    await flusher.close()
    assert target.landed == ["a"]


async def test_leaving_the_block_closes_the_flusher(new: New, target: FlushTarget) -> None:
    async with new(interval_ms=3_600_000) as flusher:
        fill(flusher, ["a"])
    assert target.landed == ["a"]


# Randomised scenarios


@pytest.mark.parametrize("seed", range(25))
async def test_each_update_is_flushed_or_refused_once_under_failures_and_cancellation(
    seed: int, clock: ManualClock, target: FlushTarget
) -> None:
    scenario = SeededScenario(seed, clock)
    size, buffer_max = scenario.random.randint(1, 9), scenario.random.randint(9, 20)
    flusher: Flusher[tuple[int, int]] = Flusher(
        scenario.flush,
        name="scenario",
        clock=clock,
        on_refused=target.refuse,
        size=size,
        interval_ms=scenario.random.choice([None, 20, 200]),
        buffer_max=buffer_max,
    )
    producers = [asyncio.create_task(scenario.produce(producer, flusher)) for producer in range(6)]
    while not all(task.done() for task in producers):
        await clock.advance_async(0.05)
        assert flusher.depth <= buffer_max
    closing = asyncio.create_task(flusher.close())
    while not closing.done():
        await clock.advance_async(1)
    await closing
    refused = [update for update, _ in target.refused]
    assert sorted(scenario.landed + refused) == sorted(scenario.accepted)
    assert set(refused) == scenario.poison.intersection(scenario.accepted)
    assert scenario.flush_most <= size
    assert flusher.depth == flusher._held_count == 0
    for producer in range(6):
        updates = [update for update in scenario.landed if update[0] == producer]
        assert updates == sorted(updates)


@pytest.mark.parametrize(
    "setting",
    [
        {"size": 0},
        {"size": True},
        {"size": 1.5},
        {"interval_ms": 0},
        {"interval_ms": "ten"},
        {"buffer_max": 3},
        {"backoff_initial_ms": 0},
        {"backoff_max_ms": -1},
    ],
)
def test_a_setting_outside_its_bounds_is_refused_by_name(new: New, setting: dict[str, Any]) -> None:
    name = {"size": "flush_size", "interval_ms": "flush_interval_ms"}.get(*setting, *setting)
    with pytest.raises(InvalidSetting, match=name):
        new(**setting)
