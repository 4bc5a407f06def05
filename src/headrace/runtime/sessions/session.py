"""A process's session in the store: its heartbeats, its claims, and the outcomes on their way to the store.

R1 (claims are repeatable by number): a claim carries a number and is repeated with it until it is answered. Each
heartbeat compares the store's leases with those in memory. R3 (a lapsed session is ended before it is recovered): a
session that another process ended drops its leases and starts again under a new id. R18 (heartbeats have a thread of
their own): user code that blocks the event loop does not make the session lapse.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from headrace.core.serving import Serving
from headrace.core.span import LOST, Settlement
from headrace.foundation.errors import HeadraceError, SessionEnded, StoreUnreachable
from headrace.foundation.ids import new_session_id, session_name
from headrace.foundation.logs import get_logger
from headrace.runtime.clock import Clock, SystemClock
from headrace.runtime.engine import Engine
from headrace.runtime.flusher import Flusher, FlusherClosed, UpdatesUnflushed
from headrace.runtime.retrying import retry_transient
from headrace.runtime.sessions.active_lease import ActiveLease
from headrace.runtime.sessions.cancel_watch import CancelWatch
from headrace.runtime.sessions.inflight_marks import SLOTS, InflightMarks
from headrace.runtime.sessions.recovery import recover_here, recover_silent
from headrace.store.protocol import Claim, Heartbeat, HeldLease, Lease, Release, Session
from headrace.store.rpc import parts_of

LOG: Any = get_logger("headrace.broker")
Update = Settlement | Release
HEARTBEAT_SHARES = (6, 3, 1)
"""Shares of `session_timeout_ms` that a heartbeat may take, the first one and those after misses: one sixth leaves time
for others on new connections, and the last leaves a slow store all of it.
"""


class _PendingEnd(NamedTuple):
    """A lease whose last update is being written; its marks are kept until that is durable."""

    marks: InflightMarks | None
    slot: int
    last: Update
    began_once: bool
    lease: Lease


class _KnownLeases(NamedTuple):
    """The leases that this process knew when it sent a heartbeat. The answer says what the store had at that moment.

    `claim_no` is the number of the last claim; leases of later claims, and of those in `claiming`, were not known yet.
    """

    names: frozenset[tuple[int, int]]
    claiming: frozenset[int]
    claim_no: int

    def has(self, stored: HeldLease) -> bool:
        """True if the process knew this lease, or could not know it."""
        is_known = (stored.span_id, stored.token) in self.names
        return is_known or stored.claim_no in self.claiming or stored.claim_no > self.claim_no


def _began_once(active: ActiveLease) -> bool:
    """True if an at-most-once run of the lease has begun; its mark stays until its outcome is durable."""
    return active.lease.at_most_once and any(active.marks)


class StoreSession:
    """A session. Owned by one event loop: `start`, then claim and settle, then `stop`; each may be called twice."""

    def __init__(self, engine: Engine, *, kind: str, slots: int = SLOTS, serves: Serving | None = None) -> None:
        """`slots`: leases that the session can hold at a time. `serves`: what it claims, None for a producer."""
        self.engine = engine
        self.kind = kind
        self.session_id = ""
        self.marks: InflightMarks | None = None
        self.lost_count = 0
        self.on_unwanted: Callable[[Heartbeat], None] = lambda _reply: None
        self.on_ended: Callable[[], None] = lambda: None
        self.on_recorded: Callable[[int], None] = lambda _runs_count: None
        self.on_results_written: Callable[[int], None] = lambda _bytes_count: None
        self._claim_no = 0
        self._slots = slots
        self._serves = serves
        self._claiming: dict[int, int] = {}
        self._held: dict[tuple[int, int], ActiveLease] = {}
        self._pending_ends: dict[tuple[int, int], _PendingEnd] = {}
        self._releasing: dict[tuple[int, int], Release] = {}
        self._flusher: Flusher[Update] | None = None
        self._cancel_watch = CancelWatch(
            engine,
            session_id=lambda: self.session_id,
            has_leases=lambda: bool(self._held),
            on_unwanted=self._on_unwanted,
        )
        self._last_unwanted: Heartbeat | None = None
        self._heartbeats: threading.Thread | asyncio.Task[None] | None = None
        self._stop_heartbeats = threading.Event()
        self._missed_count = 0
        self._beat_wake: asyncio.Event | None = None
        self._beat_loop: asyncio.AbstractEventLoop | None = None

    # -- session

    async def start(self) -> None:
        """Start the session and its heartbeats."""
        if self.session_id:
            return
        await self._begin_session()
        limits = self.engine.limits
        self._flusher = Flusher(
            self._flush,
            name="settlements",
            clock=self.engine.clock,
            on_refused=self._refused,
            size=limits.flush_size,
            outage=self.engine.outage,
        )
        self._stop_heartbeats.clear()
        if self.engine.beats_beside:
            loop = asyncio.get_running_loop()
            self._heartbeats = threading.Thread(
                target=self._heartbeat_in_thread, args=(loop,), name="headrace-heartbeat", daemon=True
            )
            self._heartbeats.start()
        else:
            self._heartbeats = asyncio.create_task(self._heartbeat_on_loop(), name="headrace-heartbeat")

    async def _begin_session(self) -> None:
        clock = self.engine.clock
        session_id = new_session_id(clock.now_us())
        if self.engine.live_directory is not None:
            path, runs_max = self.engine.live_directory / session_id, self.engine.limits.chunk_runs_max
            self.marks = InflightMarks(path, slot_runs=runs_max, slots=self._slots)
        session = Session(
            id=session_id,
            kind=self.kind,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_us=clock.now_us(),
            serves=self._serves,
            environment=self.engine.environment,
        )
        try:
            await self.engine.store.start_session(session, now_us=clock.now_us())
        except BaseException:
            self._close_marks()
            raise
        self.session_id = session_id

    async def stop(self, *, deadline_s: float | None = None) -> None:
        """Write the pending updates, release the leases and end the session.

        Raises `UpdatesUnflushed` or the store's error if that fails; the marks are kept then, and other processes
        recover the session at once.
        """
        if not self.session_id:
            return
        try:
            if self._flusher is not None:
                await self._flusher.close(deadline_s=deadline_s)
            self._check_at_most_once()
            await self.engine.store.end_session(self.session_id, now_us=self.engine.clock.now_us())
        except BaseException:
            self._close_marks(keep=True)
            raise
        finally:
            self._flusher = None
            self.session_id = ""
            self._drop_leases()
            await self._end_heartbeats()
            self._close_marks()

    def _check_at_most_once(self) -> None:
        """Refuse to end normally while at-most-once runs have begun: ending the session would release them as not
        begun.
        """
        count = sum(map(_began_once, self._held.values()))
        count += sum(leaving.began_once for leaving in self._pending_ends.values())
        if count:
            raise UpdatesUnflushed(
                f"{count} leases of at-most-once runs that have begun were not settled in time",
                (),
                hint="these runs fail when the session is recovered, since they may have done their work",
                session=session_name(self.session_id),
            )

    async def leave(self, *, deadline_s: float | None = None) -> None:
        """Write the pending updates and leave the leases in place: remote workers still have their runs.

        The session sends no more heartbeats. Raises as `stop` does.
        """
        if self._flusher is not None:
            await self._flusher.close(deadline_s=deadline_s)
        await self._end_heartbeats()
        self.abandon()

    def abandon(self) -> None:
        """Leave the session to recovery, without awaiting anything: its event loop has ended."""
        self._stop_heartbeats.set()
        self._wake_heartbeats()
        self._heartbeats, self._flusher, self.session_id = None, None, ""
        self._drop_leases()
        self._close_marks(keep=True)

    async def _end_heartbeats(self) -> None:
        self._stop_heartbeats.set()
        self._wake_heartbeats()
        await self._cancel_watch.close()
        beating, self._heartbeats = self._heartbeats, None
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
        """Forget the leases; their slots are removed with the file of marks."""
        for active in self._held.values():
            active.slot = -1
        self._last_unwanted = None
        self._held.clear()
        self._pending_ends.clear()
        self._releasing.clear()

    def _heartbeat_in_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        async def beat() -> None:
            self._beat_wake, self._beat_loop = asyncio.Event(), asyncio.get_running_loop()
            await self._heartbeat_loop(self._beat_wake, loop.call_soon_threadsafe, SystemClock())

        try:
            asyncio.run(beat())
        except RuntimeError:  # the process's event loop was closed
            return

    async def _heartbeat_on_loop(self) -> None:
        await self._heartbeat_loop(asyncio.Event(), lambda callback, *values: callback(*values), self.engine.clock)

    async def _heartbeat_loop(self, wake: asyncio.Event, call_owner: Callable[..., Any], clock: Clock) -> None:
        """Send a heartbeat every `heartbeat_ms`, and one as soon as the store is back after an outage."""
        outage, interval_s = self.engine.outage, self.engine.limits.heartbeat_ms / 1_000
        with outage.waking(wake):
            while not self._stop_heartbeats.is_set():
                await clock.wait_for(wake, interval_s)
                wake.clear()
                if not self._stop_heartbeats.is_set():
                    await self._heartbeat_once(call_owner)
                    outage.ensure_probing(clock)

    def _wake_heartbeats(self) -> None:
        """Wake the thread of the heartbeats, so that it ends."""
        if self._beat_loop is not None and self._beat_wake is not None:
            with suppress(RuntimeError):  # that loop has ended
                self._beat_loop.call_soon_threadsafe(self._beat_wake.set)

    async def _heartbeat_once(self, call_owner: Callable[..., Any]) -> None:
        session_id = self.session_id
        if not session_id:
            return
        at_request = self._known_leases()
        try:
            reply = await self._send_heartbeat(session_id)
        except SessionEnded:
            call_owner(self._on_session_lost, session_id)
        except HeadraceError as error:
            call_owner(self._on_missed, session_id, error)  # when its owner's loop ends, heartbeats end too
        else:
            if reply.database_us:
                self.engine.clock.anchor(reply.database_us)
            call_owner(self._reconcile, session_id, at_request, reply)

    async def _send_heartbeat(self, session_id: str) -> Heartbeat:
        """Send a heartbeat. Raises `StoreUnreachable` if it got no answer while another one can still be in time."""
        engine, reachability = self.engine, self.engine.outage.reachability
        share = HEARTBEAT_SHARES[min(self._missed_count, len(HEARTBEAT_SHARES) - 1)]
        timeout_s = engine.limits.session_timeout_ms / 1_000 / share if reachability.has_connections else None
        silences_count = reachability.silences_count
        self._missed_count += 1
        try:
            async with asyncio.timeout(timeout_s):
                reply = await engine.store.heartbeat(session_id, now_us=engine.clock.now_us())
        except TimeoutError:
            error = StoreUnreachable(f"no answer to a heartbeat within {timeout_s:g} s")
            reachability.fell_silent(error, since=silences_count)
            raise error from None
        self._missed_count = 0
        return reply

    def _on_missed(self, session_id: str, error: HeadraceError) -> None:
        LOG.warning("heartbeat.failed", error=str(error), session=session_name(session_id))

    def _known_leases(self) -> _KnownLeases:
        """Return the leases that the process knows now. Called from the thread of the heartbeats.

        The copies are taken in one step each, and in this order: a claim is in `_claiming` until its leases are held,
        and a lease is pending or being released once it is not held any more.
        """
        claim_no, claiming = self._claim_no, frozenset(self._claiming)
        names = frozenset(self._held) | frozenset(self._pending_ends) | frozenset(self._releasing)
        return _KnownLeases(names, claiming, claim_no)

    def _reconcile(self, session_id: str, at_request: _KnownLeases, reply: Heartbeat) -> None:
        """Release leases that the store had at a heartbeat and this process did not know, neither then nor now
        (R1, claims are repeatable by number).

        Leases of a claim that was not answered, and leases whose last update was being written, were known.
        """
        if session_id != self.session_id:
            return
        present = self._known_leases()
        unknown = [
            Release(span_id=stored.span_id, token=stored.token)
            for stored in reply.leases
            if not at_request.has(stored) and not present.has(stored)
        ]
        if unknown and self._flusher is not None:
            LOG.warning("lease.unknown_released", count=len(unknown))
            with suppress(FlusherClosed):  # then the session ends, and the leases are released with it
                for release in unknown:
                    if self._flusher.put_nowait(release):
                        self._releasing[release.span_id, release.token] = release
        self._on_unwanted(session_id, reply)

    def _on_unwanted(self, session_id: str, reply: Heartbeat) -> None:
        """Pass on which runs are cancelled, and keep it for leases of a claim whose answer is still on its way."""
        if session_id != self.session_id:
            return
        self._last_unwanted = reply if reply.stopped or reply.cancelled else None
        self.on_unwanted(reply)

    def _on_session_lost(self, session_id: str) -> None:
        """Drop all leases: another process ended this session (R3, a lapsed session is ended before it is
        recovered).
        """
        if session_id == self.session_id:
            LOG.warning("session.lost", session=session_name(session_id))
            self._drop_leases()
            self.on_ended()

    async def restart(self) -> None:
        """Start a new session after another process ended this one."""
        self._drop_leases()
        self._close_marks()
        self._claim_no = 0
        await self._begin_session()

    # -- leases

    async def claim(
        self, tasks: Sequence[str], queues: Sequence[str] | None, runs_max: int, *, queue_prefix: str = ""
    ) -> list[ActiveLease]:
        """Lease runs. Repeats the same claim until the store answers. Raises `SessionEnded` and errors that are the
        caller's.
        """
        runs_max = min(runs_max, self.free_count)
        if runs_max < 1:
            return []
        claim_no = self._claim_no + 1
        self._claiming[claim_no] = runs_max  # before the number is used: see `_known_leases`
        self._claim_no = claim_no
        claim = Claim(
            session_id=self.session_id,
            claim_no=claim_no,
            environment=self.engine.environment,
            tasks=tasks,
            queues=queues,
            queue_prefix=queue_prefix,
            runs_max=runs_max,
        )
        try:
            leases = await retry_transient(
                lambda: self.engine.store.claim(claim, now_us=self.engine.clock.now_us()),
                self.engine.clock,
                what="the store",
                outage=self.engine.outage,
            )
            if claim.session_id != self.session_id:
                raise SessionEnded("the session ended during its claim", session_id=claim.session_id)
            if leases and (unwanted := self._last_unwanted) is not None:  # once the caller has taken the leases
                asyncio.get_running_loop().call_soon(self._on_unwanted, claim.session_id, unwanted)
            return [self._add_lease(lease) for lease in leases]
        finally:
            self._claiming.pop(claim.claim_no, None)

    def _add_lease(self, lease: Lease) -> ActiveLease:
        slot, marks = -1, None
        if self.marks is not None:
            slot, marks = self.marks.take(lease.span_id, lease.token, lease.runs_count)
        active = self._held[lease.span_id, lease.token] = ActiveLease(lease, marks, slot)
        self._cancel_watch.lease_added()
        return active

    def lease(self, span_id: int, token: int) -> ActiveLease | None:
        """Return a lease that this process holds."""
        return self._held.get((span_id, token))

    def forget(self, active: ActiveLease) -> None:
        """Forget a lease that has ended and whose outcomes are all durable."""
        if self._held.pop((active.lease.span_id, active.lease.token), None) is active:
            self._keep_until_written((active.lease.span_id, active.lease.token), active, ())

    @property
    def free_count(self) -> int:
        """Number of runs that may be claimed: each may be a lease of its own, and each lease needs a slot for its
        marks.
        """
        free = self._slots - len(self._held) - len(self._pending_ends) if self.marks is None else self.marks.free_count
        return free - sum(self._claiming.values())

    @property
    def held(self) -> list[ActiveLease]:
        """The leases that this process holds."""
        return list(self._held.values())

    async def put(self, update: Update) -> None:
        """Pass on outcomes or a release; waits while the store can't keep up."""
        if self._flusher is not None:
            await self._flusher.put(update)

    async def end_lease(self, active: ActiveLease, updates: Sequence[Update]) -> None:
        """End a lease: pass on its last outcomes and, if runs are left, its release."""
        name = (active.lease.span_id, active.lease.token)
        if self._held.get(name) is active:
            self._keep_until_written(name, active, updates)
            del self._held[name]
        for update in updates:
            await self.put(update)

    def _keep_until_written(self, name: tuple[int, int], active: ActiveLease, updates: Sequence[Update]) -> None:
        slot, active.slot = active.slot, -1
        if updates:
            self._pending_ends[name] = _PendingEnd(self.marks, slot, updates[-1], _began_once(active), active.lease)
        elif self.marks is not None and slot >= 0:
            self.marks.free(slot)

    def _on_written(self, update: Update) -> None:
        """Free the slot of a lease whose last update is durable or was refused."""
        if isinstance(update, Settlement):
            self.on_results_written(len(update.results))
        name = (update.span_id, update.token)
        if self._releasing.get(name) is update:
            del self._releasing[name]
        leaving = self._pending_ends.get(name)
        if leaving is not None and leaving.last is update:
            del self._pending_ends[name]
            if leaving.marks is not None and leaving.marks is self.marks and leaving.slot >= 0:
                leaving.marks.free(leaving.slot)

    async def _flush(self, updates: Sequence[Update]) -> None:
        """Write outcomes, then releases: a release never overtakes the outcomes of its own lease."""
        settlements = [update for update in updates if isinstance(update, Settlement)]
        releases = [update for update in updates if isinstance(update, Release)]
        store, clock = self.engine.store, self.engine.clock
        # Large results are written in several transactions (R2, settlements are recognised when repeated).
        sizes = [len(settlement.results) for settlement in settlements]
        for part in parts_of(settlements, sizes) if settlements else ():
            results = await store.settle(part, now_us=clock.now_us())
            self._count_lost(part, results)
            self.on_recorded(sum(len(settlement.codes) for settlement in part))
            self.engine.recorded.notify(self._watched(part))
        if releases:
            crashes_max = self.engine.limits.crashes_max
            await store.release(releases, crashes_max=crashes_max, now_us=clock.now_us())
            self.engine.wakeup.notify()
        for update in updates:
            self._on_written(update)

    def _watched(self, settlements: Sequence[Settlement]) -> dict[str, Sequence[int]]:
        """Return the runs of settled leases that waiting tasks of this process may watch, by batch."""
        recorded = self.engine.recorded
        watched: dict[str, Sequence[int]] = {}
        if recorded.watches_count:
            for settlement in settlements:
                name = (settlement.span_id, settlement.token)
                holder = self._held.get(name) or self._pending_ends.get(name)
                lease = None if holder is None else holder.lease
                if lease is not None and (indexes := recorded.watched(lease.batch_id, lease.indexes)) is not None:
                    watched[lease.batch_id] = [*watched.get(lease.batch_id, ()), *indexes]
        return watched

    def _count_lost(self, settlements: Sequence[Settlement], results: Sequence[str]) -> None:
        for settlement, result in zip(settlements, results, strict=True):
            if result == LOST:
                self.lost_count += len(settlement.codes)
                LOG.warning("lease.lost", span=settlement.span_id, runs=len(settlement.codes))

    def _refused(self, update: Update, error: HeadraceError) -> None:
        LOG.error("update.refused", span=update.span_id, error=str(error))
        self._on_written(update)  # the next heartbeat finds the lease unknown to this process, and releases it

    async def recover(self) -> int:
        """Recover lapsed sessions; return the number of recovered spans.

        At once for processes of this machine, after their timeout for those elsewhere.
        """
        if not self.engine.is_maintained_here:  # the server that keeps the store recovers sessions
            return 0
        here = await recover_here(self.engine, self.session_id)
        return here + (await recover_silent(self.engine, self.session_id)).spans_count
