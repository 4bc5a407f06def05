"""Rig that runs an indexer over each kind of store, with faults in its commits, and compares what it has stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from headrace import Headrace
from headrace.core.entity import EntityType
from headrace.core.sequencer import Arrived, Position, Rewind, is_after
from headrace.foundation.errors import StoreUnavailable
from headrace.foundation.limits import DEFAULT
from headrace.indexer import Indexer
from headrace.runtime.clock import Clock, SystemClock
from headrace.runtime.engine import Engine
from headrace.runtime.indexing.pipeline import IndexerPipeline
from headrace.runtime.indexing.sources.source import Arrival
from headrace.runtime.wakeup import Wakeup
from headrace.store.entities.protocol import Commit, EntityStore
from headrace.store.object_store import open_payloads
from tests.indexer.indexer_stores import IndexerStores, stores_in

ALL = 1_000_000
NO_FAULT = "none"
BEFORE = "before"
AFTER = "after"
CRASH_BEFORE = "crash before"
CRASH_AFTER = "crash after"
FAULTS = (NO_FAULT, BEFORE, AFTER, CRASH_BEFORE, CRASH_AFTER)


class Crash(Exception):
    """Stands for the end of the process at this point."""


class QuickClock(SystemClock):
    """A clock whose waits before a retry take no time; waits as long as a heartbeat interval stay as they are."""

    async def sleep(self, seconds: float) -> None:
        await super().sleep(seconds if seconds >= DEFAULT.heartbeat_ms / 1_000 else 0)


class ListSource:
    """A source over a list: events at increasing positions, in pieces of `piece`, and `Rewind` entries between them.

    With `waits`, a rewind is sent only after all events before it were handled.
    """

    def __init__(
        self, entries: Iterable[tuple[Position, Any] | Rewind] = (), *, piece: int = 1_000, waits: bool = True
    ) -> None:
        self.entries = list(entries)
        self.piece = piece
        self.waits = waits
        self.indexing: Any = None
        self.rewound = 0
        self.opened: list[Position | None] = []

    async def arrivals(self, after: Position | None) -> AsyncIterator[Arrival]:
        """Yield the events after the last rewind that was sent, then the rest of the list; each rewind is sent once."""
        self.opened.append(after)
        waiting: list[tuple[Position, Any]] = []
        rewinds = 0
        done: list[tuple[Position, Any]] = []
        for entry in self.entries:
            if isinstance(entry, Rewind):
                rewinds += 1
                if rewinds <= self.rewound:
                    done = self._up_to(done + waiting, entry.to)
                    waiting = []
                    continue
                for arrived in self._pieces(self._following(done + waiting, after)):
                    yield arrived
                sent = self._following(done + waiting, after)
                while self.waits and sent and self.indexing._positions.get("main") != sent[-1][0]:
                    await asyncio.sleep(0)
                done = self._up_to(done + waiting, entry.to)
                waiting, after = [], entry.to
                yield entry
                self.rewound = rewinds
            else:
                waiting.append(entry)
        for arrived in self._pieces(self._following(done + waiting, after)):
            yield arrived

    @staticmethod
    def _up_to(entries: Sequence[tuple[Position, Any]], last: Position | None) -> list[tuple[Position, Any]]:
        return [entry for entry in entries if last is not None and not is_after(entry[0], last)]

    @staticmethod
    def _following(entries: Sequence[tuple[Position, Any]], after: Position | None) -> list[tuple[Position, Any]]:
        return [entry for entry in entries if after is None or is_after(entry[0], after)]

    def _pieces(self, entries: Sequence[tuple[Position, Any]]) -> Iterable[Arrived]:
        for start in range(0, len(entries), self.piece):
            piece = entries[start : start + self.piece]
            yield Arrived([position for position, _ in piece], [event for _, event in piece])

    async def head(self) -> Position | None:
        return None


class FailingTables:
    """Entity tables whose commits fail as `faults` lists, an entry a try; after the last entry no commit fails."""

    def __init__(self, tables: EntityStore, faults: Sequence[str] = (), turns: Sequence[int] = ()) -> None:
        self.tables = tables
        self.faults = list(faults)
        self.turns = list(turns)
        self.commits: list[Commit] = []
        self.gate: asyncio.Event | None = None
        self.frozen = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tables, name)

    async def commit(self, commit: Commit, *, now_us: int) -> None:
        fault = self.faults.pop(0) if self.faults else NO_FAULT
        for _ in range(self.turns.pop(0) if self.turns else 0):
            await asyncio.sleep(0)
        if self.gate is not None:
            self.frozen.set()
            await self.gate.wait()
        if fault == BEFORE:
            raise StoreUnavailable("the connection broke before the commit")
        if fault == CRASH_BEFORE:
            raise Crash
        await self.tables.commit(commit, now_us=now_us)
        self.commits.append(commit)
        if fault == AFTER:
            raise StoreUnavailable("the connection broke after the commit")
        if fault == CRASH_AFTER:
            raise Crash


class IndexerContents(NamedTuple):
    """Everything an indexer has stored: rows and history by table, checkpoints, runs, number and positions."""

    rows: dict[str, list[str]]
    history: dict[str, list[str]]
    checkpoints: list[tuple[int, str, Position]]
    runs: list[tuple[str, str, Any]]
    no: int
    positions: dict[str, Position]


class IndexerRig:
    """Runs of an indexer of `make(app, source)` over the stores of a test."""

    def __init__(
        self, stores: IndexerStores, make: Callable[[Headrace, Any], Indexer], clock: Clock | None = None
    ) -> None:
        self.stores = stores
        self.clock = clock or QuickClock()
        self.app = Headrace("tests")
        self._make = make
        self.tables: Any = FailingTables(stores.entities)

    def engine(self, **limits: int) -> Engine:
        return Engine(
            store=self.stores.store,
            payloads=open_payloads("memory://"),
            clock=self.clock,
            limits=DEFAULT.replaced(**limits),
            environment="default",
            live_directory=None,
            beats_beside=False,
            wakeup=Wakeup(),
            entities=self.stores.entities,
        )

    def indexing(self, source: Any, **limits: int) -> IndexerPipeline:
        indexing = IndexerPipeline(self._make(self.app, source).definition, self.engine(**limits), self.tables)
        if isinstance(source, ListSource):
            source.indexing = indexing
        return indexing

    @asynccontextmanager
    async def running(self, source: Any, **limits: int) -> AsyncIterator[IndexerPipeline]:
        indexing = self.indexing(source, **limits)
        try:
            await indexing.start()
            yield indexing
        finally:
            await indexing.close()

    async def run(self, source: Any, **limits: int) -> IndexerPipeline:
        """Run to the end of the source; start again after each crash."""
        while True:
            try:
                async with self.running(source, **limits) as indexing:
                    await indexing.run()
            except Crash:
                continue
            return indexing

    async def contents(self, indexing: IndexerPipeline) -> IndexerContents:
        """Return everything the indexer has stored."""
        types: Sequence[EntityType] = indexing.plan.entities
        with_history = [entity for entity in types if indexing.plan.keeps_history(entity)]
        (state,) = await self.stores.entities.indexer_states("default")
        return IndexerContents(
            rows={entity.table: list(map(repr, await self.stores.entities.find(entity, ()))) for entity in types},
            history={
                entity.table: list(map(repr, await self.stores.entities.history(entity))) for entity in with_history
            },
            checkpoints=await self.stores.entities.checkpoints("default", state.name),
            runs=await self.runs(),
            no=state.no,
            positions=state.positions,
        )

    async def runs(self) -> list[tuple[str, str, Any]]:
        runs = []
        store = self.stores.store
        for batch, ledger in await store.batches("default", limit=ALL):
            assert batch.state == "sealed", "a batch without runs would be completed"
            assert ledger.balances
            for run in await store.runs("default", batch_id=batch.id, limit=ALL):
                view = await store.run(batch.id, run.index)
                runs.append((view.idempotency_key, view.task, msgspec.json.decode(view.payload)))
        return sorted(runs, key=lambda run: msgspec.json.decode(run[0])[1:])

    async def forget(self) -> None:
        """Drop the tables and the runs of earlier tests."""
        for state in await self.stores.entities.indexer_states("default"):
            await self.stores.entities.reset("default", state.name)
        for batch, _ in await self.stores.store.batches("default", limit=ALL):
            await self.stores.store.stop_batch(batch.id, "cancelled", now_us=1)
        while (await self.stores.store.prune(2**62, batches_max=1_000, rows_max=100_000)).more:
            pass


@asynccontextmanager
async def open_rig(
    name: str, folder: Path, make: Callable[[Headrace, Any], Indexer], clock: Clock | None = None
) -> AsyncIterator[IndexerRig]:
    """Open a rig on stores in a folder."""
    async with stores_in(name, folder) as stores:
        yield IndexerRig(stores, make, clock)
