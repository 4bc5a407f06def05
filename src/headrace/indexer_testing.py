"""Tests of an indexer over tables in memory, with events, faults and commits under the test's control.

    simulation = await transfers.simulate([Transfer("ann", "ben", 5)])
    assert simulation.rows(Account) == [Account("ann", -5), Account("ben", 5)]

    async with transfers.simulation() as simulation:
        simulation.hold_commits()
        simulation.feed(…)
        …

The loops are those of production; only the store is in memory. `drain`, `flush` and every waiting read raise the error
of a failed commit.
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
from headrace.runtime.indexing.definition import IndexerDefinition, IndexerProgress
from headrace.runtime.indexing.pipeline import IndexerPipeline
from headrace.runtime.indexing.sources.source import Arrival
from headrace.store.entities.protocol import Commit, EntityStore, IndexerState
from headrace.store.paging import listed_batches, listed_runs

E = TypeVar("E", bound=Entity)
ALL_RUNS = 1_000_000


class EnqueuedRun(NamedTuple):
    """A run that a handler enqueued: its task, queue, and payload decoded from JSON."""

    task: str
    queue: str
    payload: Any
    key: str


class FedEvents:
    """A source of the events that a test feeds, in that order; it ends after the last one, and may be read again."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.positions: list[Position] = []

    async def arrivals(self, after: Position | None) -> AsyncIterator[Arrival]:
        """Yield the events after a position."""
        start = 0 if after is None else self.positions.index(after) + 1
        if start < len(self.events):
            yield Arrived(self.positions[start:], self.events[start:])

    async def head(self) -> Position | None:
        """Return the position of the last event."""
        return self.positions[-1] if self.positions else None


class Simulation:
    """A simulated indexer, made by `indexer.simulate(events)` and `indexer.simulation()`."""

    def __init__(self, definition: IndexerDefinition, engine: Engine) -> None:
        self.engine = engine
        self.source = FedEvents()
        self._open = asyncio.Event()
        self._open.set()
        self._faults: list[BaseException] = []
        self._tables = _InterceptedTables(engine.tables, self)
        (name, *others) = definition.sources
        if others:
            raise InvalidSetting(
                f"expected an indexer with one source, got {len(definition.sources)}",
                hint="simulate each source, or test on SQLite",
            )
        self._name = definition.name
        self.indexing = IndexerPipeline(replace(definition, sources={name: self.source}), engine, self._tables)

    @classmethod
    async def start(
        cls, definition: IndexerDefinition, limits: Mapping[str, int], clock: Clock | None = None
    ) -> Simulation:
        """Start a simulation, before its first event."""
        engine = await memory_engine(Limits().replaced(**limits), clock or SystemClock())
        simulation = cls(definition, engine)
        await simulation.indexing.start()
        return simulation

    async def close(self) -> None:
        """End the simulation; its rows can still be read."""
        self.release_commits()
        await self.indexing.close()

    # -- actions

    def feed(self, *events: Any) -> None:
        """Add events to the source."""
        first = len(self.source.events) + 1
        self.source.events += events
        self.source.positions += range(first, first + len(events))

    async def drain(self) -> IndexerProgress:
        """Handle and commit everything that was fed. Raises the error of a handler or a commit."""
        return await self.indexing.run()

    async def flush(self) -> None:
        """Return when everything handled is committed. Raises the error of a commit."""
        await self.indexing.flush()

    async def rewind(self, to: Position | None) -> IndexerState:
        """Roll back; events after the position are forgotten, and other events may be fed."""
        state = await self.indexing.rollback(to)
        count = 0 if to is None else self.source.positions.index(to) + 1
        del self.source.events[count:], self.source.positions[count:]
        return state

    def fail_commits(self, *errors: BaseException) -> None:
        """Make the next commits fail with these errors, one after the other, without effect."""
        self._faults += errors

    def hold_commits(self) -> None:
        """Hold commits until `release_commits`."""
        self._open.clear()

    def release_commits(self) -> None:
        """Continue the held commits."""
        self._open.set()

    # -- results

    def rows(self, kind: type[E]) -> list[E]:
        """Return the committed rows of a type, by id."""
        rows: list[E] = self._tables.rows(self._type(kind))
        return rows

    def row(self, kind: type[E], row_id: Any) -> E | None:
        """Return the committed row with an id, or None."""
        return next((row for row in self.rows(kind) if row.id == row_id), None)  # type: ignore[attr-defined]  # every entity has one

    async def history(self, kind: type[E]) -> list[tuple[Any, int, E | None]]:
        """Return the stored changes, `(id, event number, row)`, by id."""
        changes: list[tuple[Any, int, E | None]] = await self._tables.history(self._type(kind))
        return changes

    async def enqueued(self) -> list[EnqueuedRun]:
        """Return the committed runs that handlers enqueued, in order."""
        store, environment = self.engine.store, self.engine.environment
        runs = []
        for batch, _ in reversed(await listed_batches(store, environment, limit=ALL_RUNS)):
            for run in await listed_runs(store, environment, batch_id=batch.id, limit=ALL_RUNS):
                view = await store.run(batch.id, run.index)
                payload = msgspec.json.decode(view.payload)
                runs.append(EnqueuedRun(view.task, view.queue, payload, view.idempotency_key))
        return runs

    def _type(self, kind: type[Entity]) -> EntityType:
        table = self.indexing.staging.by_class.get(kind)
        if table is None:
            raise InvalidInput(f"{kind.__name__} is not an entity of the indexer {self._name!r}")
        return table.entity

    async def before_commit(self) -> None:
        """Hold or fail a commit, as the test asked."""
        await self._open.wait()
        if self._faults:
            raise self._faults.pop(0)


class _InterceptedTables:
    """Tables whose commits pass through a simulation."""

    def __init__(self, tables: EntityStore, simulation: Simulation) -> None:
        self._tables = tables
        self._simulation = simulation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tables, name)

    async def commit(self, commit: Commit, *, now_us: int) -> None:
        await self._simulation.before_commit()
        await self._tables.commit(commit, now_us=now_us)
