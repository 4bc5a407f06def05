"""A SQLite file as the source of a store copy, page by page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from headrace.store.sqlite import write_fence
from headrace.store.sqlite.store import SqliteStore
from headrace.store.store_copy import NOTHING, PAGE_BLOCKS, PAGE_ROWS, Belongings, CopiedBlock, Page
from headrace.store.transactions.row_mapping import as_json, to_part, to_span
from headrace.store.transactions.sql_script import Script, fetch, fetch_as, fetch_column, fetch_first

T = TypeVar("T")

BATCH_COLUMNS: Final = (
    "id", "environment", "key", "kind", "task", "state", "expected_count", "received_count", "completed_count",
    "failed_count", "cancelled_count", "expired_count", "order_bases", "cursor", "metadata", "session_id", "created_us",
    "appended_us", "sealed_us", "finished_us", "seal_timeout_ms", "block_width", "received",
)  # fmt: skip


class SqliteCopySource:
    """A file as the source of a copy (see `headrace.store.store_copy.CopySource`)."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store

    async def fence(self, move_id: str, target: str, *, now_us: int) -> tuple[str, bool]:
        """Block all writes. Returns `(id of the copy, True if it had begun before)`."""
        return await self._store.change(lambda connection: write_fence.fence(connection, move_id, target, now_us))

    async def finish(self, *, now_us: int) -> None:
        """Mark the copy as complete; writes stay blocked."""
        await self._store.change(lambda connection: write_fence.finish(connection, now_us))

    async def unfence(self) -> str:
        """Allow writes again, and return the id of the copy."""
        return await self._store.change(write_fence.unfence)

    async def runs_count(self) -> int:
        """Return the number of runs to copy."""
        return await self._read(_runs_count)

    async def page(self, after_id: int) -> Page:
        """Return the blocks after an id, with their spans and parts."""
        return await self._read(lambda: _page(after_id))

    async def batches(self, after_id: str) -> list[dict[str, Any]]:
        """Return the batches after an id, by column."""
        return await self._read(lambda: _batches(after_id))

    async def belongings(self, batch_id: str, after: Belongings | None) -> Belongings:
        """Return the next page of a batch's keys, tags, objects and dead letters, or the first one."""
        return await self._read(lambda: _belongings(batch_id, after))

    async def cancellations(self, batch_id: str) -> list[int]:
        """Return the runs of a batch that are to be cancelled."""
        return await self._read(lambda: _cancellations(batch_id))

    async def queues(self) -> list[tuple[str, str, int, bool]]:
        """Return `(environment, name, clock, paused)` of every queue."""
        return await self._read(_queues)

    async def lanes(self, environment: str) -> list[tuple[str, str]]:
        """Return `(queue, task)` of every lane."""
        return await self._read(lambda: _lanes(environment))

    async def rules(self) -> list[tuple[str, str, bytes]]:
        """Return `(environment, name, value)` of every rule."""
        return await self._read(_rules)

    async def _read(self, script: Callable[[], Script[T]]) -> T:
        return await self._store.read(script)


def _page(after_id: int) -> Script[Page]:
    blocks = yield from fetch_as(CopiedBlock, "moving_blocks", after_id=after_id, rows_max=PAGE_BLOCKS)
    ids = as_json([block.id for block in blocks])
    spans = [to_span(row) for row in (yield from fetch("spans_of_blocks", ids=ids))] if blocks else []
    parts = [to_part(row) for row in (yield from fetch("parts_of_blocks", ids=ids))] if blocks else []
    return Page(blocks, spans, parts)


def _batches(after_id: str) -> Script[list[dict[str, Any]]]:
    rows = yield from fetch("moving_batches", after_id=after_id, rows_max=PAGE_BLOCKS)
    return [dict(zip(BATCH_COLUMNS, row, strict=True)) for row in rows]


def _belongings(batch_id: str, after: Belongings | None) -> Script[Belongings]:
    """Read the next page of each list. A list that has ended stays ended, however many pages the others have."""
    first = after is None
    came = NOTHING if after is None else after
    keys = tags = objects = dead = []
    if first or came.keys:
        task, key = came.keys[-1][:2] if came.keys else ("", "")
        keys = yield from fetch("moving_keys", batch_id=batch_id, task=task, key=key, rows_max=PAGE_ROWS)
    if first or came.tags:
        tag, run_index = came.tags[-1] if came.tags else ("", -1)
        tags = yield from fetch("moving_tags", batch_id=batch_id, tag=tag, run_index=run_index, rows_max=PAGE_ROWS)
    if first or came.objects:
        object_key = came.objects[-1][0] if came.objects else ""
        objects = yield from fetch("moving_objects", batch_id=batch_id, key=object_key, rows_max=PAGE_ROWS)
    if first or came.dead:
        dead_index = came.dead[-1][0] if came.dead else -1
        dead = yield from fetch("moving_dead", batch_id=batch_id, run_index=dead_index, rows_max=PAGE_ROWS)
    return Belongings(
        [(task, key, run_index, expires_us) for task, key, run_index, expires_us in keys],
        [(tag, run_index) for tag, run_index in tags],
        [(key, batch_id) for key, batch_id in objects],
        [(run_index, queue, task, died_us) for run_index, queue, task, died_us in dead],
    )


def _cancellations(batch_id: str) -> Script[list[int]]:
    return (yield from fetch_column("moving_cancellations", batch_id=batch_id))


def _queues() -> Script[list[tuple[str, str, int, bool]]]:
    rows = yield from fetch("moving_queues")
    return [(environment, name, int(clock), bool(paused)) for environment, name, clock, paused in rows]


def _lanes(environment: str) -> Script[list[tuple[str, str]]]:
    return [(queue, task) for queue, task in (yield from fetch("moving_lanes", environment=environment))]


def _rules() -> Script[list[tuple[str, str, bytes]]]:
    rows = yield from fetch("moving_rules")
    return [(environment, name, bytes(value)) for environment, name, value in rows]


def _runs_count() -> Script[int]:
    (runs_count,) = yield from fetch_first("moving_total")
    return int(runs_count)
