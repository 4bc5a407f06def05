"""Records how a run ended: its result, encoded and offloaded if large, or its failure and the time of a retry."""

from __future__ import annotations

import random
from collections.abc import Awaitable
from functools import partial
from typing import Any, Protocol

import msgspec

from headrace.core import pack, run
from headrace.core.failure import Failure
from headrace.core.retry import retry_at_us
from headrace.core.span import RETRY
from headrace.foundation.errors import HeadraceError
from headrace.foundation.limits import Limits
from headrace.runtime.clock import Clock
from headrace.runtime.retrying import retry_transient
from headrace.runtime.sessions.active_lease import ActiveLease
from headrace.runtime.tasks.bounds import ENCODABLE
from headrace.runtime.tasks.exception_info import describe, error_line
from headrace.runtime.tasks.task_spec import TaskSpec
from headrace.runtime.tasks.value_checks import ResultCodec, ValueRefused
from headrace.runtime.worker.failure_log import FailureLog
from headrace.runtime.worker.unwritten_results import LARGE_BYTES, UnwrittenResults


class PayloadAccess(Protocol):
    """Access to payloads and results over the inline limit."""

    async def fetch(self, reference: bytes) -> tuple[bytes, int]:
        """Return the payload that a reference names, and its kind."""

    async def put_result(self, batch_id: str, result: bytes) -> tuple[bytes, str]:
        """Store a result; return its reference and the object's key."""


class OutcomeRecorder:
    """Writes the outcomes of runs into their leases, for one executor."""

    def __init__(
        self, *, clock: Clock, offload: PayloadAccess, limits: Limits, unwritten: UnwrittenResults | None
    ) -> None:
        """`unwritten`: counts large results that are not written yet; None for no bound."""
        self.encode = msgspec.json.Encoder().encode
        self._clock = clock
        self._offload = offload
        self._unwritten = unwritten
        self._inline_bytes_max = limits.inline_bytes_max
        self._error_chars_max = limits.error_chars_max
        self.failure_log = FailureLog(clock)
        self._random = random.Random().random  # noqa: S311 - jitter, not secrets

    def complete(
        self, active: ActiveLease, lease_offset: int, value: Any, results: ResultCodec
    ) -> Awaitable[None] | None:
        """Complete a run with the value that its task returned. Returns an awaitable if a large result is still to be
        stored, or waits until others are written. A value that does not fit the task's annotation fails the run.
        """
        try:
            result = self.encode(value)
        except Exception as error:  # noqa: BLE001 - a result's own code may raise anything
            self.fail_for_good(
                active,
                lease_offset,
                "InvalidResult",
                f"the result can't be encoded as JSON: {error_line(error)}; hint: return {ENCODABLE}",
            )
            return None
        if type(value) not in results.plain_types:
            try:
                results.check(value, result)
            except ValueRefused as error:
                if results.validate is None:  # no annotation that could be checked
                    message = (
                        f"the result of task {active.lease.task} can't be stored as JSON: {error}; "
                        "hint: return None or a text"
                    )
                else:
                    message = (
                        f"the result does not fit the return annotation of task {active.lease.task}: {error}; "
                        "hint: return what it says, or change it"
                    )
                self.fail_for_good(active, lease_offset, "InvalidResult", message)
                return None
        if len(result) >= self._inline_bytes_max:
            return self._store_result(active, lease_offset, result)
        active.end(lease_offset, run.COMPLETED, result)
        if self._unwritten is not None and len(result) >= LARGE_BYTES:
            return self._unwritten.hold(len(result))
        return None

    async def _store_result(self, active: ActiveLease, lease_offset: int, result: bytes) -> None:
        try:
            put = partial(self._offload.put_result, active.lease.batch_id, result)
            reference, key = await retry_transient(put, self._clock, what="the object store")
        except HeadraceError as error:
            hint = f"; hint: {error.hint}" if error.hint else ""
            self.fail_for_good(active, lease_offset, error.code, error.message + hint)
            return
        active.end(lease_offset, run.COMPLETED, reference, kind=pack.REFERENCE, object_key=key)

    def fail_for_good(self, active: ActiveLease, lease_offset: int, kind: str, message: str) -> None:
        """Fail without a retry: another attempt would end the same way."""
        message = message[: self._error_chars_max]
        failure = Failure(type=kind, message=message, attempts=active.lease.attempt, crashes=active.lease.crashes_count)
        active.end(lease_offset, run.FAILED, failure.encode())
        self.failure_log.write(active, lease_offset, failure)

    def fail(self, active: ActiveLease, lease_offset: int, spec: TaskSpec, error: BaseException) -> None:
        """Record a failed attempt; the task's policy decides whether there is another."""
        lease = active.lease
        kind, message, trace = describe(error, chars_max=self._error_chars_max)
        failure = Failure(type=kind, message=message, attempts=lease.attempt, crashes=lease.crashes_count, trace=trace)
        due_us = retry_at_us(
            spec.retry, attempt=lease.attempt, error=error, now_us=self._clock.now_us(), random=self._random
        )
        if due_us is None or lease.at_most_once:
            active.end(lease_offset, run.FAILED, failure.encode())
            self.failure_log.write(active, lease_offset, failure, error=error)
        else:
            active.end(lease_offset, RETRY, failure.encode(), due_us=due_us)
            self.failure_log.write(active, lease_offset, failure, error=error, due_us=due_us)
