"""Claim, run, settle, for as long as it is wanted.

Three loops that meet only in bounded places: one claims when the executor runs low, the runners run, one hands
outcomes to the broker's flusher, which writes them while the next runs execute.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

import structlog

from headrace.core import run
from headrace.foundation.errors import HeadraceError, SessionEnded
from headrace.runtime.engine import Engine
from headrace.runtime.maintenance.scheduler import Scheduler
from headrace.runtime.maintenance.upkeep import Upkeep
from headrace.runtime.retrying import retry_transient
from headrace.runtime.sessions.active_lease import BEGUN, ActiveLease
from headrace.runtime.sessions.inflight_marks import SLOTS
from headrace.runtime.sessions.session import StoreSession, Update
from headrace.runtime.tasks.task_registry import Registry
from headrace.runtime.worker.claim_sizing import AHEAD_S, ClaimSizer, RunExecutor
from headrace.runtime.worker.executor import Executor, ExecutorCallbacks
from headrace.runtime.worker.process_pool import ProcessPool
from headrace.runtime.worker.run_driver import CANCELLED, STOPPED
from headrace.store.protocol import Heartbeat, Release

LOG: Any = structlog.get_logger("headrace.worker")
SETTLEMENTS: Final = "headrace-settlements"


class WorkerStats(NamedTuple):
    """What a worker has done since it started, in runs."""

    completed: int
    failed: int
    retried: int
    in_flight: int


class Worker:
    """Runs the tasks of a registry until `stop`. Start it once; stopping twice does nothing more.

    `processes`: 0 runs everything here but tasks with `pool="process"`, which get a process a core; more sends
    every task to that many child processes. `schedules`: also turn the ticks of the registry's schedules into runs.
    """

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        *,
        concurrency: int,
        processes: int = 0,
        tasks: Sequence[str] | None = None,
        queues: Sequence[str] | None = None,
        kind: str = "worker",
        inline_sync: bool = False,
        schedules: bool = False,
    ) -> None:
        self.engine = engine
        self.broker = StoreSession(engine, kind=kind, slots=max(SLOTS, 2 * concurrency))
        self.upkeep = Upkeep(engine, lambda: self.broker.session_id)
        self._scheduler = Scheduler(engine, registry) if schedules and registry.schedules else None
        self._registry = registry
        self._tasks = list(tasks) if tasks is not None else registry.names
        self._queues = queues
        hooks = ExecutorCallbacks(over=self._over, dirty=self._dirty)
        self._here = Executor(
            registry,
            concurrency=concurrency,
            clock=engine.clock,
            offload=engine,
            limits=engine.limits,
            hooks=hooks,
            inline_sync=inline_sync,
        )
        self._apart = (
            set()
            if inline_sync
            else {name for name in self._tasks if processes or registry.get(name).pool == "process"}
        )
        self._crew: ProcessPool | None = None
        if self._apart:
            self._crew = ProcessPool(
                engine,
                registry,
                self.broker,
                names=sorted(self._apart),
                processes=processes,
                concurrency=concurrency,
                hooks=hooks,
            )
        self._outbox: deque[ActiveLease] = deque()
        self._dirty_works: dict[int, ActiveLease] = {}
        self._news = asyncio.Event()
        self._hungry = asyncio.Event()
        self._stopping = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self._counts = {run.COMPLETED: 0, run.FAILED: 0, ord("r"): 0}
        self._is_draining = False
        self._ending: asyncio.Task[None] | None = None
        self._renewing = asyncio.Lock()
        self.broker.on_unwanted = self._unwanted
        self.broker.on_ended = self._session_lost

    @property
    def stats(self) -> WorkerStats:
        """What was done so far."""
        in_flight = self._here.in_flight_count + (self._crew.in_flight_count if self._crew is not None else 0)
        return WorkerStats(self._counts[run.COMPLETED], self._counts[run.FAILED], self._counts[ord("r")], in_flight)

    async def start(self) -> None:
        """Become known, free what dead processes of this machine held, and begin to work."""
        await self.broker.start()
        try:
            await self.broker.recover()
            if self._crew is not None:
                await self._crew.start()
        except BaseException:
            with suppress(HeadraceError):  # the first error says why
                await self.broker.stop(deadline_s=0)
            raise
        groups: list[tuple[RunExecutor, list[str]]] = [
            (self._here, [name for name in self._tasks if name not in self._apart]),
        ]
        if self._crew is not None:
            groups.append((self._crew, sorted(self._apart)))
        for runs, names in groups:
            if names:
                self._loops.append(asyncio.create_task(self._claim_loop(runs, names), name="headrace-claims"))
        self._loops.append(asyncio.create_task(self._settle_loop(), name=SETTLEMENTS))
        self._loops.append(asyncio.create_task(self.upkeep.run(), name="headrace-upkeep"))
        if self._scheduler is not None:
            self._loops.append(asyncio.create_task(self._scheduler.run(), name="headrace-schedules"))

    async def stop(self, *, now: bool = False) -> None:
        """End in good order: begin nothing, let what is under way end within the grace, settle, release, leave.

        `now`: interrupt what is under way at once, also when an earlier call still waits for it. Raises
        `UpdatesUnflushed` when the store took no more outcomes within the grace: those runs will run again.
        """
        if self._ending is None:
            grace_s = 0 if now else self.engine.limits.shutdown_grace_s
            self._ending = asyncio.create_task(self._end(grace_s), name="headrace-stop")
        elif now:
            await asyncio.gather(*(runs.stop(grace_s=0) for runs in self._groups))
        await asyncio.shield(self._ending)

    @property
    def _groups(self) -> list[Executor | ProcessPool]:
        return [self._here] if self._crew is None else [self._here, self._crew]

    async def _end(self, grace_s: float) -> None:
        self._stopping.set()
        self._hungry.set()
        claims = [loop for loop in self._loops if loop.get_name() != SETTLEMENTS]
        for loop in claims:
            loop.cancel()
        await asyncio.gather(*claims, return_exceptions=True)
        for runs in self._groups:  # what nobody has begun is free for others at once, not after the grace
            for work in runs.take_unbegun():
                if work.is_idle:
                    self._over(work)
        await asyncio.gather(*(runs.stop(grace_s=grace_s) for runs in self._groups))
        self._is_draining = True
        self._news.set()
        drained = asyncio.Event()
        draining = asyncio.create_task(self._drain())
        draining.add_done_callback(lambda _: drained.set())
        if not await self.engine.clock.wait_for(drained, self.engine.limits.shutdown_grace_s):
            draining.cancel()  # the store takes nothing; the broker says so
        await asyncio.gather(draining, return_exceptions=True)
        await self.broker.stop(deadline_s=self.engine.limits.shutdown_grace_s)

    async def _drain(self) -> None:
        """Outcomes of all leases, then the leases themselves."""
        await asyncio.gather(*self._loops, return_exceptions=True)
        for work in self.broker.held:
            await self._hand_over(work)

    # -- claiming

    async def _claim_loop(self, runs: RunExecutor, names: list[str]) -> None:
        pace = ClaimSizer(runs, chunk_runs=self.engine.limits.chunk_runs_max)
        while not self._stopping.is_set():
            if excess := pace.excess():
                await self._give_back(runs, excess)
            wanted = min(pace.wanted(), self.broker.room)
            if wanted < 1:
                self._hungry.clear()
                if not pace.wanted() or self.broker.room < 1:
                    await self.engine.clock.wait_for(self._hungry, AHEAD_S)
                continue
            notified_count, session_id = self.engine.wakeup.notified_count, self.broker.session_id
            try:
                works = await self.broker.claim(names, self._queues, wanted)
            except SessionEnded:
                await self._start_anew(session_id)
                continue
            except Exception as error:
                LOG.error("claiming failed", error=str(error), exc_info=not isinstance(error, HeadraceError))
                await self.engine.clock.sleep(1)
                continue
            pace.claimed(sum(work.count for work in works))
            for work in works:
                runs.submit(work)
            if not works:
                await self.engine.wakeup.wait(self.engine.clock, await self._idle_s(names), since=notified_count)

    async def _give_back(self, runs: RunExecutor, runs_count: int) -> None:
        """Rule R19: what can't begin here soon is for whoever can begin it at once."""
        retracted = runs.retract(runs_count)
        for work in retracted.whole:
            self._over(work)
        for work, span_slots in retracted.parts:
            lease = work.lease
            await self.broker.put(Release(span_id=lease.span_id, token=lease.token, span_slots=span_slots))
            if work.is_over:
                self._over(work)

    async def _idle_s(self, names: list[str]) -> float:
        """How long to sleep without news: a poll interval, or until the next delayed run is due."""
        poll_s = self.engine.limits.poll_interval_ms / 1_000
        try:
            due_us = await self.engine.store.next_due_us(self.engine.environment, names)
        except HeadraceError:
            return poll_s
        if due_us is None:
            return poll_s
        return min(poll_s, max(0.001, (due_us - self.engine.clock.now_us()) / 1_000_000))

    async def _start_anew(self, session_id: str) -> None:
        """The session was ended by others: what is under way is theirs too; begin again as somebody new."""
        async with self._renewing:
            if self.broker.session_id == session_id:  # else the other loop that claims was first
                self._session_lost()
                await retry_transient(self.broker.restart, self.engine.clock, what="the store")
                if self._crew is not None:
                    self._crew.rename_marks()

    def _session_lost(self) -> None:
        self._outbox.clear()
        self._dirty_works.clear()
        self._here.take_unbegun()
        self._here.interrupt(lambda _work, _number: True, STOPPED)
        if self._crew is not None:
            self._crew.take_unbegun()
        self._hungry.set()
        self.engine.wakeup.notify()

    # -- settling

    def _over(self, work: ActiveLease) -> None:
        """The executor is done with a lease."""
        self._dirty_works.pop(id(work), None)
        self._outbox.append(work)
        self._news.set()
        self._hungry.set()

    def _dirty(self, work: ActiveLease) -> None:
        """A lease has its first outcome that was not handed over."""
        work.dirty_since_us = self.engine.clock.now_us()
        self._dirty_works[id(work)] = work
        if len(self._dirty_works) == 1:
            self._news.set()

    async def _settle_loop(self) -> None:
        """Whole leases at once; outcomes of long ones every flush interval."""
        interval_us = self.engine.limits.flush_interval_ms * 1_000
        while True:
            while self._outbox:
                await self._hand_over(self._outbox.popleft())
            now_us = self.engine.clock.now_us()
            due = [work for work in self._dirty_works.values() if work.dirty_since_us + interval_us <= now_us]
            for work in due:
                self._dirty_works.pop(id(work), None)
                await self._put_all(self._outcomes_of(work))
            self._hungry.set()
            if self._outbox:
                continue
            if self._is_draining:
                return
            self._news.clear()
            oldest = min((work.dirty_since_us for work in self._dirty_works.values()), default=None)
            timeout_s = None if oldest is None else max(0.0, (oldest + interval_us - now_us) / 1_000_000)
            await self.engine.clock.wait_for(self._news, timeout_s)

    async def _hand_over(self, work: ActiveLease) -> None:
        updates: list[Update] = self._outcomes_of(work)
        if not work.is_over:
            updates.append(self._release_of(work))
        await self.broker.end_lease(work, updates)

    async def _put_all(self, updates: Sequence[Update]) -> None:
        for update in updates:
            await self.broker.put(update)

    def _outcomes_of(self, work: ActiveLease) -> list[Update]:
        settlement = work.take_settlement()
        if settlement is None:
            return []
        for code in self._counts:
            self._counts[code] += settlement.codes.count(code)
        return [settlement]

    def _release_of(self, work: ActiveLease) -> Release:
        lease = work.lease
        if lease.at_most_once:  # what began and did not end may have done its work: the store fails it
            begun = [work.span_slots[n] for n in range(work.count) if work.marks[work.span_slots[n]] == BEGUN]
            evidence = work.evidence or "the worker stopped"
            return Release(span_id=lease.span_id, token=lease.token, suspects=tuple(begun), evidence=evidence)
        return Release(span_id=lease.span_id, token=lease.token, suspects=tuple(work.suspects), evidence=work.evidence)

    def _unwanted(self, reply: Heartbeat) -> None:
        """Stop running what was cancelled."""
        if not reply.stopped and not reply.cancelled:
            return
        stopped, single = set(reply.stopped), set(reply.cancelled)

        def wanted(work: ActiveLease, number: int) -> bool:
            lease = work.lease
            return lease.batch_id in stopped or (lease.batch_id, lease.indexes[number]) in single

        self._here.interrupt(wanted, CANCELLED)
        if self._crew is not None:
            self._crew.interrupt(wanted, CANCELLED)
