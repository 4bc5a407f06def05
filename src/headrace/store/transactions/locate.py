"""Lookups of batches, runs and spans, by id, key or index."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from headrace.core.batch import BatchRecord
from headrace.core.block import Extra
from headrace.core.index_set import IndexSet
from headrace.core.span import Span
from headrace.foundation.errors import InvalidInput, NotFound, SessionEnded, StoreBroken
from headrace.foundation.ids import session_name
from headrace.store.transactions.row_mapping import BatchRow, SpanRow, as_json, to_batch, to_span
from headrace.store.transactions.sql_script import Script, TransactionConflict, fetch, fetch_as, fetch_first, fetch_one

BLOCKS_MAX: Final = 1_000_000
"""Blocks that may hold one index: few, unless a batch was received in random order."""
_extras_decoder = msgspec.msgpack.Decoder(dict[int, Extra])


def decode_extras(data: bytes | None) -> dict[int, Extra]:
    """Return what only some runs of a block have, by block offset."""
    return {} if data is None else _extras_decoder.decode(data)


def find(batch_id: str) -> Script[BatchRecord]:
    """Return the batch. Raises `NotFound`."""
    batch, _ = yield from find_with_width(batch_id)
    return batch


def find_with_width(batch_id: str) -> Script[tuple[BatchRecord, int]]:
    """Return the batch, and how many indexes its widest block spans. Raises `NotFound`."""
    return _require_batch((yield from fetch_one("batch", id=batch_id)), batch_id)


def lock(batch_id: str) -> Script[BatchRecord]:
    """Lock the batch until the transaction ends. Spans are locked before it (R8, rows are locked in id order)."""
    batch, _ = _require_batch((yield from fetch_one("lock_batch", id=batch_id)), batch_id)
    return batch


def _require_batch(row: tuple[Any, ...] | None, batch_id: str) -> tuple[BatchRecord, int]:
    if row is None:
        raise NotFound("no batch has this id", hint="`headrace batch list` shows the batches", batch_id=batch_id)
    return to_batch(row), BatchRow._make(row).block_width


def require_live(session_id: str, *, environment: str | None, key_id: str | None) -> Script[None]:
    """Raise `SessionEnded` unless a session of an owner is live (R3, a lapsed session is ended before it is
    recovered). None in place of an environment or a key stands for any.
    """
    row = yield from fetch_one("live_session", id=session_id, environment=environment, key_id=key_id)
    if row is None:
        raise SessionEnded(
            "the session has ended: another process recovered it, or it was closed",
            hint="start a new session",
            session=session_name(session_id),
        )


def received_of(batch_id: str) -> Script[IndexSet]:
    """Return the set of indexes that a batch has received."""
    (data,) = yield from fetch_first("received", id=batch_id)
    try:
        return IndexSet.from_bytes(data) if data else IndexSet()
    except InvalidInput as error:
        raise StoreBroken("the stored set of received indexes can't be decoded", batch_id=batch_id) from error


class RunLocation(NamedTuple):
    """The block that holds the input of a run, and the run's offset in it."""

    block_id: int
    block_offset: int


def locate(batch_id: str, index: int) -> Script[RunLocation | None]:
    """Return the location of a run, or None if the index was not received."""
    row = yield from fetch_one("batch", id=batch_id)
    if row is None:
        return None
    width = BatchRow._make(row).block_width
    blocks = yield from fetch(
        "blocks_from",
        batch_id=batch_id,
        from_index=index,
        after_index=index - width,
        before_index=index + 1,
        rows_max=BLOCKS_MAX,
    )
    for block_id, first_index, last_index, runs_count, gaps in blocks:
        if not first_index <= index <= last_index:
            continue
        if gaps is None:
            return RunLocation(block_id, index - first_index)
        distances = array("I", gaps)
        if index - first_index in distances:
            return RunLocation(block_id, distances.index(index - first_index))
        assert runs_count == len(distances)
    return None


def indexes_of(first_index: int, runs_count: int, gaps: bytes | None) -> Sequence[int]:
    """Return the batch index at each offset of a block."""
    if gaps is None:
        return range(first_index, first_index + runs_count)
    return [first_index + gap for gap in array("I", gaps)]


def shapes_of(block_ids: Iterable[int]) -> Script[dict[int, Sequence[int]]]:
    """Return the batch index at each offset of some blocks, by block id."""
    rows = yield from fetch("shapes_of_blocks", ids=as_json(sorted(set(block_ids))))
    return {block_id: indexes_of(first_index, runs_count, gaps) for block_id, first_index, runs_count, gaps in rows}


def spans_of_block(block_id: int) -> Script[list[Span]]:
    """Return all spans over one block."""
    return [to_span(row) for row in (yield from fetch("spans_of_block", block_id=block_id))]


def lock_spans_of_blocks(block_ids: Iterable[int]) -> Script[dict[int, list[Span]]]:
    """Lock all spans over some blocks until the transaction ends, and return them by block id.

    They are locked in id order (R8, rows are locked in id order), and read again after that: a concurrent transaction
    may have split one.
    """
    ids = sorted(block_ids)
    if len(ids) == 1:
        rows = yield from fetch("lock_spans_of_block", block_id=ids[0])
    else:
        span_ids = sorted(row.id for row in (yield from fetch_as(SpanRow, "spans_of_blocks", ids=as_json(ids))))
        rows = yield from fetch("lock_spans", ids=as_json(span_ids))
    spans = [to_span(row) for row in rows]
    now_there = yield from fetch_as(SpanRow, "spans_of_blocks", ids=as_json(ids))
    if {span.id for span in spans} != {row.id for row in now_there}:
        raise TransactionConflict
    by_block: dict[int, list[Span]] = {block_id: [] for block_id in ids}
    for span in spans:
        by_block[span.block_id].append(span)
    return by_block


def clocks(environment: str, queues: set[str]) -> Script[dict[str, int]]:
    """Return the clocks of some queues; 0 for a queue that does not exist."""
    rows = yield from fetch("clocks", environment=environment, names=as_json(sorted(queues)))
    clock_by_queue = {name: int(clock) for name, clock in rows}
    return {queue: clock_by_queue.get(queue, 0) for queue in queues}
