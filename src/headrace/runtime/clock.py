"""Time, as something a loop is given.

Rule 1: nothing on this floor reads the time or waits for it except through a `Clock`, so a test holds the
clock in its hand and no promise about timing needs a real second.
Rule 2: one word for a moment: microseconds since 1970, UTC. Spans of waiting are seconds, as floats.
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
    """A call that is to come."""

    def cancel(self) -> object:
        """Leave it; without effect once it was made."""
        ...


class Clock(Protocol):
    """What a loop may know about time."""

    def now_us(self) -> int:
        """This moment; never less than an earlier answer of the same clock."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return when `seconds` have passed; zero or less lets others run once and returns."""
        ...

    async def wait_for(self, event: asyncio.Event, timeout_s: float | None) -> bool:
        """True once `event` is set; False when `timeout_s` passed first. None waits for as long as it takes.

        The one primitive of every loop that works on a signal or after a while, whichever comes first.
        """
        ...

    def call_later(self, seconds: float, call: Callable[[], object]) -> Timer:
        """Call `call` on the running loop when `seconds` have passed: a timeout without a task."""
        ...

    def anchor(self, database_now_us: int) -> None:
        """Go on from the database's time; a clock that nobody but its holder moves stays as it is."""
        ...


class _Anchor(NamedTuple):
    wall_us: int
    monotonic_ns: int
    floor_us: int


class SystemClock:
    """The clock of a live process: a wall time read once, carried on by the monotonic clock.

    A wall clock that jumps (NTP, an operator, a suspended machine) therefore moves nothing. `anchor` takes
    the database's time at each heartbeat, so hosts whose clocks disagree by minutes agree on due times and
    leases. Where the database is behind, this clock stands still until the database has caught up: it never
    goes back.
    """

    def __init__(self, start_us: int | None = None) -> None:
        """`start_us`: what time the database says it is; without it, this machine's word is taken."""
        self._lock = threading.Lock()
        wall_us = time.time_ns() // 1_000 if start_us is None else start_us
        self._anchor = _Anchor(wall_us, time.monotonic_ns(), 0)

    def now_us(self) -> int:
        with self._lock:
            return self._now_us()

    def anchor(self, database_now_us: int) -> None:
        """Go on from the database's time. May be called from the heartbeat's own thread.

        The answer is as old as its way back from the database; a heartbeat's round trip is far under any
        lease, so it isn't corrected for.
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
    """The clock of a test: it stands until it is told to move.

    Sleepers wake in the order they are due, those due at one moment in the order they went to sleep. Belongs
    to one event loop at a time.
    """

    def __init__(self, start_us: int = 1_700_000_000 * SECOND_US) -> None:
        self._now_us = start_us
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []
        self._sleeps_count = 0

    def now_us(self) -> int:
        return self._now_us

    @property
    def sleepers_count(self) -> int:
        """How many are waiting for this clock to move."""
        return sum(1 for _, _, woken in self._sleepers if not woken.done())

    def advance(self, seconds: float) -> None:
        """Move on at once and wake whoever is due; they run when the caller next lets go of the loop.

        A woken task sees the time at the end of the step. Where it sleeps again within the step, use
        `advance_async`, which stops at each due moment.
        """
        target_us = self._target_us(seconds)
        while self._sleepers and self._sleepers[0][0] <= target_us:
            self._wake_next()
        self._now_us = target_us

    async def advance_async(self, seconds: float) -> None:
        """Move on from due moment to due moment, and let everything run until it waits again at each."""
        target_us = self._target_us(seconds)
        await self.settle()
        while self._sleepers and self._sleepers[0][0] <= target_us:
            self._now_us = due_us = max(self._now_us, self._sleepers[0][0])
            while self._sleepers and self._sleepers[0][0] <= due_us:
                self._wake_next()
            await self.settle()
        self._now_us = target_us

    async def settle(self) -> None:
        """Return when no task on this loop can go on without time, another thread or the network.

        Reads the loop's own queue of what is ready, which only the stdlib's loops show; on any other loop it
        gives a fixed number of turns. Raises `AssertionError` for tasks that spin for ever.
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
        raise AssertionError("the tasks of this loop never come to rest")

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
        """The test holds this clock, and nobody else."""

    def _alarm(self, seconds: float) -> asyncio.Future[None]:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        due_us = self._now_us + max(1, math.ceil(round(seconds * SECOND_US, 3)))
        self._sleeps_count += 1
        heapq.heappush(self._sleepers, (due_us, self._sleeps_count, woken))
        return woken

    def _target_us(self, seconds: float) -> int:
        if seconds < 0:
            raise InvalidInput(f"a clock can't go back by {-seconds} s", hint="advance by zero seconds or more")
        return self._now_us + round(seconds * SECOND_US)

    def _wake_next(self) -> None:
        _, _, woken = heapq.heappop(self._sleepers)
        if not woken.done():
            woken.set_result(None)
