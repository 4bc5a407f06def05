"""An indexer over any house, with faults in its commits and everything it left behind as one value."""

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
from headrace.store.payloads import open_payloads
from tests.indexer.houses import House, opened

ALL = 1_000_000
STEADY = "steady"
BEFORE = "before"
AFTER = "after"
CRASH_BEFORE = "crash before"
CRASH_AFTER = "crash after"
FAULTS = (STEADY, BEFORE, AFTER, CRASH_BEFORE, CRASH_AFTER)


class Crash(Exception):
    """The process died here."""


class QuickClock(SystemClock):
    """A clock on which waiting for the next try takes no time; signs of life come as seldom as ever."""

    async def sleep(self, seconds: float) -> None:
        await super().sleep(seconds if seconds >= DEFAULT.heartbeat_ms / 1_000 else 0)


class Listed:
    """A source of what a test lists: events at rising positions, in pieces of `piece`, and now and then a `Rewind`.

    With `waits` it goes back only when everything before was handled.
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
        """What follows the newest rewind that was followed, then more; each rewind is told once."""
        self.opened.append(after)
        waiting: list[tuple[Position, Any]] = []
        rewinds = 0
        done: list[tuple[Position, Any]] = []
        for entry in self.entries:
            if isinstance(entry, Rewind):
                rewinds += 1
                if rewinds <= self.rewound:
                    done = [own for own in done + waiting if entry.to is not None and not is_after(own[0], entry.to)]
                    waiting = []
                    continue
                for arrived in self._pieces(
                    [own for own in done + waiting if after is None or is_after(own[0], after)]
                ):
                    yield arrived
                told = [own for own in done + waiting if after is None or is_after(own[0], after)]
                while self.waits and told and self.indexing._positions.get("main") != told[-1][0]:
                    await asyncio.sleep(0)
                done = [own for own in done + waiting if entry.to is not None and not is_after(own[0], entry.to)]
                waiting, after = [], entry.to
                yield entry
                self.rewound = rewinds
            else:
                waiting.append(entry)
        for arrived in self._pieces([own for own in done + waiting if after is None or is_after(own[0], after)]):
            yield arrived

    def _pieces(self, entries: Sequence[tuple[Position, Any]]) -> Iterable[Arrived]:
        for start in range(0, len(entries), self.piece):
            some = entries[start : start + self.piece]
            yield Arrived([own[0] for own in some], [own[1] for own in some])

    async def head(self) -> Position | None:
        return None


class Unsteady:
    """Tables whose commits fail as `faults` says, one word a try; after the last word all is steady."""

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
        fault = self.faults.pop(0) if self.faults else STEADY
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


class Left(NamedTuple):
    """Everything an indexer left: rows and history by table, checkpoints, runs, and where it stands."""

    rows: dict[str, list[str]]
    history: dict[str, list[str]]
    checkpoints: list[tuple[int, str, Position]]
    runs: list[tuple[str, str, Any]]
    no: int
    positions: dict[str, Position]


class Rig:
    """One indexer of `make(app, source)` over one house."""

    def __init__(self, house: House, make: Callable[[Headrace, Any], Indexer], clock: Clock | None = None) -> None:
        self.house = house
        self.clock = clock or QuickClock()
        self.app = Headrace("tests")
        self._make = make
        self.tables: Any = Unsteady(house.entities)

    def engine(self, **limits: int) -> Engine:
        return Engine(
            store=self.house.store,
            payloads=open_payloads("memory://"),
            clock=self.clock,
            limits=DEFAULT.replaced(**limits),
            environment="default",
            live_directory=None,
            beats_beside=False,
            wakeup=Wakeup(),
            entities=self.house.entities,
        )

    def indexing(self, source: Any, **limits: int) -> IndexerPipeline:
        indexing = IndexerPipeline(self._make(self.app, source).definition, self.engine(**limits), self.tables)
        if isinstance(source, Listed):
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
        """Run to the end of the source, starting anew after each crash."""
        while True:
            try:
                async with self.running(source, **limits) as indexing:
                    await indexing.run()
            except Crash:
                continue
            return indexing

    async def left(self, indexing: IndexerPipeline) -> Left:
        """Everything it left behind."""
        types: Sequence[EntityType] = indexing.plan.entities
        keeping = [own for own in types if indexing.plan.keeps_history(own)]
        (standing,) = await self.house.entities.standings("default")
        return Left(
            rows={own.table: list(map(repr, await self.house.entities.find(own, ()))) for own in types},
            history={own.table: list(map(repr, await self.house.entities.history(own))) for own in keeping},
            checkpoints=await self.house.entities.checkpoints("default", standing.name),
            runs=await self.runs(),
            no=standing.no,
            positions=standing.positions,
        )

    async def runs(self) -> list[tuple[str, str, Any]]:
        found = []
        store = self.house.store
        for batch, ledger in await store.batches("default", limit=ALL):
            assert batch.state == "sealed", "an empty one would be completed, and nobody's"
            assert ledger.balances
            for run in await store.runs("default", batch_id=batch.id, limit=ALL):
                view = await store.run(batch.id, run.index)
                found.append((view.idempotency_key, view.task, msgspec.json.decode(view.payload)))
        return sorted(found, key=lambda own: msgspec.json.decode(own[0])[1:])

    async def forget(self) -> None:
        """Drop the tables, and the runs with them: as if nothing had been."""
        for standing in await self.house.entities.standings("default"):
            await self.house.entities.reset("default", standing.name)
        for batch, _ in await self.house.store.batches("default", limit=ALL):
            await self.house.store.stop_batch(batch.id, "cancelled", now_us=1)
        while (await self.house.store.prune(2**62, batches_max=1_000, rows_max=100_000)).more:
            pass


@asynccontextmanager
async def rig(
    name: str, folder: Path, make: Callable[[Headrace, Any], Indexer], clock: Clock | None = None
) -> AsyncIterator[Rig]:
    """A rig on a fresh house."""
    async with opened(name, folder) as house:
        yield Rig(house, make, clock)
