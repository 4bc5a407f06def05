"""One process's dealings with the store: its session, its claims, and outcomes on their way back.

Rule R1: a claim carries a number and is repeated with it until it is answered; each heartbeat compares what the store
thinks is leased with what is. Rule R3: a session that others ended drops its leases and starts anew under a new
id. Rule R18: heartbeats have their own thread, so a loop that user code blocks does not look dead.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import structlog

from headrace.core.span import LOST, Settlement
from headrace.foundation.errors import HeadraceError, SessionEnded
from headrace.foundation.ids import new_session_id
from headrace.runtime.engine import Engine
from headrace.runtime.flusher import Flusher, FlusherClosed, UpdatesUnflushed
from headrace.runtime.retrying import retry_transient
from headrace.runtime.sessions.active_lease import ActiveLease
from headrace.runtime.sessions.inflight_marks import SLOTS, InflightMarks
from headrace.runtime.sessions.recovery import recover_here, recover_silent
from headrace.store.protocol import Claim, Heartbeat, Lease, Release, Session

LOG: Any = structlog.get_logger("headrace.broker")
Update = Settlement | Release


class _PendingEnd(NamedTuple):
    """A lease whose last update is on its way; its marks are evidence until that is durable."""

    marks: InflightMarks | None
    slot: int
    last: Update
    began_once: bool


def _began_once(work: ActiveLease) -> bool:
    """Whether an at-most-once run of it began; its mark stays until its outcome is durable."""
    return work.lease.at_most_once and any(work.marks)


class StoreSession:
    """Owned by one event loop. `start`, then claim and settle, then `stop`; each may be called twice."""

    def __init__(self, engine: Engine, *, kind: str, slots: int = SLOTS) -> None:
        """`slots`: leases it can hold at a time."""
        self.engine = engine
        self.kind = kind
        self.session_id = ""
        self.marks: InflightMarks | None = None
        self.lost_count = 0
        self.on_unwanted: Callable[[Heartbeat], None] = lambda _reply: None
        self.on_ended: Callable[[], None] = lambda: None
        self.on_recorded: Callable[[int], None] = lambda _runs_count: None
        self._claim_no = 0
        self._slots = slots
        self._claiming: dict[int, int] = {}
        self._held: dict[tuple[int, int], ActiveLease] = {}
        self._leaving: dict[tuple[int, int], _PendingEnd] = {}
        self._flusher: Flusher[Update] | None = None
        self._beating: threading.Thread | asyncio.Task[None] | None = None
        self._stop_beating = threading.Event()

    # -- session

    async def start(self) -> None:
        """Make this process known and keep it so."""
        if self.session_id:
            return
        try:
            await self._begin_session()
        except BaseException:
            self._close_marks()
            raise
        limits = self.engine.limits
        self._flusher = Flusher(
            self._flush, name="settlements", clock=self.engine.clock, on_refused=self._refused, size=limits.flush_size
        )
        self._stop_beating.clear()
        if self.engine.beats_beside:
            loop = asyncio.get_running_loop()
            self._beating = threading.Thread(
                target=self._beat_in_thread, args=(loop,), name="headrace-heartbeat", daemon=True
            )
            self._beating.start()
        else:
            self._beating = asyncio.create_task(self._beat_on_loop(), name="headrace-heartbeat")

    async def _begin_session(self) -> None:
        clock = self.engine.clock
        session_id = new_session_id(clock.now_us())
        if self.engine.live_directory is not None:
            path, runs_max = self.engine.live_directory / session_id, self.engine.limits.chunk_runs_max
            self.marks = InflightMarks(path, slot_runs=runs_max, slots=self._slots)
        session = Session(
            id=session_id, kind=self.kind, host=socket.gethostname(), pid=os.getpid(), started_us=clock.now_us()
        )
        await self.engine.store.start_session(session, now_us=clock.now_us())
        self.session_id = session_id

    async def stop(self, *, deadline_s: float | None = None) -> None:
        """Write what is still to be written, give leases back, and leave.

        Raises `UpdatesUnflushed` or the store's error when that can't be done; then the marks stay as evidence, and
        others recover the session at once.
        """
        if not self.session_id:
            return
        try:
            if self._flusher is not None:
                await self._flusher.close(deadline_s=deadline_s)
            self._check_once()
            await self.engine.store.end_session(self.session_id, now_us=self.engine.clock.now_us())
        except BaseException:
            self._close_marks(keep=True)
            raise
        finally:
            self._flusher = None
            self.session_id = ""
            self._drop_leases()
            await self._end_beating()
            self._close_marks()

    def _check_once(self) -> None:
        """Leases that go back with the session count as never begun, which is not so here: leave them to recovery."""
        count = sum(map(_began_once, self._held.values()))
        count += sum(leaving.began_once for leaving in self._leaving.values())
        if count:
            raise UpdatesUnflushed(
                f"{count} leases of at-most-once runs that began were not settled in time",
                (),
                hint="these runs fail once the session is recovered, since they may have done their work",
                session=self.session_id,
            )

    async def leave(self, *, deadline_s: float | None = None) -> None:
        """Write what is still to be written and go, with the leases left standing: others have their runs.

        The session counts as silent from now on. Raises as `stop` does.
        """
        if self._flusher is not None:
            await self._flusher.close(deadline_s=deadline_s)
        await self._end_beating()
        self.abandon()

    def abandon(self) -> None:
        """The event loop is gone, and nothing can be awaited on it: leave the evidence to whoever recovers this."""
        self._stop_beating.set()
        self._beating, self._flusher, self.session_id = None, None, ""
        self._drop_leases()
        self._close_marks(keep=True)

    async def _end_beating(self) -> None:
        self._stop_beating.set()
        beating, self._beating = self._beating, None
        if isinstance(beating, threading.Thread):
            await asyncio.to_thread(beating.join)
        elif beating is not None:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    def _close_marks(self, *, keep: bool = False) -> None:
        marks, self.marks = self.marks, None
        if marks is not None:
            marks.close(keep=keep)

    def _drop_leases(self) -> None:
        """What was held is nobody's here any more; its slots went with the file of marks."""
        for work in self._held.values():
            work.slot = -1
        self._held.clear()
        self._leaving.clear()

    def _beat_in_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        async def beat() -> None:
            await self._beat(lambda news, *values: loop.call_soon_threadsafe(news, *values), asyncio.to_thread)

        try:
            asyncio.run(beat())
        except RuntimeError:  # the loop of the process was closed under us: nobody is left to tell
            return

    async def _beat_on_loop(self) -> None:
        while True:
            await self.engine.clock.sleep(self.engine.limits.heartbeat_ms / 1_000)
            await self._beat_once(lambda news, *values: news(*values))

    async def _beat(self, tell: Callable[..., Any], in_thread: Callable[..., Any]) -> None:
        while not await in_thread(self._stop_beating.wait, self.engine.limits.heartbeat_ms / 1_000):
            await self._beat_once(tell)

    async def _beat_once(self, tell: Callable[..., Any]) -> None:
        session_id = self.session_id
        if not session_id:
            return
        try:
            reply = await self.engine.store.heartbeat(session_id, now_us=self.engine.clock.now_us())
        except SessionEnded:
            tell(self._thawed, session_id)
        except HeadraceError as error:
            tell(self._missed, session_id, error)  # with its owner's loop a heartbeat ends, whatever the store says
        else:
            if reply.database_us:
                self.engine.clock.anchor(reply.database_us)
            tell(self._reconcile, session_id, reply)

    def _missed(self, session_id: str, error: HeadraceError) -> None:
        LOG.warning("heartbeat failed", error=str(error), session=session_id)

    def _reconcile(self, session_id: str, reply: Heartbeat) -> None:
        """Rule R1: leases that the store knows and this process does not go back.

        A claim whose answer is still to come, and a lease whose last update is on its way, are known.
        """
        if session_id != self.session_id:
            return
        stray = [
            Release(span_id=held.span_id, token=held.token)
            for held in reply.leases
            if (held.span_id, held.token) not in self._held
            and (held.span_id, held.token) not in self._leaving
            and held.claim_no not in self._claiming
            and held.claim_no <= self._claim_no
        ]
        if stray and self._flusher is not None:
            LOG.warning("leases nobody here holds go back", count=len(stray))
            with suppress(FlusherClosed):  # then the session ends, and they go back with it
                for release in stray:
                    self._flusher.put_nowait(release)
        self.on_unwanted(reply)

    def _thawed(self, session_id: str) -> None:
        """Rule R3: others took this process for dead; what it holds is theirs."""
        if session_id == self.session_id:
            LOG.warning("the session was ended by others; its leases are dropped", session=session_id)
            self._drop_leases()
            self.on_ended()

    async def restart(self) -> None:
        """Start anew after the session was ended by others."""
        self._drop_leases()
        self._close_marks()
        self._claim_no = 0
        await self._begin_session()

    # -- work

    async def claim(
        self, tasks: Sequence[str], queues: Sequence[str] | None, runs_max: int, *, queue_prefix: str = ""
    ) -> list[ActiveLease]:
        """Lease runs. Repeats the same claim until the store answers; raises `SessionEnded` and client faults."""
        runs_max = min(runs_max, self.room)
        if runs_max < 1:
            return []
        self._claim_no += 1
        wish = Claim(
            session_id=self.session_id,
            claim_no=self._claim_no,
            environment=self.engine.environment,
            tasks=tasks,
            queues=queues,
            queue_prefix=queue_prefix,
            runs_max=runs_max,
        )
        self._claiming[wish.claim_no] = runs_max
        try:
            leases = await retry_transient(
                lambda: self.engine.store.claim(wish, now_us=self.engine.clock.now_us()),
                self.engine.clock,
                what="the store",
            )
            if wish.session_id != self.session_id:
                raise SessionEnded("the session ended while it claimed", session_id=wish.session_id)
            return [self._hold(lease) for lease in leases]
        finally:
            self._claiming.pop(wish.claim_no, None)

    def _hold(self, lease: Lease) -> ActiveLease:
        slot, marks = -1, None
        if self.marks is not None:
            slot, marks = self.marks.take(lease.span_id, lease.token, lease.runs_count)
        work = self._held[lease.span_id, lease.token] = ActiveLease(lease, marks, slot)
        return work

    def lease(self, span_id: int, token: int) -> ActiveLease | None:
        """A lease that this process holds."""
        return self._held.get((span_id, token))

    def forget(self, work: ActiveLease) -> None:
        """A lease has ended, and all of its outcomes are durable."""
        if self._held.pop((work.lease.span_id, work.lease.token), None) is work:
            self._leave((work.lease.span_id, work.lease.token), work, ())

    @property
    def room(self) -> int:
        """Runs that may be claimed: each might be a lease of its own, and each lease needs a slot for its marks."""
        free = self._slots - len(self._held) - len(self._leaving) if self.marks is None else self.marks.free_count
        return free - sum(self._claiming.values())

    @property
    def held(self) -> list[ActiveLease]:
        """The leases this process holds."""
        return list(self._held.values())

    async def put(self, update: Update) -> None:
        """Hand outcomes or a release over; waits while the store can't keep up."""
        if self._flusher is not None:
            await self._flusher.put(update)

    async def end_lease(self, work: ActiveLease, updates: Sequence[Update]) -> None:
        """The lease has ended: hand over its last outcomes and, where runs are left, its release."""
        name = (work.lease.span_id, work.lease.token)
        if self._held.pop(name, None) is work:
            self._leave(name, work, updates)
        for update in updates:
            await self.put(update)

    def _leave(self, name: tuple[int, int], work: ActiveLease, updates: Sequence[Update]) -> None:
        slot, work.slot = work.slot, -1
        if updates:
            self._leaving[name] = _PendingEnd(self.marks, slot, updates[-1], _began_once(work))
        elif self.marks is not None and slot >= 0:
            self.marks.free(slot)

    def _has_left(self, update: Update) -> None:
        """An update is durable, or refused for good."""
        name = (update.span_id, update.token)
        leaving = self._leaving.get(name)
        if leaving is not None and leaving.last is update:
            del self._leaving[name]
            if leaving.marks is not None and leaving.marks is self.marks and leaving.slot >= 0:
                leaving.marks.free(leaving.slot)

    async def _flush(self, updates: Sequence[Update]) -> None:
        """Write outcomes, then releases: a release never overtakes the outcomes of its own lease."""
        settlements = [update for update in updates if isinstance(update, Settlement)]
        releases = [update for update in updates if isinstance(update, Release)]
        store, clock = self.engine.store, self.engine.clock
        if settlements:
            words = await store.settle(settlements, now_us=clock.now_us())
            self._tell_lost(settlements, words)
            self.on_recorded(sum(len(settlement.codes) for settlement in settlements))
            self.engine.recorded.notify()
        if releases:
            crashes_max = self.engine.limits.crashes_max
            await store.release(releases, crashes_max=crashes_max, now_us=clock.now_us())
            self.engine.wakeup.notify()
        for update in updates:
            self._has_left(update)

    def _tell_lost(self, settlements: Sequence[Settlement], words: Sequence[str]) -> None:
        for settlement, word in zip(settlements, words, strict=True):
            if word == LOST:
                self.lost_count += len(settlement.codes)
                LOG.warning(
                    "outcomes came too late: the lease was lost", span=settlement.span_id, runs=len(settlement.codes)
                )

    def _refused(self, update: Update, error: HeadraceError) -> None:
        LOG.error("the store refuses an update for good", span=update.span_id, error=str(error))
        self._has_left(update)  # the next heartbeat finds the lease with nobody, and it goes back

    async def recover(self) -> int:
        """End sessions that died and give their leases back: at once on this machine, by timeout elsewhere."""
        if not self.engine.is_maintained_here:  # a server keeps the store, and recovers sessions
            return 0
        here = await recover_here(self.engine, self.session_id)
        return here + (await recover_silent(self.engine, self.session_id)).spans_count
