"""Best-effort wake-ups within a process."""

from __future__ import annotations

import asyncio

from headrace.runtime.clock import ManualClock
from headrace.runtime.wakeup import WATCHES_PER_S, Wakeup, Watch


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


def watched(wakeup: Wakeup, clock: ManualClock, *targets: tuple[str, int | None]) -> list[Watch]:
    """Begin watches."""
    watches = [wakeup.watch(batch_id, index) for batch_id, index in targets]
    for watch in watches:
        watch.begin(clock)
    return watches


async def woken(watches: list[Watch], clock: ManualClock) -> list[bool]:
    """Return which watches were notified, and forget it."""
    answers = await asyncio.gather(*(watch.wait(clock, 0) for watch in watches))
    for watch in watches:
        watch.clear()
    return answers


async def test_a_watch_is_woken_by_its_own_batch_or_run_alone() -> None:
    wakeup, clock = Wakeup(), ManualClock()
    watches = watched(wakeup, clock, ("a", None), ("a", 3), ("a", 4), ("b", None))
    wakeup.notify({"a": [3], "c": [4]})
    assert await woken(watches, clock) == [True, True, False, False]
    wakeup.notify({"b": ()})
    assert await woken(watches, clock) == [False, False, False, True]
    wakeup.notify({"a": None})
    assert await woken(watches, clock) == [True, True, True, False]
    wakeup.notify()
    assert await woken(watches, clock) == [True] * 4
    assert wakeup.watched("a", [3, 4]) == [3, 4]
    assert wakeup.watched("b", [3, 4]) == ()
    assert wakeup.watched("c", [3, 4]) is None
    for watch in watches:
        watch.end()
    assert (wakeup.watches_count, wakeup._watches) == (0, {})


async def test_notifications_without_names_wake_a_bounded_number_of_watches() -> None:
    wakeup, clock = Wakeup(), ManualClock()
    watches = watched(wakeup, clock, *((f"batch {number}", None) for number in range(2 * WATCHES_PER_S)))
    wakeup.notify()
    assert all(await woken(watches, clock))
    for _ in range(3):
        clock.advance(0.6)
        wakeup.notify()
        assert not any(await woken(watches, clock)), "2,000 watches are woken at most every two seconds"
    clock.advance(0.6)
    wakeup.notify()
    assert all(await woken(watches, clock))
    waiting = asyncio.create_task(watches[0].wait(clock, 1))
    await clock.settle()
    await clock.advance_async(1.5)
    assert not waiting.done(), "many watches poll less often"
    await clock.advance_async(0.5)
    assert await waiting is False
