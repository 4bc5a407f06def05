from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from headrace.foundation.errors import ClientFault, HeadraceError, InvalidSetting, StoreUnavailable
from headrace.runtime.clock import ManualClock
from headrace.runtime.flusher import Flusher, FlusherClosed, UpdatesUnflushed
from tests.support.flush_target import Sink


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def new(clock: ManualClock, sink: Sink) -> Callable[..., Flusher[Any]]:
    def build(**settings: Any) -> Flusher[Any]:
        settings = {"size": 4, "interval_ms": 100, "buffer_max": 12} | settings
        return Flusher(sink.flush, name="test", clock=clock, on_refused=sink.refuse, **settings)

    return build


New = Callable[..., Flusher[Any]]


def fill(flusher: Flusher[Any], updates: Sequence[Any]) -> None:
    for update in updates:
        assert flusher.put_nowait(update)


# When a flush is due


async def test_a_full_flush_does_not_wait_for_its_interval(new: New, clock: ManualClock, sink: Sink) -> None:
    flusher = new()
    fill(flusher, range(3))
    await clock.settle()
    assert sink.flushes == []
    fill(flusher, [3])
    await clock.settle()
    assert sink.flushes == [(0, 1, 2, 3)]


async def test_the_oldest_update_waits_one_interval_at_most(new: New, clock: ManualClock, sink: Sink) -> None:
    flusher = new()
    fill(flusher, ["a"])
    await clock.advance_async(0.099)
    assert sink.flushes == []
    await clock.advance_async(0.001)
    assert sink.flushes == [("a",)]


async def test_updates_that_trickle_in_for_ever_cannot_put_a_flush_off(
    new: New, clock: ManualClock, sink: Sink
) -> None:
    flusher = new(size=1_000, buffer_max=2_000)
    arrived_us: dict[int, int] = {}
    seen = 0
    for tick in range(200):
        arrived_us[tick] = clock.now_us()
        fill(flusher, [tick])
        await clock.advance_async(0.01)
        for update in sink.landed[seen:]:
            assert clock.now_us() - arrived_us[update] <= 100_000
        seen = len(sink.landed)
        assert flusher.depth <= 10
    assert len(sink.flushes) == 20


async def test_what_a_full_flush_leaves_behind_keeps_its_interval(new: New, clock: ManualClock, sink: Sink) -> None:
    flusher = new()
    fill(flusher, range(3))
    await clock.advance_async(0.05)
    fill(flusher, range(3, 6))
    await clock.settle()
    assert sink.flushes == [(0, 1, 2, 3)]
    await clock.advance_async(0.1)
    assert sink.landed == list(range(6))


async def test_a_flush_is_never_larger_than_its_size(new: New, clock: ManualClock, sink: Sink) -> None:
    flusher = new(size=500, buffer_max=1_000_000, interval_ms=None)
    sink.gate.clear()
    fill(flusher, range(1_000_000))
    await clock.settle()
    sink.gate.set()
    await clock.settle()
    assert {len(flush) for flush in sink.flushes} == {500}
    assert sink.landed == list(range(1_000_000))
    assert flusher.flushes_count == 2_000
    assert flusher.flushed_count == 1_000_000


async def test_a_lone_update_is_flushed_at_once_and_what_arrives_meanwhile_shares_the_next_flush(
    new: New, clock: ManualClock, sink: Sink
) -> None:
    flusher = new(interval_ms=None)
    sink.gate.clear()
    fill(flusher, ["lone"])
    await clock.settle()
    assert sink.tries == [("lone",)]
    fill(flusher, ["b", "c", "d"])
    await clock.settle()
    assert sink.tries == [("lone",)]
    sink.gate.set()
    await clock.settle()
    assert sink.flushes == [("lone",), ("b", "c", "d")]
    assert clock.sleepers_count == 0


async def test_eight_producers_land_each_update_in_one_flush_and_in_their_own_order(
    new: New, clock: ManualClock, sink: Sink
) -> None:
    flusher = new(size=7, buffer_max=10)
    sink.errors = [OSError("once"), StoreUnavailable("twice")]

    async def producer(number: int) -> None:
        for count in range(250):
            await flusher.put((number, count))

    producers = [asyncio.create_task(producer(number)) for number in range(8)]
    while not all(task.done() for task in producers):
        await clock.advance_async(0.05)
        assert flusher.depth <= 10
    await flusher.close()
    assert len(sink.landed) == len(set(sink.landed)) == 2_000
    for number in range(8):
        assert [count for who, count in sink.landed if who == number] == list(range(250))
    assert max(map(len, sink.flushes)) <= 7
    assert sink.in_flight_most == 1


async def test_taking_an_update_in_costs_no_task(new: New, clock: ManualClock) -> None:
    flusher = new(size=100, buffer_max=1_000)
    before = len(asyncio.all_tasks())
    fill(flusher, range(500))
    assert len(asyncio.all_tasks()) == before + 1
    await clock.settle()


# When the buffer is full


async def test_a_full_buffer_makes_its_producers_wait(new: New, clock: ManualClock, sink: Sink) -> None:
    flusher = new(size=2, buffer_max=3)
    sink.gate.clear()
    fill(flusher, [0, 1])
    await clock.settle()
    fill(flusher, [2])
    assert not flusher.put_nowait("no room")
    waiting = [asyncio.create_task(flusher.put(update)) for update in (3, 4)]
    await clock.advance_async(10)
    assert flusher.depth == 3
    assert not any(task.done() for task in waiting)
    sink.gate.set()
    await clock.advance_async(1)
    assert all(task.done() for task in waiting)
    assert sink.landed == [0, 1, 2, 3, 4]


async def test_nobody_overtakes_a_producer_that_waits(new: New, clock: ManualClock, sink: Sink) -> None:
    flusher = new(size=1, buffer_max=1, interval_ms=None)
    sink.gate.clear()
    fill(flusher, ["first"])
    waiting = asyncio.create_task(flusher.put("waited"))
    await clock.settle()
    refused_count = 0

    async def barge() -> None:
        nonlocal refused_count
        while not flusher.put_nowait("barged"):
            refused_count += 1
            await asyncio.sleep(0)

    sink.gate.set()
    await barge()
    await clock.settle()
    assert waiting.done()
    assert refused_count > 0
    assert sink.landed == ["first", "waited", "barged"]


async def test_a_producer_cancelled_while_it_waits_leaves_nothing_behind(
    new: New, clock: ManualClock, sink: Sink
) -> None:
    flusher = new(size=1, buffer_max=1, interval_ms=None)
    sink.gate.clear()
    fill(flusher, ["first"])
    gone = asyncio.create_task(flusher.put("gone"))
    stays = asyncio.create_task(flusher.put("stays"))
    await clock.settle()
    gone.cancel()
    await clock.settle()
    assert len(flusher._senders) == 1
    sink.gate.set()
    await clock.settle()
    assert gone.cancelled()
    assert stays.done()
    assert sink.landed == ["first", "stays"]


async def test_a_producer_cancelled_as_it_is_let_in_passes_its_place_on(
    new: New, clock: ManualClock, sink: Sink
) -> None:
    flusher = new(size=1, buffer_max=1, interval_ms=None)
    sink.gate.clear()
    fill(flusher, ["first"])
    gone = asyncio.create_task(flusher.put("gone"))
    stays = asyncio.create_task(flusher.put("stays"))
    await clock.settle()
    sink.gate.set()
    while not flusher._granted_count:
        await asyncio.sleep(0)
    assert not gone.done()
    gone.cancel()
    await clock.settle()
    assert gone.cancelled()
    assert stays.done()
    assert sink.landed == ["first", "stays"]
    fill(flusher, ["there is room again"])
    await flusher.close()


# When a flush fails


@pytest.mark.parametrize("error", [StoreUnavailable("busy"), OSError(28, "disk full"), ValueError("a bug")])
async def test_a_failing_flush_is_tried_again_unchanged_with_a_wait_that_doubles(
    new: New, clock: ManualClock, sink: Sink, error: Exception
) -> None:
    flusher = new(interval_ms=None, backoff_initial_ms=50, backoff_max_ms=300)
    sink.errors = [error] * 6
    fill(flusher, ["a", "b"])
    start_us = clock.now_us()
    tried_ms: list[int] = []
    for _ in range(2_000):
        await clock.settle()
        if len(sink.tries) > len(tried_ms):
            tried_ms.append((clock.now_us() - start_us) // 1_000)
            if not sink.flushes:
                assert flusher.last_error is error
                assert flusher.flushed_count == 0
                flusher.put_nowait("later")
        clock.advance(0.001)
    assert tried_ms[:7] == [0, 50, 150, 350, 650, 950, 1250]
    assert sink.tries[:7] == [("a", "b")] * 7
    assert sink.flushes[0] == ("a", "b")
    assert sink.landed[2:] == ["later"] * 6
    assert flusher.last_error is None


async def test_nothing_grows_while_the_store_fails(new: New, clock: ManualClock, sink: Sink) -> None:
    flusher = new(size=4, buffer_max=6)
    sink.errors = [OSError("down")] * 1_000
    taken: list[int] = []

    async def producer() -> None:
        for count in range(100):
            await flusher.put(count)
            taken.append(count)

    producing = asyncio.create_task(producer())
    await clock.advance_async(600)
    assert flusher.depth == 6
    assert len(taken) == 6
    assert {len(each) for each in sink.tries} == {4}
    assert 100 < len(sink.tries) < 200
    sink.errors.clear()
    await clock.advance_async(60)
    assert producing.done()
    assert sink.landed == list(range(100))


async def test_an_update_that_is_refused_for_good_is_found_and_the_others_land_in_order(
    new: New, clock: ManualClock, sink: Sink
) -> None:
    flusher = new(size=100, buffer_max=200)
    sink.poison = {0, 41, 42, 99}
    fill(flusher, range(150))
    await clock.advance_async(1)
    assert [update for update, _ in sink.refused] == [0, 41, 42, 99]
    assert all(isinstance(error, ClientFault) for _, error in sink.refused)
    assert sink.landed == [number for number in range(150) if number not in sink.poison]
    assert flusher.flushed_count == 146
    assert flusher.depth == 0
    assert len(sink.tries) < 70


async def test_a_store_that_fails_while_a_refused_update_is_looked_for_loses_nothing(
    new: New, clock: ManualClock, sink: Sink
) -> None:
    flusher = new(size=8, buffer_max=16)
    sink.poison = {5}
    fill(flusher, range(8))
    sink.errors = [ClientFault("in there"), OSError("down"), OSError("still down")]
    await clock.advance_async(5)
    assert [update for update, _ in sink.refused] == [5]
    assert sink.landed == [0, 1, 2, 3, 4, 6, 7]


async def test_a_report_that_fails_does_not_stop_the_flusher(clock: ManualClock, sink: Sink) -> None:
    def report(update: Any, error: HeadraceError) -> None:
        raise RuntimeError("nobody listens")

    flusher: Flusher[Any] = Flusher(sink.flush, name="test", clock=clock, on_refused=report, size=4)
    sink.poison = {"bad"}
    fill(flusher, ["bad", "good"])
    await flusher.close()
    assert sink.landed == ["good"]


async def test_a_flush_that_was_cancelled_is_not_counted_and_is_tried_again(
    new: New, clock: ManualClock, sink: Sink
) -> None:
    flusher = new(interval_ms=None)
    sink.errors = [asyncio.CancelledError()]
    fill(flusher, ["a"])
    await clock.settle()
    assert (flusher.flushes_count, flusher.flushed_count, flusher.depth) == (0, 0, 1)
    await clock.advance_async(1)
    assert sink.flushes == [("a",)]


async def test_a_flusher_whose_task_is_cancelled_keeps_what_it_had(new: New, clock: ManualClock, sink: Sink) -> None:
    flusher = new(size=2, buffer_max=3, interval_ms=None)
    sink.gate.clear()
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


# The end


async def test_closing_writes_everything_at_once_without_waiting_for_the_interval(
    new: New, clock: ManualClock, sink: Sink
) -> None:
    flusher = new(interval_ms=3_600_000)
    fill(flusher, range(7))
    await flusher.close()
    assert sink.flushes == [(0, 1, 2, 3), (4, 5, 6)]
    assert flusher.unflushed == ()


async def test_closing_does_not_wait_for_the_rest_of_a_back_off(new: New, clock: ManualClock, sink: Sink) -> None:
    flusher = new(interval_ms=None, backoff_initial_ms=60_000, backoff_max_ms=60_000)
    sink.errors = [OSError("down")]
    fill(flusher, ["a"])
    await clock.settle()
    assert sink.flushes == []
    await flusher.close()
    assert sink.flushes == [("a",)]


async def test_a_store_that_still_fails_at_the_end_is_not_tried_without_pause(
    new: New, clock: ManualClock, sink: Sink
) -> None:
    flusher = new(interval_ms=None, backoff_initial_ms=50, backoff_max_ms=50)
    sink.errors = [OSError("down")] * 5
    fill(flusher, ["a"])
    await clock.settle()
    closing = asyncio.create_task(flusher.close())
    await clock.settle()
    assert len(sink.tries) == 2
    await clock.advance_async(0.05)
    assert len(sink.tries) == 3
    await clock.advance_async(1)
    assert closing.done()
    assert sink.landed == ["a"]


async def test_who_waits_for_room_when_it_closes_is_still_let_in(new: New, clock: ManualClock, sink: Sink) -> None:
    flusher = new(size=2, buffer_max=2)
    sink.gate.clear()
    fill(flusher, [0, 1])
    waiting = [asyncio.create_task(flusher.put(update)) for update in range(2, 9)]
    await clock.settle()
    closing = asyncio.create_task(flusher.close())
    await clock.settle()
    sink.gate.set()
    await clock.settle()
    assert closing.done()
    assert all(task.done() and task.exception() is None for task in waiting)
    assert sink.landed == list(range(9))


async def test_closing_does_not_wait_for_a_producer_that_was_cancelled_as_it_was_let_in(
    new: New, clock: ManualClock, sink: Sink
) -> None:
    flusher = new(size=1, buffer_max=1, interval_ms=None)
    sink.gate.clear()
    fill(flusher, ["first"])
    gone = asyncio.create_task(flusher.put("gone"))
    await clock.settle()
    closing = asyncio.create_task(flusher.close())
    await clock.settle()
    sink.gate.set()
    while not flusher._granted_count:
        await asyncio.sleep(0)
    gone.cancel()
    await clock.settle()
    assert closing.done()
    assert sink.landed == ["first"]


async def test_a_closed_flusher_takes_nothing_more(new: New, clock: ManualClock, sink: Sink) -> None:
    flusher = new()
    fill(flusher, ["a"])
    closing = asyncio.create_task(flusher.close())
    await asyncio.sleep(0)
    with pytest.raises(FlusherClosed):
        flusher.put_nowait("b")
    with pytest.raises(FlusherClosed):
        await flusher.put("b")
    await closing
    assert sink.landed == ["a"]


async def test_closing_survives_being_first_being_last_and_being_told_twice(new: New, sink: Sink) -> None:
    unused = new()
    await unused.close()
    await unused.close(deadline_s=1)
    with pytest.raises(FlusherClosed):
        unused.put_nowait("a")
    used = new()
    fill(used, ["a"])
    await asyncio.gather(used.close(), used.close(deadline_s=5))
    await used.close()
    assert sink.landed == ["a"]


async def test_closing_gives_up_after_its_grace_and_says_what_stayed(new: New, clock: ManualClock, sink: Sink) -> None:
    flusher = new(size=2, buffer_max=3)
    sink.errors = [OSError("down")] * 1_000
    fill(flusher, [0, 1, 2])
    waiting = asyncio.create_task(flusher.put(3))
    await clock.settle()
    closing = asyncio.create_task(flusher.close(deadline_s=30))
    await clock.advance_async(29.9)
    assert not closing.done()
    await clock.advance_async(0.1)
    with pytest.raises(UpdatesUnflushed, match="3 updates were not written") as told:
        await closing
    assert told.value.unflushed == flusher.unflushed == (0, 1, 2)
    assert isinstance(told.value.__cause__, OSError)
    with pytest.raises(FlusherClosed):
        await waiting
    with pytest.raises(UpdatesUnflushed):
        await flusher.close()


async def test_a_flush_that_hangs_does_not_outlive_the_grace(new: New, clock: ManualClock, sink: Sink) -> None:
    flusher = new(interval_ms=None)
    sink.gate.clear()
    fill(flusher, ["hangs"])
    closing = asyncio.create_task(flusher.close(deadline_s=1))
    await clock.advance_async(1)
    with pytest.raises(UpdatesUnflushed):
        await closing
    assert flusher.flushed_count == 0
    assert flusher.unflushed == ("hangs",)


async def test_a_close_that_is_cancelled_leaves_the_drain_running(new: New, clock: ManualClock, sink: Sink) -> None:
    flusher = new()
    sink.gate.clear()
    fill(flusher, ["a"])
    closing = asyncio.create_task(flusher.close())
    await clock.settle()
    closing.cancel()
    sink.gate.set()
    await flusher.close()
    assert sink.landed == ["a"]


async def test_leaving_the_block_closes_the_flusher(new: New, sink: Sink) -> None:
    async with new(interval_ms=3_600_000) as flusher:
        fill(flusher, ["a"])
    assert sink.landed == ["a"]


# All of it at once


class Dice:
    """Producers that are cancelled and a store that stalls, fails and refuses, all decided by one seed."""

    def __init__(self, seed: int, clock: ManualClock) -> None:
        self.random = random.Random(seed)
        self.clock = clock
        self.poison = {(who, count) for who in range(6) for count in range(60) if self.random.random() < 0.03}
        self.accepted: list[tuple[int, int]] = []
        self.landed: list[tuple[int, int]] = []
        self.flush_most = 0

    async def flush(self, updates: Sequence[tuple[int, int]]) -> None:
        self.flush_most = max(self.flush_most, len(updates))
        if self.random.random() < 0.5:
            await self.clock.sleep(self.random.random() * 0.2)
        if self.random.random() < 0.2:
            raise self.random.choice([OSError("down"), StoreUnavailable("busy"), asyncio.CancelledError()])
        if self.poison.intersection(updates):
            raise ClientFault("refused")
        self.landed.extend(updates)

    async def produce(self, who: int, flusher: Flusher[tuple[int, int]]) -> None:
        for count in range(60):
            if self.random.random() < 0.2:
                await self.clock.sleep(self.random.random() * 0.1)
            put = asyncio.ensure_future(flusher.put((who, count)))
            if self.random.random() < 0.1:
                for _ in range(self.random.randint(0, 6)):
                    await asyncio.sleep(0)
                put.cancel()
            try:
                await put
            except asyncio.CancelledError:
                continue
            self.accepted.append((who, count))


@pytest.mark.parametrize("seed", range(25))
async def test_whatever_fails_and_whoever_is_cancelled_each_update_has_one_end(
    seed: int, clock: ManualClock, sink: Sink
) -> None:
    dice = Dice(seed, clock)
    size, buffer_max = dice.random.randint(1, 9), dice.random.randint(9, 20)
    flusher: Flusher[tuple[int, int]] = Flusher(
        dice.flush,
        name="dice",
        clock=clock,
        on_refused=sink.refuse,
        size=size,
        interval_ms=dice.random.choice([None, 20, 200]),
        buffer_max=buffer_max,
    )
    producers = [asyncio.create_task(dice.produce(who, flusher)) for who in range(6)]
    while not all(task.done() for task in producers):
        await clock.advance_async(0.05)
        assert flusher.depth <= buffer_max
    closing = asyncio.create_task(flusher.close())
    while not closing.done():
        await clock.advance_async(1)
    await closing
    refused = [update for update, _ in sink.refused]
    assert sorted(dice.landed + refused) == sorted(dice.accepted)
    assert set(refused) == dice.poison.intersection(dice.accepted)
    assert dice.flush_most <= size
    assert flusher.depth == flusher._held_count == 0
    for who in range(6):
        mine = [update for update in dice.landed if update[0] == who]
        assert mine == sorted(mine)


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
