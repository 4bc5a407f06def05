"""What must happen though nobody asks for it: each duty a short function in a listed order, done in bounded steps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog

from headrace.foundation.errors import HeadraceError
from headrace.foundation.limits import SECOND_MS
from headrace.runtime.broker import Broker
from headrace.runtime.engine import Engine

LOG: Any = structlog.get_logger("headrace.upkeep")
ROWS_MAX: Final = 1_000
BATCHES_MAX: Final = 10
ORPHAN_PAGE: Final = 500
ORPHANS_EVERY: Final = 60
"""Rounds between two looks at the object store, which is slower to list than a table."""


class Upkeep:
    """Runs every duty once a round; a duty that fails is logged and does not keep the others from theirs."""

    def __init__(self, engine: Engine, broker: Broker | None) -> None:
        self._engine = engine
        self._broker = broker
        self._rounds_count = 0
        self.duties: list[tuple[str, Callable[[], Awaitable[object]]]] = [
            ("recover", self.recover),
            ("sweep", self.sweep),
            ("prune", self.prune),
            ("remove_orphans", self._remove_orphans_now_and_then),
        ]

    async def run(self) -> None:
        """Rounds until cancelled."""
        while True:
            await self._engine.clock.sleep(self._engine.limits.upkeep_interval_ms / SECOND_MS)
            await self.round()

    async def round(self) -> None:
        """Every duty once."""
        for name, duty in self.duties:
            try:
                await duty()
            except HeadraceError as error:
                LOG.warning("upkeep could not do a duty", duty=name, error=str(error))
            except Exception:
                LOG.exception("upkeep broke in a duty", duty=name)
        self._rounds_count += 1

    async def recover(self) -> None:
        """Leases of sessions that died go back."""
        if self._broker is not None:
            await self._broker.recover()

    async def sweep(self) -> None:
        """Runs not started in time expire, batches past their seal deadline are abandoned, cancelled ones end."""
        engine = self._engine
        while True:
            swept = await engine.store.sweep(now_us=engine.clock.now_us(), rows_max=ROWS_MAX)
            if swept.abandoned:
                LOG.warning("batches were not sealed in time and are abandoned", batches=swept.abandoned)
            if swept.expired_count or swept.cancelled_count:
                engine.recorded.ring()
            if not swept.more:
                return

    async def prune(self, finished_before_us: int | None = None) -> int:
        """Batches past their retention go, whole, with their objects; answers how many."""
        engine = self._engine
        before_us = engine.clock.now_us() - engine.limits.retention_ms * 1_000
        if finished_before_us is not None:
            before_us = finished_before_us
        count = 0
        while True:
            pruned = await engine.store.prune(before_us, batches_max=BATCHES_MAX, rows_max=ROWS_MAX)
            for environment, batch_id in pruned.batches:
                await engine.payloads.delete_batch(environment, batch_id)
            count += len(pruned.batches)
            if not pruned.more:
                return count

    async def _remove_orphans_now_and_then(self) -> None:
        if self._rounds_count % ORPHANS_EVERY == 0:
            await self.remove_orphans()

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
        return removed_count + await self._remove_unnamed(page)

    async def _remove_unnamed(self, keys: list[str]) -> int:
        orphans = await self._engine.store.unnamed(keys) if keys else []
        await self._engine.payloads.delete(orphans)
        return len(orphans)
