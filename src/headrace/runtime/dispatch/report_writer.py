"""What workers report of activations, on its way into the store: by lease where that is here, by id where it is not.

Rule R6: a report carries an id only. One whose run was handed out here is settled under that lease; any other is looked
for by its id among the leases of all servers, and settled under the token that stands there, when the id names the very
delivery that is under way. What names none is a repeat, or came too late, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Final, NamedTuple

import structlog

from headrace.core.activation import LANE, Delivery, delivery_of, note_of
from headrace.core.pack import pack
from headrace.core.span import LOST, RETRY, RETURNING, Settlement, encode_uint16s
from headrace.foundation.errors import HeadraceError
from headrace.runtime.dispatch.lease_buffer import BufferedLease, DeliveredRun
from headrace.runtime.dispatch.report_outcome import (
    COMPLETE,
    ActivationReport,
    ReportOutcome,
    ReportWaiter,
    unsuccessful_outcome,
)
from headrace.runtime.engine import Engine
from headrace.store.protocol import Lease

LOG: Any = structlog.get_logger("headrace.reports")
_SPAN_SLOT: Final = attrgetter("span_slot")
STRAY_PART_NO: Final = 1 << 30
"""Where the numbers of settlements by id begin: a lease's holder numbers its own from 0."""


class ForeignReport(NamedTuple):
    """A report of what is not in anybody's hands here."""

    report: ActivationReport
    answer: ReportWaiter | None


class FoundLease(NamedTuple):
    """What a stray makes of a run, under the lease that it was found in."""

    span_id: int
    token: int
    span_slot: int
    verdict: ReportOutcome


ReportUpdate = DeliveredRun | ForeignReport
"""A run in somebody's hands here whose end was reported, or a report of another one."""


class ReportWriter:
    """The flush of a `Flusher[Update]`: one transaction for what it is given, safe to repeat."""

    def __init__(
        self, engine: Engine, *, landed: Callable[[BufferedLease, int], None], is_stray: Callable[[int, int, int], None]
    ) -> None:
        """`landed`: so many outcomes under a lease are durable. `is_stray`: a run was settled by id under
        `(span id, token, place)`.
        """
        self._engine = engine
        self._landed = landed
        self._is_stray = is_stray
        self.late_count = 0
        self.stray_count = 0

    async def flush(self, updates: Sequence[ReportUpdate]) -> None:
        """Write all of it, and answer those who wait."""
        by_lease: dict[BufferedLease, list[DeliveredRun]] = {}
        strays = []
        for update in updates:
            if isinstance(update, ForeignReport):
                strays.append(update)
            else:
                by_lease.setdefault(update.held, []).append(update)
        found = await self._found(strays) if strays else []
        settlements = [_settlement(held.work.lease, runs[0].part_no, runs) for held, runs in by_lease.items()]
        settlements += [_settlement(one, STRAY_PART_NO + one.span_slot, [one]) for one in found]
        if settlements:
            store, now_us = self._engine.store, self._engine.clock.now_us()
            words = await store.settle(settlements, now_us=now_us)
            self._count(settlements, words)
            self._engine.recorded.notify()
            if any(settlement.notes for settlement in settlements):
                self._engine.wakeup.notify()
        for held, runs in by_lease.items():
            self._landed(held, len(runs))
        for one in found:
            self._is_stray(one.span_id, one.token, one.span_slot)
        for update in updates:
            if update.answer is not None:
                update.answer.ended()

    def _count(self, settlements: Sequence[Settlement], words: Sequence[str]) -> None:
        for settlement, word in zip(settlements, words, strict=True):
            if word == LOST:
                self.late_count += len(settlement.codes)
                LOG.info("reports came too late: the lease was lost", runs=len(settlement.codes))

    async def _found(self, strays: Sequence[ForeignReport]) -> list[FoundLease]:
        """The strays whose delivery is under way somewhere, under the lease that stands there."""
        engine = self._engine
        by_delivery: dict[Delivery, ForeignReport] = {}
        for stray in strays:
            by_delivery.setdefault(delivery_of(stray.report.name), stray)
        keys = [delivery.id for delivery in by_delivery]
        found = []
        for lease in await engine.maintenance.named_leases(engine.environment, LANE, keys):
            note = note_of(lease.note)
            of_it = by_delivery.get(Delivery(lease.key, lease.attempt, note.overdue_count))
            if of_it is None:
                continue
            verdict = COMPLETE
            if of_it.report.state != "completed":
                verdict = unsuccessful_outcome(
                    of_it.report,
                    attempt=lease.attempt,
                    at_most_once=lease.at_most_once,
                    note=note,
                    delay_ms=lease.extra.retry_delay_ms,
                    clock=engine.clock,
                )
            found.append(FoundLease(lease.span_id, lease.token, lease.span_slot, verdict))
        self.stray_count += len(found)
        self.late_count += len(strays) - len(found)
        return found

    @staticmethod
    def refused(update: ReportUpdate, error: HeadraceError) -> None:
        """The store refuses an update for good."""
        LOG.error("the store refuses a report for good", error=str(error))
        if update.answer is not None:
            update.answer.ended(error)


def _settlement(lease: Lease | FoundLease, part_no: int, runs: Sequence[DeliveredRun | FoundLease]) -> Settlement:
    """Of runs of one lease, in the order they have there."""
    told = sorted(runs, key=_SPAN_SLOT)
    verdicts = [one.verdict for one in told]
    returning = [verdict for verdict in verdicts if verdict.code in RETURNING]
    return Settlement(
        span_id=lease.span_id,
        token=lease.token,
        part_no=part_no,
        span_slots=encode_uint16s(map(_SPAN_SLOT, told)),
        codes=bytes([verdict.code for verdict in verdicts]),
        results=pack([verdict.result for verdict in verdicts]),
        dues_us=tuple(verdict.due_us for verdict in returning if verdict.code == RETRY),
        notes=tuple(verdict.note for verdict in returning),
        is_shared=True,
    )
