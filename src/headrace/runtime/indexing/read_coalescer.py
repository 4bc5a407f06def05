"""Reads of an indexer that memory can't answer, coalesced: what is asked in one turn of the loop is one query a table.

Rule 1: whoever waits is always answered: with rows, or with the error that ended the query or the indexer.
Rule 2: between the SELECT and the moment its rows are taken nothing leaves memory (`Staging.begin_read`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, Final, TypeVar

from headrace.core.condition import Condition
from headrace.core.staging import MISSING, StagedTable, Staging
from headrace.runtime.clock import Clock
from headrace.runtime.retrying import retry_transient
from headrace.store.entities.protocol import EntityStore

T = TypeVar("T")

IDS_MAX: Final = 10_000
"""Ids or values in one query."""

PendingReads = dict[Any, list[asyncio.Future[Any]]]


class ReadCoalescer:
    """The reads of one indexer. `before_query`: called once a turn, before anything is asked of the store."""

    def __init__(self, staging: Staging, store: EntityStore, clock: Clock, *, retries_max: int) -> None:
        self._staging = staging
        self._store = store
        self._clock = clock
        self._retries_max = retries_max
        self._ids: dict[StagedTable, PendingReads] = {}
        self._values: dict[tuple[StagedTable, str], PendingReads] = {}
        self._is_scheduled = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self.before_query: Callable[[], None] = _nothing
        self.before_where: Callable[[StagedTable, str], Awaitable[None]] | None = None
        self.settle_first: Callable[[], Awaitable[None]] | None = None
        self.queries_count = 0
        self.query_s = 0.0

    def get(self, table: StagedTable, row_id: Any) -> asyncio.Future[Any]:
        """A row that is not in memory, or None."""
        asked = self._ids.get(table)
        if asked is None:
            asked = self._ids[table] = {}
        return self._asked(asked, row_id)

    async def get_many(self, table: StagedTable, row_ids: Sequence[Any]) -> list[Any]:
        """Rows by id, None for those there are not, in the order asked."""
        rows = table.rows
        asked = self._ids.setdefault(table, {})
        waiting = [self._asked(asked, row_id) for row_id in row_ids if row_id not in rows]
        if waiting:
            await asyncio.gather(*waiting)
        found = []
        for row_id in row_ids:
            row = rows.get(row_id, MISSING)
            found.append(await self.get(table, row_id) if row is MISSING else row)
        return found

    async def where(self, table: StagedTable, conditions: Sequence[Condition]) -> list[Any]:
        """The rows that fulfil all conditions, by id."""
        first = conditions[0]
        if self.before_where is not None:
            for condition in conditions:
                await self.before_where(table, condition.field)
        if self.settle_first is not None:
            await self.settle_first()
        elif len(conditions) == 1 and first.values is not None:
            complete = table.index(first.field).complete
            asked = self._values.setdefault((table, first.field), {})
            waiting = [self._asked(asked, value) for value in first.values if value not in complete]
            if waiting:
                await asyncio.gather(*waiting)
            return self._staging.staged(table, conditions)
        return await self._within_read(partial(self._select, table, conditions))

    async def _select(self, table: StagedTable, conditions: Sequence[Condition]) -> list[Any]:
        rows = await self._query(lambda: self._store.find(table.entity, conditions), table)
        return self._staging.found(table, conditions, rows)

    @property
    def asked_count(self) -> int:
        """Rows and values that wait for the next query."""
        return sum(map(len, self._ids.values())) + sum(map(len, self._values.values()))

    def fail(self, error: BaseException) -> None:
        """The indexer has failed: whoever waits hears of it now, and whoever asks from here on."""
        self._failure = error
        for asked in (*self._ids.values(), *self._values.values()):
            _refuse(asked, error)
        self._ids.clear()
        self._values.clear()
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Leave what is under way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _asked(self, asked: PendingReads, key: Any) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        if self._failure is not None:
            answer.set_exception(self._failure)
            return answer
        waiting = asked.get(key)
        if waiting is None:
            asked[key] = [answer]
        else:
            waiting.append(answer)
        if not self._is_scheduled:
            self._is_scheduled = True
            loop.call_soon(self._ask)
        return answer

    def _ask(self) -> None:
        """What was asked in this turn, as one query a table."""
        self.before_query()
        self._is_scheduled = False
        ids, self._ids = self._ids, {}
        values, self._values = self._values, {}
        for table, asked in ids.items():
            for piece in _pieces(asked):
                self._start(partial(self._load, table, piece), piece)
        for (table, field), asked in values.items():
            for piece in _pieces(asked):
                self._start(partial(self._match, table, field, piece), piece)

    def _start(self, work: Callable[[], Awaitable[None]], asked: PendingReads) -> None:
        task = asyncio.ensure_future(self._answered(work, asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answered(self, work: Callable[[], Awaitable[None]], asked: PendingReads) -> None:
        try:
            await self._within_read(work)
        except asyncio.CancelledError:
            _refuse(asked, self._failure or asyncio.CancelledError())
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait are told
            _refuse(asked, error)

    async def _within_read(self, work: Callable[[], Awaitable[T]]) -> T:
        self._staging.begin_read()
        try:
            return await work()
        finally:
            self._staging.end_read()

    async def _load(self, table: StagedTable, asked: PendingReads) -> None:
        ids = [row_id for row_id in asked if row_id not in table.rows]
        found = (
            {row.id: row for row in await self._query(lambda: self._store.load(table.entity, ids), table)}
            if ids
            else {}
        )
        for row_id, answers in asked.items():
            row = self._staging.adopt(table, row_id, found.get(row_id))
            for answer in answers:
                if not answer.done():
                    answer.set_result(row)

    async def _match(self, table: StagedTable, field: str, asked: PendingReads) -> None:
        conditions = (Condition(field, tuple(asked), None),)
        await self._select(table, conditions)
        for answers in asked.values():
            for answer in answers:
                if not answer.done():
                    answer.set_result(None)

    async def _query(self, call: Callable[[], Awaitable[T]], table: StagedTable) -> T:
        self.queries_count += 1
        started = perf_counter()
        try:
            return await retry_transient(
                call, self._clock, what=f"a read of {table.entity.table}", waits_max=self._retries_max
            )
        finally:
            self.query_s += perf_counter() - started


def _pieces(asked: PendingReads) -> list[PendingReads]:
    if len(asked) <= IDS_MAX:
        return [asked] if asked else []
    keys = list(asked)
    return [{key: asked[key] for key in keys[start : start + IDS_MAX]} for start in range(0, len(keys), IDS_MAX)]


def _refuse(asked: PendingReads, error: BaseException) -> None:
    for answers in asked.values():
        for answer in answers:
            if answer.done():
                continue
            if isinstance(error, asyncio.CancelledError):
                answer.cancel()
            else:
                answer.set_exception(error)
                answer.exception()  # who stopped waiting need not hear of it


def _nothing() -> None:
    return
