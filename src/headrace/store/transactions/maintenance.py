"""Transactions of upkeep, each in bounded steps: move on what is overdue, delete what is old."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from headrace.core import batch as batches
from headrace.core.span import expire
from headrace.store.protocol import Pruned, Suspects, Swept
from headrace.store.transactions.cancel_redrive import end_spans, stop, sweep_stopped
from headrace.store.transactions.leases import release_spans
from headrace.store.transactions.row_mapping import BatchRow, as_json, to_batch, to_span
from headrace.store.transactions.sql_script import Script, fetch, fetch_as, fetch_column

BY_BLOCK: Final = ("delete_parts", "delete_spans")
"""Statements that delete the rows of some blocks, each a bounded step."""
BY_BATCH: Final = ("delete_keys", "delete_tags")
"""Statements that delete the rows of some batches beside their blocks, each a bounded step."""

_UNKNOWN: Final = Suspects(span_slots=None, evidence="the session of this lease does not exist")


def take_duty(name: str, holder: str, free_us: int, now_us: int) -> Script[bool]:
    """Take a duty that no other process holds."""
    return bool((yield from fetch("take_duty", name=name, holder=holder, free_us=free_us, now_us=now_us)))


def end_duty(name: str, holder: str, free_us: int) -> Script[None]:
    """End a duty, if this holder still has it."""
    yield from fetch("end_duty", name=name, holder=holder, free_us=free_us)


def sweep(rows_max: int, crashes_max: int, now_us: int) -> Script[Swept]:
    """Sweep a bounded number of everything that has a deadline and no live owner.

    Locked spans are skipped. All batches are locked before any is changed (R8, rows are locked in id order). A batch is
    overdue by its locked row (R4, other tables are read after the lock), so one that was just sealed stays sealed.
    """
    expired = [to_span(row) for row in (yield from fetch("expired_spans", now_us=now_us, rows_max=rows_max))]
    ownerless = [to_span(row) for row in (yield from fetch("leases_without_session", rows_max=rows_max))]
    ids = {batch.id for batch in (yield from fetch_as(BatchRow, "open_batches", now_us=now_us, rows_max=rows_max))}
    ids |= set((yield from fetch_column("stopping_batches")))
    ids |= {span.batch_id for span in expired + ownerless}
    locked = [to_batch(row) for row in (yield from fetch("lock_batches", ids=as_json(sorted(ids))))] if ids else []
    expired_count = yield from end_spans([expire(span) for span in expired], now_us)
    overdue = [batch for batch in locked if (due_us := batches.seal_due_us(batch)) is not None and due_us <= now_us]
    for batch in overdue:
        yield from stop(batch.id, batches.ABANDONED, now_us)
    stopping = [batch_id for batch_id in (yield from fetch_column("stopping_batches")) if batch_id in ids]
    spans_left, cancelled_count = rows_max, 0
    for batch_id in stopping:
        spans_count, runs_count = yield from sweep_stopped(batch_id, spans_left, now_us)
        spans_left -= spans_count
        cancelled_count += runs_count
    if ownerless:
        yield from release_spans(ownerless, _UNKNOWN, crashes_max, now_us)
    return Swept(
        expired_count=expired_count,
        abandoned=[batch.id for batch in overdue],
        cancelled_count=cancelled_count,
        more=max(len(expired), len(overdue), rows_max - spans_left, len(ownerless)) >= rows_max,
    )


def prune(before_us: int, batches_max: int, rows_max: int) -> Script[Pruned]:
    """Delete finished batches, all of them with the same statements, at most about `rows_max` rows of each table."""
    finished = yield from fetch("finished_batches", before_us=before_us, rows_max=batches_max + 1)
    environments: dict[str, str] = dict(finished[:batches_max])
    with_objects: list[tuple[str, str]] = []
    if environments:
        step = yield from delete_rows(list(environments), rows_max)
        with_objects = [(environments[batch_id], batch_id) for batch_id in sorted(step.with_objects)]
        if step.more:
            return Pruned(batches=[], with_objects=with_objects, more=True)
        ids = as_json(sorted(environments))
        yield from fetch("delete_cancellations", ids=ids)
        yield from fetch("lock_batches", ids=ids)  # after the spans (R8, rows are locked in id order)
        yield from fetch("delete_batches", ids=ids)
    yield from fetch("delete_sessions", before_us=before_us)
    yield from fetch("delete_buckets", before_us=before_us)
    batches_pruned = [(environment, batch_id) for batch_id, environment in environments.items()]
    return Pruned(batches=batches_pruned, with_objects=with_objects, more=len(finished) > batches_max)


class DeletedRows(NamedTuple):
    """The result of one bounded step: batches of which objects became orphans, and True if rows may be left."""

    with_objects: set[str]
    more: bool


def delete_rows(batch_ids: Sequence[str], rows_max: int) -> Script[DeletedRows]:
    """Delete a bounded number of the rows of batches, children before parents, block by block.

    A block is deleted in the step that deletes its last rows, so that no step reads it again.
    """
    ids = as_json(list(batch_ids))
    blocks_max = max(rows_max // 2, 1)
    blocks = yield from fetch_column("first_blocks", ids=ids, rows_max=blocks_max)
    if blocks:
        block_ids = as_json(blocks)
        for name in BY_BLOCK:
            if len((yield from fetch(name, ids=block_ids, rows_max=rows_max))) >= rows_max:
                return DeletedRows(set(), more=True)
        yield from fetch("delete_blocks", ids=block_ids)
        if len(blocks) >= blocks_max:
            return DeletedRows(set(), more=True)
    for name in BY_BATCH:
        if len((yield from fetch(name, ids=ids, rows_max=rows_max))) >= rows_max:
            return DeletedRows(set(), more=True)
    owners = yield from fetch_column("delete_objects", ids=ids, rows_max=rows_max)
    return DeletedRows(set(owners), more=len(owners) >= rows_max)


def unnamed(keys: Sequence[str]) -> Script[list[str]]:
    """Return the object keys that no row names."""
    named = set((yield from fetch_column("named_objects", keys=as_json(list(keys)))))
    return [key for key in keys if key not in named]
