"""The context of a run: an optional argument of a task."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Final

import structlog

from headrace.foundation.ids import run_id

LOG: Any = structlog.get_logger("headrace.run")
SCHEDULE: Final = "headrace-schedule"
SCHEDULED_US: Final = "headrace-scheduled-us"
"""Headers of a scheduled run: the schedule's name, and the time of the tick."""

_DIGITS_MAX: Final = 18


class Context:
    """One attempt of one run, passed to a task that has a parameter annotated `Context`.

    With the default `DETACHED` the task can also be called without Headrace, and type checkers know that callers need
    not pass it: `async def send(to: str, context: Context = DETACHED)`.

    `index` counts from 0 in the batch, `attempt` from 1. `deadline_us`: the time at which the attempt times out,
    microseconds UTC, or None. `headers`: as given at enqueue.
    """

    __slots__ = ("_cancelled", "_log", "attempt", "batch_id", "deadline_us", "headers", "index", "queue", "task")

    def __init__(
        self,
        *,
        batch_id: str,
        index: int,
        attempt: int,
        task: str,
        queue: str,
        deadline_us: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.batch_id = batch_id
        self.index = index
        self.attempt = attempt
        self.task = task
        self.queue = queue
        self.deadline_us = deadline_us
        self.headers: Mapping[str, str] = headers or {}
        self._cancelled = threading.Event()
        self._log: Any = None

    @property
    def run_id(self) -> str:
        """The public id of the run, the same on every attempt. Use it as idempotency key of the run's own calls."""
        return run_id(self.batch_id, self.index)

    @property
    def scheduled_us(self) -> int | None:
        """The time of the tick for which a schedule enqueued this run, microseconds UTC; None for other runs."""
        scheduled = self.headers.get(SCHEDULED_US, "")
        return int(scheduled) if scheduled.isascii() and scheduled.isdigit() and len(scheduled) <= _DIGITS_MAX else None

    @property
    def cancelled(self) -> bool:
        """True once the run was cancelled or is past its deadline; long loops check it."""
        return self._cancelled.is_set()

    @property
    def log(self) -> Any:
        """A structured logger with batch, index, attempt and task bound."""
        if self._log is None:
            self._log = LOG.bind(batch=self.batch_id, index=self.index, attempt=self.attempt, task=self.task)
        return self._log

    def cancel(self) -> None:
        """Mark the run as cancelled; called by the worker, from any thread."""
        self._cancelled.set()


DETACHED: Final = Context(batch_id=f"batch_{'0' * 26}", index=0, attempt=1, task="", queue="")
"""The context of a call that is not a run."""
