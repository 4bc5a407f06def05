"""The context of a handler: one event's access to the staged rows, to effects, and to runs.

A context belongs to one event. After its handler has ended it refuses every call: a later call was not awaited, and its
writes would belong to another event.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, ParamSpec, Protocol, TypeVar
from uuid import UUID

import msgspec

from headrace.core.block import Extra
from headrace.core.condition import conditions_of
from headrace.core.entity import Entity
from headrace.core.sequencer import Position
from headrace.core.span import Key
from headrace.core.staging import MISSING, Rows, StagedTable, Staging, table_of
from headrace.foundation.errors import HeadraceError, InvalidInput, NotFound
from headrace.foundation.limits import Limits
from headrace.foundation.logs import get_logger
from headrace.runtime.clock import Clock
from headrace.runtime.indexing.effects import Effects
from headrace.runtime.indexing.read_coalescer import ReadCoalescer
from headrace.runtime.tasks.call_options import Options, extra_of, key_of
from headrace.runtime.tasks.task_spec import TaskSpec

E = TypeVar("E", bound=Entity)
P = ParamSpec("P")

LOG: Any = get_logger("headrace.indexer")


_IDS: Final = (str, int, UUID)


class EventAddress(NamedTuple):
    """The origin of an event. `time_us` is None if its source has no times."""

    source: str
    position: Position
    time_us: int | None
    kind: str


class Enqueueable(Protocol[P]):
    """A task, or a task with options. `P` are its parameters."""

    def request(self, /, *args: P.args, **kwargs: P.kwargs) -> tuple[TaskSpec, Options, bytes]:
        """Return one call as it is stored. Raises `InvalidInput` when the arguments don't fit the task."""
        ...


class EnqueueRequest(NamedTuple):
    """A run that a handler enqueued, with the event; `ordinal` numbers the runs of one event."""

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
    """State that the contexts of one running indexer share."""

    __slots__ = (
        "ahead",
        "clock",
        "effects",
        "enqueued",
        "fault",
        "indexer",
        "limits",
        "puts",
        "reads",
        "ready",
        "staging",
        "tables",
    )

    def __init__(
        self, indexer: str, staging: Staging, reads: ReadCoalescer, effects: Effects, clock: Clock, limits: Limits
    ) -> None:
        self.indexer = indexer
        self.staging = staging
        self.tables = staging.by_class
        self.puts = {kind: table.write for kind, table in staging.by_class.items()}
        self.ready: dict[type[Entity], Rows] = {}
        """The rows in memory of types that have been read and whose rows may be returned without a copy."""
        self.reads = reads
        self.effects = effects
        self.clock = clock
        self.limits = limits
        self.enqueued: list[EnqueueRequest] = []
        self.ahead: dict[Any, list[Any]] = {}
        self.fault: ContextEnded | None = None


class HandlerContext(msgspec.Struct, eq=False):
    """One event's access to rows, effects and runs. Reads see the writes of every earlier event and of this one.

    A struct, because one is made per event: it costs a third of a plain object.
    """

    _scope: HandlerScope
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
        """The origin of the event."""
        event = self._event
        config = getattr(event, "__struct_config__", None)
        tag = None if config is None else config.tag
        kind = (
            tag if isinstance(tag, str) else event.get("type", "") if isinstance(event, dict) else type(event).__name__
        )
        return EventAddress(self.source, self.position, self.time_us, str(kind))

    @property
    def log(self) -> Any:
        """A logger with the indexer and the event bound; silent while the handler only loads ahead."""
        self._check("log")
        if self.is_preload:
            return _SILENT
        return LOG.bind(indexer=self._scope.indexer, source=self.source, position=self.position)

    # -- reading

    async def get(self, kind: type[E], row_id: Any) -> E | None:
        """Return the row with this id, or None."""
        self._check("get")
        scope = self._scope
        rows = scope.ready.get(kind)
        if rows is not None and type(row_id) in _IDS:
            row: Any = rows.get(row_id, MISSING)
            if row is not MISSING:
                staged_row: E | None = row
                return staged_row
        table = self._table(kind)
        row_id = table.entity.checked_id(row_id)
        row = table.rows.get(row_id, MISSING)
        if row is MISSING:
            row = await scope.reads.get(table, row_id)
        answer: E | None = table.entity.copied(row)
        return answer

    async def require(self, kind: type[E], row_id: Any, message: str = "") -> E:
        """Return the row with this id. Raises `NotFound`, with `message` if given."""
        row = await self.get(kind, row_id)
        if row is None:
            raise NotFound(message or f"no {kind.__name__} has the id {row_id!r}", entity=kind.__name__, id=row_id)
        return row

    async def get_or_create(self, kind: type[E], row_id: Any, **fields: Any) -> E:
        """Return the row with this id; if there is none, create and set one with these fields."""
        rows = self._scope.ready.get(kind)
        if rows is not None and type(row_id) in _IDS and not self.is_over:
            existing: E | None = rows.get(row_id)
            if existing is not None:
                return existing
        row = await self.get(kind, row_id)
        if row is None:
            try:
                row = kind(id=row_id, **fields)
            except TypeError as error:
                raise InvalidInput(
                    f"{kind.__name__} can't be created from {', '.join(['id', *fields])}: {error}"
                ) from error
            self.set(row)
        return row

    async def get_many(self, kind: type[E], row_ids: Sequence[Any]) -> list[E | None]:
        """Return rows by id, None for missing ones, in the order of `row_ids`; at most one query."""
        self._check("get_many")
        table = self._table(kind)
        ids = [table.entity.checked_id(row_id) for row_id in row_ids]
        rows = await self._scope.reads.get_many(table, ids)
        return [table.entity.copied(row) for row in rows]

    async def where(self, kind: type[E], **conditions_by_field: Any) -> list[E]:
        """Return the rows that match every condition, by id: `country="NZ"`, `any_of(…)`, `between(…)`, `at_least(…)`,
        …
        """
        self._check("where")
        table = self._table(kind)
        conditions = conditions_of(table.entity, conditions_by_field)
        rows: list[Any] | None = self._scope.ahead.get((kind, conditions)) if self.is_preload else None
        if rows is None:
            rows = await self._scope.reads.where(table, conditions)
            if self.is_preload:  # many handlers that run ahead ask for the same
                self._scope.ahead[kind, conditions] = rows
        return [table.entity.copied(row) for row in rows] if table.entity.is_changeable else rows

    # -- writing

    def set(self, row: Entity) -> None:
        """Store a row, new or in place of the one with its id."""
        if self.is_over:
            self._refuse_late_call("set")
        put = self._scope.puts.get(type(row)) or self._table_of_row(row).write
        if not self.is_preload:
            put(row, self._no)

    def delete(self, kind: type[Entity], row_id: Any) -> None:
        """Delete the row with this id, if there is one."""
        self._check("delete")
        table = table_of(self._scope.tables, kind)
        if not self.is_preload:
            table.delete(row_id, self._no)

    def _table_of_row(self, row: object) -> StagedTable:
        if hasattr(row, "__await__"):
            row.close() if hasattr(row, "close") else None
            raise InvalidInput(
                "set: expected a row, got a coroutine", hint="write await before the call that returns the row"
            )
        return table_of(self._scope.tables, type(row))

    # -- effects and runs

    async def effect(self, effect: Any, *args: Any) -> Any:
        """Return the result of a registered effect: called once for its arguments, then stored."""
        self._check("effect")
        return await self._scope.effects.call(effect, args, is_preload=self.is_preload)

    def enqueue(self, task: Enqueueable[P], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Enqueue a run of a task, or of `task.options(…)`. It is appended with the commit, so it is neither lost nor
        doubled. Raises `InvalidInput` when the arguments don't fit the task.
        """
        self._check("enqueue")
        request = getattr(task, "request", None)
        if request is None:
            raise InvalidInput(f"enqueue: expected a task, got {task!r}", hint="decorate the function with @app.task")
        spec, options, payload = request(*args, **kwargs)
        if options.idempotency_key:
            raise InvalidInput(
                "enqueue: a run of an event is keyed by its position, got an idempotency key too",
                hint="omit idempotency_key",
            )
        scope = self._scope
        limits, now_us = scope.limits, scope.clock.now_us()
        if self._ordinal >= limits.index_enqueues_max:
            raise InvalidInput(
                f"enqueue: expected at most {limits.index_enqueues_max} runs per event",
                hint="raise index_enqueues_max",
                position=self.position,
            )
        key, extra = key_of(spec, options, now_us), extra_of(options, limits, now_us)
        if not self.is_preload:
            scope.enqueued.append(EnqueueRequest(self.source, self.position, self._ordinal, key, payload, extra))
        self._ordinal += 1

    def _check(self, what: str) -> None:
        if self.is_over:
            self._refuse_late_call(what)

    def _table(self, kind: type[Entity]) -> StagedTable:
        """Return the table of a class, and mark it as read."""
        table = table_of(self._scope.tables, kind)
        if not table.is_read:
            table.begin_reading()
            if not table.entity.is_changeable:
                self._scope.ready[kind] = table.rows
        return table

    def _refuse_late_call(self, what: str) -> None:
        error = ContextEnded(
            f"{what} was called after the handler of the event at {self.position!r} had ended",
            hint="await every call that a handler makes",
            indexer=self._scope.indexer,
            source=self.source,
            position=self.position,
        )
        if not self.is_preload:
            self._scope.fault = self._scope.fault or error
        raise error


class _Silent:
    """A logger that writes nothing."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return _nothing


def _nothing(*_: Any, **__: Any) -> None:
    return


_SILENT: Final = _Silent()
