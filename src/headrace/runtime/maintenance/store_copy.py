"""Copies all of one store into another, while no process works on the first.

The source is fenced first: from then on it accepts no writes from any process, and copied rows stay as they were. Pages
of blocks are copied one after the other, each once, however often the copy is killed. Then each batch is published as a
whole, and its ledger is counted from the chunks on both sides.
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
    """The result of a copy. `objects_missing`: payloads that the source's object store no longer has."""

    batches: int = 0
    blocks: int = 0
    runs: int = 0
    objects: int = 0
    objects_missing: list[str] = []
    resumed: bool = False


class StoreCopy:
    """One copy of `source` into `target`, read through `copy_source` and written through `copy_target`."""

    def __init__(self, source: Engine, target: Engine, *, copy_source: CopySource, copy_target: CopyTarget) -> None:
        self._source = source
        self._target = target
        self.copy_source = copy_source
        self.copy_target = copy_target
        self._report = CopyReport()

    async def run(self, target_name: str, report_progress: Callable[[int, int], None]) -> CopyReport:
        """Copy everything; `report_progress(copied, total)` gets the numbers of runs. The same call resumes a copy that
        was killed.

        Raises `Conflict` while a process works on the source, and `StoreBroken` if the ledgers differ in the end.
        """
        await self._recover_ended()
        now_us = self._source.clock.now_us()
        move_id, self._report.resumed = await self.copy_source.fence(new_move_id(now_us), target_name, now_us=now_us)
        runs_count = await self.copy_source.runs_count()
        async for batches in self._batches():
            keyed_batches = [
                (batch["environment"], batch["key"], batch["id"]) for batch in batches if batch["key"] is not None
            ]
            await self.copy_target.check_keys(keyed_batches)
        await self._copy_pages(move_id, lambda runs: report_progress(runs, runs_count))
        await self._publish_batches()
        await self._verify()
        await self.copy_source.finish(now_us=self._source.clock.now_us())
        await self.copy_target.forget(move_id)
        self._target.wakeup.notify()
        return self._report

    async def undo(self) -> None:
        """Undo a copy that is not finished: copied rows are deleted, and the source accepts writes again.

        Raises `Conflict` if batches were published: they run in the target, so the copy can't be undone.
        """
        async for batches in self._batches():
            while await self.copy_target.delete_unpublished([batch["id"] for batch in batches]):
                continue
        await self.copy_target.forget(await self.copy_source.unfence())

    async def _batches(self) -> AsyncIterator[list[dict[str, Any]]]:
        after_id = ""
        while batches := await self.copy_source.batches(after_id):
            yield batches
            after_id = batches[-1]["id"]

    async def _recover_ended(self) -> None:
        """Recover ended processes first, so that nothing is leased."""
        try:
            await recover_here(self._source, "")
            await recover_silent(self._source, "")
            await Upkeep(self._source).sweep()
        except StoreBroken:  # the source is fenced already: an earlier start has recovered them
            return

    async def _copy_pages(self, move_id: str, report_progress: Callable[[int], None]) -> None:
        after_id = await self.copy_target.moved_until(move_id)
        while (page := await self.copy_source.page(after_id)).blocks:
            self._report.blocks += len(page.blocks)
            self._report.runs += page.runs_count
            await self.copy_target.insert_page(move_id, after_id, page)
            after_id = page.blocks[-1][0]
            report_progress(self._report.runs)

    async def _publish_batches(self) -> None:
        """Publish each batch after its belongings; from then on it runs in the target."""
        offsets = await self._copy_queues()
        async for batches in self._batches():
            for batch in batches:
                await self._copy_belongings(batch["id"], batch["environment"])
                cancelled = await self.copy_source.cancellations(batch["id"])
                offset, now_us = offsets.get(batch["environment"], 0), self._target.clock.now_us()
                await self.copy_target.publish_batch(batch, cancelled, offset, now_us=now_us)
                self._report.batches += 1

    async def _copy_queues(self) -> dict[str, int]:
        queues = await self.copy_source.queues()
        offsets = {}
        for environment in sorted({row[0] for row in queues}):
            environment_queues = [
                (name, clock, paused) for where, name, clock, paused in queues if where == environment
            ]
            lanes = await self.copy_source.lanes(environment)
            offsets[environment] = await self.copy_target.create_queues(environment, environment_queues, lanes)
        await self.copy_target.keep_rules(await self.copy_source.rules())
        return offsets

    async def _copy_belongings(self, batch_id: str, environment: str) -> None:
        page: Belongings | None = None
        while (page := await self.copy_source.belongings(batch_id, page)) != NOTHING:
            for key, _ in page.objects:
                await self._copy_object(key)
            await self.copy_target.insert_belongings(batch_id, environment, page, now_us=self._target.clock.now_us())

    async def _copy_object(self, key: str) -> None:
        if self._source.payloads.url == self._target.payloads.url:
            return
        try:
            data = await self._source.payloads.get(key)
        except ObjectMissing:
            self._report.objects_missing.append(key)
            return
        await self._target.payloads.put(key, data)
        self._report.objects += 1

    async def _verify(self) -> None:
        """Count every batch from its chunks on both sides; runs that already execute in the target are included."""
        async for batches in self._batches():
            for batch in batches:
                source_count = await self._source.store.verify(batch["id"])
                target_count = await self._target.store.verify(batch["id"])
                if (
                    source_count.differences
                    or target_count.differences
                    or source_count.ledger.expected != target_count.ledger.expected
                ):
                    raise StoreBroken(
                        f"the ledgers differ: {source_count.ledger} in the source, {target_count.ledger} in the target",
                        hint="nothing was deleted: keep the source, and report the `headrace verify` of both",
                        batch_id=batch["id"],
                        differences=[*source_count.differences, *target_count.differences][:5],
                    )
