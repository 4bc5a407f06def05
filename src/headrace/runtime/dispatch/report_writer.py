"""Writes the reports of workers into the store: by lease if this server delivered the run, by id otherwise.

R6 (a report by id is fenced by its delivery): a report carries only an id. A run that was delivered here is settled
under its lease. Any other is looked up by its id among the leases of all servers, and settled under the current token
if the id names the delivery that is in flight. A report that names no such delivery is a repetition or late, and
changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Final, NamedTuple

from headrace.core.activation import LANE, Delivery, delivery_of, note_of
from headrace.core.pack import pack
from headrace.core.span import LOST, RETRY, RETURNING, Settlement, encode_uint16s
from headrace.foundation.errors import HeadraceError
from headrace.foundation.logs import get_logger
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

LOG: Any = get_logger("headrace.reports")
_SPAN_SLOT: Final = attrgetter("span_slot")
FOREIGN_PART_NO: Final = 1 << 30
"""First part number of settlements by id; the holder of a lease numbers its own parts from 0."""


class ForeignReport(NamedTuple):
    """A report of an activation that this server did not deliver."""

    report: ActivationReport
    waiter: ReportWaiter | None


class ForeignLease(NamedTuple):
    """The outcome of a foreign report, with its current lease."""

    span_id: int
    token: int
    span_slot: int
    outcome: ReportOutcome


ReportUpdate = DeliveredRun | ForeignReport
"""A run delivered here whose end was reported, or a foreign report."""


class ReportWriter:
    """The flush function of a `Flusher[ReportUpdate]`: one transaction per call, safe to repeat."""

    def __init__(
        self,
        engine: Engine,
        *,
        on_written: Callable[[BufferedLease, int], None],
        on_foreign_settled: Callable[[int, int, int], None],
    ) -> None:
        """`landed` gets the number of outcomes of a lease that are durable. `is_stray` is called for a run that was
        settled by id, with `(span id, token, span slot)`.
        """
        self._engine = engine
        self._on_written = on_written
        self._on_foreign_settled = on_foreign_settled
        self.late_count = 0
        self.foreign_count = 0

    async def flush(self, updates: Sequence[ReportUpdate]) -> None:
        """Write all updates, then wake their reporters."""
        by_lease: dict[BufferedLease, list[DeliveredRun]] = {}
        foreign_reports = []
        for update in updates:
            if isinstance(update, ForeignReport):
                foreign_reports.append(update)
            else:
                by_lease.setdefault(update.buffered, []).append(update)
        foreign_leases = await self._find_leases(foreign_reports) if foreign_reports else []
        settlements = [_settlement(buffered.active.lease, runs[0].part_no, runs) for buffered, runs in by_lease.items()]
        settlements += [
            _settlement(foreign_lease, FOREIGN_PART_NO + foreign_lease.span_slot, [foreign_lease])
            for foreign_lease in foreign_leases
        ]
        if settlements:
            store, now_us = self._engine.store, self._engine.clock.now_us()
            results = await store.settle(settlements, now_us=now_us)
            self._count(settlements, results)
            self._engine.recorded.notify()
            if any(settlement.notes for settlement in settlements):
                self._engine.wakeup.notify()
        for buffered, runs in by_lease.items():
            self._on_written(buffered, len(runs))
        for foreign_lease in foreign_leases:
            self._on_foreign_settled(foreign_lease.span_id, foreign_lease.token, foreign_lease.span_slot)
        for update in updates:
            if update.waiter is not None:
                update.waiter.ended()

    def _count(self, settlements: Sequence[Settlement], results: Sequence[str]) -> None:
        for settlement, result in zip(settlements, results, strict=True):
            if result == LOST:
                self.late_count += len(settlement.codes)
                LOG.info("report.late", runs=len(settlement.codes))

    async def _find_leases(self, foreign_reports: Sequence[ForeignReport]) -> list[ForeignLease]:
        """Return the foreign reports whose delivery is in flight on some server, with its current lease."""
        engine = self._engine
        by_delivery: dict[Delivery, ForeignReport] = {}
        for sent in foreign_reports:
            by_delivery.setdefault(delivery_of(sent.report.name), sent)
        keys = [delivery.id for delivery in by_delivery]
        foreign_leases = []
        for lease in await engine.maintenance.named_leases(engine.environment, LANE, keys):
            note = note_of(lease.note)
            foreign = by_delivery.get(Delivery(lease.key, lease.attempt, note.overdue_count))
            if foreign is None:
                continue
            outcome = COMPLETE
            if foreign.report.state != "completed":
                outcome = unsuccessful_outcome(
                    foreign.report,
                    attempt=lease.attempt,
                    at_most_once=lease.at_most_once,
                    note=note,
                    delay_ms=lease.extra.retry_delay_ms,
                    clock=engine.clock,
                )
            foreign_leases.append(ForeignLease(lease.span_id, lease.token, lease.span_slot, outcome))
        self.foreign_count += len(foreign_leases)
        self.late_count += len(foreign_reports) - len(foreign_leases)
        return foreign_leases

    @staticmethod
    def refused(update: ReportUpdate, error: HeadraceError) -> None:
        """Log a report that the store refuses, and pass the error to its reporter."""
        LOG.error("report.refused", error=str(error))
        if update.waiter is not None:
            update.waiter.ended(error)


def _settlement(lease: Lease | ForeignLease, part_no: int, runs: Sequence[DeliveredRun | ForeignLease]) -> Settlement:
    """Return the settlement of runs of one lease, in the order of their slots."""
    ordered_runs = sorted(runs, key=_SPAN_SLOT)
    outcomes = [run.outcome for run in ordered_runs]
    returning = [outcome for outcome in outcomes if outcome.code in RETURNING]
    return Settlement(
        span_id=lease.span_id,
        token=lease.token,
        part_no=part_no,
        span_slots=encode_uint16s(map(_SPAN_SLOT, ordered_runs)),
        codes=bytes([outcome.code for outcome in outcomes]),
        results=pack([outcome.result for outcome in outcomes]),
        dues_us=tuple(outcome.due_us for outcome in returning if outcome.code == RETRY),
        notes=tuple(outcome.note for outcome in returning),
        is_shared=True,
    )
