from __future__ import annotations

import asyncio
import time

import pytest

from headrace.foundation.errors import InvalidInput
from headrace.runtime.clock import Clock, ManualClock, SystemClock

START_US = 1_700_000_000_000_000


class MachineClocks:
    """Wall clock and monotonic clock of a machine, set by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall_us = START_US
        self.monotonic_us = 5_000_000
        monkeypatch.setattr(time, "time_ns", lambda: self.wall_us * 1_000)
        monkeypatch.setattr(time, "monotonic_ns", lambda: self.monotonic_us * 1_000)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> MachineClocks:
    return MachineClocks(monkeypatch)


def test_a_system_clock_starts_at_the_wall_time_and_follows_the_monotonic_clock(machine: MachineClocks) -> None:
    clock = SystemClock()
    assert clock.now_us() == START_US
    machine.monotonic_us += 1_500
    assert clock.now_us() == START_US + 1_500


@pytest.mark.parametrize("jump_us", [-3_600_000_000, 3_600_000_000])
def test_a_wall_clock_that_jumps_does_not_move_a_system_clock(machine: MachineClocks, jump_us: int) -> None:
    clock = SystemClock()
    machine.wall_us += jump_us
    machine.monotonic_us += 10
    assert clock.now_us() == START_US + 10


def test_a_heartbeat_sets_the_clock_to_the_time_of_the_database(machine: MachineClocks) -> None:
    clock = SystemClock()
    clock.anchor(START_US + 60_000_000)
    machine.monotonic_us += 7
    assert clock.now_us() == START_US + 60_000_007


def test_a_database_that_is_behind_stops_the_clock_until_it_has_caught_up(machine: MachineClocks) -> None:
    clock = SystemClock()
    machine.monotonic_us += 1_000
    before_us = clock.now_us()
    clock.anchor(before_us - 500)
    assert clock.now_us() == before_us
    machine.monotonic_us += 499
    assert clock.now_us() == before_us
    machine.monotonic_us += 2
    assert clock.now_us() == before_us + 1


def test_a_clock_set_back_twice_never_goes_back(machine: MachineClocks) -> None:
    clock = SystemClock()
    before_us = clock.now_us()
    clock.anchor(before_us - 500)
    clock.anchor(before_us - 900)
    assert clock.now_us() == before_us


async def test_the_system_clock_waits_for_an_event_or_for_its_time() -> None:
    clock: Clock = SystemClock()
    event = asyncio.Event()
    assert not await clock.wait_for(event, 0)
    assert not await clock.wait_for(event, 0.001)
    asyncio.get_running_loop().call_soon(event.set)
    assert await clock.wait_for(event, None)
    assert await clock.wait_for(event, 0)
    await clock.sleep(-1)


def test_the_real_clock_is_near_the_wall_time() -> None:
    assert abs(SystemClock().now_us() - time.time_ns() // 1_000) < 60_000_000


async def test_sleepers_wake_in_the_order_they_are_due() -> None:
    clock = ManualClock(START_US)
    woken: list[str] = []

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append(name)

    sleepers = (("late", 3.0), ("early", 1.0), ("same", 1.0), ("mid", 2.0))
    tasks = [asyncio.create_task(sleeper(name, seconds)) for name, seconds in sleepers]
    await clock.settle()
    assert clock.sleepers_count == 4
    clock.advance(0.5)
    await clock.settle()
    assert woken == []
    clock.advance(2.5)
    assert woken == []
    await clock.settle()
    assert woken == ["early", "same", "mid", "late"]
    assert clock.now_us() == START_US + 3_000_000
    await asyncio.gather(*tasks)


async def test_a_task_that_sleeps_repeatedly_within_a_step_wakes_at_each_due_time() -> None:
    clock = ManualClock(START_US)
    moments_us: list[int] = []

    async def ticker() -> None:
        while True:
            await clock.sleep(0.1)
            moments_us.append(clock.now_us() - START_US)

    ticking = asyncio.create_task(ticker())
    await clock.advance_async(1.05)
    assert moments_us == [100_000 * tick for tick in range(1, 11)]
    assert clock.now_us() == START_US + 1_050_000
    ticking.cancel()


async def test_a_manual_clock_waits_for_an_event_or_for_its_time() -> None:
    clock = ManualClock(START_US)
    event = asyncio.Event()
    timed_out = asyncio.create_task(clock.wait_for(event, 2.0))
    await clock.advance_async(1.9)
    assert not timed_out.done()
    await clock.advance_async(0.1)
    assert await timed_out is False

    signalled = asyncio.create_task(clock.wait_for(event, 2.0))
    for_ever = asyncio.create_task(clock.wait_for(event, None))
    await clock.advance_async(1.0)
    event.set()
    await clock.settle()
    assert signalled.done()
    assert await signalled is True
    assert await for_ever is True
    assert clock.sleepers_count == 0


async def test_a_cancelled_sleeper_is_removed() -> None:
    clock = ManualClock(START_US)
    sleeping = asyncio.create_task(clock.sleep(1.0))
    waiting = asyncio.create_task(clock.wait_for(asyncio.Event(), 1.0))
    await clock.settle()
    sleeping.cancel()
    waiting.cancel()
    await clock.settle()
    assert clock.sleepers_count == 0
    clock.advance(5.0)
    assert sleeping.cancelled()
    assert waiting.cancelled()


async def test_settling_lets_a_long_chain_of_tasks_run_to_its_end() -> None:
    clock = ManualClock()
    turns = 0

    async def chain() -> None:
        nonlocal turns
        for _ in range(5_000):
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(chain())
    await clock.settle()
    assert turns == 5_000
    await task


def test_a_manual_clock_refuses_to_go_back() -> None:
    with pytest.raises(InvalidInput, match="a clock never goes back"):
        ManualClock().advance(-1)
