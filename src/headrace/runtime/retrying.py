"""Retries of calls that fail for a passing reason, with one back-off for every store and object store."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeVar

from headrace.foundation.errors import HeadraceError
from headrace.foundation.logs import get_logger
from headrace.runtime.clock import Clock
from headrace.runtime.outage import Outage

T = TypeVar("T")


class HasStore(Protocol):
    """The clock and the outages of a process, as its engine has them."""

    clock: Clock
    outage: Outage


LOG: Any = get_logger("headrace.retrying")
BACKOFF_INITIAL_S: Final = 0.05
BACKOFF_MAX_S: Final = 5.0


def backoff_s(failures_count: int, *, initial_s: float = BACKOFF_INITIAL_S, max_s: float = BACKOFF_MAX_S) -> float:
    """Return the wait after `failures_count` consecutive failures (1 or more): doubled from `initial_s` to `max_s`."""
    return min(max_s, initial_s * 2.0 ** min(failures_count - 1, 32))


async def through_outages(engine: HasStore, call: Callable[[], Awaitable[T]]) -> T:
    """Read the store, and wait for its return while it can't be reached."""
    return await retry_transient(call, engine.clock, what="the store", outage=engine.outage)


async def retry_transient(
    call: Callable[[], Awaitable[T]],
    clock: Clock,
    *,
    what: str,
    waits_max: int | None = None,
    outage: Outage | None = None,
) -> T:
    """Call until the call succeeds, waiting `backoff_s` between attempts. The call must be safe to repeat.

    An error that is not retryable is raised at once, a retryable one after `waits_max` waits. With `waits_max=None` the
    call is repeated without end, and each wait is logged with `what`, the name of what did not answer.

    `outage`: the outages of the store that is called. While it can't be reached nothing is sent, and the call is
    repeated when it is back. With `waits_max` the error is raised after the time that all waits would have taken.
    """
    waits_count = 0
    while True:
        try:
            return await call()
        except HeadraceError as error:
            if not error.retryable or waits_count == waits_max:
                raise
            failure, wait_s = error, backoff_s(waits_count + 1)
            if waits_max is None:
                LOG.warning("call.retrying", of=what, error=error.message, wait_s=wait_s)
        waits_count += 1
        await clock.sleep(wait_s)
        if outage is not None and not outage.is_over:
            left_s = None if waits_max is None else sum(backoff_s(count + 1) for count in range(waits_count, waits_max))
            if not await outage.until_over(clock, left_s):
                raise failure
