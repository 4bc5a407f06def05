"""Waits for the return of a store that can't be reached.

One task of the process probes the store, `PROBE_MAX_S` apart. All other tasks wait for the first success of any
operation: a probe, a heartbeat of another thread, a request that was already in flight. While the store is away they
send nothing. When it is back, the first `AT_ONCE` continue at once, and as many more each `NEXT_S` seconds, so that a
process with thousands of waiting requests does not send all of them in the same millisecond.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from headrace.foundation.errors import HeadraceError
from headrace.foundation.logs import get_logger
from headrace.runtime.clock import SECOND_US, Clock
from headrace.store.reachability import Reachability

LOG: Any = get_logger("headrace.outage")
PROBE_FIRST_S: Final = 0.05
PROBE_MAX_S: Final = 0.75
JITTER: Final = 0.25
"""Largest part by which a pause between two probes is shortened: processes that lost the store at the same moment must
not probe at the same moment.
"""

AT_ONCE: Final = 8
NEXT_S: Final = 0.01
RECHECK_S: Final = 5.0
"""A waiting task looks this often whether the probing task still exists: its event loop may have ended."""


class _Waiter:
    """An event to set when the store is back, and its position among the waiters at that moment."""

    __slots__ = ("event", "loop", "rank")

    def __init__(self, event: asyncio.Event) -> None:
        self.event = event
        self.loop = asyncio.get_running_loop()
        self.rank = 0

    def wake(self, rank: int) -> None:
        self.rank = rank
        try:
            is_here = asyncio.get_running_loop() is self.loop
        except RuntimeError:
            is_here = False
        if is_here:
            self.event.set()
        else:
            with suppress(RuntimeError):  # that loop has ended, and the waiting task with it
                self.loop.call_soon_threadsafe(self.event.set)


class Outage:
    """The outages of one store, for the tasks that retry. Used by all event loops of a process."""

    def __init__(
        self, reachability: Reachability | None = None, *, jitter: Callable[[], float] = random.random
    ) -> None:
        """Without `reachability` no outage is ever noticed, and callers wait for their own back-off only."""
        self.reachability = reachability or Reachability()
        self.probes_count = 0
        self._jitter = jitter
        self._lock = threading.Lock()
        self._waiters: dict[_Waiter, None] = {}
        self._prober: asyncio.Task[None] | None = None
        self.reachability.listen(self._wake_all)

    @property
    def is_over(self) -> bool:
        """True while the store is reachable, as far as this process knows."""
        return not self._is_away()

    def _is_away(self) -> bool:
        return not self.reachability.is_reachable

    async def until_over(
        self, clock: Clock, timeout_s: float | None = None, *, event: asyncio.Event | None = None
    ) -> bool:
        """Wait until the store is reachable. False if `timeout_s` passed first, or the caller's `event` was set."""
        if not self._is_away():
            return True
        signal = asyncio.Event() if event is None else event
        until_us = None if timeout_s is None else clock.now_us() + int(timeout_s * SECOND_US)
        with self._waiting(signal) as waiter:
            while self._is_away() and not signal.is_set():
                self.ensure_probing(clock)
                left_s = RECHECK_S if until_us is None else (until_us - clock.now_us()) / SECOND_US
                if left_s <= 0:
                    return False
                await clock.wait_for(signal, min(left_s, RECHECK_S))
        if not self._is_away() and waiter.rank >= AT_ONCE:
            await clock.sleep(waiter.rank // AT_ONCE * NEXT_S)
        return not self._is_away()

    @contextmanager
    def waking(self, event: asyncio.Event) -> Iterator[None]:
        """Set `event` at each return of the store, while the block lasts."""
        with self._waiting(event):
            yield

    @contextmanager
    def _waiting(self, event: asyncio.Event) -> Iterator[_Waiter]:
        waiter = _Waiter(event)
        with self._lock:
            self._waiters[waiter] = None
        try:
            yield waiter
        finally:
            with self._lock:
                self._waiters.pop(waiter, None)

    def _wake_all(self) -> None:
        with self._lock:
            waiters = list(self._waiters)
        for rank, waiter in enumerate(waiters):
            waiter.wake(rank)

    # -- the probing task

    def ensure_probing(self, clock: Clock) -> None:
        """Start the probing task on this event loop, unless the store is reachable or such a task exists."""
        if not self._is_away() or self.reachability.probe is None:
            return
        with self._lock:
            prober = self._prober
            if prober is None or prober.done() or prober.get_loop().is_closed():
                self._prober = asyncio.get_running_loop().create_task(self._probe(clock), name="headrace-probe")

    async def _probe(self, clock: Clock) -> None:
        """Probe until the store is reachable."""
        probe = self.reachability.probe
        assert probe is not None
        failures_count = 0
        while self._is_away():
            pause_s = min(PROBE_MAX_S, PROBE_FIRST_S * 2.0 ** min(failures_count, 32))
            await clock.sleep(pause_s * (1 - JITTER * self._jitter()))
            if not self._is_away():
                return
            self.probes_count += 1
            failures_count += 1
            try:
                await probe()
            except HeadraceError as error:
                LOG.debug("store.probe_failed", probes=failures_count, error=error.message)
            except Exception:
                LOG.exception("store.probe_crashed")
            else:
                self.reachability.succeeded()

    async def close(self) -> None:
        """End the probing task."""
        prober, self._prober = self._prober, None
        if prober is None or prober.done():
            return
        if prober.get_loop() is asyncio.get_running_loop():
            prober.cancel()
            await asyncio.gather(prober, return_exceptions=True)
        else:
            with suppress(RuntimeError):  # that loop has ended
                prober.get_loop().call_soon_threadsafe(prober.cancel)
