"""Backpressure: bounds on the waiting runs. At a bound, ingest waits a short time, then the response says when
to retry.

The store counts the runs of its queues, rarely: at most a twentieth of the time is spent on counting. Between two
counts a server adds the runs that it accepts itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from time import perf_counter
from typing import ClassVar, Final, NamedTuple

from headrace.core.span import Key
from headrace.foundation.errors import EngineFault
from headrace.runtime.engine import Engine

COUNT_EACH_S: Final = 0.25
COUNTING_SHARE: Final = 20
STEP_S: Final = 0.1
RETRY_S: Final = 5
"""Seconds after which a refused sender may retry."""

STATES: Final = ("waiting", "delayed", "leased")


class QueueFull(EngineFault):
    """A bound on the waiting runs is reached; workers must catch up first."""

    code: ClassVar[str] = "NO_ROOM"
    status: ClassVar[int] = 429


class _Counts(NamedTuple):
    by_queue: dict[str, Counter[str]]
    overall: Counter[str]
    bytes_count: int


class Backpressure:
    """The bounds of one environment, as one server knows them. Owned by one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._counts = _Counts({}, Counter(), 0)
        self._fresh_until_us = 0
        limits = engine.limits
        self._per_queue = {state: getattr(limits, f"queue_{state}_max") for state in STATES}
        self._overall = {state: getattr(limits, f"{state}_max") for state in STATES}
        self._bytes_max = limits.store_mib_max * 1024 * 1024
        self.is_bounded = any((*self._per_queue.values(), *self._overall.values(), self._bytes_max))

    async def admit(self, keys: Sequence[Key]) -> None:
        """Accept runs with these keys, after a short wait if a bound is reached. Raises `QueueFull`."""
        if not self.is_bounded or not keys:
            return
        clock = self._engine.clock
        until_us = clock.now_us() + self._engine.limits.ingest_wait_ms * 1_000
        while (reason := await self._reason(keys)) is not None:
            left_s = (until_us - clock.now_us()) / 1_000_000
            if left_s <= 0:
                raise QueueFull(
                    f"a bound on the waiting runs is reached: {reason}",
                    hint=f"retry in {RETRY_S} s, or add workers",
                    retry_after_s=RETRY_S,
                )
            await clock.sleep(min(left_s, STEP_S))
        for key in keys:
            state = "delayed" if key.due_us > clock.now_us() else "waiting"
            self._counts.by_queue.setdefault(key.queue, Counter())[state] += 1
            self._counts.overall[state] += 1

    async def _reason(self, keys: Sequence[Key]) -> str | None:
        """Return the bound that these runs would exceed; None if they fit."""
        counts = await self._current_counts()
        now_us = self._engine.clock.now_us()
        if 0 < self._bytes_max <= counts.bytes_count:
            return f"the store has {counts.bytes_count} bytes, store_mib_max is {self._bytes_max >> 20}"
        new_counts = Counter((key.queue, "delayed" if key.due_us > now_us else "waiting") for key in keys)
        totals: Counter[str] = Counter()
        for (queue, state), count in new_counts.items():
            totals[state] += count
            queue_counts = counts.by_queue.get(queue, Counter())
            for bound in (state, "leased"):
                limit = self._per_queue[bound]
                count_after = queue_counts[bound] + (count if bound == state else 0)
                if limit and (count_after > limit if bound == state else count_after >= limit):
                    return f"queue {queue} has {queue_counts[bound]} {bound} runs, queue_{bound}_max is {limit}"
        for state in STATES:
            limit = self._overall[state]
            count_after = counts.overall[state] + totals[state]
            if limit and (count_after > limit if state != "leased" else count_after >= limit):
                return f"{counts.overall[state]} runs are {state}, {state}_max is {limit}"
        return None

    async def _current_counts(self) -> _Counts:
        engine = self._engine
        if engine.clock.now_us() < self._fresh_until_us:
            return self._counts
        began = perf_counter()
        views = await engine.store.queues(engine.environment)
        bytes_count = await engine.maintenance.size_bytes() if self._bytes_max else 0
        took_s = perf_counter() - began
        by_queue = {
            view.name: Counter(waiting=view.waiting_count, delayed=view.delayed_count, leased=view.leased_count)
            for view in views
        }
        overall: Counter[str] = Counter()
        for queue_counts in by_queue.values():
            overall.update(queue_counts)
        self._counts = _Counts(by_queue, overall, bytes_count)
        age_s = max(COUNT_EACH_S, COUNTING_SHARE * took_s)
        self._fresh_until_us = engine.clock.now_us() + int(age_s * 1_000_000)
        return self._counts
