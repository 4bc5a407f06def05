"""Coalesced reads of an indexer: all reads of one turn of the event loop that miss memory become one query per table.

Rule 1: a waiting caller always gets an answer: rows, or the error that ended the query or the indexer. Rule 2: no row
leaves memory between a SELECT and the moment its rows are adopted (`Staging.begin_read`).
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
from headrace.runtime.outage import Outage
from headrace.runtime.retrying import retry_transient
from headrace.store.entities.protocol import EntityStore

T = TypeVar("T")

IDS_MAX: Final = 10_000
"""Largest number of ids or values in one query."""

PendingReads = dict[Any, list[asyncio.Future[Any]]]


class ReadCoalescer:
    """The reads of one indexer. `before_query` is called once per turn, before the store is queried."""

    def __init__(
        self, staging: Staging, store: EntityStore, clock: Clock, *, retries_max: int, outage: Outage | None = None
    ) -> None:
        self._staging = staging
        self._store = store
        self._clock = clock
        self._retries_max = retries_max
        self._outage = outage
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
        """Return a future of a row that is not in memory, or of None."""
        pending = self._ids.get(table)
        if pending is None:
            pending = self._ids[table] = {}
        return self._add_pending(pending, row_id)

    async def get_many(self, table: StagedTable, row_ids: Sequence[Any]) -> list[Any]:
        """Return rows by id, None for missing ones, in the order of `row_ids`."""
        rows = table.rows
        pending = self._ids.setdefault(table, {})
        waiting = [self._add_pending(pending, row_id) for row_id in row_ids if row_id not in rows]
        if waiting:
            await asyncio.gather(*waiting)
        rows_found = []
        for row_id in row_ids:
            row = rows.get(row_id, MISSING)
            rows_found.append(await self.get(table, row_id) if row is MISSING else row)
        return rows_found

    async def where(self, table: StagedTable, conditions: Sequence[Condition]) -> list[Any]:
        """Return the rows that match all conditions, by id."""
        first = conditions[0]
        if self.before_where is not None:
            for condition in conditions:
                await self.before_where(table, condition.field)
        if self.settle_first is not None:
            await self.settle_first()
        elif len(conditions) == 1 and first.values is not None:
            complete = table.index(first.field).complete
            pending = self._values.setdefault((table, first.field), {})
            waiting = [self._add_pending(pending, value) for value in first.values if value not in complete]
            if waiting:
                await asyncio.gather(*waiting)
            return self._staging.staged(table, conditions)
        return await self._within_read(partial(self._select, table, conditions))

    async def _select(self, table: StagedTable, conditions: Sequence[Condition]) -> list[Any]:
        rows = await self._query(lambda: self._store.find(table.entity, conditions), table)
        return self._staging.merged(table, conditions, rows)

    @property
    def pending_count(self) -> int:
        """Number of rows and values that wait for the next query."""
        return sum(map(len, self._ids.values())) + sum(map(len, self._values.values()))

    def fail(self, error: BaseException) -> None:
        """Fail the indexer's reads: waiting callers get the error now, later ones at their call."""
        self._failure = error
        for pending in (*self._ids.values(), *self._values.values()):
            _fail_pending(pending, error)
        self._ids.clear()
        self._values.clear()
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Cancel the reads in flight."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _add_pending(self, pending: PendingReads, key: Any) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        if self._failure is not None:
            answer.set_exception(self._failure)
            return answer
        waiting = pending.get(key)
        if waiting is None:
            pending[key] = [answer]
        else:
            waiting.append(answer)
        if not self._is_scheduled:
            self._is_scheduled = True
            loop.call_soon(self._send_queries)
        return answer

    def _send_queries(self) -> None:
        """Send the reads of this turn, as one query per table."""
        self.before_query()
        self._is_scheduled = False
        ids, self._ids = self._ids, {}
        values, self._values = self._values, {}
        for table, pending in ids.items():
            for piece in _split(pending):
                self._start(partial(self._load, table, piece), piece)
        for (table, field), pending in values.items():
            for piece in _split(pending):
                self._start(partial(self._load_matching, table, field, piece), piece)

    def _start(self, work: Callable[[], Awaitable[None]], pending: PendingReads) -> None:
        task = asyncio.ensure_future(self._run_query(work, pending))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_query(self, work: Callable[[], Awaitable[None]], pending: PendingReads) -> None:
        try:
            await self._within_read(work)
        except asyncio.CancelledError:
            _fail_pending(pending, self._failure or asyncio.CancelledError())
            raise
        except Exception as error:  # noqa: BLE001 - every handler that waits gets the error
            _fail_pending(pending, error)

    async def _within_read(self, work: Callable[[], Awaitable[T]]) -> T:
        self._staging.begin_read()
        try:
            return await work()
        finally:
            self._staging.end_read()

    async def _load(self, table: StagedTable, pending: PendingReads) -> None:
        ids = [row_id for row_id in pending if row_id not in table.rows]
        rows_by_id = (
            {row.id: row for row in await self._query(lambda: self._store.load(table.entity, ids), table)}
            if ids
            else {}
        )
        for row_id, answers in pending.items():
            row = self._staging.adopt(table, row_id, rows_by_id.get(row_id))
            for answer in answers:
                if not answer.done():
                    answer.set_result(row)

    async def _load_matching(self, table: StagedTable, field: str, pending: PendingReads) -> None:
        conditions = (Condition(field, tuple(pending), None),)
        await self._select(table, conditions)
        for answers in pending.values():
            for answer in answers:
                if not answer.done():
                    answer.set_result(None)

    async def _query(self, call: Callable[[], Awaitable[T]], table: StagedTable) -> T:
        self.queries_count += 1
        started = perf_counter()
        try:
            return await retry_transient(
                call,
                self._clock,
                what=f"a read of {table.entity.table}",
                waits_max=self._retries_max,
                outage=self._outage,
            )
        finally:
            self.query_s += perf_counter() - started


def _split(pending: PendingReads) -> list[PendingReads]:
    if len(pending) <= IDS_MAX:
        return [pending] if pending else []
    keys = list(pending)
    return [{key: pending[key] for key in keys[start : start + IDS_MAX]} for start in range(0, len(keys), IDS_MAX)]


def _fail_pending(pending: PendingReads, error: BaseException) -> None:
    for answers in pending.values():
        for answer in answers:
            if answer.done():
                continue
            if isinstance(error, asyncio.CancelledError):
                answer.cancel()
            else:
                answer.set_exception(error)
                answer.exception()  # retrieved, so that a caller that stopped waiting causes no warning


def _nothing() -> None:
    return
