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
from typing import Any, Final

import structlog

from headrace.core.span import LOST, Settlement
from headrace.foundation.errors import EngineFault, HeadraceError, SessionEnded
from headrace.foundation.ids import new_session_id
from headrace.runtime.engine import Engine
from headrace.runtime.flusher import Flusher
from headrace.runtime.marks import Marks, is_dead, merged, of_session, remove
from headrace.runtime.work import Work
from headrace.store.protocol import Claim, Heartbeat, Release, Session, Suspects

LOG: Any = structlog.get_logger("headrace.broker")
BACKOFF_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

Update = Settlement | Release


class Broker:
    """Owned by one event loop. `start`, then claim and settle, then `stop`; each may be called twice."""

    def __init__(self, engine: Engine, *, kind: str) -> None:
        self.engine = engine
        self.kind = kind
        self.session_id = ""
        self.marks: Marks | None = None
        self.lost_count = 0
        self.on_unwanted: Callable[[Heartbeat], None] = lambda _reply: None
        self.on_ended: Callable[[], None] = lambda: None
        self.on_recorded: Callable[[int], None] = lambda _runs_count: None
        self._claim_no = 0
        self._answered_claim_no = 0
        self._held: dict[tuple[int, int], Work] = {}
        self._flusher: Flusher[Update] | None = None
        self._beating: threading.Thread | asyncio.Task[None] | None = None
        self._stop_beating = threading.Event()

    # -- session

    async def start(self) -> None:
        """Make this process known and keep it so."""
        if self.session_id:
            return
        await self._begin_session()
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
            self.marks = Marks(self.engine.live_directory / session_id, slot_runs=self.engine.limits.chunk_runs_max)
        session = Session(
            id=session_id, kind=self.kind, host=socket.gethostname(), pid=os.getpid(), started_us=clock.now_us()
        )
        await self.engine.store.start_session(session, now_us=clock.now_us())
        self.session_id = session_id

    async def stop(self, *, deadline_s: float | None = None) -> None:
        """Write what is still to be written, give leases back, and leave."""
        if not self.session_id:
            return
        if self._flusher is not None:
            await self._flusher.close(deadline_s=deadline_s)
            self._flusher = None
        self._stop_beating.set()
        if isinstance(self._beating, threading.Thread):
            await asyncio.to_thread(self._beating.join)
        elif self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)
        self._beating = None
        session_id, self.session_id = self.session_id, ""
        await self.engine.store.end_session(session_id, now_us=self.engine.clock.now_us())
        self._held.clear()
        if self.marks is not None:
            self.marks.close()
            self.marks = None

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
            LOG.warning("heartbeat failed", error=str(error), session=session_id)
        else:
            tell(self._reconcile, reply)

    def _reconcile(self, reply: Heartbeat) -> None:
        """Rule R1: leases that the store knows and this process does not go back."""
        stray = [
            Release(span_id=held.span_id, token=held.token)
            for held in reply.leases
            if (held.span_id, held.token) not in self._held and held.claim_no <= self._answered_claim_no
        ]
        if stray and self._flusher is not None:
            LOG.warning("leases nobody here holds go back", count=len(stray))
            for release in stray:
                self._flusher.put_nowait(release)
        self.on_unwanted(reply)

    def _thawed(self, session_id: str) -> None:
        """Rule R3: others took this process for dead; what it holds is theirs."""
        if session_id == self.session_id:
            LOG.warning("the session was ended by others; its leases are dropped", session=session_id)
            self._held.clear()
            self.on_ended()

    async def restart(self) -> None:
        """Start anew after the session was ended by others."""
        old, self.marks = self.marks, None
        if old is not None:
            old.close()
        self._claim_no = self._answered_claim_no = 0
        await self._begin_session()

    # -- work

    async def claim(self, tasks: Sequence[str], queues: Sequence[str] | None, runs_max: int) -> list[Work]:
        """Lease runs. Repeats the same claim until the store answers; raises `SessionEnded` and client faults."""
        self._claim_no += 1
        wish = Claim(
            session_id=self.session_id,
            claim_no=self._claim_no,
            environment=self.engine.environment,
            tasks=tasks,
            queues=queues,
            runs_max=runs_max,
        )
        leases = await self.patiently(lambda: self.engine.store.claim(wish, now_us=self.engine.clock.now_us()))
        self._answered_claim_no = wish.claim_no
        works = []
        for lease in leases:
            slot, marks = -1, None
            if self.marks is not None:
                slot, marks = self.marks.take(lease.span_id, lease.token, lease.runs_count)
            work = self._held[lease.span_id, lease.token] = Work(lease, marks, slot)
            works.append(work)
        return works

    @property
    def held(self) -> list[Work]:
        """The leases this process holds."""
        return list(self._held.values())

    async def put(self, update: Update) -> None:
        """Hand outcomes or a release over; waits while the store can't keep up."""
        if self._flusher is not None:
            await self._flusher.put(update)

    def forget(self, work: Work) -> None:
        """The lease has ended: all its outcomes, or its release, are handed over."""
        self._held.pop((work.lease.span_id, work.lease.token), None)
        if self.marks is not None:
            self.marks.free(work.slot)

    async def _flush(self, updates: Sequence[Update]) -> None:
        """Write outcomes, then releases: a release never overtakes the outcomes of its own lease."""
        settlements = [update for update in updates if isinstance(update, Settlement)]
        releases = [update for update in updates if isinstance(update, Release)]
        store, clock = self.engine.store, self.engine.clock
        if settlements:
            words = await store.settle(settlements, now_us=clock.now_us())
            self._tell_lost(settlements, words)
            self.on_recorded(sum(len(settlement.codes) for settlement in settlements))
            self.engine.recorded.ring()
        if releases:
            crashes_max = self.engine.limits.crashes_max
            await store.release(releases, crashes_max=crashes_max, now_us=clock.now_us())
            self.engine.doorbell.ring()

    def _tell_lost(self, settlements: Sequence[Settlement], words: Sequence[str]) -> None:
        for settlement, word in zip(settlements, words, strict=True):
            if word == LOST:
                self.lost_count += len(settlement.codes)
                LOG.warning(
                    "outcomes came too late: the lease was lost", span=settlement.span_id, runs=len(settlement.codes)
                )

    def _refused(self, update: Update, error: HeadraceError) -> None:
        LOG.error("the store refuses an update for good", span=update.span_id, error=str(error))

    async def patiently(self, call: Callable[[], Any]) -> Any:
        """Call until the store answers, with growing waits; what can't be retried is raised."""
        tries = 0
        while True:
            try:
                return await call()
            except EngineFault as error:
                if not error.retryable:
                    raise
                wait_s = BACKOFF_S[min(tries, len(BACKOFF_S) - 1)]
                tries += 1
                LOG.warning("the store did not answer; trying again", error=error.message, wait_s=wait_s)
                await self.engine.clock.sleep(wait_s)

    async def recover(self) -> int:
        """End sessions that died and give their leases back: at once on this machine, by timeout elsewhere."""
        engine = self.engine
        spans_count = 0
        for session in await engine.store.sessions():
            if session.id == self.session_id:
                continue
            now_us = engine.clock.now_us()
            files = of_session(engine.live_directory, session.id) if engine.live_directory is not None else []
            dead = is_dead(files[0]) if files else None
            if dead is False:
                continue
            if dead:
                silent_since_us = now_us
                suspects = Suspects(places=merged(files), evidence=f"process {session.pid} on {session.host} died")
            else:
                silent_since_us = now_us - engine.limits.session_timeout_ms * 1_000
                evidence = f"process {session.pid} on {session.host} fell silent"
                suspects = Suspects(places=None, evidence=evidence)
            count = await engine.store.recover(
                session.id,
                suspects,
                silent_since_us=max(silent_since_us, session.heartbeat_us if dead else silent_since_us),
                crashes_max=engine.limits.crashes_max,
                now_us=now_us,
            )
            if dead:
                remove(files)
            if count:
                LOG.info("recovered the leases of a dead session", session=session.id, spans=count)
                engine.doorbell.ring()
            spans_count += count
        return spans_count
