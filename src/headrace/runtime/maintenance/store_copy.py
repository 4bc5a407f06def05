"""Moving all of one store into another, while nothing works on the first.

The source is fenced first: from then on it takes no writes, whoever has it open, and what was copied stays as it was
copied. Pages of blocks are copied one after the other, each once however often the move is killed; then each batch is
let in as a whole, and its ledger is counted from the chunks on both sides.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from headrace.foundation.errors import ObjectMissing, StoreBroken
from headrace.foundation.ids import new_move_id
from headrace.runtime.engine import Engine
from headrace.runtime.maintenance.upkeep import Upkeep
from headrace.runtime.sessions.recovery import recover_here, recover_silent
from headrace.store.store_copy import NOTHING, Belongings, CopySource, CopyTarget


class CopyReport(msgspec.Struct, kw_only=True):
    """What a move came to. `objects_missing`: payloads that the source's object store no longer has."""

    batches: int = 0
    blocks: int = 0
    runs: int = 0
    objects: int = 0
    objects_missing: list[str] = []
    resumed: bool = False


class StoreCopy:
    """One move of `source` into `target`, whose stores are `departure` and `arrival`."""

    def __init__(self, source: Engine, target: Engine, *, departure: CopySource, arrival: CopyTarget) -> None:
        self._source = source
        self._target = target
        self.departure = departure
        self.arrival = arrival
        self._moved = CopyReport()

    async def run(self, target_name: str, told: Callable[[int, int], None]) -> CopyReport:
        """Move everything; `told(runs, of how many)` hears how far it has come. The same call goes on where it was.

        Raises `Conflict` while anybody works on the source, and `StoreBroken` when the ledgers differ in the end.
        """
        await self._settle_down()
        now_us = self._source.clock.now_us()
        move_id, self._moved.resumed = await self.departure.fence(new_move_id(now_us), target_name, now_us=now_us)
        runs_count = await self.departure.runs_count()
        async for batches in self._batches():
            named = [(batch["environment"], batch["key"], batch["id"]) for batch in batches if batch["key"] is not None]
            await self.arrival.check_keys(named)
        await self._copy_pages(move_id, lambda runs: told(runs, runs_count))
        await self._let_in()
        await self._verify()
        await self.departure.finish(now_us=self._source.clock.now_us())
        await self.arrival.forget(move_id)
        self._target.wakeup.notify()
        return self._moved

    async def undo(self) -> None:
        """Give up a move that is not over: what was copied is deleted, and the source takes writes again.

        Raises `Conflict` when batches were let in: they run in the target, and there is no way back.
        """
        async for batches in self._batches():
            while await self.arrival.take_back([batch["id"] for batch in batches]):
                continue
        await self.arrival.forget(await self.departure.unfence())

    async def _batches(self) -> AsyncIterator[list[dict[str, Any]]]:
        after_id = ""
        while batches := await self.departure.batches(after_id):
            yield batches
            after_id = batches[-1]["id"]

    async def _settle_down(self) -> None:
        """What dead processes left goes back first, so that nothing is leased."""
        try:
            await recover_here(self._source, "")
            await recover_silent(self._source, "")
            await Upkeep(self._source).sweep()
        except StoreBroken:  # it is fenced already: an earlier start has done this
            return

    async def _copy_pages(self, move_id: str, told: Callable[[int], None]) -> None:
        after_id = await self.arrival.moved_until(move_id)
        while (page := await self.departure.page(after_id)).blocks:
            self._moved.blocks += len(page.blocks)
            self._moved.runs += page.runs_count
            await self.arrival.take_in(move_id, after_id, page)
            after_id = page.blocks[-1][0]
            told(self._moved.runs)

    async def _let_in(self) -> None:
        """Each batch with what it owns, and then the batch itself: from then on it runs in the target."""
        offsets = await self._know_queues()
        async for batches in self._batches():
            for batch in batches:
                await self._own(batch["id"], batch["environment"])
                cancelled = await self.departure.cancellations(batch["id"])
                offset, now_us = offsets.get(batch["environment"], 0), self._target.clock.now_us()
                await self.arrival.let_in(batch, cancelled, offset, now_us=now_us)
                self._moved.batches += 1

    async def _know_queues(self) -> dict[str, int]:
        found = await self.departure.queues()
        offsets = {}
        for environment in sorted({row[0] for row in found}):
            own = [(name, clock, paused) for where, name, clock, paused in found if where == environment]
            lanes = await self.departure.lanes(environment)
            offsets[environment] = await self.arrival.know(environment, own, lanes)
        await self.arrival.keep_rules(await self.departure.rules())
        return offsets

    async def _own(self, batch_id: str, environment: str) -> None:
        page: Belongings | None = None
        while (page := await self.departure.belongings(batch_id, page)) != NOTHING:
            for key, _ in page.objects:
                await self._copy_object(key)
            await self.arrival.own(batch_id, environment, page, now_us=self._target.clock.now_us())

    async def _copy_object(self, key: str) -> None:
        if self._source.payloads.url == self._target.payloads.url:
            return
        try:
            data = await self._source.payloads.get(key)
        except ObjectMissing:
            self._moved.objects_missing.append(key)
            return
        await self._target.payloads.put(key, data)
        self._moved.objects += 1

    async def _verify(self) -> None:
        """Both sides count every batch from its chunks; what runs in the target meanwhile is still accounted for."""
        async for batches in self._batches():
            for batch in batches:
                here = await self._source.store.verify(batch["id"])
                there = await self._target.store.verify(batch["id"])
                if here.differences or there.differences or here.ledger.expected != there.ledger.expected:
                    raise StoreBroken(
                        f"the ledgers differ: {here.ledger} before, {there.ledger} after",
                        hint="nothing was deleted: keep the source, and report this with `headrace verify` of both",
                        batch_id=batch["id"],
                        differences=[*here.differences, *there.differences][:5],
                    )
