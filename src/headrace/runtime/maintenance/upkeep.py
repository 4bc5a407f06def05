"""What must happen though nobody asks for it: each duty a short function in a listed order, done in bounded steps.

Every process with a broker does upkeep, and the store hands each duty to one of them at a time: whoever takes a due
duty has it until its deadline, and when it is done it is due again an interval later, for whoever looks first. No
leader is elected; a process that dies over a duty loses it at the deadline. Only what hangs on the machine (whose
process died here) is everybody's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any, Final, NamedTuple

import structlog

from headrace.core.activation import LANE
from headrace.core.rules import rules_of
from headrace.foundation.errors import HeadraceError
from headrace.foundation.ids import new_session_id
from headrace.foundation.limits import MINUTE_MS, SECOND_MS
from headrace.runtime.engine import DutyStats, Engine
from headrace.runtime.sessions.recovery import recover_here, recover_silent
from headrace.store.client_uploads import FOLDER as PACKETS

LOG: Any = structlog.get_logger("headrace.upkeep")
ROWS_MAX: Final = 1_000
BATCHES_MAX: Final = 10
ORPHAN_PAGE: Final = 500
ORPHANS_EVERY_MS: Final = 5 * MINUTE_MS
"""Between two looks at the object store, which is slower to list than a table."""

PAUSE_MIN_S: Final = 0.01


class Duty(NamedTuple):
    """One thing that must be done. `work` answers how much it moved, and when it is due again (0: at its interval).

    `deadline_ms` after it was begun it is given up, and free for others. `is_shared`: one process does it for all.
    """

    name: str
    work: Callable[[], Awaitable[tuple[int, int]]]
    deadline_ms: int
    interval_ms: int
    is_shared: bool = True


class Upkeep:
    """Does every duty that is due; one that fails is logged and keeps no other from its own."""

    def __init__(self, engine: Engine, session_id: Callable[[], str] = str) -> None:
        """`session_id` answers the session of this process, which is not looked at for signs of life; "" is none."""
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
            Duty("remove_orphans", self._remove_orphans, 60 * MINUTE_MS, max(interval_ms, ORPHANS_EVERY_MS)),
        )
        self.stats = engine.duties
        for duty in self.duties:
            self.stats.setdefault(duty.name, DutyStats())

    async def run(self) -> None:
        """Rounds until cancelled: one an interval, and one when a duty is due before that."""
        clock, interval_ms = self._engine.clock, self._engine.limits.upkeep_interval_ms
        self._next_us = clock.now_us() + interval_ms * 1_000
        while True:
            await clock.sleep(max(PAUSE_MIN_S, (self._next_us - clock.now_us()) / 1_000_000))
            await self.round()

    async def round(self) -> None:
        """Every duty that is due and that nobody else does, once."""
        engine = self._engine
        self._next_us = engine.clock.now_us() + engine.limits.upkeep_interval_ms * 1_000
        if not engine.is_maintained_here:  # a server keeps the store, and does these duties
            return
        try:
            free_us = await engine.maintenance.duties()
        except HeadraceError as error:
            LOG.warning("upkeep could not look at its duties", error=str(error))
            return
        for duty in self.duties:
            if not duty.is_shared:
                await self._done(duty)
            elif await self._is_taken(duty, free_us.get(duty.name, 0)):
                await self._free(duty, await self._done(duty))

    async def _is_taken(self, duty: Duty, free_us: int) -> bool:
        """Whether the duty is due and this process's from now on."""
        now_us = self._engine.clock.now_us()
        if free_us > now_us:
            self._next_us = min(self._next_us, free_us)
            return False
        try:
            return await self._engine.maintenance.take_duty(
                duty.name, self._holder, free_us=now_us + duty.deadline_ms * 1_000, now_us=now_us
            )
        except HeadraceError as error:
            LOG.warning("upkeep could not take a duty", duty=duty.name, error=str(error))
            return False

    async def _free(self, duty: Duty, due_us: int) -> None:
        self._next_us = min(self._next_us, due_us)
        try:
            await self._engine.maintenance.end_duty(duty.name, self._holder, free_us=due_us)
        except HeadraceError as error:  # it is free again at its deadline
            LOG.warning("upkeep could not hand a duty back", duty=duty.name, error=str(error))

    async def _done(self, duty: Duty) -> int:
        """Do a duty within its deadline; answers when it is due again."""
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
            LOG.warning("upkeep gave a duty up", duty=duty.name, deadline_ms=duty.deadline_ms)
        except HeadraceError as error:
            stats.failed_count += 1
            LOG.warning("upkeep could not do a duty", duty=duty.name, error=str(error))
        except Exception:
            stats.failed_count += 1
            LOG.exception("upkeep broke in a duty", duty=duty.name)
        finally:
            if not working.done():
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
            stats.seconds += perf_counter() - began
        usual_us = clock.now_us() + duty.interval_ms * 1_000
        return min(usual_us, due_us) if due_us else usual_us

    # -- the duties

    async def _recover_here(self) -> tuple[int, int]:
        """Leases of processes that died on this machine go back, at once."""
        return await recover_here(self._engine, self._session_id()), 0

    async def _recover_silent(self) -> tuple[int, int]:
        """Leases of processes that fell silent go back; due again when the next one may count as silent."""
        return await recover_silent(self._engine, self._session_id())

    async def _sweep(self) -> tuple[int, int]:
        return await self.sweep(), 0

    async def _prune(self) -> tuple[int, int]:
        return await self.prune(), 0

    async def _demote(self) -> tuple[int, int]:
        return await self.demote(), 0

    async def _purge_dead(self) -> tuple[int, int]:
        return await self.purge_dead(), 0

    async def _remove_orphans(self) -> tuple[int, int]:
        return await self.remove_orphans(), 0

    async def sweep(self) -> int:
        """Runs not started in time expire, batches past their seal deadline are abandoned, cancelled ones end."""
        engine, moved_count = self._engine, 0
        while True:
            swept = await engine.maintenance.sweep(now_us=engine.clock.now_us(), rows_max=ROWS_MAX)
            if swept.abandoned:
                LOG.warning("batches were not sealed in time and are abandoned", batches=swept.abandoned)
            if swept.expired_count or swept.cancelled_count:
                engine.recorded.notify()
            moved_count += swept.expired_count + swept.cancelled_count + len(swept.abandoned)
            if not swept.more:
                return moved_count

    async def prune(self, finished_before_us: int | None = None) -> int:
        """Batches past their retention go, whole, with their objects; answers how many."""
        engine = self._engine
        before_us = engine.clock.now_us() - engine.limits.retention_ms * 1_000
        if finished_before_us is not None:
            before_us = finished_before_us
        count = 0
        while True:
            pruned = await engine.maintenance.prune(before_us, batches_max=BATCHES_MAX, rows_max=ROWS_MAX)
            for environment, batch_id in pruned.batches:
                await engine.payloads.delete_batch(environment, batch_id)
            count += len(pruned.batches)
            if not pruned.more:
                return count

    async def demote(self) -> int:
        """What waits in demoted queues waits in those that took their place; answers how many spans moved."""
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
        """Dead letters that nobody looked at for long go; answers how many."""
        engine, count = self._engine, 0
        if not engine.limits.dead_letter_retention_ms:
            return 0
        before_us = engine.clock.now_us() - engine.limits.dead_letter_retention_ms * 1_000
        while page := await engine.store.dead_letters(engine.environment, before_us=before_us, limit=ROWS_MAX):
            count += await engine.store.purge_dead(engine.environment, [(dead.batch_id, dead.index) for dead in page])
        return count

    async def remove_orphans(self) -> int:
        """Objects older than the grace that no row names (their append never came) go; answers how many."""
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
        removed_count += await engine.payloads.delete_older(PACKETS, before_us)
        return removed_count + await self._remove_unnamed(page)

    async def _remove_unnamed(self, keys: list[str]) -> int:
        orphans = await self._engine.maintenance.unnamed(keys) if keys else []
        await self._engine.payloads.delete(orphans)
        return len(orphans)
