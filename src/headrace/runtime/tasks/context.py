"""What a run may ask about itself: an optional argument of a task."""

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
    """One attempt of one run. A task that has a parameter annotated `Context` gets it.

    Give the parameter the default `DETACHED` and the task can also be called without Headrace, and type checkers know
    that nobody has to pass it: `async def send(to: str, context: Context = DETACHED)`.

    `index` counts in the batch from 0, `attempt` from 1. `deadline_us`: when the attempt times out, microseconds
    UTC, or None. `headers`: as given at enqueue.
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
        """The run's name outside, the same on every attempt: fit for an idempotency key of a call it makes."""
        return run_id(self.batch_id, self.index)

    @property
    def scheduled_us(self) -> int | None:
        """The time of the tick that a schedule enqueued this run for, microseconds UTC; None for any other run."""
        told = self.headers.get(SCHEDULED_US, "")
        return int(told) if told.isascii() and told.isdigit() and len(told) <= _DIGITS_MAX else None

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants the outcome any more (cancelled, or past its deadline); long loops look at it."""
        return self._cancelled.is_set()

    @property
    def log(self) -> Any:
        """A structured logger with batch, index and attempt bound."""
        if self._log is None:
            self._log = LOG.bind(batch=self.batch_id, index=self.index, attempt=self.attempt, task=self.task)
        return self._log

    def cancel(self) -> None:
        """Tell the run that nobody waits for it; called by the worker, from any thread."""
        self._cancelled.set()


DETACHED: Final = Context(batch_id=f"batch_{'0' * 26}", index=0, attempt=1, task="", queue="")
"""The context of a call that is not a run."""
