"""Transactions of upkeep, each in bounded steps: move on what is overdue, delete what is old."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from headrace.core import batch as batches
from headrace.core.span import expire
from headrace.store.protocol import Pruned, Suspects, Swept
from headrace.store.transactions.cancel_redrive import end_spans, stop, sweep_stopped
from headrace.store.transactions.leases import release_spans
from headrace.store.transactions.row_mapping import BatchRow, as_json, to_batch, to_span
from headrace.store.transactions.sql_script import Script, fetch, fetch_as, fetch_column

BY_STEPS: Final = (
    "delete_parts",
    "delete_spans",
    "delete_blocks",
    "delete_keys",
    "delete_tags",
    "delete_objects",
)
"""Statements that delete the rows of a batch, in this order, each a bounded step."""

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
    """Delete finished batches, children before parents, at most about `rows_max` rows of each table."""
    finished = yield from fetch("finished_batches", before_us=before_us, rows_max=batches_max + 1)
    pruned: list[tuple[str, str]] = []
    for batch_id, environment in finished[:batches_max]:
        for name in BY_STEPS:
            if len((yield from fetch(name, batch_id=batch_id, rows_max=rows_max))) >= rows_max:
                return Pruned(batches=pruned, more=True)
        yield from fetch("delete_cancellations", batch_id=batch_id)
        yield from fetch("delete_batch", batch_id=batch_id)
        pruned.append((environment, batch_id))
    yield from fetch("delete_sessions", before_us=before_us)
    yield from fetch("delete_buckets", before_us=before_us)
    return Pruned(batches=pruned, more=len(finished) > batches_max)


def unnamed(keys: Sequence[str]) -> Script[list[str]]:
    """Return the object keys that no row names."""
    named = set((yield from fetch_column("named_objects", keys=as_json(list(keys)))))
    return [key for key in keys if key not in named]
