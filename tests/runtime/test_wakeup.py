"""Best-effort wake-ups within a process."""

from __future__ import annotations

import asyncio

from headrace.runtime.clock import ManualClock
from headrace.runtime.wakeup import Wakeup


async def test_a_notification_wakes_all_waiting_tasks() -> None:
    wakeup, clock = Wakeup(), ManualClock()
    waiting = [asyncio.create_task(wakeup.wait(clock, 60)) for _ in range(3)]
    await clock.settle()
    wakeup.notify()
    assert await asyncio.gather(*waiting) == [True] * 3
    assert clock.sleepers_count == 0


async def test_a_wait_without_a_notification_ends_at_its_timeout() -> None:
    wakeup, clock = Wakeup(), ManualClock()
    waiting = asyncio.create_task(wakeup.wait(clock, 60))
    await clock.advance_async(60)
    assert await waiting is False


async def test_a_notification_between_a_check_and_the_wait_is_not_missed() -> None:
    wakeup, clock = Wakeup(), ManualClock()
    wakeup.notify()
    count = wakeup.notified_count
    wakeup.notify()
    assert await wakeup.wait(clock, 60, since=count)
    waiting = asyncio.create_task(wakeup.wait(clock, 60, since=wakeup.notified_count))
    await clock.settle()
    assert not waiting.done()
    wakeup.notify()
    assert await waiting
