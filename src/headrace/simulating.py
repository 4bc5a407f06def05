"""An indexer over tables in memory, with events, faults and time in a test's hand.

    simulation = await transfers.simulate([Transfer("ann", "ben", 5)])
    assert simulation.rows(Account) == [Account("ann", -5), Account("ben", 5)]

    async with transfers.simulation() as simulation:
        simulation.hold_commits()
        simulation.feed(…)
        …

The same loops run as in production; only the house is the one in memory. `drain`, `flush` and every read that waits
raise the commit's own error when one failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import msgspec

from headrace.compose import memory_engine
from headrace.core.entity import Entity, EntityType
from headrace.core.sequencer import Arrived, Position
from headrace.foundation.errors import InvalidInput, InvalidSetting
from headrace.foundation.limits import Limits
from headrace.runtime.clock import Clock, SystemClock
from headrace.runtime.engine import Engine
from headrace.runtime.indexing.pipeline import IndexerDefinition, IndexerPipeline, IndexerProgress
from headrace.runtime.indexing.sources.source import Arrival
from headrace.store.entities.protocol import Commit, EntityStore, IndexerState

E = TypeVar("E", bound=Entity)
ALL_RUNS = 1_000_000


class EnqueuedRun(NamedTuple):
    """A run that a handler enqueued: its task, queue, and payload as JSON would decode it."""

    task: str
    queue: str
    payload: Any
    key: str


class Fed:
    """A source of what a test feeds, in the order fed; it ends where that ends, and may be read again."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.positions: list[Position] = []

    async def arrivals(self, after: Position | None) -> AsyncIterator[Arrival]:
        """What was fed after a position."""
        start = 0 if after is None else self.positions.index(after) + 1
        if start < len(self.events):
            yield Arrived(self.positions[start:], self.events[start:])

    async def head(self) -> Position | None:
        """The last one fed."""
        return self.positions[-1] if self.positions else None


class Simulation:
    """One simulated indexer. Made by `indexer.simulate(events)` and `indexer.simulation()`."""

    def __init__(self, definition: IndexerDefinition, engine: Engine) -> None:
        self.engine = engine
        self.source = Fed()
        self._open = asyncio.Event()
        self._open.set()
        self._faults: list[BaseException] = []
        self._tables = _Watched(engine.tables, self)
        (name, *others) = definition.sources
        if others:
            raise InvalidSetting("several sources can't be simulated as one", hint="simulate each, or run on sqlite")
        self._name = definition.name
        self.indexing = IndexerPipeline(replace(definition, sources={name: self.source}), engine, self._tables)

    @classmethod
    async def made(
        cls, definition: IndexerDefinition, limits: Mapping[str, int], clock: Clock | None = None
    ) -> Simulation:
        """One that has begun, before its first event."""
        engine = await memory_engine(Limits().replaced(**limits), clock or SystemClock())
        simulation = cls(definition, engine)
        await simulation.indexing.start()
        return simulation

    async def close(self) -> None:
        """End it; what it made can still be looked at."""
        self.release_commits()
        await self.indexing.close()

    # -- what a test does

    def feed(self, *events: Any) -> None:
        """Events that come next."""
        first = len(self.source.events) + 1
        self.source.events += events
        self.source.positions += range(first, first + len(events))

    async def drain(self) -> IndexerProgress:
        """Handle everything that was fed and commit it. Raises what a handler or a commit raised."""
        return await self.indexing.run()

    async def flush(self) -> None:
        """Return when what was handled is committed. Raises what a commit raised."""
        await self.indexing.flush()

    async def rewind(self, to: Position | None) -> IndexerState:
        """Go back; what was fed after that position is forgotten, and other events may be fed."""
        standing = await self.indexing.rollback(to)
        count = 0 if to is None else self.source.positions.index(to) + 1
        del self.source.events[count:], self.source.positions[count:]
        return standing

    def fail_commits(self, *errors: BaseException) -> None:
        """The next commits fail with these, one after the other, and change nothing."""
        self._faults += errors

    def hold_commits(self) -> None:
        """Let commits wait until `release_commits`."""
        self._open.clear()

    def release_commits(self) -> None:
        """Let held commits go on."""
        self._open.set()

    # -- what became of it

    def rows(self, kind: type[E]) -> list[E]:
        """The committed rows of a type, by id."""
        rows: list[E] = self._tables.rows(self._type(kind))
        return rows

    def row(self, kind: type[E], row_id: Any) -> E | None:
        """The committed row of an id, or None."""
        return next((own for own in self.rows(kind) if own.id == row_id), None)  # type: ignore[attr-defined]  # every entity has one

    async def history(self, kind: type[E]) -> list[tuple[Any, int, E | None]]:
        """The changes that are kept, `(id, event number, row)`, by id."""
        found: list[tuple[Any, int, E | None]] = await self._tables.history(self._type(kind))
        return found

    async def enqueued(self) -> list[EnqueuedRun]:
        """The runs that handlers enqueued and that are committed, in order."""
        store, environment = self.engine.store, self.engine.environment
        found = []
        for batch, _ in reversed(await store.batches(environment, limit=ALL_RUNS)):
            for run in await store.runs(environment, batch_id=batch.id, limit=ALL_RUNS):
                view = await store.run(batch.id, run.index)
                payload = msgspec.json.decode(view.payload)
                found.append(EnqueuedRun(view.task, view.queue, payload, view.idempotency_key))
        return found

    def _type(self, kind: type[Entity]) -> EntityType:
        table = self.indexing.staging.by_class.get(kind)
        if table is None:
            raise InvalidInput(f"{kind.__name__} is no entity of the indexer {self._name!r}")
        return table.entity

    async def before_commit(self) -> None:
        """Where commits are held and failed."""
        await self._open.wait()
        if self._faults:
            raise self._faults.pop(0)


class _Watched:
    """Tables whose commits pass by a simulation first."""

    def __init__(self, tables: EntityStore, simulation: Simulation) -> None:
        self._tables = tables
        self._simulation = simulation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tables, name)

    async def commit(self, commit: Commit, *, now_us: int) -> None:
        await self._simulation.before_commit()
        await self._tables.commit(commit, now_us=now_us)
