"""Where things are: batches, runs and their spans, by id, key or index."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from headrace.core.batch import BatchRecord
from headrace.core.block import Extra
from headrace.core.index_set import IndexSet
from headrace.core.span import Span
from headrace.foundation.errors import InvalidInput, NotFound, SessionEnded, StoreBroken
from headrace.store.transactions.row_mapping import BatchRow, SpanRow, as_json, to_batch, to_span
from headrace.store.transactions.sql_script import Script, TransactionConflict, fetch, fetch_as, fetch_first, fetch_one

BLOCKS_MAX: Final = 1_000_000
"""Blocks that may hold one index: few, unless a batch came in random order."""
_extras_decoder = msgspec.msgpack.Decoder(dict[int, Extra])


def decode_extras(data: bytes | None) -> dict[int, Extra]:
    """What only some runs of a block have, by position."""
    return {} if data is None else _extras_decoder.decode(data)


def find(batch_id: str) -> Script[BatchRecord]:
    """The batch, or `NotFound`."""
    batch, _ = yield from find_with_width(batch_id)
    return batch


def find_with_width(batch_id: str) -> Script[tuple[BatchRecord, int]]:
    """The batch and the distance that the indexes of its widest block span, or `NotFound`."""
    return _known((yield from fetch_one("batch", id=batch_id)), batch_id)


def lock(batch_id: str) -> Script[BatchRecord]:
    """The batch, not to be changed by others before this transaction ends. After the spans it locks (rule R8)."""
    batch, _ = _known((yield from fetch_one("lock_batch", id=batch_id)), batch_id)
    return batch


def _known(row: tuple[Any, ...] | None, batch_id: str) -> tuple[BatchRecord, int]:
    if row is None:
        raise NotFound("there is no such batch", hint="`headrace batch list` shows those there are", batch_id=batch_id)
    return to_batch(row), BatchRow._make(row).block_width


def require_live(session_id: str) -> Script[None]:
    """Rule R3: an ended session can't come back, under its old id least of all. Raises `SessionEnded`."""
    if (yield from fetch_one("live_session", id=session_id)) is None:
        raise SessionEnded("the session has ended", hint="start a new one", session_id=session_id)


def received_of(batch_id: str) -> Script[IndexSet]:
    """The set of indexes a batch has received."""
    (data,) = yield from fetch_first("received", id=batch_id)
    try:
        return IndexSet.from_bytes(data) if data else IndexSet()
    except InvalidInput as error:
        raise StoreBroken("the set of received indexes can't be read", batch_id=batch_id) from error


def locate(batch_id: str, index: int) -> Script[tuple[int, int] | None]:
    """`(block id, position)` of a run, or None when no such index was received."""
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
            return block_id, index - first_index
        span_slots = array("I", gaps)
        if index - first_index in span_slots:
            return block_id, span_slots.index(index - first_index)
        assert runs_count == len(span_slots)
    return None


def indexes_of(first_index: int, runs_count: int, gaps: bytes | None) -> Sequence[int]:
    """The batch index of each position of a block."""
    if gaps is None:
        return range(first_index, first_index + runs_count)
    return [first_index + gap for gap in array("I", gaps)]


def shapes_of(block_ids: Iterable[int]) -> Script[dict[int, Sequence[int]]]:
    """The batch index of each position of some blocks, by block."""
    rows = yield from fetch("shapes_of_blocks", ids=as_json(sorted(set(block_ids))))
    return {block_id: indexes_of(first_index, runs_count, gaps) for block_id, first_index, runs_count, gaps in rows}


def spans_of_block(block_id: int) -> Script[list[Span]]:
    """All spans over one block."""
    return [to_span(row) for row in (yield from fetch("spans_of_block", block_id=block_id))]


def lock_spans_of_blocks(block_ids: Iterable[int]) -> Script[dict[int, list[Span]]]:
    """All spans over some blocks, by block, not to be changed by others before this transaction ends.

    They are locked in one order (rule R8), and looked at again: who held one may have split it meanwhile.
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
    """The clocks of some queues; a queue nobody knows stands at 0."""
    rows = yield from fetch("clocks", environment=environment, names=as_json(sorted(queues)))
    found = {name: int(clock) for name, clock in rows}
    return {queue: found.get(queue, 0) for queue in queues}
