"""Upkeep: the duties that no request triggers, each a short function, done in bounded steps and in a fixed order.

Every process with a session does upkeep, and the store gives each duty to one of them at a time. The process that takes
a due duty has it until the duty's deadline. When it is done, it is due again after an interval, for the process that
checks first. There is no leader; a process that ends during a duty loses it at the deadline. Only recovery of this
machine's own processes is done by every process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any, Final, NamedTuple

from headrace.core.activation import LANE
from headrace.core.rules import rules_of
from headrace.core.serving import StalledLane
from headrace.foundation.errors import HeadraceError, InvalidInput
from headrace.foundation.ids import new_session_id
from headrace.foundation.limits import MINUTE_MS, SECOND_MS
from headrace.foundation.logs import get_logger
from headrace.runtime.engine import DutyStats, Engine
from headrace.runtime.sessions.recovery import recover_here, recover_silent
from headrace.store.client_uploads import FOLDER as UPLOADS_FOLDER

LOG: Any = get_logger("headrace.upkeep")
ROWS_MAX: Final = 1_000
BATCHES_MAX: Final = 250
ORPHAN_PAGE: Final = 500
ORPHANS_EVERY_MS: Final = 5 * MINUTE_MS
"""Between two listings of the object store, which is slower to list than a table."""

PAUSE_MIN_S: Final = 0.01
HEARTBEATS_FIRST_S: Final = 2.5
"""Pause after an outage of the store: other processes send their heartbeats, so that none counts as gone."""


class Duty(NamedTuple):
    """One duty. `work` returns how much it changed, and when it is due again (0: after its interval).

    It is given up `deadline_ms` after its start, and is free for other processes then. `is_shared`: one process does it
    for all.
    """

    name: str
    work: Callable[[], Awaitable[tuple[int, int]]]
    deadline_ms: int
    interval_ms: int
    is_shared: bool = True


class Upkeep:
    """Does every duty that is due; a duty that fails is logged and does not prevent the others."""

    def __init__(self, engine: Engine, session_id: Callable[[], str] = str) -> None:
        """`session_id` returns the session of this process, which recovery skips; "" for none."""
        self._engine = engine
        self._session_id = session_id
        self._holder = new_session_id(engine.clock.now_us())
        self._next_us = 0
        interval_ms = engine.limits.upkeep_interval_ms
        self.duties = (
            Duty("recover_here", self._recover_here, 30 * SECOND_MS, interval_ms, is_shared=False),
            Duty("recover_silent", self._recover_silent, 30 * SECOND_MS, interval_ms),
            Duty("sweep", self._sweep, MINUTE_MS, interval_ms),
            Duty("prune", self._prune, 5 * MINUTE_MS, interval_ms),
            Duty("demote", self._demote, MINUTE_MS, interval_ms),
            Duty("purge_dead", self._purge_dead, MINUTE_MS, max(interval_ms, MINUTE_MS)),
            Duty("report_stalled", self._report_stalled, MINUTE_MS, max(interval_ms, MINUTE_MS)),
            Duty("remove_orphans", self._remove_orphans, 60 * MINUTE_MS, max(interval_ms, ORPHANS_EVERY_MS)),
        )
        self._stalled: set[StalledLane] = set()
        self.stats = engine.duties
        for duty in self.duties:
            self.stats.setdefault(duty.name, DutyStats())

    async def run(self) -> None:
        """Run rounds until cancelled: one per interval, and one when a duty is due earlier."""
        clock, interval_ms = self._engine.clock, self._engine.limits.upkeep_interval_ms
        self._next_us = clock.now_us() + interval_ms * 1_000
        while True:
            await clock.sleep(max(PAUSE_MIN_S, (self._next_us - clock.now_us()) / 1_000_000))
            if not self._engine.outage.is_over:
                await self._engine.outage.until_over(clock)
                await clock.sleep(HEARTBEATS_FIRST_S)
            await self.round()

    async def round(self) -> None:
        """Do every duty once that is due and that no other process does."""
        engine = self._engine
        self._next_us = engine.clock.now_us() + engine.limits.upkeep_interval_ms * 1_000
        if not engine.is_maintained_here:  # the server that keeps the store does these duties
            return
        try:
            free_us = await engine.maintenance.duties()
        except HeadraceError as error:
            LOG.warning("upkeep.duties_unreadable", error=str(error))
            return
        for duty in self.duties:
            if not duty.is_shared:
                await self._do(duty)
            elif await self._take_if_due(duty, free_us.get(duty.name, 0)):
                await self._release(duty, await self._do(duty))

    async def _take_if_due(self, duty: Duty, free_us: int) -> bool:
        """Take a duty if it is due; True if this process has it."""
        now_us = self._engine.clock.now_us()
        if free_us > now_us:
            self._next_us = min(self._next_us, free_us)
            return False
        try:
            return await self._engine.maintenance.take_duty(
                duty.name, self._holder, free_us=now_us + duty.deadline_ms * 1_000, now_us=now_us
            )
        except HeadraceError as error:
            LOG.warning("upkeep.take_failed", duty=duty.name, error=str(error))
            return False

    async def _release(self, duty: Duty, due_us: int) -> None:
        self._next_us = min(self._next_us, due_us)
        try:
            await self._engine.maintenance.end_duty(duty.name, self._holder, free_us=due_us)
        except HeadraceError as error:  # it is free again at its deadline
            LOG.warning("upkeep.release_failed", duty=duty.name, error=str(error))

    async def _do(self, duty: Duty) -> int:
        """Do a duty within its deadline; return when it is due again."""
        clock, stats, began = self._engine.clock, self.stats[duty.name], perf_counter()
        due_us = 0
        over = asyncio.Event()
        working = asyncio.ensure_future(duty.work())
        working.add_done_callback(lambda _: over.set())
        try:
            await clock.wait_for(over, duty.deadline_ms / SECOND_MS)
            moved_count, due_us = working.result()
            stats.done_count += 1
            stats.moved_count += moved_count
        except asyncio.InvalidStateError:  # the deadline came first
            stats.failed_count += 1
            LOG.warning("upkeep.deadline_exceeded", duty=duty.name, deadline_ms=duty.deadline_ms)
        except HeadraceError as error:
            stats.failed_count += 1
            LOG.warning("upkeep.duty_failed", duty=duty.name, error=str(error))
        except Exception:
            stats.failed_count += 1
            LOG.exception("upkeep.duty_crashed", duty=duty.name)
        finally:
            if not working.done():
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
            stats.seconds += perf_counter() - began
        usual_us = clock.now_us() + duty.interval_ms * 1_000
        return min(usual_us, due_us) if due_us else usual_us

    # -- duties

    async def _recover_here(self) -> tuple[int, int]:
        """Recover the leases of processes that ended on this machine, at once."""
        return await recover_here(self._engine, self._session_id()), 0

    async def _recover_silent(self) -> tuple[int, int]:
        """Recover the leases of sessions without heartbeats; due again when the next one may lapse."""
        return await recover_silent(self._engine, self._session_id())

    async def _sweep(self) -> tuple[int, int]:
        return await self.sweep(), 0

    async def _prune(self) -> tuple[int, int]:
        return await self.prune(), 0

    async def _demote(self) -> tuple[int, int]:
        return await self.demote(), 0

    async def _purge_dead(self) -> tuple[int, int]:
        return await self.purge_dead(), 0

    async def _report_stalled(self) -> tuple[int, int]:
        return await self.report_stalled(), 0

    async def _remove_orphans(self) -> tuple[int, int]:
        return await self.remove_orphans(), 0

    async def sweep(self) -> int:
        """Expire runs that did not start in time, abandon batches past their seal deadline, end cancelled ones."""
        engine, moved_count = self._engine, 0
        while True:
            swept = await engine.maintenance.sweep(now_us=engine.clock.now_us(), rows_max=ROWS_MAX)
            if swept.abandoned:
                LOG.warning("batch.abandoned", batches=swept.abandoned)
                engine.cancelled.notify()
            if swept.expired_count or swept.cancelled_count:
                engine.recorded.notify()
            moved_count += swept.expired_count + swept.cancelled_count + len(swept.abandoned)
            if not swept.more:
                return moved_count

    async def prune(self, finished_before_us: int | None = None) -> int:
        """Delete batches past their retention as a whole, with their objects; return their number."""
        engine = self._engine
        before_us = engine.clock.now_us() - engine.limits.retention_ms * 1_000
        if finished_before_us is not None:
            before_us = finished_before_us
        count = 0
        while True:
            pruned = await engine.maintenance.prune(before_us, batches_max=BATCHES_MAX, rows_max=ROWS_MAX)
            for environment, batch_id in pruned.with_objects:
                try:
                    await engine.payloads.delete_batch(environment, batch_id)
                except InvalidInput as error:  # an id that another version accepted; its batch had no objects
                    LOG.warning("upkeep.objects_kept", environment=environment, batch=batch_id, error=error.message)
            count += len(pruned.batches)
            if not pruned.more:
                return count

    async def demote(self) -> int:
        """Move the waiting runs of demoted queues into the queues that replace them; return the number of moved
        spans.
        """
        engine, moved_count = self._engine, 0
        store = engine.maintenance
        for source, target in rules_of(await engine.store.rules(engine.environment)).demotions.items():
            while True:
                count = await store.move_waiting(engine.environment, LANE, source, target, spans_max=ROWS_MAX)
                moved_count += count
                if count < ROWS_MAX:
                    break
        if moved_count:
            engine.wakeup.notify()
        return moved_count

    async def purge_dead(self) -> int:
        """Delete dead letters past their retention; return their number."""
        engine, count = self._engine, 0
        if not engine.limits.dead_letter_retention_ms:
            return 0
        before_us = engine.clock.now_us() - engine.limits.dead_letter_retention_ms * 1_000
        while page := await engine.store.dead_letters(engine.environment, before_us=before_us, limit=ROWS_MAX):
            count += await engine.store.purge_dead(engine.environment, [(dead.batch_id, dead.index) for dead in page])
        return count

    async def report_stalled(self) -> int:
        """Log each queue and task whose waiting runs no live worker takes, once as long as that lasts.

        Return 0: nothing is changed.
        """
        engine = self._engine
        lanes = await engine.store.stalled_lanes(engine.environment, now_us=engine.clock.now_us())
        stalled = {lane for lane in lanes if lane.reason != "paused"}  # an operator paused it
        for lane in sorted(stalled - self._stalled, key=lambda lane: (lane.queue, lane.task)):
            LOG.warning("lane.stalled", queue=lane.queue, task=lane.task, reason=lane.reason, hint=lane.hint)
        self._stalled = stalled
        return 0

    async def remove_orphans(self) -> int:
        """Delete objects older than the grace period that no row refers to (their append never came); return their
        number.
        """
        engine = self._engine
        before_us = engine.clock.now_us() - engine.limits.orphan_grace_ms * 1_000
        page: list[str] = []
        removed_count = 0
        async for stored in engine.payloads.list():
            if stored.modified_us < before_us:
                page.append(stored.key)
            if len(page) >= ORPHAN_PAGE:
                removed_count += await self._remove_unnamed(page)
                page = []
        removed_count += await engine.payloads.delete_older(UPLOADS_FOLDER, before_us)
        return removed_count + await self._remove_unnamed(page)

    async def _remove_unnamed(self, keys: list[str]) -> int:
        orphans = await self._engine.maintenance.unnamed(keys) if keys else []
        await self._engine.payloads.delete(orphans)
        return len(orphans)
