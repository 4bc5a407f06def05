"""Best-effort news inside one process."""

from __future__ import annotations

import asyncio

from headrace.runtime.clock import ManualClock
from headrace.runtime.wakeup import Wakeup


async def test_a_ring_wakes_everyone_who_waits() -> None:
    bell, clock = Wakeup(), ManualClock()
    waiting = [asyncio.create_task(bell.wait(clock, 60)) for _ in range(3)]
    await clock.settle()
    bell.notify()
    assert await asyncio.gather(*waiting) == [True] * 3
    assert clock.sleepers_count == 0


async def test_who_hears_nothing_goes_on_after_a_while() -> None:
    bell, clock = Wakeup(), ManualClock()
    waiting = asyncio.create_task(bell.wait(clock, 60))
    await clock.advance_async(60)
    assert await waiting is False


async def test_a_ring_between_a_look_and_the_wait_is_not_missed() -> None:
    bell, clock = Wakeup(), ManualClock()
    bell.notify()
    seen = bell.notified_count
    bell.notify()
    assert await bell.wait(clock, 60, since=seen)
    waiting = asyncio.create_task(bell.wait(clock, 60, since=bell.notified_count))
    await clock.settle()
    assert not waiting.done()
    bell.notify()
    assert await waiting
