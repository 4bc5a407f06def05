"""What a handler is given: one event's way to the staged rows, to effects, and to runs.

A context belongs to one event. When the handler has ended it refuses everything: what comes later was not awaited, and
would be written under an event that is not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar
from uuid import UUID

import msgspec
import structlog

from headrace.core.block import Extra
from headrace.core.condition import conditions_of
from headrace.core.entity import Entity
from headrace.core.sequencer import Position
from headrace.core.span import Key
from headrace.core.staging import MISSING, Rows, StagedTable, Staging, table_of
from headrace.foundation.errors import HeadraceError, InvalidInput, NotFound
from headrace.foundation.limits import Limits
from headrace.runtime.clock import Clock
from headrace.runtime.indexing.effects import Effects
from headrace.runtime.indexing.read_coalescer import ReadCoalescer
from headrace.runtime.tasks.call_options import Options, extra_of, key_of
from headrace.runtime.tasks.task_spec import TaskSpec

E = TypeVar("E", bound=Entity)

LOG: Any = structlog.get_logger("headrace.indexer")


_IDS: Final = (str, int, UUID)


class EventAddress(NamedTuple):
    """Where an event came from. `time_us` is None where its source has no times."""

    source: str
    position: Position
    time_us: int | None
    kind: str


class EnqueueRequest(NamedTuple):
    """A run that a handler asked for, with the event that did; `ordinal` counts those of one event."""

    source: str
    position: Position
    ordinal: int
    key: Key
    payload: bytes
    extra: Extra | None


class ContextEnded(HeadraceError):
    """A context was used after its handler had ended."""

    code = "LATE_USE"
    status = 400
    exit_code = 2


class HandlerScope:
    """What the contexts of one running indexer have in common."""

    __slots__ = (
        "ahead",
        "asked",
        "clock",
        "effects",
        "fault",
        "indexer",
        "limits",
        "lookups",
        "puts",
        "ready",
        "staging",
        "tables",
    )

    def __init__(
        self, indexer: str, staging: Staging, lookups: ReadCoalescer, effects: Effects, clock: Clock, limits: Limits
    ) -> None:
        self.indexer = indexer
        self.staging = staging
        self.tables = staging.by_class
        self.puts = {kind: table.write for kind, table in staging.by_class.items()}
        self.ready: dict[type[Entity], Rows] = {}
        """The rows in memory of types that are read already and whose rows may be handed out as they are."""
        self.lookups = lookups
        self.effects = effects
        self.clock = clock
        self.limits = limits
        self.asked: list[EnqueueRequest] = []
        self.ahead: dict[Any, list[Any]] = {}
        self.fault: ContextEnded | None = None


class HandlerContext(msgspec.Struct, eq=False):
    """One event's way to everything. Reads see what every earlier event and this one wrote.

    A struct, because one is made for each event: it costs a third of what a plain object does.
    """

    _shared: HandlerScope
    _no: int
    source: str
    position: Position
    time_us: int | None
    _event: Any
    is_preload: bool = False
    is_over: bool = False
    _ordinal: int = 0

    def __repr__(self) -> str:
        return f"HandlerContext({self.source!r}, {self.position!r})"

    @property
    def event(self) -> EventAddress:
        """Where the event came from."""
        event = self._event
        config = getattr(event, "__struct_config__", None)
        tag = None if config is None else config.tag
        kind = (
            tag if isinstance(tag, str) else event.get("type", "") if isinstance(event, dict) else type(event).__name__
        )
        return EventAddress(self.source, self.position, self.time_us, str(kind))

    @property
    def log(self) -> Any:
        """A logger that says which indexer and event; silent while only loading ahead."""
        self._check("log")
        if self.is_preload:
            return _SILENT
        return LOG.bind(indexer=self._shared.indexer, source=self.source, position=self.position)

    # -- reading

    async def get(self, kind: type[E], row_id: Any) -> E | None:
        """The row of this id, or None."""
        self._check("get")
        shared = self._shared
        rows = shared.ready.get(kind)
        if rows is not None and type(row_id) in _IDS:
            row: Any = rows.get(row_id, MISSING)
            if row is not MISSING:
                found: E | None = row
                return found
        table = self._table(kind)
        row_id = table.entity.checked_id(row_id)
        row = table.rows.get(row_id, MISSING)
        if row is MISSING:
            row = await shared.lookups.get(table, row_id)
        answer: E | None = table.entity.copied(row)
        return answer

    async def require(self, kind: type[E], row_id: Any, message: str = "") -> E:
        """The row of this id. Raises `NotFound`, with your own words if you give them."""
        row = await self.get(kind, row_id)
        if row is None:
            raise NotFound(message or f"there is no {kind.__name__} {row_id!r}", entity=kind.__name__, id=row_id)
        return row

    async def get_or_create(self, kind: type[E], row_id: Any, **fields: Any) -> E:
        """The row of this id; where there is none, a new one with these fields, which is set."""
        rows = self._shared.ready.get(kind)
        if rows is not None and type(row_id) in _IDS and not self.is_over:
            known: E | None = rows.get(row_id)
            if known is not None:
                return known
        row = await self.get(kind, row_id)
        if row is None:
            try:
                row = kind(id=row_id, **fields)
            except TypeError as error:
                raise InvalidInput(f"{kind.__name__} can't be made of {', '.join(['id', *fields])}: {error}") from error
            self.set(row)
        return row

    async def get_many(self, kind: type[E], row_ids: Sequence[Any]) -> list[E | None]:
        """Rows by id, None for those there are not, in the order asked; one query at most."""
        self._check("get_many")
        table = self._table(kind)
        ids = [table.entity.checked_id(row_id) for row_id in row_ids]
        rows = await self._shared.lookups.get_many(table, ids)
        return [table.entity.copied(row) for row in rows]

    async def where(self, kind: type[E], **wanted: Any) -> list[E]:
        """The rows that fulfil every condition, by id: `country="NZ"`, `any_of(…)`, `between(…)`, `at_least(…)`, …"""
        self._check("where")
        table = self._table(kind)
        conditions = conditions_of(table.entity, wanted)
        rows: list[Any] | None = self._shared.ahead.get((kind, conditions)) if self.is_preload else None
        if rows is None:
            rows = await self._shared.lookups.where(table, conditions)
            if self.is_preload:  # many that run ahead ask the same
                self._shared.ahead[kind, conditions] = rows
        return [table.entity.copied(row) for row in rows] if table.entity.is_changeable else rows

    # -- writing

    def set(self, row: Entity) -> None:
        """Put a row, new or instead of the one of its id."""
        if self.is_over:
            self._late("set")
        put = self._shared.puts.get(type(row)) or self._table_of_row(row).write
        if not self.is_preload:
            put(row, self._no)

    def delete(self, kind: type[Entity], row_id: Any) -> None:
        """Delete the row of this id, whether there is one or not."""
        self._check("delete")
        table = table_of(self._shared.tables, kind)
        if not self.is_preload:
            table.delete(row_id, self._no)

    def _table_of_row(self, row: object) -> StagedTable:
        if hasattr(row, "__await__"):
            row.close() if hasattr(row, "close") else None
            raise InvalidInput("set takes a row, and this is one still to be awaited", hint="write await before it")
        return table_of(self._shared.tables, type(row))

    # -- beyond the tables

    async def effect(self, effect: Any, *args: Any) -> Any:
        """What a registered call answers: asked once for its arguments, then remembered."""
        self._check("effect")
        return await self._shared.effects.call(effect, args, is_preload=self.is_preload)

    def enqueue(self, task: Any, *args: Any, **kwargs: Any) -> None:
        """Ask for a run of a task, or of `task.options(…)`: appended with the commit, so never lost or doubled."""
        self._check("enqueue")
        request: Callable[..., tuple[TaskSpec, Options, bytes]] | None = getattr(task, "request", None)
        if request is None:
            raise InvalidInput(f"{task!r} is no task", hint="@app.task makes one of a function")
        spec, options, payload = request(*args, **kwargs)
        if options.idempotency_key:
            raise InvalidInput("what an event enqueues is known by its position", hint="leave the idempotency key out")
        shared = self._shared
        limits, now_us = shared.limits, shared.clock.now_us()
        if self._ordinal >= limits.index_enqueues_max:
            raise InvalidInput(
                f"one event enqueues at most {limits.index_enqueues_max} runs", hint="raise index_enqueues_max",
                position=self.position,
            )  # fmt: skip
        key, extra = key_of(spec, options, now_us), extra_of(options, limits, now_us)
        if not self.is_preload:
            shared.asked.append(EnqueueRequest(self.source, self.position, self._ordinal, key, payload, extra))
        self._ordinal += 1

    def _check(self, what: str) -> None:
        if self.is_over:
            self._late(what)

    def _table(self, kind: type[Entity]) -> StagedTable:
        """The table of a class, whose rows are read from here on."""
        table = table_of(self._shared.tables, kind)
        if not table.is_read:
            table.begin_reading()
            if not table.entity.is_changeable:
                self._shared.ready[kind] = table.rows
        return table

    def _late(self, what: str) -> None:
        error = ContextEnded(
            f"{what} was called after the handler of the event at {self.position!r} had ended",
            hint="await everything that a handler starts",
            indexer=self._shared.indexer,
            source=self.source,
            position=self.position,
        )
        if not self.is_preload:
            self._shared.fault = self._shared.fault or error
        raise error


class _Silent:
    """A logger that says nothing."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return _nothing


def _nothing(*_: Any, **__: Any) -> None:
    return


_SILENT: Final = _Silent()
