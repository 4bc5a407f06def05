"""Upkeep's transactions: what is overdue moves on, what is old goes, each in bounded steps."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

from headrace.core import batch as batches
from headrace.core.span import expire
from headrace.store.protocol import Pruned, Suspects, Swept
from headrace.store.sqlite.appending import end_spans, stop, sweep_stopped
from headrace.store.sqlite.rows import as_json, execute, to_batch, to_span
from headrace.store.sqlite.working import give_back

_BY_STEPS: Final = (
    "delete_parts",
    "delete_spans",
    "delete_blocks",
    "delete_keys",
    "delete_tags",
    "delete_objects",
)
_UNKNOWN: Final = Suspects(places=None, evidence="its session is gone")


def sweep(connection: sqlite3.Connection, rows_max: int, crashes_max: int, now_us: int) -> Swept:
    """One bounded round over everything that has a deadline and no live owner."""
    expired = execute(connection, "expired_spans", now_us=now_us, rows_max=rows_max).fetchall()
    expired_count = end_spans(connection, [expire(to_span(row)) for row in expired], now_us)
    overdue = [
        to_batch(row) for row in execute(connection, "open_batches", now_us=now_us, rows_max=rows_max).fetchall()
    ]
    for batch in overdue:
        stop(connection, batch.id, batches.ABANDONED, now_us)
    stopping = [row[0] for row in execute(connection, "stopping_batches").fetchall()]
    left, cancelled_count = rows_max, 0
    for batch_id in stopping:
        spans_count, runs_count = sweep_stopped(connection, batch_id, left, now_us)
        left -= spans_count
        cancelled_count += runs_count
    lost = execute(connection, "leases_without_session", rows_max=rows_max).fetchall()
    if lost:
        give_back(connection, [to_span(row) for row in lost], _UNKNOWN, crashes_max, now_us)
    return Swept(
        expired_count=expired_count,
        abandoned=[batch.id for batch in overdue],
        cancelled_count=cancelled_count,
        more=max(len(expired), len(overdue), rows_max - left, len(lost)) >= rows_max,
    )


def prune(connection: sqlite3.Connection, before_us: int, batches_max: int, rows_max: int) -> Pruned:
    """Delete finished batches, children before parents, at most about `rows_max` rows of each table."""
    finished = execute(connection, "finished_batches", before_us=before_us, rows_max=batches_max + 1).fetchall()
    gone: list[tuple[str, str]] = []
    for batch_id, environment in finished[:batches_max]:
        for name in _BY_STEPS:
            if execute(connection, name, batch_id=batch_id, rows_max=rows_max).rowcount >= rows_max:
                return Pruned(batches=gone, more=True)
        execute(connection, "delete_cancellations", batch_id=batch_id)
        execute(connection, "delete_batch", batch_id=batch_id)
        gone.append((environment, batch_id))
    execute(connection, "delete_sessions", before_us=before_us)
    return Pruned(batches=gone, more=len(finished) > batches_max)


def unnamed(connection: sqlite3.Connection, keys: Sequence[str]) -> list[str]:
    """Object keys that no row names."""
    named = {row[0] for row in execute(connection, "named_objects", keys=as_json(list(keys)))}
    return [key for key in keys if key not in named]
