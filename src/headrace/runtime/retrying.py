"""Asking again while the other side is away: one way of waiting for a store or an object store."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import structlog

from headrace.foundation.errors import HeadraceError
from headrace.runtime.clock import Clock

T = TypeVar("T")

LOG: Any = structlog.get_logger("headrace.patience")
WAITS_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Between two tries; the last one from then on."""


async def retry_transient(
    call: Callable[[], Awaitable[T]], clock: Clock, *, what: str, waits_max: int | None = None
) -> T:
    """Call until it answers, with growing waits. The call must be safe to repeat.

    An error that trying again can't help is raised at once, any other after `waits_max` waits. Without a bound nobody
    would ever hear of it, so the log does, with `what` did not answer.
    """
    waits_count = 0
    while True:
        try:
            return await call()
        except HeadraceError as error:
            if not error.retryable or waits_count == waits_max:
                raise
            wait_s = WAITS_S[min(waits_count, len(WAITS_S) - 1)]
            if waits_max is None:
                LOG.warning("no answer; trying again", of=what, error=error.message, wait_s=wait_s)
        waits_count += 1
        await clock.sleep(wait_s)
