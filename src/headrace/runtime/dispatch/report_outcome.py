"""The outcome that a report gives to a run, and the reporter that waits until it is durable."""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

import msgspec

from headrace.core.activation import Note
from headrace.core.failure import Failure
from headrace.core.retry import SECOND_US
from headrace.core.run import COMPLETED, FAILED
from headrace.core.span import RETRY
from headrace.foundation.errors import HeadraceError
from headrace.runtime.clock import Clock

DELAY_S_MAX: Final = 365 * 86_400


class ActivationReport(msgspec.Struct, frozen=True):
    """The end of an attempt: `state` is completed, failed or retry. The other fields change the next attempt of a
    retry.
    """

    name: str
    state: str
    attempts_max: int | None = None
    delay_s: int | None = None


class ReportWaiter:
    """A reporter that waits until all of its reports are durable, or one of them is refused.

    One future serves all reports of a call.
    """

    __slots__ = ("_error", "_left_count", "future")

    def __init__(self, reports_count: int) -> None:
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._left_count = reports_count
        self._error: HeadraceError | None = None

    def ended(self, error: HeadraceError | None = None) -> None:
        """Count one report as durable, or as refused with `error`."""
        self._error = self._error or error
        self._left_count -= 1
        if self._left_count or self.future.done():
            return
        if self._error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(self._error)


class ReportOutcome(NamedTuple):
    """The outcome that a report gives to a run."""

    code: int
    result: bytes
    due_us: int
    note: str


COMPLETE: Final = ReportOutcome(COMPLETED, b"null", 0, "")
"""Outcome of an activation that is reported as completed: its worker reports no result."""


def unsuccessful_outcome(
    report: ActivationReport, *, attempt: int, at_most_once: bool, note: Note, delay_ms: int, clock: Clock
) -> ReportOutcome:
    """Return the outcome of a report other than completed.

    `delay_ms`: the activation's own delay between attempts, unless a report changed it.
    """
    if report.state == "failed" or at_most_once:
        message = "the worker reported a failure"
        if report.state != "failed":
            message = "the worker asked for a retry of an at-most-once activation"
        return ReportOutcome(FAILED, Failure(type="TaskFailed", message=message, attempts=attempt).encode(), 0, "")
    attempts_max = note.attempts_max if report.attempts_max is None else report.attempts_max
    delay_s = note.delay_s if report.delay_s is None else report.delay_s
    wait_us = delay_ms * 1_000 if delay_s is None else min(delay_s, DELAY_S_MAX) * SECOND_US
    error = Failure(type="TaskFailed", message="the worker asked for a retry", attempts=attempt)
    after = Note(attempts_max=attempts_max, delay_s=delay_s)
    return ReportOutcome(RETRY, error.encode(), clock.now_us() + wait_us if wait_us else 0, after.encode())
