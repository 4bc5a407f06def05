"""Log lines of failed attempts: each with its ids, up to a number a second, and then their count.

A line costs twenty times the run that it is about, and the store has all failures.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import Any, Final

from headrace.core.failure import Failure
from headrace.foundation.logs import get_logger
from headrace.runtime.clock import Clock, Timer
from headrace.runtime.sessions.active_lease import ActiveLease
from headrace.runtime.worker.run_driver import ids_of

LOG: Any = get_logger("headrace.attempts")
LINES_MAX: Final = 100
"""Failed attempts of a window that get a line of their own."""
WINDOW_S: Final = 1.0


class FailureLog:
    """Writer of these lines for one process. Belongs to one event loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._left_count = 0
        self._until_us = 0
        self._unlogged: Counter[tuple[str, str]] = Counter()
        self._timer: Timer | None = None

    def write(
        self,
        active: ActiveLease,
        lease_offset: int,
        failure: Failure,
        *,
        error: BaseException | None = None,
        due_us: int | None = None,
    ) -> None:
        """Log a failed attempt: one line with its ids and what follows; the traceback at the level debug."""
        now_us = self._clock.now_us()
        if now_us >= self._until_us:
            self._until_us, self._left_count = now_us + int(WINDOW_S * 1_000_000), LINES_MAX
        if not self._left_count:
            self._unlogged[active.lease.task, failure.type] += 1
            if self._timer is None:
                self._timer = self._clock.call_later(WINDOW_S, self.flush)
            return
        self._left_count -= 1
        ids = ids_of(active, lease_offset)
        next_step = {"next": "failed"} if due_us is None else {"next": "retry", "retry_at": _moment(due_us)}
        LOG.warning("attempt.failed", **ids, error=failure.type, message=failure.message, **next_step)
        if error is not None:
            LOG.debug("attempt.traceback", **ids, exc_info=error)

    def flush(self) -> None:
        """Log the numbers of failed attempts without a line, by task and error."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        unlogged, self._unlogged = self._unlogged, Counter()
        for (task, error), count in unlogged.items():
            LOG.warning("attempt.failures_unlogged", task=task, error=error, count=count)


def _moment(at_us: int) -> str:
    return datetime.fromtimestamp(at_us / 1_000_000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
