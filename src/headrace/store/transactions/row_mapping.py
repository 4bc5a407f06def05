"""Conversion between rows and values: spans, batches and parts as parameters of a statement and as its result.

A bulk write is one statement with two parameters: rows as JSON, and one blob that all byte columns are cut from (R13,
bulk writes are one statement with one blob: between two statements, a CPU-bound thread may take the interpreter).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from headrace.core.batch import BatchRecord
from headrace.core.span import Counts, Part, Span, decode_uint16s
from headrace.store.transactions.sql_script import Script, fetch, fetch_first

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder().decode


class Blob:
    """Collector of byte columns. `put` returns the 1-based start and the length that `substr` takes; -1 is NULL."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._next = 1

    def put(self, piece: bytes | None) -> tuple[int, int]:
        """Add the bytes of one column."""
        if piece is None:
            return 0, -1
        start = self._next
        self._pieces.append(piece)
        self._next += len(piece)
        return start, len(piece)

    def bytes(self) -> bytes:
        """Return all bytes, end to end."""
        return b"".join(self._pieces)


def as_json(value: object) -> str:
    """Encode a list or mapping as a JSON parameter."""
    return _encode(value).decode()


class SpanRow(NamedTuple):
    """A row of the fragment `span_columns`. The column of `block_offsets` is called `positions`."""

    id: int
    block_id: int
    batch_id: str
    environment: str
    queue: str
    task: str
    priority: int
    due_us: int
    expires_us: int
    at_most_once: int
    order_no: int
    first_index: int
    attempt: int
    crashes_count: int
    crashes_alone_count: int
    block_offsets: bytes | None
    states: bytes
    unsettled_count: int
    state: str
    session_id: str
    claim_no: int
    token: int
    dead_letter: int
    note: str
    since_us: int
    leased_us: int


class BatchRow(NamedTuple):
    """A row of the fragment `batch_columns`. `block_width`: how many indexes the widest block of the batch spans."""

    id: str
    environment: str
    key: str | None
    kind: str
    task: str
    state: str
    expected_count: int | None
    received_count: int
    completed_count: int
    failed_count: int
    cancelled_count: int
    expired_count: int
    order_bases: str
    cursor: bytes
    metadata: str
    session_id: str
    created_us: int
    appended_us: int
    sealed_us: int
    finished_us: int
    seal_timeout_ms: int
    block_width: int


class PartRow(NamedTuple):
    """A row of the fragment `part_columns`. The column of `block_offsets` is called `positions`."""

    block_id: int
    span_id: int
    token: int
    part_no: int
    settled_us: int
    block_offsets: bytes | None
    codes: bytes
    results: bytes


class PartShape(NamedTuple):
    """A row of the statement `shapes_of_parts`: a part without its results."""

    id: int
    block_id: int
    settled_us: int
    block_offsets: bytes | None
    codes: bytes
    results_bytes: int

    @property
    def codes_by_offset(self) -> Iterator[tuple[int, int]]:
        """The block offset and the code of each outcome."""
        offsets = range(len(self.codes)) if self.block_offsets is None else decode_uint16s(self.block_offsets)
        return zip(offsets, self.codes, strict=True)


class BlockRow(NamedTuple):
    """A row of the statement `blocks`."""

    id: int
    first_index: int
    gaps: bytes | None
    extras: bytes | None
    items: bytes


def to_span(columns: Sequence[Any]) -> Span:
    """Make a span of the columns of a `SpanRow`."""
    row = SpanRow._make(columns)
    return Span(
        id=row.id,
        block_id=row.block_id,
        batch_id=row.batch_id,
        environment=row.environment,
        queue=row.queue,
        task=row.task,
        priority=row.priority,
        due_us=row.due_us,
        expires_us=row.expires_us,
        at_most_once=bool(row.at_most_once),
        order_no=row.order_no,
        first_index=row.first_index,
        attempt=row.attempt,
        crashes_count=row.crashes_count,
        crashes_alone_count=row.crashes_alone_count,
        block_offsets=row.block_offsets,
        states=row.states,
        unsettled_count=row.unsettled_count,
        state=row.state,
        session_id=row.session_id,
        claim_no=row.claim_no,
        token=row.token,
        dead_letter=bool(row.dead_letter),
        note=row.note,
        since_us=row.since_us,
        leased_us=row.leased_us,
    )


def to_batch(columns: Sequence[Any]) -> BatchRecord:
    """Make a batch of the columns of a `BatchRow`."""
    row = BatchRow._make(columns)
    return BatchRecord(
        id=row.id,
        environment=row.environment,
        key=row.key,
        kind=row.kind,
        task=row.task,
        state=row.state,
        expected_count=row.expected_count,
        received_count=row.received_count,
        counts=Counts(row.completed_count, row.failed_count, row.cancelled_count, row.expired_count),
        order_bases=_decode(row.order_bases),
        cursor=row.cursor,
        metadata=_decode(row.metadata),
        session_id=row.session_id,
        created_us=row.created_us,
        appended_us=row.appended_us,
        sealed_us=row.sealed_us,
        finished_us=row.finished_us,
        seal_timeout_ms=row.seal_timeout_ms,
    )


def to_part(columns: Sequence[Any]) -> Part:
    """Make a part of the columns of a `PartRow`."""
    return Part(**PartRow._make(columns)._asdict())


def put_batch(batch: BatchRecord) -> Script[None]:
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
    """Insert new spans, numbered from `first_id` in their order."""
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
                span.claim_no, span.token, *blob.put(span.block_offsets), *blob.put(span.states), int(span.dead_letter),
                span.note, span.since_us, span.leased_us,
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
            span.leased_us,
        )
        for span in spans
    ]  # fmt: skip
    if rows:
        yield from fetch("update_spans", rows=as_json(rows), blob=blob.bytes())


def put_states(spans: Iterable[Span]) -> Script[None]:
    """Write spans of which only the states of runs changed."""
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
            *blob.put(part.block_offsets), *blob.put(part.codes), *blob.put(part.results),
        )
        for part in parts
    ]  # fmt: skip
    if rows:
        yield from fetch("insert_parts", rows=as_json(rows), blob=blob.bytes())


def take_ids(*, blocks_count: int = 0, spans_count: int = 0) -> Script[tuple[int, int]]:
    """Reserve ids, and return the first for blocks and the first for spans."""
    first_block, first_span = yield from fetch_first("take_ids", blocks_count=blocks_count, spans_count=spans_count)
    return int(first_block), int(first_span)
