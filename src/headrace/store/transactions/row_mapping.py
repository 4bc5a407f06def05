"""Between rows and values: how spans, batches and parts go into a statement and come out of one.

Bulk writes are one statement with two parameters, rows as JSON and one blob that all byte columns are cut from
(rule R13: a statement a row lets a CPU-bound thread in between each two of them).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from headrace.core.batch import Batch
from headrace.core.span import Counts, Part, Span
from headrace.store.transactions.sql_script import Script, fetch, fetch_first

SPAN_COLUMNS: Final = (
    "id", "block_id", "batch_id", "environment", "queue", "task", "priority", "due_us", "expires_us", "at_most_once",
    "order_no", "first_index", "attempt", "crashes_count", "crashes_alone_count", "positions", "states",
    "unsettled_count", "state", "session_id", "claim_no", "token", "dead_letter", "note", "since_us",
)  # fmt: skip

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder().decode


class Blob:
    """Collects byte columns; `put` answers the 1-based start and the length that `substr` takes (-1 for NULL)."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._next = 1

    def put(self, piece: bytes | None) -> tuple[int, int]:
        """Add one column's bytes."""
        if piece is None:
            return 0, -1
        start = self._next
        self._pieces.append(piece)
        self._next += len(piece)
        return start, len(piece)

    def bytes(self) -> bytes:
        """All of it, end to end."""
        return b"".join(self._pieces)


def as_json(value: object) -> str:
    """A list or mapping as a JSON parameter."""
    return _encode(value).decode()


def to_span(row: Sequence[Any]) -> Span:
    """A span from a row in the order of `SPAN_COLUMNS` (more columns may follow)."""
    values = dict(zip(SPAN_COLUMNS, row, strict=False))
    values["at_most_once"] = bool(values["at_most_once"])
    values["dead_letter"] = bool(values["dead_letter"])
    return Span(**values)


def to_batch(row: Sequence[Any]) -> Batch:
    """A batch from a row of the statements in `read.sql`."""
    return Batch(
        id=row[0],
        environment=row[1],
        key=row[2],
        kind=row[3],
        task=row[4],
        state=row[5],
        expected_count=row[6],
        received_count=row[7],
        counts=Counts(*row[8:12]),
        order_bases=_decode(row[12]),
        cursor=row[13],
        metadata=_decode(row[14]),
        session_id=row[15],
        created_us=row[16],
        appended_us=row[17],
        sealed_us=row[18],
        finished_us=row[19],
        seal_timeout_ms=row[20],
    )


def to_part(row: Sequence[Any]) -> Part:
    """A part from a row of `parts_of_blocks`."""
    return Part(
        block_id=row[0],
        span_id=row[1],
        token=row[2],
        part_no=row[3],
        positions=row[4],
        codes=row[5],
        results=row[6],
        settled_us=row[7],
    )


def put_batch(batch: Batch) -> Script[None]:
    """Write a batch after a decision."""
    yield from fetch(
        "update_batch",
        id=batch.id,
        state=batch.state,
        expected_count=batch.expected_count,
        received_count=batch.received_count,
        completed_count=batch.counts.completed,
        failed_count=batch.counts.failed,
        cancelled_count=batch.counts.cancelled,
        expired_count=batch.counts.expired,
        order_bases=as_json(batch.order_bases),
        cursor=batch.cursor,
        appended_us=batch.appended_us,
        sealed_us=batch.sealed_us,
        finished_us=batch.finished_us,
    )


def add_spans(spans: Sequence[Span], *, first_id: int) -> Script[None]:
    """Insert new spans, numbering them from `first_id` in their order."""
    if not spans:
        return
    blob, rows = Blob(), []
    for number, span in enumerate(spans):
        span.id = first_id + number
        rows.append(
            (
                span.id, span.block_id, span.batch_id, span.environment, span.queue, span.task, span.priority,
                span.due_us, span.expires_us, int(span.at_most_once), span.order_no, span.first_index, span.attempt,
                span.crashes_count, span.crashes_alone_count, span.unsettled_count, span.state, span.session_id,
                span.claim_no, span.token, *blob.put(span.positions), *blob.put(span.states), int(span.dead_letter),
                span.note, span.since_us,
            )
        )  # fmt: skip
    yield from fetch("insert_spans", rows=as_json(rows), blob=blob.bytes())


def put_spans(spans: Iterable[Span]) -> Script[None]:
    """Write spans after a decision."""
    blob = Blob()
    rows = [
        (
            span.id, span.order_no, span.crashes_count, span.crashes_alone_count, span.unsettled_count, span.state,
            span.session_id, span.claim_no, span.token, *blob.put(span.states),
        )
        for span in spans
    ]  # fmt: skip
    if rows:
        yield from fetch("update_spans", rows=as_json(rows), blob=blob.bytes())


def put_states(spans: Iterable[Span]) -> Script[None]:
    """Write spans of which nothing changed but the states of their runs."""
    blob = Blob()
    rows = [(span.id, span.unsettled_count, *blob.put(span.states)) for span in spans]
    if rows:
        yield from fetch("update_states", rows=as_json(rows), blob=blob.bytes())


def add_parts(parts: Iterable[Part]) -> Script[None]:
    """Insert recorded outcomes."""
    blob = Blob()
    rows = [
        (
            part.block_id, part.span_id, part.token, part.part_no, part.settled_us,
            *blob.put(part.positions), *blob.put(part.codes), *blob.put(part.results),
        )
        for part in parts
    ]  # fmt: skip
    if rows:
        yield from fetch("insert_parts", rows=as_json(rows), blob=blob.bytes())


def take_ids(*, blocks_count: int = 0, spans_count: int = 0) -> Script[tuple[int, int]]:
    """Reserve ids: the first of the blocks' and the first of the spans'."""
    first_block, first_span = yield from fetch_first("take_ids", blocks_count=blocks_count, spans_count=spans_count)
    return int(first_block), int(first_span)
