"""A PostgreSQL schema as the target of a store copy, page by page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from headrace.core.span import DELAYED, LEASED, WAITING
from headrace.foundation.errors import Conflict
from headrace.store.postgres.store import PostgresStore
from headrace.store.store_copy import MOVING, PAGE_ROWS, Belongings, Page
from headrace.store.transactions.maintenance import BY_STEPS
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

    async def take_in(self, move_id: str, after_id: int, came: Page) -> None:
        """Insert a page, once."""
        await self._perform(lambda: _take_in(move_id, after_id, came))

    async def know(
        self, environment: str, own: Sequence[tuple[str, int, bool]], lanes: Sequence[tuple[str, str]]
    ) -> int:
        """Create the queues of an environment, and return by how much order numbers grow."""
        return await self._perform(lambda: _know(environment, own, lanes))

    async def own(self, batch_id: str, environment: str, came: Belongings, *, now_us: int) -> None:
        """Insert what belongs to a batch."""
        await self._perform(lambda: _own(batch_id, environment, came, now_us))

    async def let_in(self, batch: dict[str, Any], cancelled: Sequence[int], offset: int, *, now_us: int) -> None:
        """Make a batch that was copied completely visible and runnable."""
        bases = {name: base + offset for name, base in msgspec.json.decode(batch["order_bases"]).items()}
        row = batch | {"order_bases": as_json(bases)}
        await self._perform(lambda: _let_in(row, cancelled, offset, now_us))

    async def take_back(self, batch_ids: Sequence[str]) -> bool:
        """Delete a bounded part of batches that are not visible yet. Returns False when nothing is left of them."""
        return await self._perform(lambda: _take_back(batch_ids))

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


def _take_in(move_id: str, after_id: int, came: Page) -> Script[None]:
    if (yield from _moved_until(move_id)) != after_id:
        return  # this page was copied before
    first_block, first_span = yield from take_ids(blocks_count=len(came.blocks), spans_count=len(came.spans))
    block_ids = {block.id: first_block + number for number, block in enumerate(came.blocks)}
    span_ids = {span.id: first_span + number for number, span in enumerate(came.spans)}
    for batch_id in sorted({block.batch_id for block in came.blocks}):
        blob, rows = Blob(), []
        for block in came.blocks:
            if block.batch_id == batch_id:
                cuts = (*blob.put(block.gaps), *blob.put(block.extras), *blob.put(block.items))
                rows.append((block_ids[block.id], block.first_index, block.last_index, block.runs_count, *cuts))
        yield from fetch("insert_blocks", batch_id=batch_id, rows=as_json(rows), blob=blob.bytes())
    for span in came.spans:
        span.block_id = block_ids[span.block_id]
        if span.state in (WAITING, DELAYED, LEASED):
            span.state = MOVING
    yield from add_spans(came.spans, first_id=first_span)
    for part in came.parts:
        part.block_id, part.span_id = block_ids[part.block_id], span_ids[part.span_id]
    yield from add_parts(came.parts)
    yield from fetch("move_until", id=move_id, block_id=came.blocks[-1].id)


def _know(environment: str, own: Sequence[tuple[str, int, bool]], lanes: Sequence[tuple[str, str]]) -> Script[int]:
    (clock,) = yield from fetch_first("environment_clock", environment=environment)
    for name, own_clock, paused in own:
        yield from fetch("know_queue", environment=environment, name=name)
        if not clock:
            yield from fetch("advance_clock", environment=environment, name=name, order_no=own_clock)
        if paused:
            yield from fetch("pause_queue", environment=environment, name=name, paused=1)
    yield from fetch("know_lanes", environment=environment, rows=as_json(list(lanes)))
    return int(clock) - max((own_clock for _, own_clock, _ in own), default=0) if clock else 0


def _own(batch_id: str, environment: str, came: Belongings, now_us: int) -> Script[None]:
    if came.keys:
        yield from fetch(
            "insert_keys", environment=environment, batch_id=batch_id, rows=as_json(came.keys), now_us=now_us
        )
    if came.tags:
        yield from fetch("insert_tags", environment=environment, batch_id=batch_id, rows=as_json(came.tags))
    if came.objects:
        yield from fetch("insert_objects", rows=as_json(came.objects))

    if came.dead:
        rows = [(batch_id, index, environment, queue, task, died_us) for index, queue, task, died_us in came.dead]
        yield from fetch("insert_moved_dead", rows=as_json(rows))


def _keep_rules(rules: Sequence[tuple[str, str, bytes]]) -> Script[None]:
    for environment, name, value in rules:
        yield from fetch("keep_rules", environment=environment, name=name, value=value, before=None)


def _let_in(row: dict[str, Any], cancelled: Sequence[int], offset: int, now_us: int) -> Script[None]:
    if not (yield from fetch("insert_moved_batch", **row)):
        return  # the batch was made visible before
    if cancelled:
        yield from fetch("ask_to_cancel", batch_id=row["id"], indexes=as_json(list(cancelled)))
    yield from fetch("free_moved_spans", batch_id=row["id"], offset=offset, now_us=now_us)


def _take_back(batch_ids: Sequence[str]) -> Script[bool]:
    for batch_id in batch_ids:
        if (yield from fetch_one("batch", id=batch_id)) is not None:
            raise Conflict(
                "batches of this copy run in the target already", hint="continue the copy", batch_id=batch_id
            )
    is_more = False
    for batch_id in batch_ids:
        for name in (*BY_STEPS, "delete_dead"):
            gone = yield from fetch(name, batch_id=batch_id, rows_max=PAGE_ROWS)
            is_more = is_more or len(gone) >= PAGE_ROWS
            if is_more:
                break
    return is_more


def _forget(move_id: str) -> Script[None]:
    yield from fetch("forget_move", id=move_id)
