"""Writes the reports of workers into the store: by lease if this server delivered the run, by id otherwise.

R6 (a report by id is fenced by its delivery): a report carries only an id. A run that was delivered here is settled
under its lease. Any other is looked up by its id among the leases of all servers, and settled under the current token.

An id with a suffix names a delivery, and counts for its lease only. The activation's own id counts for the lease that
the run has now: a completion always, since the work is done, also if the run waits again; a failure or a request for a
retry only if the run missed no deadline and this server has not leased it again, as it is late otherwise. A report that
counts for no lease is a repetition or late, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Final, NamedTuple

from headrace.core.activation import LANE, delivery_of, is_fenced, note_of
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
from headrace.store.protocol import Lease, NamedLease

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
        is_fenced_here: bool,
        is_held_here: Callable[[int, int], bool],
        on_written: Callable[[BufferedLease, int], None],
        on_foreign_settled: Callable[[int, int, int], None],
    ) -> None:
        """`on_written` gets the number of outcomes of a lease that are durable. `on_foreign_settled` is called for a
        run that was settled by id, with `(span id, token, span slot)`. `is_held_here` is true for a lease, by span id
        and token, of this server. `is_fenced_here`: this server's ids name the delivery.
        """
        self._engine = engine
        self._is_fenced = is_fenced_here
        self._is_held_here = is_held_here
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
        foreign_leases, absent = await self._find_leases(foreign_reports) if foreign_reports else ([], [])
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
        if absent:
            await self._complete_waiting(absent)
        for buffered, runs in by_lease.items():
            self._on_written(buffered, len(runs))
        for foreign_lease in foreign_leases:
            self._on_foreign_settled(foreign_lease.span_id, foreign_lease.token, foreign_lease.span_slot)
        for update in updates:
            if update.waiter is not None:
                update.waiter.ended()

    async def _complete_waiting(self, names: Sequence[str]) -> None:
        """Complete runs whose worker reported completion late, and that wait for their next delivery now."""
        engine = self._engine
        completed_count = await engine.maintenance.complete_waiting(
            engine.environment, LANE, names, COMPLETE.result, now_us=engine.clock.now_us()
        )
        if completed_count:
            self.late_count -= completed_count
            engine.recorded.notify()

    def late(self, waiter: ReportWaiter | None) -> None:
        """Count a report of an earlier delivery, and answer it."""
        self.late_count += 1
        LOG.info("report.late", runs=1)
        if waiter is not None:
            waiter.ended()

    def _count(self, settlements: Sequence[Settlement], results: Sequence[str]) -> None:
        for settlement, result in zip(settlements, results, strict=True):
            if result == LOST:
                self.late_count += len(settlement.codes)
                LOG.info("report.late", runs=len(settlement.codes))

    async def _find_leases(self, foreign_reports: Sequence[ForeignReport]) -> tuple[list[ForeignLease], list[str]]:
        """Return the foreign reports that count for a lease of some server, with that lease; and the ids whose
        completion counts for none.
        """
        engine = self._engine
        by_id: dict[str, list[ForeignReport]] = {}
        for sent in foreign_reports:
            by_id.setdefault(delivery_of(sent.report.name).id, []).append(sent)
        foreign_leases = []
        for lease in await engine.maintenance.named_leases(engine.environment, LANE, list(by_id)):
            foreign = next((sent for sent in by_id[lease.key] if self._counts_for(sent.report, lease)), None)
            if foreign is None:
                continue
            del by_id[lease.key]
            outcome = COMPLETE
            if foreign.report.state != "completed":
                outcome = unsuccessful_outcome(
                    foreign.report,
                    attempt=lease.attempt,
                    at_most_once=lease.at_most_once,
                    note=note_of(lease.note),
                    delay_ms=lease.extra.retry_delay_ms,
                    clock=engine.clock,
                )
            foreign_leases.append(ForeignLease(lease.span_id, lease.token, lease.span_slot, outcome))
        self.foreign_count += len(foreign_leases)
        self.late_count += len(foreign_reports) - len(foreign_leases)
        absent = [
            name
            for name, reports in by_id.items()
            if any(sent.report.state == "completed" and not self._is_fenced_report(sent.report) for sent in reports)
        ]
        return foreign_leases, absent

    def _is_fenced_report(self, report: ActivationReport) -> bool:
        """True if the id of a report names its delivery. This server's own setting decides about the first one."""
        return self._is_fenced or is_fenced(report.name)

    def _counts_for(self, report: ActivationReport, lease: NamedLease) -> bool:
        """True if a report of a run that was not delivered here may be of its current lease."""
        is_undelivered_here = self._is_held_here(lease.span_id, lease.token)
        if self._is_fenced_report(report):
            return delivery_of(report.name).token == lease.token and not is_undelivered_here
        if report.state == "completed":
            return True
        return not is_undelivered_here and not note_of(lease.note).overdue_count

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
