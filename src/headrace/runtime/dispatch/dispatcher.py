"""Activations between the store and workers that know ids only: leased by the span, handed out one by one.

One claim leases hundreds of runs to this server's session, and each `fetch` takes one of them from memory; several
servers share a database without seeing each other. What nobody asks for goes back, so that others get it. A run that
its worker does not report on by its deadline waits again, and its attempt is no further for it; one that may run only
once fails instead, and is recorded as started before it is handed out (rule R5).

When this server dies its leases stand until its session counts as silent (`delivery_recovery_ms`), and until then what
its workers report to another server, or to this one once it is back, is settled by id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog

from headrace.core.activation import Note
from headrace.core.failure import Failure
from headrace.core.pack import REFERENCE
from headrace.core.rules import Rules
from headrace.core.run import CANCELLED, EXPIRED, FAILED
from headrace.core.span import OVERDUE
from headrace.foundation.errors import EngineFault, HeadraceError, ObjectMissing, StoreUnavailable
from headrace.runtime.dispatch.lease_buffer import (
    BufferedLease,
    DeliveredRun,
    DeliveryDeadlines,
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

LOG: Any = structlog.get_logger("headrace.dispatcher")
IDLE_S: Final = 1.0
"""After this long in line a run goes back: somebody else may be asked for it."""
TICK_S: Final = 0.25
OVERDUE_MAX: Final = 1_000
ANSWERED_MAX: Final = 128
"""Reports in one flush while those who report wait for it: of thousands at once some go on under others' commit."""


class Dispatcher:
    """Owned by one event loop. `start`, then fetch and report, then `stop`; each may be called twice."""

    def __init__(
        self,
        engine: Engine,
        *,
        flush_interval_ms: int | None = None,
        is_killed: Callable[[Rules, str, bytes], bool] = lambda _rules, _name, _payload: False,
    ) -> None:
        """`flush_interval_ms`: how long a report may wait for others; None for natural batching.

        `is_killed` says which activations, by rules, task and payload, are dropped instead of handed out.
        """
        self.engine = engine
        self._rules = RuleCache(engine)
        self._is_killed = is_killed
        self.overdue_count = 0
        self._broker = StoreSession(engine, kind=DISPATCHER)
        self._broker.on_ended = self._session_ended
        self._broker.on_unwanted = self._unwanted_now
        self._reporting = ReportWriter(engine, landed=self._landed, is_stray=self._is_stray)
        self._flush_interval_ms = flush_interval_ms
        self._flusher: Flusher[ReportUpdate] | None = None
        self._line = LeaseBuffer()
        self._supply = Prefetcher(engine, self._broker, self._line, on_ended=self._session_ended)
        self._out: dict[str, DeliveredRun] = {}
        self._deadlines = DeliveryDeadlines()
        self._ticking: asyncio.Task[None] | None = None
        self._unwanted: frozenset[str] = frozenset()
        self._is_stopping = False

    # -- life

    async def start(self) -> None:
        """Make this server known as one that hands out."""
        if self._ticking is not None:
            return
        await self._broker.start()
        await self._rules.refresh()
        size = self.engine.limits.flush_size
        self._flusher = Flusher(
            self._reporting.flush,
            name="reports",
            clock=self.engine.clock,
            on_refused=self._refused,
            size=size if self._flush_interval_ms is not None else min(size, ANSWERED_MAX),
            interval_ms=self._flush_interval_ms,
            buffer_max=max(4 * size, 4_096),
        )
        self._ticking = asyncio.create_task(self._tick(), name="headrace-dispatcher")

    async def stop(self) -> None:
        """Hand out nothing more, write what was reported, give back what nobody has, and go.

        What workers have stays leased until this session counts as silent: they report to another server. Raises
        `UpdatesUnflushed` when the store took no reports within the grace.
        """
        ticking, self._ticking = self._ticking, None
        if ticking is None:
            return
        self._is_stopping = True
        grace_s = self.engine.limits.shutdown_grace_s
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
        unflushed: UpdatesUnflushed | None = None
        try:
            if self._flusher is not None:
                await self._flusher.close(deadline_s=grace_s)
        except UpdatesUnflushed as error:
            unflushed = error
        await self._supply.close()
        await self._give_back(lambda _held: True)
        if self._out or unflushed is not None:
            await self._broker.leave(deadline_s=grace_s)
        else:
            await self._broker.stop(deadline_s=grace_s)
        if unflushed is not None:
            raise unflushed

    @property
    def out_count(self) -> int:
        """Activations that workers have."""
        return len(self._out)

    @property
    def line_count(self) -> int:
        """Activations that are leased and that nobody has."""
        return len(self._line)

    @property
    def reports_depth(self) -> int:
        """Reports taken in and not yet written."""
        return 0 if self._flusher is None else self._flusher.depth

    @property
    def flushes_count(self) -> int:
        """Transactions that reports were written in."""
        return 0 if self._flusher is None else self._flusher.flushes_count

    @property
    def late_count(self) -> int:
        """Reports that came too late, twice, or of what nobody knows."""
        return self._reporting.late_count

    # -- handing out

    async def fetch(self, wish: QueueFilter) -> DeliveredRun | None:
        """One activation that a wish covers, now in its asker's hands; None when none waits.

        Raises `StoreUnavailable` when the store can't be asked.
        """
        handout = self.fetch_nowait(wish)
        if handout is None and (handout := await self._next(wish)) is not None:
            self._begin(handout, self.engine.clock.now_us())
        return handout

    def fetch_nowait(self, wish: QueueFilter) -> DeliveredRun | None:
        """What `fetch` answers if that is here already; None where it must be waited for, or there is none."""
        handout = self._next_nowait(wish) if wish.is_answerable and self._ticking is not None else None
        if handout is None:
            return None
        if handout.kind == REFERENCE:
            self._put_back(handout)
            return None
        self._begin(handout, handout.held.since_us)  # it was taken this moment
        return handout

    async def take(self, wish: QueueFilter, count_max: int, *, lease_ms: int) -> list[DeliveredRun]:
        """At most so many, on their way to workers: within `lease_ms` each is marked or given back, or goes back."""
        found: list[DeliveredRun] = []
        while len(found) < count_max:
            try:
                handout = await (self._next_in_line(wish) if found else self._next(wish))
            except HeadraceError:
                if not found:
                    raise
                break  # what was found goes out; who asks next hears of it
            if handout is None:
                break
            handout.is_claimed = True
            self._deadlines.add(handout, self.engine.clock.now_us() + lease_ms * 1_000)
            found.append(handout)
        return found

    def mark(self, names: Sequence[str]) -> int:
        """These are with their workers, and their deadlines begin; answers how many were on their way."""
        found, now_us = self._on_their_way(names), self.engine.clock.now_us()
        for handout in found:
            handout.is_claimed = False
            handout.payload = b""  # its worker has it
            self._begin(handout, now_us)
        return len(found)

    def put_back(self, names: Sequence[str]) -> int:
        """These did not reach a worker: they are first in line again; answers how many were on their way."""
        found = self._on_their_way(names)
        for handout in found:
            self._put_back(handout)
        return len(found)

    def _on_their_way(self, names: Sequence[str]) -> list[DeliveredRun]:
        known = (self._out.get(name) for name in dict.fromkeys(names))
        return [handout for handout in known if handout is not None and handout.is_claimed]

    def _put_back(self, handout: DeliveredRun) -> None:
        handout.is_claimed = False
        self._deadlines.remove(handout)
        del self._out[handout.name]
        self._line.put_back(handout, self.engine.clock.now_us())

    def _begin(self, handout: DeliveredRun, now_us: int) -> None:
        wait_ms = handout.extra.timeout_ms + self.engine.limits.delivery_grace_ms
        self._deadlines.add(handout, now_us + wait_ms * 1_000)

    async def _next(self, wish: QueueFilter) -> DeliveredRun | None:
        """The next that a wish covers, leased for it when none is in line."""
        if not wish.is_answerable or self._ticking is None:
            return None
        while (handout := await self._next_in_line(wish)) is None:
            if self._is_full or not await self._supply.refilled(wish):
                return None
        return handout

    async def _next_in_line(self, wish: QueueFilter) -> DeliveredRun | None:
        """The next in line with all of its bytes."""
        while (handout := self._next_nowait(wish)) is not None:
            if handout.kind != REFERENCE or await self._fetched(handout):
                return handout
        return None

    def _next_nowait(self, wish: QueueFilter) -> DeliveredRun | None:
        """The next in line that may run, in nobody's hands until its deadline is set; what may not run ends here."""
        while not self._is_full:
            now_us = self.engine.clock.now_us()
            handout = self._line.take(wish, now_us)
            if handout is None:
                return None
            held = handout.held
            if held.pace.left_count == held.pace.half_count:
                self._supply.half_used(held.pace)
            if handout.number in held.work.unwanted:  # it was settled by its id, from elsewhere
                handout.is_ended = True
                held.open_count -= 1
                self._end_if_over(held)
                continue
            self._out[handout.name] = handout
            if not handout.extra.idempotency_key:  # another door may have let anything into the lane
                self.refuse(handout, "a run of the lane of activations has no id to go out under")
            elif 0 < held.work.lease.expires_us <= now_us:
                self._end(handout, ReportOutcome(EXPIRED, b"", 0, ""))
            elif not self._rules.rules.kills or not self._dropped(handout):
                return handout
        return None

    @property
    def _is_full(self) -> bool:
        """Whether nothing more is handed out for now."""
        return self._is_stopping or len(self._out) >= self.engine.limits.deliveries_max

    def _dropped(self, handout: DeliveredRun) -> bool:
        """Whether a rule dropped it, which ends it."""
        if not self._is_killed(self._rules.rules, handout.extra.name, handout.payload):
            return False
        self._end(handout, ReportOutcome(CANCELLED, b"", 0, ""))
        return True

    def refuse(self, handout: DeliveredRun, why: str) -> None:
        """What was handed out can't be read by any worker: it fails."""
        error = Failure(type="Unreadable", message=why, attempts=handout.attempt)
        self._end(handout, ReportOutcome(FAILED, error.encode(), 0, ""))

    async def _fetched(self, handout: DeliveredRun) -> bool:
        """Whether a large activation may be handed out: its object is there, and no rule drops it for what is in it."""
        try:
            handout.payload, handout.kind = await self.engine.fetch(handout.payload)
        except ObjectMissing as error:
            self.refuse(handout, error.message)
            return False
        except BaseException:
            self._put_back(handout)
            raise
        return not self._dropped(handout)

    # -- the session

    def _session_ended(self) -> None:
        """Others took this server for dead: what was leased is theirs, and reports on it are looked for by id."""
        self._supply.session_ended()
        for handout in self._out.values():
            handout.is_ended = True
        self._out.clear()
        self._line.clear()
        self._deadlines.clear()

    # -- taking reports

    async def report(self, reports: Sequence[ActivationReport], *, is_awaited: bool = True) -> None:
        """How attempts ended; answers after the commit that holds it, or, not awaited, once it is taken in.

        A repeat, what came too late, and what nobody knows change nothing. Raises what the store refuses for good.
        """
        written = self.report_nowait(reports, is_awaited=is_awaited)
        if written is not None:
            await written

    def report_nowait(
        self, reports: Sequence[ActivationReport], *, is_awaited: bool = True
    ) -> asyncio.Future[None] | None:
        """The same without a task of its caller's: what is to be waited for, or None when nothing is."""
        if self._flusher is None:
            raise StoreUnavailable("this server takes no reports now", hint="report to another one, or in a moment")
        answer = ReportWaiter(len(reports)) if is_awaited and reports else None
        for number, one in enumerate(reports):
            update = self._taken(one, answer)
            try:
                is_in = self._flusher.put_nowait(update)
            except FlusherClosed:
                self._not_taken(update)
                raise
            if not is_in:
                return asyncio.create_task(self._report_in_turn(update, reports[number + 1 :], answer))
        return None if answer is None else answer.future

    async def _report_in_turn(
        self, first: ReportUpdate, reports: Sequence[ActivationReport], answer: ReportWaiter | None
    ) -> None:
        """What there was no room for, each when there is."""
        assert self._flusher is not None
        update = first
        try:
            await self._flusher.put(update)
            for one in reports:
                update = self._taken(one, answer)
                await self._flusher.put(update)
        except BaseException:
            self._not_taken(update)
            raise
        if answer is not None:
            await answer.future

    def _not_taken(self, update: ReportUpdate) -> None:
        """A report was not taken in: whoever reports it again finds it as it was."""
        if isinstance(update, DeliveredRun):
            self._restore(update)

    def _taken(self, report: ActivationReport, answer: ReportWaiter | None) -> ReportUpdate:
        """What a report comes to, its run out of its worker's hands."""
        handout = self._out.pop(report.name, None)
        if handout is None:
            return ForeignReport(report, answer)
        verdict = COMPLETE
        if report.state != "completed":
            lease = handout.held.work.lease
            verdict = unsuccessful_outcome(
                report,
                attempt=lease.attempt,
                at_most_once=lease.at_most_once,
                note=handout.held.note,
                delay_ms=handout.extra.retry_delay_ms,
                clock=self.engine.clock,
            )
        handout.end(verdict, answer)
        self._deadlines.remove(handout)
        return handout

    def _end(self, handout: DeliveredRun, verdict: ReportOutcome) -> None:
        """A run ends without a worker's word; when there is no room for that now, at the next tick."""
        assert self._flusher is not None
        handout.end(verdict, None)
        self._deadlines.remove(handout)
        if self._flusher.put_nowait(handout):
            self._out.pop(handout.name, None)
        else:
            handout.is_ended = False
            self._deadlines.add(handout, self.engine.clock.now_us() + int(TICK_S * 1_000_000))

    def _landed(self, held: BufferedLease, runs_count: int) -> None:
        held.open_count -= runs_count
        self._end_if_over(held)

    def _refused(self, update: ReportUpdate, error: HeadraceError) -> None:
        """The store refuses a report for good: the run is as if nobody had reported on it."""
        self._reporting.refused(update, error)
        self._not_taken(update)

    def _restore(self, handout: DeliveredRun) -> None:
        """A run whose end was not taken in is in its worker's hands again, until its deadline."""
        if self._broker.lease(handout.held.work.lease.span_id, handout.held.work.lease.token) is handout.held.work:
            handout.is_ended = False
            self._out[handout.name] = handout
            self._deadlines.add(handout, handout.deadline_us)

    def _end_if_over(self, held: BufferedLease) -> None:
        if held.is_over and not held.is_left:
            held.is_left = True
            self._broker.forget(held.work)

    def _is_stray(self, span_id: int, token: int, span_slot: int) -> None:
        """A run was settled by its id under a lease that may be this server's own, and in line."""
        work = self._broker.lease(span_id, token)
        if work is not None and span_slot in work.span_slots:
            work.unwanted.add(list(work.span_slots).index(span_slot))

    # -- what nobody asks for

    async def _tick(self) -> None:
        """Deadlines when they are due, and what is idle, until cancelled."""
        clock = self.engine.clock
        while True:
            now_us = clock.now_us()
            next_us = self._deadlines.next_us
            wait_s = TICK_S if next_us is None else min(TICK_S, max(0.01, (next_us - now_us) / 1_000_000))
            await clock.sleep(wait_s)
            try:
                await self.tick()
            except EngineFault as error:
                LOG.warning("the dispatcher could not do its duties", error=error.message)
            except Exception:
                LOG.exception("the dispatcher broke in its duties")

    async def tick(self) -> None:
        """One round: who is overdue, and what has been in line for long."""
        await self._rules.refresh()
        now_us = self.engine.clock.now_us()
        for handout in self._deadlines.overdue(now_us, OVERDUE_MAX):
            if handout.is_claimed:
                self._put_back(handout)
            elif not handout.is_ended:
                self.overdue_count += 1
                self._end(handout, self._overdue(handout))
        idle_us = now_us - int(IDLE_S * 1_000_000)
        unwanted, self._unwanted = self._unwanted, frozenset()
        await self._give_back(lambda held: held.since_us < idle_us or held.work.lease.batch_id in unwanted)

    def _overdue(self, handout: DeliveredRun) -> ReportOutcome:
        """What a passed deadline makes of a run: it waits again, unless it may run once or was overdue too often."""
        lease, note, attempt = handout.held.work.lease, handout.held.note, handout.attempt
        overdue_count = note.overdue_count + 1
        if lease.at_most_once:
            message = "its worker did not report in time, and it may run only once"
            return ReportOutcome(
                FAILED, Failure(type="DeadlineExceeded", message=message, attempts=attempt).encode(), 0, ""
            )
        if overdue_count >= self.engine.limits.delivery_attempts_max:
            message = f"no worker reported in time, {overdue_count} times"
            error = Failure(type="DeliveryAttemptsExceeded", message=message, attempts=attempt)
            return ReportOutcome(FAILED, error.encode(), 0, "")
        after = Note(overdue_count=overdue_count, attempts_max=note.attempts_max, delay_s=note.delay_s)
        return ReportOutcome(OVERDUE, b"", 0, after.encode())

    def _unwanted_now(self, reply: Heartbeat) -> None:
        """Of some batches there are runs that nobody wants any more: what is in line of them goes back, and ends."""
        self._unwanted = frozenset(reply.stopped) | {batch_id for batch_id, _ in reply.cancelled}

    async def _give_back(self, is_cut: Callable[[BufferedLease], bool]) -> None:
        """Rule R19: what nobody has asked for goes back, for others to have."""
        for held, span_slots in self._line.cut(is_cut):
            lease = held.work.lease
            if held.is_over and not held.work.count and not held.is_left:
                held.is_left = True
                await self._broker.end_lease(held.work, [Release(span_id=lease.span_id, token=lease.token)])
            else:
                await self._broker.put(Release(span_id=lease.span_id, token=lease.token, span_slots=span_slots))
                self._end_if_over(held)
