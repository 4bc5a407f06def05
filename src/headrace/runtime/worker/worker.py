"""The worker: claims runs, executes them and settles their outcomes until it is stopped.

Three loops share only bounded buffers. One claims when the executor has few runs left, the runners execute, and one
passes outcomes to the session's flusher, which writes them while the next runs execute.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor as ThreadExecutor
from contextlib import suppress
from typing import Any, Final, NamedTuple

from headrace.core import run
from headrace.core.serving import Serving
from headrace.foundation.errors import HeadraceError, SessionEnded
from headrace.foundation.logs import get_logger
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
from headrace.runtime.worker.loop_watch import LoopWatch
from headrace.runtime.worker.process_pool import ProcessPool
from headrace.runtime.worker.run_driver import CANCELLED, STOPPED
from headrace.runtime.worker.unwritten_results import UnwrittenResults
from headrace.store.protocol import Heartbeat, Release

LOG: Any = get_logger("headrace.worker")
SETTLEMENTS: Final = "headrace-settlements"


class WorkerStats(NamedTuple):
    """Counts of a worker since its start, in runs."""

    completed: int
    failed: int
    retried: int
    in_flight: int


class Worker:
    """Executes the tasks of a registry until `stop`. Start it once; a second stop has no effect.

    `processes`: with 0, only tasks with `pool="process"` run in child processes, one per core; with more, every task
    runs in that many child processes. `schedules`: enqueue the runs of the registry's schedules too. `settings`: those
    of the app, for child processes. `inline_sync` and `threads` are for tests: every plain function runs on the event
    loop's own thread, or in these threads.
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
        threads: ThreadExecutor | None = None,
        schedules: bool = False,
        settings: Mapping[str, str | int] | None = None,
    ) -> None:
        self.engine = engine
        self._tasks = list(tasks) if tasks is not None else registry.names
        serves = Serving(
            environment=engine.environment,
            tasks=tuple(self._tasks),
            queues=None if queues is None else tuple(queues),
            concurrency=concurrency,
        )
        self.session = StoreSession(
            engine, kind=kind, slots=max(SLOTS, 2 * concurrency + engine.limits.waiting_parents_max), serves=serves
        )
        self.upkeep = Upkeep(engine, lambda: self.session.session_id)
        self._scheduler = Scheduler(engine, registry) if schedules and registry.schedules else None
        self._registry, self._queues, self._unwritten = registry, queues, UnwrittenResults(engine.clock)
        self._wants_runs = asyncio.Event()
        hooks = ExecutorCallbacks(self._on_finished, self._on_unsettled, self._wants_runs.set)
        self._executor = Executor(
            registry,
            concurrency=concurrency,
            clock=engine.clock,
            offload=engine,
            limits=engine.limits,
            hooks=hooks,
            inline_sync=inline_sync,
            threads=threads,
            unwritten=self._unwritten,
        )
        self._pooled_tasks = (
            set()
            if inline_sync or threads is not None
            else {name for name in self._tasks if processes or registry.get(name).pool == "process"}
        )
        self._pool: ProcessPool | None = None
        if self._pooled_tasks:
            self._pool = ProcessPool(
                engine,
                registry,
                self.session,
                names=sorted(self._pooled_tasks),
                processes=processes,
                concurrency=concurrency,
                hooks=hooks,
                settings=settings or {},
            )
        self._finished: deque[ActiveLease] = deque()
        self._unsettled: dict[int, ActiveLease] = {}
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self._counts, self._is_draining = {run.COMPLETED: 0, run.FAILED: 0, ord("r"): 0}, False
        self._loop_watch: LoopWatch | None = None
        self._ending: asyncio.Task[None] | None = None
        self._renewing = asyncio.Lock()
        self.session.on_unwanted = self._on_cancelled
        self.session.on_ended, self.session.on_results_written = self._session_lost, self._unwritten.release

    @property
    def stats(self) -> WorkerStats:
        """The counts since the start."""
        in_flight = self._executor.in_flight_count + (self._pool.in_flight_count if self._pool is not None else 0)
        return WorkerStats(self._counts[run.COMPLETED], self._counts[run.FAILED], self._counts[ord("r")], in_flight)

    async def start(self) -> None:
        """Start the session, recover ended processes of this machine, and start to claim."""
        await self.session.start()
        try:
            await self.session.recover()
            if self._pool is not None:
                await self._pool.start()
        except BaseException:
            with suppress(HeadraceError):  # the first error is raised
                await self.session.stop(deadline_s=0)
            raise
        if self.engine.beats_beside:
            executor = self._executor
            self._loop_watch = LoopWatch(
                is_busy=lambda: executor.in_flight_count + executor.unbegun_count > 0, ids_of=executor.ids_of
            )
        groups: list[tuple[RunExecutor, list[str]]] = [
            (self._executor, [name for name in self._tasks if name not in self._pooled_tasks]),
        ]
        if self._pool is not None:
            groups.append((self._pool, sorted(self._pooled_tasks)))
        for runs, names in groups:
            if names:
                self._loops.append(asyncio.create_task(self._claim_loop(runs, names), name="headrace-claims"))
        self._loops.append(asyncio.create_task(self._settle_loop(), name=SETTLEMENTS))
        self._loops.append(asyncio.create_task(self.upkeep.run(), name="headrace-upkeep"))
        if self._scheduler is not None:
            self._loops.append(asyncio.create_task(self._scheduler.run(), name="headrace-schedules"))

    async def stop(self, *, now: bool = False) -> None:
        """Stop gracefully: begin no run, let those in flight end within the grace period, settle, release, end the
        session.

        `now`: interrupt the runs in flight at once, also if an earlier call still waits for them. Raises
        `UpdatesUnflushed` if the store accepted no more outcomes within the grace period; those runs will be executed
        again.
        """
        if self._ending is None:
            grace_s = 0 if now else self.engine.limits.shutdown_grace_s
            self._ending = asyncio.create_task(self._end(grace_s), name="headrace-stop")
        elif now:
            await asyncio.gather(*(runs.stop(grace_s=0) for runs in self._executors))
        await asyncio.shield(self._ending)

    @property
    def _executors(self) -> list[Executor | ProcessPool]:
        return [self._executor] if self._pool is None else [self._executor, self._pool]

    async def _end(self, grace_s: float) -> None:
        self._stopping.set()
        self._wants_runs.set()
        claims = [loop for loop in self._loops if loop.get_name() != SETTLEMENTS]
        for loop in claims:
            loop.cancel()
        await asyncio.gather(*claims, return_exceptions=True)
        # runs that have not begun are free for other workers at once, not after the grace period
        for runs in self._executors:
            for active in runs.take_unbegun():
                if active.is_idle:
                    self._on_finished(active)
        await asyncio.gather(*(runs.stop(grace_s=grace_s) for runs in self._executors))
        if self._loop_watch is not None:
            self._loop_watch.stop()
        self._is_draining = True
        self._changed.set()
        drained = asyncio.Event()
        draining = asyncio.create_task(self._drain())
        draining.add_done_callback(lambda _: drained.set())
        if not await self.engine.clock.wait_for(drained, self.engine.limits.shutdown_grace_s):
            draining.cancel()  # the store does not respond; the session's stop raises the error
        await asyncio.gather(draining, return_exceptions=True)
        await self.session.stop(deadline_s=self.engine.limits.shutdown_grace_s)

    async def _drain(self) -> None:
        """Pass on the outcomes of all leases, then release the leases."""
        await asyncio.gather(*self._loops, return_exceptions=True)
        for active in self.session.held:
            await self._settle_finished(active)

    # -- claiming

    async def _claim_loop(self, runs: RunExecutor, names: list[str]) -> None:
        sizer = ClaimSizer(runs, chunk_runs=self.engine.limits.chunk_runs_max)
        while not self._stopping.is_set():
            if excess := sizer.excess():
                await self._release_excess(runs, excess)
            runs_max = min(sizer.claim_size(), self.session.free_count)
            if runs_max < 1:
                self._wants_runs.clear()
                if not sizer.claim_size() or self.session.free_count < 1:
                    await self.engine.clock.wait_for(self._wants_runs, AHEAD_S)
                continue
            notified_count, session_id = self.engine.wakeup.notified_count, self.session.session_id
            try:
                leases = await self.session.claim(names, self._queues, runs_max)
            except SessionEnded:
                await self._renew_session(session_id)
                continue
            except Exception as error:
                LOG.error("claim.failed", error=str(error), exc_info=not isinstance(error, HeadraceError))
                await self.engine.clock.sleep(1)
                continue
            sizer.claimed(sum(active.count for active in leases))
            for active in leases:
                runs.submit(active)
            if not leases:
                await self.engine.wakeup.wait(self.engine.clock, await self._idle_s(names), since=notified_count)

    async def _release_excess(self, runs: RunExecutor, runs_count: int) -> None:
        """Release runs that can't begin here soon (R19, claims start small)."""
        retracted = runs.retract(runs_count)
        for active in retracted.whole:
            self._on_finished(active)
        for active, span_slots in retracted.parts:
            lease = active.lease
            await self.session.put(Release(span_id=lease.span_id, token=lease.token, span_slots=span_slots))
            if active.is_over:
                self._on_finished(active)

    async def _idle_s(self, names: list[str]) -> float:
        """Return how long to wait without a wake-up: the poll interval, or until the next delayed run is due."""
        poll_s = self.engine.limits.poll_interval_ms / 1_000
        try:
            due_us = await self.engine.store.next_due_us(self.engine.environment, names)
        except HeadraceError:
            return poll_s
        if due_us is None:
            return poll_s
        return min(poll_s, max(0.001, (due_us - self.engine.clock.now_us()) / 1_000_000))

    async def _renew_session(self, session_id: str) -> None:
        """Start a new session after another process ended this one; its runs belong to others now."""
        async with self._renewing:
            if self.session.session_id == session_id:  # otherwise the other claim loop was first
                self._session_lost()
                await retry_transient(
                    self.session.restart, self.engine.clock, what="the store", outage=self.engine.outage
                )
                if self._pool is not None:
                    self._pool.rename_marks()

    def _session_lost(self) -> None:
        self._unwritten.clear()
        self._finished.clear()
        self._unsettled.clear()
        self._executor.take_unbegun()
        self._executor.interrupt(lambda _work, _number: True, STOPPED)
        if self._pool is not None:
            self._pool.take_unbegun()
        self._wants_runs.set()
        self.engine.wakeup.notify()

    # -- settling

    def _on_finished(self, active: ActiveLease) -> None:
        """Handle a lease that the executor has finished with."""
        self._unsettled.pop(id(active), None)
        self._finished.append(active)
        self._changed.set()
        self._wants_runs.set()

    def _on_unsettled(self, active: ActiveLease) -> None:
        """Note a lease with a first outcome that was not passed on."""
        active.dirty_since_us = self.engine.clock.now_us()
        self._unsettled[id(active)] = active
        if len(self._unsettled) == 1:
            self._changed.set()

    async def _settle_loop(self) -> None:
        """Pass on finished leases at once, and outcomes of long ones every flush interval."""
        interval_us = self.engine.limits.flush_interval_ms * 1_000
        while True:
            while self._finished:
                await self._settle_finished(self._finished.popleft())
            now_us = self.engine.clock.now_us()
            due_leases = [
                active for active in self._unsettled.values() if active.dirty_since_us + interval_us <= now_us
            ]
            for active in due_leases:
                self._unsettled.pop(id(active), None)
                await self._put_all(self._outcomes_of(active))
            self._wants_runs.set()
            if self._finished:
                continue
            if self._is_draining:
                return
            self._changed.clear()
            oldest = min((active.dirty_since_us for active in self._unsettled.values()), default=None)
            timeout_s = None if oldest is None else max(0.0, (oldest + interval_us - now_us) / 1_000_000)
            await self.engine.clock.wait_for(self._changed, timeout_s)

    async def _settle_finished(self, active: ActiveLease) -> None:
        updates: list[Update] = self._outcomes_of(active)
        if not active.is_over:
            updates.append(self._release_of(active))
        await self.session.end_lease(active, updates)

    async def _put_all(self, updates: Sequence[Update]) -> None:
        for update in updates:
            await self.session.put(update)

    def _outcomes_of(self, active: ActiveLease) -> list[Update]:
        settlements: list[Update] = []
        while True:
            settlement = active.take_settlement(self.engine.limits.chunk_bytes_max)
            if settlement is None:
                return settlements
            for code in self._counts:
                self._counts[code] += settlement.codes.count(code)
            settlements.append(settlement)
            if not active.has_untaken:
                return settlements

    def _release_of(self, active: ActiveLease) -> Release:
        lease = active.lease
        if lease.at_most_once:  # a run that began and did not end may have done its work: the store fails it
            begun = [active.span_slots[n] for n in range(active.count) if active.marks[active.span_slots[n]] == BEGUN]
            crash_details = active.evidence or "the worker stopped"
            return Release(span_id=lease.span_id, token=lease.token, suspects=tuple(begun), evidence=crash_details)
        return Release(
            span_id=lease.span_id, token=lease.token, suspects=tuple(active.suspects), evidence=active.evidence
        )

    def _on_cancelled(self, reply: Heartbeat) -> None:
        """Interrupt the runs that were cancelled, of the leases that the store had when it answered.

        A run that was cancelled, redriven and claimed again since then is not meant.
        """
        if not reply.stopped and not reply.cancelled:
            return
        stopped, single = set(reply.stopped), set(reply.cancelled)
        names = {(stored.span_id, stored.token) for stored in reply.leases}

        def is_cancelled(active: ActiveLease, lease_offset: int) -> bool:
            lease = active.lease
            is_meant = lease.batch_id in stopped or (lease.batch_id, lease.indexes[lease_offset]) in single
            return is_meant and (lease.span_id, lease.token) in names

        self._executor.interrupt(is_cancelled, CANCELLED)
        if self._pool is not None:
            self._pool.interrupt(is_cancelled, CANCELLED)
