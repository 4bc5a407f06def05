"""Clocks: every loop gets the time from one, and never reads it elsewhere.

Rule 1: no module of the runtime reads the time or waits for it but through a `Clock`. A test passes a clock that it
controls, so no promise about timing needs a real second. Rule 2: a moment is an integer, microseconds since 1970 in
UTC. A duration to wait is a float, in seconds.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import threading
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

from headrace.foundation.errors import InvalidInput

SECOND_US: Final = 1_000_000
_SETTLE_TURNS_MAX: Final = 1_000_000


class Timer(Protocol):
    """A scheduled call."""

    def cancel(self) -> object:
        """Cancel the call; no effect once it was made."""
        ...


class Clock(Protocol):
    """The time, as a loop may use it."""

    def now_us(self) -> int:
        """Return the current time; never less than an earlier answer of the same clock."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Sleep for `seconds`; zero or less yields to the event loop once."""
        ...

    async def wait_for(self, event: asyncio.Event, timeout_s: float | None) -> bool:
        """Wait for `event`. True once it is set, False if `timeout_s` passed first; None waits without a limit.

        The one primitive of every loop that works on a signal or after some time, whichever comes first.
        """
        ...

    def call_later(self, seconds: float, call: Callable[[], object]) -> Timer:
        """Call `call` on the running loop after `seconds`: a timeout that needs no task."""
        ...

    def anchor(self, database_now_us: int) -> None:
        """Continue from the database's time; a manual clock ignores it."""
        ...


class _Anchor(NamedTuple):
    wall_us: int
    monotonic_ns: int
    floor_us: int


class SystemClock:
    """Clock of a live process: a wall-clock time read once, advanced by the monotonic clock.

    A wall clock that jumps (NTP, an operator, a suspended machine) has no effect. `anchor` takes the database's time at
    each heartbeat, so hosts whose clocks differ by minutes agree on due times and leases. If the database's time is
    behind, this clock stands still until the database has caught up: it never goes back.
    """

    def __init__(self, start_us: int | None = None) -> None:
        """`start_us`: the database's time; without it, this machine's wall clock is used."""
        self._lock = threading.Lock()
        wall_us = time.time_ns() // 1_000 if start_us is None else start_us
        self._anchor = _Anchor(wall_us, time.monotonic_ns(), 0)

    def now_us(self) -> int:
        with self._lock:
            return self._now_us()

    def anchor(self, database_now_us: int) -> None:
        """Continue from the database's time. May be called from the heartbeat's own thread.

        The time is as old as its way back from the database. That is far below any lease, so it is not corrected for.
        """
        with self._lock:
            self._anchor = _Anchor(database_now_us, time.monotonic_ns(), self._now_us())

    def _now_us(self) -> int:
        wall_us, monotonic_ns, floor_us = self._anchor
        return max(floor_us, wall_us + (time.monotonic_ns() - monotonic_ns) // 1_000)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))

    async def wait_for(self, event: asyncio.Event, timeout_s: float | None) -> bool:
        if event.is_set():
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return event.is_set()
        return True

    def call_later(self, seconds: float, call: Callable[[], object]) -> Timer:
        return asyncio.get_running_loop().call_later(max(0.0, seconds), call)


class ManualClock:
    """Clock of a test: the time changes only when the test advances it.

    Sleeping tasks wake in the order of their due times, and for equal due times in the order they began to sleep.
    Belongs to one event loop at a time.
    """

    def __init__(self, start_us: int = 1_700_000_000 * SECOND_US) -> None:
        self._now_us = start_us
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []
        self._sleeps_count = 0

    def now_us(self) -> int:
        return self._now_us

    @property
    def sleepers_count(self) -> int:
        """Return how many tasks wait for this clock."""
        return sum(1 for _, _, woken in self._sleepers if not woken.done())

    def advance(self, seconds: float) -> None:
        """Advance at once and wake the tasks that are due; they run when the caller next yields to the loop.

        A woken task sees the time at the end of the step. If tasks sleep again within the step, use `advance_async`,
        which stops at each due time.
        """
        target_us = self._target_us(seconds)
        while self._sleepers and self._sleepers[0][0] <= target_us:
            self._wake_next()
        self._now_us = target_us

    async def advance_async(self, seconds: float) -> None:
        """Advance from due time to due time; at each, run all tasks until they wait again."""
        target_us = self._target_us(seconds)
        await self.settle()
        while self._sleepers and self._sleepers[0][0] <= target_us:
            self._now_us = due_us = max(self._now_us, self._sleepers[0][0])
            while self._sleepers and self._sleepers[0][0] <= due_us:
                self._wake_next()
            await self.settle()
        self._now_us = target_us

    async def settle(self) -> None:
        """Return when no task of this loop can go on without time, another thread or the network.

        Reads the loop's queue of ready callbacks, which only the loops of the standard library expose; any other loop
        is given a fixed number of turns. Raises `AssertionError` for tasks that never wait.
        """
        ready: Any = getattr(asyncio.get_running_loop(), "_ready", None)
        if ready is None:
            for _ in range(100):
                await asyncio.sleep(0)
            return
        for _ in range(_SETTLE_TURNS_MAX):
            await asyncio.sleep(0)
            if not ready:
                return
        raise AssertionError("the tasks of this loop never stop being ready")

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        await self._alarm(seconds)

    async def wait_for(self, event: asyncio.Event, timeout_s: float | None) -> bool:
        if event.is_set():
            return True
        if timeout_s is None:
            return await event.wait()
        if timeout_s <= 0:
            await asyncio.sleep(0)
            return event.is_set()
        alarm = self._alarm(timeout_s)
        signal = asyncio.ensure_future(event.wait())
        try:
            await asyncio.wait((alarm, signal), return_when=asyncio.FIRST_COMPLETED)
        finally:
            alarm.cancel()
            signal.cancel()
        return event.is_set()

    def call_later(self, seconds: float, call: Callable[[], object]) -> Timer:
        alarm = self._alarm(seconds)
        alarm.add_done_callback(lambda done: None if done.cancelled() else call())
        return alarm

    def anchor(self, database_now_us: int) -> None:
        """Ignore the database's time: only the test advances this clock."""

    def _alarm(self, seconds: float) -> asyncio.Future[None]:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        due_us = self._now_us + max(1, math.ceil(round(seconds * SECOND_US, 3)))
        self._sleeps_count += 1
        heapq.heappush(self._sleepers, (due_us, self._sleeps_count, woken))
        return woken

    def _target_us(self, seconds: float) -> int:
        if seconds < 0:
            raise InvalidInput(
                f"expected zero seconds or more to advance the clock by, got {seconds}", hint="a clock never goes back"
            )
        return self._now_us + round(seconds * SECOND_US)

    def _wake_next(self) -> None:
        _, _, woken = heapq.heappop(self._sleepers)
        if not woken.done():
            woken.set_result(None)
