"""A PostgreSQL schema as the target of a store copy, page by page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from headrace.core.span import DELAYED, LEASED, WAITING
from headrace.foundation.errors import Conflict
from headrace.store.postgres.store import PostgresStore
from headrace.store.store_copy import MOVING, PAGE_ROWS, Belongings, Page
from headrace.store.transactions.maintenance import delete_rows
from headrace.store.transactions.row_mapping import Blob, add_parts, add_spans, as_json, take_ids
from headrace.store.transactions.sql_script import Script, fetch, fetch_column, fetch_first, fetch_one


class PostgresCopyTarget:
    """A schema as the target of a copy (see `headrace.store.store_copy.CopyTarget`)."""

    def __init__(self, store: PostgresStore) -> None:
        self._perform = store.perform

    async def moved_until(self, move_id: str) -> int:
        """Return the last block of the source that was copied."""
        return await self._perform(lambda: _moved_until(move_id))

    async def check_keys(self, named: Sequence[tuple[str, str, str]]) -> None:
        """Raise `Conflict` if keys of batches name other batches here."""
        if named:
            await self._perform(lambda: _check_keys(named))

    async def insert_page(self, move_id: str, after_id: int, page: Page) -> None:
        """Insert a page, once."""
        await self._perform(lambda: _insert_page(move_id, after_id, page))

    async def create_queues(
        self, environment: str, queues: Sequence[tuple[str, int, bool]], lanes: Sequence[tuple[str, str]]
    ) -> int:
        """Create the queues of an environment, and return by how much order numbers grow."""
        return await self._perform(lambda: _create_queues(environment, queues, lanes))

    async def insert_belongings(self, batch_id: str, environment: str, belongings: Belongings, *, now_us: int) -> None:
        """Insert what belongs to a batch."""
        await self._perform(lambda: _insert_belongings(batch_id, environment, belongings, now_us))

    async def publish_batch(self, batch: dict[str, Any], cancelled: Sequence[int], offset: int, *, now_us: int) -> None:
        """Make a batch that was copied completely visible and runnable."""
        bases = {name: base + offset for name, base in msgspec.json.decode(batch["order_bases"]).items()}
        row = batch | {"order_bases": as_json(bases)}
        await self._perform(lambda: _publish_batch(row, cancelled, offset, now_us))

    async def delete_unpublished(self, batch_ids: Sequence[str]) -> bool:
        """Delete a bounded part of batches that are not visible yet. Returns False when nothing is left of them."""
        return await self._perform(lambda: _delete_unpublished(batch_ids))

    async def keep_rules(self, rules: Sequence[tuple[str, str, bytes]]) -> None:
        """Insert the rules whose names do not exist here."""
        await self._perform(lambda: _keep_rules(rules))

    async def forget(self, move_id: str) -> None:
        """Delete the progress of a copy, which is complete or was undone."""
        await self._perform(lambda: _forget(move_id))


def _moved_until(move_id: str) -> Script[int]:
    block_ids = yield from fetch_column("moved_until", id=move_id)
    return int(block_ids[0]) if block_ids else 0


def _check_keys(named: Sequence[tuple[str, str, str]]) -> Script[None]:
    taken = yield from fetch("taken_keys", rows=as_json(list(named)))
    if taken:
        keys = ", ".join(repr(key) for _, key in taken[:5])
        raise Conflict(
            f"{len(taken)} keys of batches name other batches in the target: {keys}",
            hint="copy into another schema, or delete those batches there",
        )


def _insert_page(move_id: str, after_id: int, page: Page) -> Script[None]:
    if (yield from _moved_until(move_id)) != after_id:
        return  # this page was copied before
    first_block, first_span = yield from take_ids(blocks_count=len(page.blocks), spans_count=len(page.spans))
    block_ids = {block.id: first_block + number for number, block in enumerate(page.blocks)}
    span_ids = {span.id: first_span + number for number, span in enumerate(page.spans)}
    for batch_id in sorted({block.batch_id for block in page.blocks}):
        blob, rows = Blob(), []
        for block in page.blocks:
            if block.batch_id == batch_id:
                cuts = (*blob.put(block.gaps), *blob.put(block.extras), *blob.put(block.items))
                rows.append((block_ids[block.id], block.first_index, block.last_index, block.runs_count, *cuts))
        yield from fetch("insert_blocks", batch_id=batch_id, rows=as_json(rows), blob=blob.bytes())
    for span in page.spans:
        span.block_id = block_ids[span.block_id]
        if span.state in (WAITING, DELAYED, LEASED):
            span.state = MOVING
    yield from add_spans(page.spans, first_id=first_span)
    for part in page.parts:
        part.block_id, part.span_id = block_ids[part.block_id], span_ids[part.span_id]
    yield from add_parts(page.parts)
    yield from fetch("move_until", id=move_id, block_id=page.blocks[-1].id)


def _create_queues(
    environment: str, queues: Sequence[tuple[str, int, bool]], lanes: Sequence[tuple[str, str]]
) -> Script[int]:
    (clock,) = yield from fetch_first("environment_clock", environment=environment)
    for name, own_clock, paused in queues:
        yield from fetch("know_queue", environment=environment, name=name)
        if not clock:
            yield from fetch("advance_clock", environment=environment, name=name, order_no=own_clock)
        if paused:
            yield from fetch("pause_queue", environment=environment, name=name, paused=1)
    yield from fetch("know_lanes", environment=environment, rows=as_json(list(lanes)))
    return int(clock) - max((own_clock for _, own_clock, _ in queues), default=0) if clock else 0


def _insert_belongings(batch_id: str, environment: str, belongings: Belongings, now_us: int) -> Script[None]:
    if belongings.keys:
        yield from fetch(
            "insert_keys", environment=environment, batch_id=batch_id, rows=as_json(belongings.keys), now_us=now_us
        )
    if belongings.tags:
        yield from fetch("insert_tags", environment=environment, batch_id=batch_id, rows=as_json(belongings.tags))
    if belongings.objects:
        yield from fetch("insert_objects", rows=as_json(belongings.objects))

    if belongings.dead:
        rows = [(batch_id, index, environment, queue, task, died_us) for index, queue, task, died_us in belongings.dead]
        yield from fetch("insert_moved_dead", rows=as_json(rows))


def _keep_rules(rules: Sequence[tuple[str, str, bytes]]) -> Script[None]:
    for environment, name, value in rules:
        yield from fetch("keep_rules", environment=environment, name=name, value=value, before=None)


def _publish_batch(row: dict[str, Any], cancelled: Sequence[int], offset: int, now_us: int) -> Script[None]:
    if not (yield from fetch("insert_moved_batch", **row)):
        return  # the batch was made visible before
    if cancelled:
        yield from fetch("ask_to_cancel", batch_id=row["id"], indexes=as_json(list(cancelled)))
    yield from fetch("free_moved_spans", batch_id=row["id"], offset=offset, now_us=now_us)


def _delete_unpublished(batch_ids: Sequence[str]) -> Script[bool]:
    for batch_id in batch_ids:
        if (yield from fetch_one("batch", id=batch_id)) is not None:
            raise Conflict(
                "batches of this copy run in the target already", hint="continue the copy", batch_id=batch_id
            )
    if (yield from delete_rows(batch_ids, PAGE_ROWS)).more:
        return True
    for batch_id in batch_ids:
        if len((yield from fetch("delete_dead", batch_id=batch_id, rows_max=PAGE_ROWS))) >= PAGE_ROWS:
            return True
    return False


def _forget(move_id: str) -> Script[None]:
    yield from fetch("forget_move", id=move_id)
