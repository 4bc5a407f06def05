"""What workers report of activations, on its way into the store: by lease where that is here, by id where it is not.

Rule R6: a report carries an id only. One whose run was handed out here is settled under that lease; any other is looked
for by its id among the leases of all servers, and settled under the token that stands there, when the id names the very
delivery that is under way. What names none is a repeat, or came too late, and changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import structlog

from headrace.core.activation import LANE, Delivery, Note, delivery_of, note_of
from headrace.core.failure import Failure
from headrace.core.pack import pack
from headrace.core.retry import SECOND_US
from headrace.core.run import COMPLETED, FAILED
from headrace.core.span import LOST, RETRY, RETURNING, Settlement, encode_places
from headrace.foundation.errors import HeadraceError
from headrace.runtime.clock import Clock
from headrace.runtime.engine import Engine
from headrace.runtime.handouts import Handout

LOG: Any = structlog.get_logger("headrace.reports")
NOTHING: Final = b"null"
"""What an activation comes to: its worker reports no result."""

STRAY_PART_NO: Final = 1 << 30
"""Where the numbers of settlements by id begin: a lease's holder numbers its own from 0."""

DELAY_S_MAX: Final = 365 * 86_400


class Report(msgspec.Struct, frozen=True):
    """How an attempt ended: `state` is completed, failed or retry. The rest is what a retry may change for the next."""

    name: str
    state: str
    attempts_max: int | None = None
    delay_s: int | None = None


class Answer:
    """What somebody waits for: so many reports, all of them durable or one of them refused.

    One future for all that were reported together: a batch of reports is waited for once.
    """

    __slots__ = ("_error", "_left_count", "future")

    def __init__(self, reports_count: int) -> None:
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._left_count = reports_count
        self._error: HeadraceError | None = None

    def ended(self, error: HeadraceError | None = None) -> None:
        """One of them is durable, or the store refuses it for good."""
        self._error = self._error or error
        self._left_count -= 1
        if self._left_count or self.future.done():
            return
        if self._error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(self._error)


class Told(msgspec.Struct, gc=False):
    """One outcome under a lease, on its way."""

    span_id: int
    token: int
    part_no: int
    place: int
    code: int
    result: bytes
    due_us: int
    note: str
    handout: Handout | None
    answer: Answer | None


class Stray(NamedTuple):
    """A report of what is not in anybody's hands here."""

    report: Report
    answer: Answer | None


Update = Told | Stray


class Verdict(NamedTuple):
    """What a report makes of a run."""

    code: int
    result: bytes
    due_us: int
    note: str


def verdict_of(report: Report, *, attempt: int, at_most_once: bool, note: Note, delay_ms: int, clock: Clock) -> Verdict:
    """`delay_ms`: between attempts, as the activation itself says, unless a report said otherwise."""
    if report.state == "completed":
        return Verdict(COMPLETED, NOTHING, 0, "")
    if report.state == "failed" or at_most_once:
        message = "its worker reported that it failed"
        if report.state != "failed":
            message = "its worker asked for a retry, and it may run only once"
        return Verdict(FAILED, Failure(type="TaskFailed", message=message, attempts=attempt).encode(), 0, "")
    attempts_max = note.attempts_max if report.attempts_max is None else report.attempts_max
    delay_s = note.delay_s if report.delay_s is None else report.delay_s
    wait_us = delay_ms * 1_000 if delay_s is None else min(delay_s, DELAY_S_MAX) * SECOND_US
    error = Failure(type="TaskFailed", message="its worker asked for a retry", attempts=attempt)
    after = Note(attempts_max=attempts_max, delay_s=delay_s)
    return Verdict(RETRY, error.encode(), clock.now_us() + wait_us if wait_us else 0, after.encode())


class Reporting:
    """The flush of a `Flusher[Update]`: one transaction for what it is given, safe to repeat."""

    def __init__(self, engine: Engine, *, landed: Callable[[Told], None], is_stray: Callable[[int, int, int], None]):
        """`landed`: an outcome is durable. `is_stray`: a run was settled by id under `(span id, token, place)`."""
        self._engine = engine
        self._landed = landed
        self._is_stray = is_stray
        self.late_count = 0
        self.stray_count = 0

    async def flush(self, updates: Sequence[Update]) -> None:
        """Write all of it, and answer those who wait."""
        strays = [update for update in updates if isinstance(update, Stray)]
        told = [update for update in updates if isinstance(update, Told)]
        found = await self._found(strays) if strays else []
        settlements = _merged([*told, *found])
        if settlements:
            store, now_us = self._engine.store, self._engine.clock.now_us()
            words = await store.settle(settlements, now_us=now_us)
            self._count(settlements, words)
            self._engine.recorded.ring()
            if any(settlement.notes for settlement in settlements):
                self._engine.doorbell.ring()
        for one in told:
            self._landed(one)
            if one.answer is not None:
                one.answer.ended()
        for one in found:
            self._is_stray(one.span_id, one.token, one.place)
        for stray in strays:
            if stray.answer is not None:
                stray.answer.ended()

    def _count(self, settlements: Sequence[Settlement], words: Sequence[str]) -> None:
        for settlement, word in zip(settlements, words, strict=True):
            if word == LOST:
                self.late_count += len(settlement.codes)
                LOG.info("reports came too late: the lease was lost", runs=len(settlement.codes))

    async def _found(self, strays: Sequence[Stray]) -> list[Told]:
        """The strays whose delivery is under way somewhere, under the lease that stands there."""
        engine = self._engine
        by_delivery: dict[Delivery, Stray] = {}
        for stray in strays:
            by_delivery.setdefault(delivery_of(stray.report.name), stray)
        keys = [delivery.id for delivery in by_delivery]
        found = []
        for lease in await engine.store.named_leases(engine.environment, LANE, keys):
            note = note_of(lease.note)
            of_it = by_delivery.get(Delivery(lease.key, lease.attempt, note.overdue_count))
            if of_it is None:
                continue
            verdict = verdict_of(
                of_it.report,
                attempt=lease.attempt,
                at_most_once=lease.at_most_once,
                note=note,
                delay_ms=lease.extra.retry_delay_ms,
                clock=engine.clock,
            )
            part_no = STRAY_PART_NO + lease.place
            found.append(Told(lease.span_id, lease.token, part_no, lease.place, *verdict, handout=None, answer=None))
        self.stray_count += len(found)
        self.late_count += len(strays) - len(found)
        return found

    @staticmethod
    def refused(update: Update, error: HeadraceError) -> None:
        """The store refuses an update for good."""
        LOG.error("the store refuses a report for good", error=str(error))
        if update.answer is not None:
            update.answer.ended(error)


def _merged(told: Sequence[Told]) -> list[Settlement]:
    """One settlement a lease, numbered as the first of its outcomes, in the order of the lease's runs."""
    by_lease: dict[tuple[int, int], dict[int, Told]] = {}
    for one in told:
        by_lease.setdefault((one.span_id, one.token), {}).setdefault(one.place, one)
    settlements = []
    for (span_id, token), own in by_lease.items():
        part_no = next(iter(own.values())).part_no
        places = sorted(own)
        runs = [own[place] for place in places]
        returning = [one for one in runs if one.code in RETURNING]
        settlements.append(
            Settlement(
                span_id=span_id,
                token=token,
                part_no=part_no,
                places=encode_places(places),
                codes=bytes(one.code for one in runs),
                results=pack([one.result for one in runs]),
                dues_us=tuple(one.due_us for one in returning if one.code == RETRY),
                notes=tuple(one.note for one in returning),
                is_shared=True,
            )
        )
    return settlements
