"""The dispatcher: it leases activations from the store by the span and delivers them one by one to remote workers.

One claim leases hundreds of runs to this server's session, and each `fetch` takes one of them from memory. Several
servers share a database without knowing each other. Leases that no worker requests are released, so that other servers
get them. A run that its worker does not report by its deadline waits again, without using an attempt. An at-most-once
run fails instead, and is recorded as started before delivery (R5, at-most-once runs are recorded first).

When this server ends, its leases stand until its session lapses (`delivery_recovery_ms`). Until then, reports of its
workers to another server, or to this one after a restart, are settled by id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

from headrace.core.activation import LANE, Note, delivery_of
from headrace.core.failure import Failure
from headrace.core.pack import REFERENCE
from headrace.core.rules import Rules
from headrace.core.run import CANCELLED, EXPIRED, FAILED
from headrace.core.serving import Serving
from headrace.core.span import OVERDUE
from headrace.foundation.errors import EngineFault, HeadraceError, ObjectMissing, StoreUnavailable
from headrace.foundation.logs import get_logger
from headrace.runtime.dispatch.lease_buffer import (
    BufferedLease,
    DeliveredRun,
    DeliveryDeadlines,
    Holder,
    LeaseBuffer,
    QueueFilter,
)
from headrace.runtime.dispatch.prefetcher import Prefetcher
from headrace.runtime.dispatch.report_outcome import (
    COMPLETE,
    ActivationReport,
    ReportOutcome,
    ReportWaiter,
    unsuccessful_outcome,
)
from headrace.runtime.dispatch.report_writer import ForeignReport, ReportUpdate, ReportWriter
from headrace.runtime.dispatch.rule_cache import RuleCache
from headrace.runtime.engine import Engine
from headrace.runtime.flusher import Flusher, FlusherClosed, UpdatesUnflushed
from headrace.runtime.sessions.recovery import DISPATCHER
from headrace.runtime.sessions.session import StoreSession
from headrace.store.protocol import Heartbeat, Release

LOG: Any = get_logger("headrace.dispatcher")
IDLE_S: Final = 1.0
"""A run that stays in the lease buffer for longer is released: another server may get a request for it."""
TICK_S: Final = 0.25
OVERDUE_MAX: Final = 1_000
ANSWERED_MAX: Final = 128
"""Reports in one flush while their senders wait: with thousands at once, some senders continue during others'
commit.
"""


class Dispatcher:
    """Delivers activations and takes reports. Owned by one event loop: `start`, fetch and report, `stop`; each may be
    called twice.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        flush_interval_ms: int | None = None,
        is_fenced: bool = False,
        is_killed: Callable[[Rules, str, bytes], bool] = lambda _rules, _name, _payload: False,
    ) -> None:
        """`flush_interval_ms`: how long a report may wait for others; None for natural batching.

        `is_fenced`: the ids that workers see name the delivery; otherwise they are the activation's own.

        `is_killed` decides by rules, task and payload which activations are dropped instead of delivered.
        """
        self.engine = engine
        self._rules = RuleCache(engine)
        self._is_killed = is_killed
        self.overdue_count = 0
        self._session = StoreSession(
            engine, kind=DISPATCHER, serves=Serving(environment=engine.environment, tasks=(LANE,))
        )
        self._session.on_ended = self._session_ended
        self._session.on_unwanted = self._on_cancelled
        self._report_writer = ReportWriter(
            engine,
            is_fenced_here=is_fenced,
            is_held_here=self._is_held_here,
            on_written=self._on_written,
            on_foreign_settled=self._on_foreign_settled,
        )
        self._flush_interval_ms = flush_interval_ms
        self._flusher: Flusher[ReportUpdate] | None = None
        self._is_fenced = is_fenced
        self._buffer = LeaseBuffer(is_fenced=is_fenced)
        self._prefetcher = Prefetcher(engine, self._session, self._buffer, on_ended=self._session_ended)
        self._delivered: dict[str, DeliveredRun] = {}
        self._deadlines = DeliveryDeadlines()
        self._tick_task: asyncio.Task[None] | None = None
        self._cancelled_batches: frozenset[str] = frozenset()
        self._is_stopping = False

    # -- start and stop

    async def start(self) -> None:
        """Start the session and the upkeep of deadlines."""
        if self._tick_task is not None:
            return
        await self._session.start()
        await self._rules.refresh()
        size = self.engine.limits.flush_size
        self._flusher = Flusher(
            self._report_writer.flush,
            name="reports",
            clock=self.engine.clock,
            on_refused=self._refused,
            size=size if self._flush_interval_ms is not None else min(size, ANSWERED_MAX),
            interval_ms=self._flush_interval_ms,
            buffer_max=max(4 * size, 4_096),
            outage=self.engine.outage,
        )
        self._tick_task = asyncio.create_task(self._tick(), name="headrace-dispatcher")

    async def stop(self) -> None:
        """Deliver no more, write the reports, release the undelivered runs, and end the session.

        Delivered runs stay leased until the session lapses: their workers report to another server. Raises
        `UpdatesUnflushed` if the store accepted no reports within the grace period.
        """
        tick_task, self._tick_task = self._tick_task, None
        if tick_task is None:
            return
        self._is_stopping = True
        grace_s = self.engine.limits.shutdown_grace_s
        tick_task.cancel()
        await asyncio.gather(tick_task, return_exceptions=True)
        unflushed: UpdatesUnflushed | None = None
        try:
            if self._flusher is not None:
                await self._flusher.close(deadline_s=grace_s)
        except UpdatesUnflushed as error:
            unflushed = error
        await self._prefetcher.close()
        await self._release(lambda _held: True)
        if self._delivered or unflushed is not None:
            await self._session.leave(deadline_s=grace_s)
        else:
            await self._session.stop(deadline_s=grace_s)
        if unflushed is not None:
            raise unflushed

    @property
    def delivered_count(self) -> int:
        """Number of activations that workers have."""
        return len(self._delivered)

    @property
    def buffered_count(self) -> int:
        """Number of activations in the lease buffer."""
        return len(self._buffer)

    @property
    def reports_depth(self) -> int:
        """Number of reports accepted and not yet written."""
        return 0 if self._flusher is None else self._flusher.depth

    @property
    def flushes_count(self) -> int:
        """Number of transactions in which reports were written."""
        return 0 if self._flusher is None else self._flusher.flushes_count

    @property
    def late_count(self) -> int:
        """Number of reports that were late, repeated, or about unknown activations."""
        return self._report_writer.late_count

    # -- delivering

    async def fetch(self, queue_filter: QueueFilter, holder: Holder | None = None) -> DeliveredRun | None:
        """Deliver one activation that the filter selects to a worker on `holder`; None if none waits.

        Raises `StoreUnavailable` if the store does not respond.
        """
        delivered = self.fetch_nowait(queue_filter, holder)
        if delivered is None and (delivered := await self._next(queue_filter)) is not None:
            delivered.holder = holder
            self._set_deadline(delivered, self.engine.clock.now_us())
        return delivered

    def fetch_nowait(self, queue_filter: QueueFilter, holder: Holder | None = None) -> DeliveredRun | None:
        """Deliver an activation that is in memory; None if there is none, or its payload must be fetched first."""
        delivered = (
            self._next_nowait(queue_filter) if queue_filter.is_answerable and self._tick_task is not None else None
        )
        if delivered is None:
            return None
        if delivered.kind == REFERENCE:
            self._put_back(delivered)
            return None
        delivered.holder = holder
        self._set_deadline(delivered, delivered.buffered.since_us)  # the time at which it was taken, just now
        return delivered

    async def take(self, queue_filter: QueueFilter, count_max: int, *, lease_ms: int) -> list[DeliveredRun]:
        """Claim at most `count_max` activations for pushing: within `lease_ms` each must be marked or put back."""
        claimed: list[DeliveredRun] = []
        while len(claimed) < count_max:
            try:
                delivered = await (self._next_buffered(queue_filter) if claimed else self._next(queue_filter))
            except HeadraceError:
                if not claimed:
                    raise
                break  # deliver what was claimed; the next request gets the error
            if delivered is None:
                break
            delivered.is_claimed = True
            self._deadlines.add(delivered, self.engine.clock.now_us() + lease_ms * 1_000)
            claimed.append(delivered)
        return claimed

    def mark(self, keys: Sequence[str]) -> int:
        """Mark deliveries as received by their workers, and start their deadlines; return how many were claimed."""
        claimed, now_us = self._claimed(keys), self.engine.clock.now_us()
        for delivered in claimed:
            delivered.is_claimed = False
            delivered.payload = b""  # the worker has it
            self._set_deadline(delivered, now_us)
        return len(claimed)

    def put_back(self, keys: Sequence[str]) -> int:
        """Put back deliveries that did not reach a worker, first in the buffer; return how many were claimed."""
        claimed = self._claimed(keys)
        for delivered in claimed:
            self._return_sent(delivered)
        return len(claimed)

    def _claimed(self, keys: Sequence[str]) -> list[DeliveredRun]:
        """Return the deliveries with these keys that are being sent. A later delivery of the run has another key."""
        candidates = (
            (key, self._delivered.get(key if self._is_fenced else delivery_of(key).id)) for key in dict.fromkeys(keys)
        )
        return [
            delivered
            for key, delivered in candidates
            if delivered is not None and delivered.is_claimed and delivered.key == key
        ]

    def _return_sent(self, delivered: DeliveredRun) -> None:
        """Put back a run that was sent to a worker; the worker may have received it, so its next delivery has another
        key.
        """
        self._put_back(delivered)
        delivered.returns_count += 1

    def _put_back(self, delivered: DeliveredRun) -> None:
        delivered.is_claimed = False
        self._deadlines.remove(delivered)
        del self._delivered[delivered.name]
        self._buffer.put_back(delivered, self.engine.clock.now_us())

    def _set_deadline(self, delivered: DeliveredRun, now_us: int) -> None:
        wait_ms = delivered.extra.timeout_ms + self.engine.limits.delivery_grace_ms
        self._deadlines.add(delivered, now_us + wait_ms * 1_000)

    async def _next(self, queue_filter: QueueFilter) -> DeliveredRun | None:
        """Return the next activation that the filter selects, leasing more if the buffer has none."""
        if not queue_filter.is_answerable or self._tick_task is None:
            return None
        while (delivered := await self._next_buffered(queue_filter)) is None:
            if self._is_full or not await self._prefetcher.refill(queue_filter):
                return None
        return delivered

    async def _next_buffered(self, queue_filter: QueueFilter) -> DeliveredRun | None:
        """Return the next buffered activation, with its payload fetched."""
        while (delivered := self._next_nowait(queue_filter)) is not None:
            if delivered.kind != REFERENCE or await self._fetch_payload(delivered):
                return delivered
        return None

    def _next_nowait(self, queue_filter: QueueFilter) -> DeliveredRun | None:
        """Return the next buffered activation that may run, without a deadline yet; those that may not run end here."""
        while not self._is_full:
            now_us = self.engine.clock.now_us()
            delivered = self._buffer.take(queue_filter, now_us)
            if delivered is None:
                return None
            buffered = delivered.buffered
            if buffered.rate.left_count == buffered.rate.half_count:
                self._prefetcher.on_half_used(buffered.rate)
            if (
                delivered.lease_offset in buffered.active.cancelled_offsets
            ):  # it was settled by its id, through another server
                delivered.is_ended = True
                buffered.open_count -= 1
                self._end_if_over(buffered)
                continue
            self._delivered[delivered.name] = delivered
            if (
                not delivered.extra.idempotency_key
            ):  # another producer may have put any run into the lane of activations
                self.refuse(delivered, "the run has no activation id")
            elif 0 < buffered.active.lease.expires_us <= now_us:
                self._end(delivered, ReportOutcome(EXPIRED, b"", 0, ""))
            elif not self._rules.rules.kills or not self._drop_if_killed(delivered):
                return delivered
        return None

    @property
    def _is_full(self) -> bool:
        """True while no more runs may be delivered."""
        return self._is_stopping or len(self._delivered) >= self.engine.limits.deliveries_max

    def _drop_if_killed(self, delivered: DeliveredRun) -> bool:
        """End an activation that a killswitch rule drops; True if it was dropped."""
        if not self._is_killed(self._rules.rules, delivered.extra.name, delivered.payload):
            return False
        self._end(delivered, ReportOutcome(CANCELLED, b"", 0, ""))
        return True

    def refuse(self, delivered: DeliveredRun, why: str) -> None:
        """Fail an activation that no worker can decode."""
        error = Failure(type="Unreadable", message=why, attempts=delivered.attempt)
        self._end(delivered, ReportOutcome(FAILED, error.encode(), 0, ""))

    async def _fetch_payload(self, delivered: DeliveredRun) -> bool:
        """Fetch the object of a large activation; False if it ended instead, missing or dropped by a rule."""
        try:
            delivered.payload, delivered.kind = await self.engine.fetch(delivered.payload)
        except ObjectMissing as error:
            self.refuse(delivered, error.message)
            return False
        except BaseException:
            self._put_back(delivered)
            raise
        return not self._drop_if_killed(delivered)

    # -- the session

    def _session_ended(self) -> None:
        """Forget the leases of a session that another process ended; reports of its runs are settled by id."""
        self._prefetcher.session_ended()
        for delivered in self._delivered.values():
            delivered.is_ended = True
        self._delivered.clear()
        self._buffer.clear()
        self._deadlines.clear()

    # -- reports

    async def report(
        self, reports: Sequence[ActivationReport], *, is_awaited: bool = True, reporter: Holder | None = None
    ) -> None:
        """Record how attempts ended; return after the commit, or, with `is_awaited=False`, once the reports are
        accepted.

        `reporter`: the connection of the worker. A repeated or late report, and one about an unknown activation,
        change nothing; but a late report of completion completes a run that waits again or was delivered again. Raises
        the error if the store refuses a report.
        """
        written = self.report_nowait(reports, is_awaited=is_awaited, reporter=reporter)
        if written is not None:
            await written

    def report_nowait(
        self, reports: Sequence[ActivationReport], *, is_awaited: bool = True, reporter: Holder | None = None
    ) -> asyncio.Future[None] | None:
        """Like `report`, without a task of the caller's: return the future to wait for, or None."""
        if self._flusher is None:
            raise StoreUnavailable(
                "this server accepts no reports: it is not running", hint="report to another server, or retry later"
            )
        waiter = ReportWaiter(len(reports)) if is_awaited and reports else None
        for number, report in enumerate(reports):
            update = self._accept_report(report, waiter, reporter)
            if update is None:
                continue
            try:
                is_accepted = self._flusher.put_nowait(update)
            except FlusherClosed:
                self._undo_report(update)
                raise
            if not is_accepted:
                return asyncio.create_task(self._accept_rest(update, reports[number + 1 :], waiter, reporter))
        return None if waiter is None else waiter.future

    async def _accept_rest(
        self,
        first: ReportUpdate,
        reports: Sequence[ActivationReport],
        waiter: ReportWaiter | None,
        reporter: Holder | None,
    ) -> None:
        """Accept the reports that the full flusher could not take, one after the other."""
        assert self._flusher is not None
        update: ReportUpdate | None = first
        try:
            await self._flusher.put(first)
            for report in reports:
                update = self._accept_report(report, waiter, reporter)
                if update is not None:
                    await self._flusher.put(update)
        except BaseException:
            self._undo_report(update)
            raise
        if waiter is not None:
            await waiter.future

    def _undo_report(self, update: ReportUpdate | None) -> None:
        """Undo a report that was not accepted, so that it can be repeated."""
        if isinstance(update, DeliveredRun):
            self._restore(update)

    def _accept_report(
        self, report: ActivationReport, waiter: ReportWaiter | None, reporter: Holder | None
    ) -> ReportUpdate | None:
        """Take a run from its worker and return the update that its report makes; None for a late report, which makes
        none.
        """
        delivered = self._delivered.get(report.name)
        if delivered is None:
            return ForeignReport(report, waiter)
        outcome = COMPLETE
        if report.state != "completed":
            if not delivered.is_held_by(reporter):
                self._report_writer.late(waiter)
                return None
            lease = delivered.buffered.active.lease
            outcome = unsuccessful_outcome(
                report,
                attempt=lease.attempt,
                at_most_once=lease.at_most_once,
                note=delivered.buffered.note,
                delay_ms=delivered.extra.retry_delay_ms,
                clock=self.engine.clock,
            )
        del self._delivered[report.name]
        delivered.end(outcome, waiter)
        self._deadlines.remove(delivered)
        return delivered

    def _end(self, delivered: DeliveredRun, outcome: ReportOutcome) -> None:
        """End a run without a report; if the flusher is full, at the next tick."""
        assert self._flusher is not None
        delivered.end(outcome, None)
        self._deadlines.remove(delivered)
        if self._flusher.put_nowait(delivered):
            self._delivered.pop(delivered.name, None)
        else:
            delivered.is_ended = False
            self._deadlines.add(delivered, self.engine.clock.now_us() + int(TICK_S * 1_000_000))

    def _on_written(self, buffered: BufferedLease, runs_count: int) -> None:
        buffered.open_count -= runs_count
        self._end_if_over(buffered)

    def _refused(self, update: ReportUpdate, error: HeadraceError) -> None:
        """Handle a report that the store refuses: the run counts as not reported."""
        self._report_writer.refused(update, error)
        self._undo_report(update)

    def _restore(self, delivered: DeliveredRun) -> None:
        """Return a run to its worker until its deadline, because its end was not accepted."""
        if (
            self._session.lease(delivered.buffered.active.lease.span_id, delivered.buffered.active.lease.token)
            is delivered.buffered.active
        ):
            delivered.is_ended = False
            self._delivered[delivered.name] = delivered
            self._deadlines.add(delivered, delivered.deadline_us)

    def _end_if_over(self, buffered: BufferedLease) -> None:
        if buffered.is_over and not buffered.is_left:
            buffered.is_left = True
            self._session.forget(buffered.active)

    def _is_held_here(self, span_id: int, token: int) -> bool:
        """True if this server has a lease: then its workers have none of its runs that are not delivered."""
        return self._session.lease(span_id, token) is not None

    def _on_foreign_settled(self, span_id: int, token: int, span_slot: int) -> None:
        """Note a run that was settled by its id under a lease that may be in this server's buffer."""
        active = self._session.lease(span_id, token)
        if active is not None and span_slot in active.span_slots:
            active.cancelled_offsets.add(list(active.span_slots).index(span_slot))

    # -- deadlines and idle leases

    async def _tick(self) -> None:
        """Check deadlines when they are due, and idle leases regularly, until cancelled."""
        clock = self.engine.clock
        while True:
            now_us = clock.now_us()
            next_us = self._deadlines.next_us
            wait_s = TICK_S if next_us is None else min(TICK_S, max(0.01, (next_us - now_us) / 1_000_000))
            await clock.sleep(wait_s)
            try:
                await self.tick()
            except EngineFault as error:
                LOG.warning("dispatcher.tick_failed", error=error.message)
            except Exception:
                LOG.exception("dispatcher.tick_crashed")

    async def tick(self) -> None:
        """Run one round: end overdue runs and release idle leases."""
        await self._rules.refresh()
        now_us = self.engine.clock.now_us()
        for delivered in self._deadlines.overdue(now_us, OVERDUE_MAX):
            if delivered.is_claimed:
                self._return_sent(delivered)
            elif not delivered.is_ended:
                self.overdue_count += 1
                self._end(delivered, self._overdue_outcome(delivered))
        idle_us = now_us - int(IDLE_S * 1_000_000)
        cancelled_batches, self._cancelled_batches = self._cancelled_batches, frozenset()
        await self._release(
            lambda buffered: buffered.since_us < idle_us or buffered.active.lease.batch_id in cancelled_batches
        )

    def _overdue_outcome(self, delivered: DeliveredRun) -> ReportOutcome:
        """Return the outcome of a run that passed its deadline: it waits again, unless it may run only once or was
        overdue too often.
        """
        lease, note, attempt = delivered.buffered.active.lease, delivered.buffered.note, delivered.attempt
        overdue_count = note.overdue_count + 1
        if lease.at_most_once:
            message = "the worker of an at-most-once activation did not report in time"
            return ReportOutcome(
                FAILED, Failure(type="DeadlineExceeded", message=message, attempts=attempt).encode(), 0, ""
            )
        if overdue_count >= self.engine.limits.delivery_attempts_max:
            message = f"no worker reported in time, {overdue_count} times"
            error = Failure(type="DeliveryAttemptsExceeded", message=message, attempts=attempt)
            return ReportOutcome(FAILED, error.encode(), 0, "")
        after = Note(overdue_count=overdue_count, attempts_max=note.attempts_max, delay_s=note.delay_s)
        return ReportOutcome(OVERDUE, b"", 0, after.encode())

    def _on_cancelled(self, reply: Heartbeat) -> None:
        """Note batches that were cancelled in part or whole: their buffered runs are released at the next tick."""
        self._cancelled_batches = frozenset(reply.stopped) | {batch_id for batch_id, _ in reply.cancelled}

    async def _release(self, is_selected: Callable[[BufferedLease], bool]) -> None:
        """Release buffered runs that the caller selects by lease (R19, claims start small: idle runs are free for
        others).
        """
        for buffered, span_slots in self._buffer.remove_undelivered(is_selected):
            lease = buffered.active.lease
            if buffered.is_over and not buffered.active.count and not buffered.is_left:
                buffered.is_left = True
                await self._session.end_lease(buffered.active, [Release(span_id=lease.span_id, token=lease.token)])
            else:
                await self._session.put(Release(span_id=lease.span_id, token=lease.token, span_slots=span_slots))
                self._end_if_over(buffered)
