"""Ordered events into SQL tables, through plain Python handlers.

    class Account(Entity):
        id: str
        balance: int = 0

    transfers = app.indexer("transfers", source=ndjson("transfers.ndjson"), entities=[Account])

    @transfers.on("transfer")
    async def on_transfer(event: Transfer, ctx: HandlerContext) -> None:
        sender = await ctx.get_or_create(Account, event.sender)
        ctx.set(msgspec.structs.replace(sender, balance=sender.balance - event.amount))

`headrace index job.py:transfers` runs it. The rows that the handlers of one batch wrote are committed while the
handlers of the next batch run.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar

from headrace.core.condition import above, any_of, at_least, at_most, below, between
from headrace.core.entity import Entity, Indexed, Int64
from headrace.core.sequencer import Arrived, Position, Rewind
from headrace.foundation.errors import InvalidSetting
from headrace.runtime.engine import Engine
from headrace.runtime.indexing.definition import ALL, IndexerDefinition, IndexerProgress, Where
from headrace.runtime.indexing.effects import Effect
from headrace.runtime.indexing.handler_context import EventAddress, HandlerContext
from headrace.runtime.indexing.handler_registry import HandlerFailed, HandlerRegistry, Unknown
from headrace.runtime.indexing.indexer_lease import IndexerBusy
from headrace.runtime.indexing.pipeline import IndexerPipeline
from headrace.runtime.indexing.sources.files import Csv, Ndjson
from headrace.runtime.indexing.sources.nats import Nats
from headrace.runtime.indexing.sources.source import Source
from headrace.runtime.indexing.sources.streams import Results, Stream
from headrace.runtime.indexing.sources.table import Table
from headrace.runtime.owner_loop import OwnerLoop
from headrace.store.entities.protocol import HistoryGone, IndexerState, LeaseLost, SchemaChanged
from headrace.twins import on_owner_loop

if TYPE_CHECKING:
    from headrace.indexer_testing import Simulation

__all__ = [
    "ALL",
    "Arrived",
    "Entity",
    "EventAddress",
    "HandlerContext",
    "HandlerFailed",
    "HistoryGone",
    "Indexed",
    "Indexer",
    "IndexerBusy",
    "IndexerPipeline",
    "IndexerProgress",
    "Int64",
    "LeaseLost",
    "Position",
    "Rewind",
    "SchemaChanged",
    "Source",
    "above",
    "any_of",
    "at_least",
    "at_most",
    "below",
    "between",
    "csv",
    "nats",
    "ndjson",
    "results",
    "stream",
    "table",
]


class App(Protocol):
    """The part of an app that an indexer uses."""

    @property
    def owner_loop(self) -> OwnerLoop:
        """The event loop of the app."""
        ...

    async def open(self) -> Engine:
        """Open the store, once."""
        ...


def ndjson(path: str | Path, *, time: str | None = None) -> Source:
    """Return a source for a file with one JSON object per line, also .gz or .zst. `time`: the field to merge several
    sources by.
    """
    return Ndjson(path, time)


def csv(
    path: str | Path, *, kind: str, event: type[Any] | None = None, time: str | None = None, delimiter: str = ","
) -> Source:
    """Return a source for a CSV file with a header row, also .gz or .zst: events of one kind, typed by `event`, or
    strings.
    """
    return Csv(path, kind=kind, event=event, time=time, delimiter=delimiter)


def stream(begin: Callable[[Position | None], Any]) -> Source:
    """Return a source for the items of `begin(after)`, plain or async: `(position, event)`, with a time, or
    `Rewind(to)`.
    """
    return Stream(begin)


def table(dsn: str, name: str, *, key: str, kind: str, follow_s: float | None = None) -> Source:
    """Return a source for a PostgreSQL table in the order of a key that only grows; `follow_s`: query again at its
    end.
    """
    return Table(dsn, name, key=key, kind=kind, follow_s=follow_s)


def nats(url: str, stream: str, *, subject: str = ">", follow: bool = True) -> Source:
    """Return a source for a NATS JetStream stream, each message one JSON event (`pip install headrace[nats]`)."""
    return Nats(url, stream, subject=subject, follow=follow)


def results(app: App, batch: str) -> Source:
    """Return a source for the outcomes of a finished batch, as events `{"type": "result", "index", "state",
    "output"}`.
    """
    return Results(app.open, batch)


F = TypeVar("F", bound=Callable[..., Any])

_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,39}\Z")
MAIN: Final = "main"


class Indexer:
    """An indexer of an app, made by `app.indexer(…)`."""

    def __init__(
        self,
        app: App,
        name: str,
        *,
        source: Source | Mapping[str, Source],
        entities: Sequence[type[Entity]],
        history: int | Literal["all"] = 0,
        where: Where = "overlay",
        defer_indexes: bool = False,
        preload: bool = True,
        unknown: Unknown = "refuse",
    ) -> None:
        if not _NAME.match(name):
            raise InvalidSetting(
                f"{name!r} is not a valid name of an indexer",
                hint="use lower-case letters, digits, - and _, at most 40 characters, beginning with a letter",
            )
        sources = source if isinstance(source, Mapping) else {MAIN: source}
        for key, event_source in sources.items():
            if not _NAME.match(key) or not hasattr(event_source, "arrivals"):
                raise InvalidSetting(
                    f"source {key!r}: expected a source with a valid name, got {event_source!r}",
                    hint="ndjson(path), stream(…), …",
                )
        if not sources:
            raise InvalidSetting(f"the indexer {name!r} has no source", hint="source=ndjson(path)")
        history_length = ALL if history == "all" else history
        if type(history_length) is not int or history_length < 0:
            raise InvalidSetting(
                f"history: expected a number of events or 'all', got {history!r}", hint="history=100_000"
            )
        if where not in ("overlay", "drain"):
            raise InvalidSetting(f"where: expected 'overlay' or 'drain', got {where!r}", hint='where="overlay"')
        self.app = app
        self.definition = IndexerDefinition(
            name=name,
            sources=sources,
            entities=tuple(entities),
            handlers=HandlerRegistry(unknown=unknown),
            history=history_length,
            where=where,
            defer_indexes=defer_indexes,
            preload=preload,
        )

    @property
    def name(self) -> str:
        """The indexer's name in the store."""
        return self.definition.name

    def on(self, kind: str) -> Callable[[F], F]:
        """Register the handler of one kind of event.

        A handler is `async def on_transfer(event: Transfer, ctx: HandlerContext) -> None`.
        """

        def register(function: F) -> F:
            self.definition.handlers.add(kind, function)
            return function

        return register

    def effect(
        self, *, name: str | None = None, calls: int | None = None, per_s: float = 1.0, cache: bool = True
    ) -> Callable[[Callable[..., Any]], Effect]:
        """Register a call out of the indexer, for `ctx.effect(fn, key…)`: at most `calls` in `per_s` seconds.

        Its result is stored under its arguments; with `cache=False` it is kept only for the current batch.
        """

        def register(function: Callable[..., Any]) -> Effect:
            effect = Effect(function, name=name or function.__name__, calls=calls, per_s=per_s, cache=cache)
            if any(other.name == effect.name for other in self.definition.effects):
                raise InvalidSetting(f"two effects have the name {effect.name!r}", hint="pass name=… to one of them")
            self.definition.effects.append(effect)
            return effect

        return register

    # -- running

    @asynccontextmanager
    async def open(
        self, *, wait: bool = True, on_waiting: Callable[[str], None] | None = None, **limits: int
    ) -> AsyncGenerator[IndexerPipeline, None]:
        """Create the tables and hold the lease during the block; leaving it commits what is staged.

        `limits` by name (`index_depth_max=0`) override the app's. With `wait` a lease that another process holds is
        waited for; otherwise `IndexerBusy` is raised.
        """
        if not self.app.owner_loop.claim():
            raise InvalidSetting(
                "an indexer can't start on this event loop: its app is open on another event loop",
                hint="start it before the first _sync call of the process, or call `await app.close()` before",
            )
        engine = await self.app.open()
        if limits:
            engine = engine.with_limits(engine.limits.replaced(**limits))
        pipeline = IndexerPipeline(self.definition, engine, engine.tables)
        try:
            await pipeline.start(wait=wait, on_waiting=on_waiting)
            yield pipeline
        finally:
            await pipeline.close()

    async def run(self, *, until: Position | None = None, **limits: int) -> IndexerProgress:
        """Index until the sources end or `until` was reached; everything is durable when this returns."""
        async with self.open(wait=True, on_waiting=None, **limits) as pipeline:
            return await pipeline.run(until=until)

    async def rollback(self, to: Position | None, *, source: str | None = None) -> IndexerState:
        """Go back to the last event at or before a position; None is before the first event."""
        async with self.open() as pipeline:
            return await pipeline.rollback(to, source=source)

    @property
    def _owner(self) -> OwnerLoop:
        return self.app.owner_loop

    @on_owner_loop
    async def state(self) -> IndexerState | None:
        """Return the indexer's state in the store; None before its first start."""
        engine = await self.app.open()
        for state in await engine.tables.indexer_states(engine.environment):
            if state.name == self.name:
                return state
        return None

    @on_owner_loop
    async def reset(self) -> list[str]:
        """Drop its tables and its state; return the tables' names. Raises `NotFound`."""
        engine = await self.app.open()
        return await engine.tables.reset(engine.environment, self.name)

    # -- testing

    async def simulate(self, events: Iterable[Any], **limits: int) -> Simulation:
        """Run events through the handlers over tables in memory, and return the simulation with its results.

        Events are numbered from 1. Raises the error of a handler or a commit.
        """
        async with self.simulation(**limits) as simulation:
            simulation.feed(*events)
            await simulation.drain()
            return simulation

    @asynccontextmanager
    async def simulation(self, **limits: int) -> AsyncGenerator[Simulation, None]:
        """Run a simulation step by step: the test feeds events, holds and fails commits, and rolls back."""
        from headrace.indexer_testing import Simulation

        simulation = await Simulation.start(self.definition, limits)
        try:
            yield simulation
        finally:
            await simulation.close()
