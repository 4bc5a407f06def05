"""Queries of operators and of result readers. Nothing here writes; it runs beside the writer."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import Final, TypeAlias

import msgspec

from headrace.core import run as runs_core
from headrace.core.batch import STREAM, BatchRecord, Ledger, ledger
from headrace.core.block import Extra
from headrace.core.index_set import IndexSet
from headrace.core.pack import unpack_some
from headrace.core.page import count_within
from headrace.core.serving import LANES_MAX, Serving, StalledLane, WaitingLane
from headrace.core.serving import stalled_lanes as stalled
from headrace.core.span import LEASED, Span, block_offsets_of, encode_uint16s, results_of
from headrace.foundation.errors import NotFound
from headrace.foundation.ids import INDEX_MAX
from headrace.store.projections import WITH_RESULT, attempt_of, no_run, serving_since, view_of
from headrace.store.protocol import LeaseLoad, QueueView, RunOutcome, RunRecord, Session, Verification
from headrace.store.transactions.locate import (
    decode_extras,
    find,
    find_with_width,
    indexes_of,
    locate,
    received_of,
    spans_of_block,
)
from headrace.store.transactions.row_mapping import BatchRow, PartShape, as_json, to_batch, to_part, to_span
from headrace.store.transactions.sql_script import Rows, Script, fetch, fetch_as, fetch_first, fetch_one

VERIFY_BLOCKS: Final = 256
LISTED_ROWS: Final = 64
"""Batches that are read at a time: their metadata may be large."""
NOTHING: Final = (b"", 0)
FinalRun: TypeAlias = tuple[int, int, int, int]
"""A run with an outcome: its index, block id, block offset and state. A plain tuple, since each costs a reader time."""
_decode_serving: Final = msgspec.json.Decoder(Serving).decode


def with_ledger(batch: BatchRecord) -> Script[tuple[BatchRecord, Ledger]]:
    """Return a batch with its ledger."""
    (leased_count,) = yield from fetch_first("leased_count", batch_id=batch.id)
    return batch, ledger(batch, leased_count=leased_count)


def batch_and_ledger(batch_id: str) -> Script[tuple[BatchRecord, Ledger]]:
    """Return a batch with its ledger. Raises `NotFound`."""
    return (yield from with_ledger((yield from find(batch_id))))


def find_by_key(environment: str, key: str) -> Script[BatchRecord | None]:
    """Return the batch that a key names."""
    row = yield from fetch_one("batch_by_key", environment=environment, key=key)
    return None if row is None else to_batch(row)


def list_batches(
    environment: str, states: Sequence[str] | None, before_id: str, limit: int, bytes_max: int
) -> Script[list[tuple[BatchRecord, Ledger]]]:
    """List batches of an environment, newest first, until their metadata exceeds `bytes_max`."""
    listed: list[tuple[BatchRecord, Ledger]] = []
    held_bytes = 0
    while len(listed) < limit:
        rows_max = min(limit - len(listed), LISTED_ROWS)
        rows = yield from fetch_as(
            BatchRow,
            "list_batches",
            environment=environment,
            states=None if states is None else as_json(list(states)),
            before_id=listed[-1][0].id if listed else before_id,
            rows_max=rows_max,
        )
        for row in rows:
            held_bytes += len(row.metadata) + len(row.cursor)
            if listed and held_bytes > bytes_max:
                return listed
            listed += [(yield from with_ledger(to_batch(row)))]
        if len(rows) < rows_max:
            break
    return listed


def missing(batch_id: str, ranges_max: int) -> Script[list[tuple[int, int]]]:
    """Return ranges of announced indexes that are not durable yet."""
    batch = yield from find(batch_id)
    received = yield from received_of(batch_id)
    expected = received.end if batch.expected_count is None else batch.expected_count
    return received.missing(expected, ranges_max)


def outcomes(
    batch_id: str, from_index: int, runs_max: int, *, bytes_max: int, passing: bool = False
) -> Script[list[RunOutcome]]:
    """Return final outcomes from `from_index` on: consecutive ones, or with `passing` all of them.

    The page ends before its results exceed `bytes_max`. It has at least one outcome.
    """
    batch, width = yield from find_with_width(batch_id)
    blocks_max = width + runs_max  # as many may begin before the first requested run, and one with each run after it
    blocks = yield from fetch(
        "blocks_from",
        batch_id=batch_id,
        from_index=from_index,
        after_index=from_index - width,
        before_index=INDEX_MAX + 1 if batch.kind == STREAM else from_index + runs_max,
        rows_max=blocks_max + 1,
    )
    nearest, sizes = _nearest(blocks, from_index, runs_max, blocks_max)
    states, results_bytes = yield from _states(sizes)
    final: list[FinalRun] = []
    expected_index = from_index
    for index, block_id, block_offset in nearest:
        state = states[block_id][block_offset]
        is_gap = index != expected_index and batch.kind != STREAM
        if passing and state not in runs_core.FINAL:
            continue
        if (is_gap and not passing) or state not in runs_core.FINAL:
            break
        final.append((index, block_id, block_offset, state))
        expected_index = index + 1
    if results_bytes > bytes_max:
        final, part_ids = yield from _first_final(final, bytes_max)
        rows = yield from fetch("parts_by_id", ids=as_json(part_ids))
    else:
        rows = yield from fetch("parts_of_blocks", ids=as_json(sorted({block_id for _, block_id, _, _ in final})))
    results = _results(rows)
    page = [
        RunOutcome(index=index, state=state, result=result[0], kind=result[1])
        for index, block_id, block_offset, state in final
        for result in (results.get((block_id, block_offset), NOTHING) if state in WITH_RESULT else NOTHING,)
    ]
    if results_bytes > bytes_max:
        del page[count_within((len(outcome.result) for outcome in page), bytes_max) :]
    return page


def _first_final(final: Sequence[FinalRun], bytes_max: int) -> Script[tuple[list[FinalRun], list[int]]]:
    """Return the first of some runs, whose parts have at most `bytes_max` of results or are one, with these parts.

    Parts are chosen by their sizes, so that no result is read in vain.
    """
    shapes = yield from _part_shapes(sorted({block_id for _, block_id, _, _ in final}))
    part_of_run = {
        (shape.block_id, block_offset): shape
        for shape in shapes
        for block_offset, code in shape.codes_by_offset
        if code in WITH_RESULT
    }
    part_ids: set[int] = set()
    held_bytes = 0
    for number, (_, block_id, block_offset, state) in enumerate(final):
        shape = part_of_run.get((block_id, block_offset)) if state in WITH_RESULT else None
        if shape is None or shape.id in part_ids:
            continue
        held_bytes += shape.results_bytes
        if part_ids and held_bytes > bytes_max:
            return list(final[:number]), sorted(part_ids)
        part_ids.add(shape.id)
    return list(final), sorted(part_ids)


def _part_shapes(block_ids: Sequence[int]) -> Script[list[PartShape]]:
    return (yield from fetch_as(PartShape, "shapes_of_parts", ids=as_json(block_ids)))


def _nearest(
    blocks: Sequence[tuple[int, int, int, int, bytes | None]], from_index: int, runs_max: int, blocks_max: int
) -> tuple[list[tuple[int, int, int]], dict[int, int]]:
    """Return the first `runs_max` runs from an index on, as `(index, block id, block offset)`, and the sizes of their
    blocks.

    Blocks are sorted by first index and rarely overlap, so one pass finds them. Where they do overlap, memory stays
    bounded.
    """
    nearest: list[tuple[int, int, int]] = []
    sizes: dict[int, int] = {}
    for block_id, first_index, _, runs_count, gaps in blocks:
        if len(nearest) >= runs_max and first_index > nearest[-1][0]:
            break
        indexes = indexes_of(first_index, runs_count, gaps)
        start = bisect_left(indexes, from_index)
        last = nearest[-1][0] if nearest else -1
        nearest += [(indexes[at], block_id, at) for at in range(start, min(runs_count, start + runs_max))]
        if indexes[start] <= last:
            nearest.sort()
        del nearest[runs_max:]
        sizes[block_id] = runs_count
    # the list was cut: blocks behind the cut may hold indexes that come before the last ones found
    if len(blocks) > blocks_max:
        reach = blocks[-1][1]
        nearest = [nearby for nearby in nearest if nearby[0] <= reach]
    return nearest, {block_id: sizes[block_id] for _, block_id, _ in nearest}


def _states(sizes: dict[int, int]) -> Script[tuple[dict[int, bytearray], int]]:
    """Return the state at each offset of some blocks, from the spans that have the states, and the size of all results
    of these blocks.
    """
    states = {block_id: bytearray((runs_core.MOVED,)) * runs_count for block_id, runs_count in sizes.items()}
    results_bytes = 0
    for block_id, encoded_offsets, span_states, all_bytes in (
        yield from fetch("states_of_blocks", ids=as_json(list(states)))
    ):
        results_bytes = all_bytes
        if encoded_offsets is None:
            if runs_core.MOVED not in span_states:
                states[block_id] = bytearray(span_states)
                continue
            block_offsets: Sequence[int] = range(len(states[block_id]))
        else:
            block_offsets = array("H", encoded_offsets)
        for block_offset, state in zip(block_offsets, span_states, strict=True):
            if state != runs_core.MOVED:
                states[block_id][block_offset] = state
    return states, results_bytes


def _results(rows: Rows) -> dict[tuple[int, int], tuple[bytes, int]]:
    """Return the last recorded result at each `(block id, block offset)` of some parts."""
    results: dict[tuple[int, int], tuple[bytes, int]] = {}
    for row in rows:
        part = to_part(row)
        for block_offset, code, result, kind in results_of(part):
            if code in WITH_RESULT:
                results[part.block_id, block_offset] = (result, kind)
    return results


def run(batch_id: str, index: int) -> Script[RunRecord]:
    """Return a run with its input, its result and its attempts."""
    try:
        batch = yield from find(batch_id)
    except NotFound:
        raise no_run(batch_id, index) from None
    location = yield from locate(batch_id, index)
    if location is None:
        raise no_run(batch_id, index)
    block_id, block_offset = location
    _, _, _, extras, items = yield from fetch_first("blocks", ids=as_json([block_id]))
    payloads, kinds = unpack_some(items, [block_offset])
    extra = decode_extras(extras).get(block_offset, Extra())
    spans = yield from spans_of_block(block_id)
    span, state = home_of(spans, block_offset)
    attempts: list[dict[str, object]] = []
    result, result_kind = b"", 0
    for row in (yield from fetch("parts_of_run", block_id=block_id, block_offset=encode_uint16s((block_offset,)))):
        part = to_part(row)
        for block_offset_of_part, code, data, kind in results_of(part):
            if block_offset_of_part != block_offset:
                continue
            attempts.append(attempt_of(code, data, part.settled_us))
            if code in WITH_RESULT and state in WITH_RESULT:
                result, result_kind = data, kind
    view = view_of(span, index, state)
    view.environment = batch.environment
    view.payload, view.kind = payloads[0], kinds[0] if kinds else 0
    view.headers, view.tags, view.idempotency_key = extra.headers, list(extra.tags), extra.idempotency_key
    view.result, view.result_kind, view.attempts = result, result_kind, attempts
    view.kept = extra.kept
    view.name = extra.name
    view.created_us = min(span.since_us for span in spans)
    return view


def home_of(spans: Sequence[Span], block_offset: int) -> tuple[Span, int]:
    """Return the one span that has a run's state, and the state."""
    for span in spans:
        for offset, state in zip(block_offsets_of(span), span.states, strict=True):
            if offset == block_offset and state != runs_core.MOVED:
                return span, state
    raise NotFound(
        "no span has the state of this run", hint="run `headrace verify` on the batch", block_offset=block_offset
    )


def queues(environment: str) -> Script[list[QueueView]]:
    """List queues with the numbers of their runs."""
    return [
        QueueView(
            name=name,
            environment=environment,
            paused=bool(paused),
            waiting_count=waiting,
            delayed_count=delayed,
            leased_count=leased,
            oldest_us=oldest,
        )
        for name, paused, waiting, delayed, leased, oldest in (yield from fetch("list_queues", environment=environment))
    ]


def sessions() -> Script[list[Session]]:
    """List the sessions that have not ended."""
    return [
        Session(
            id=id_,
            kind=kind,
            host=host,
            pid=pid,
            started_us=started_us,
            heartbeat_us=heartbeat_us,
            serves=_decode_serving(serves) if serves else None,
            environment=environment,
            key_id=key_id,
        )
        for id_, kind, host, pid, started_us, heartbeat_us, serves, environment, key_id in (
            yield from fetch("sessions")
        )
    ]


def lease_loads() -> Script[dict[str, LeaseLoad]]:
    """Return how many runs each session has leased."""
    return {
        session_id: LeaseLoad(int(runs_count), int(claimed_us))
        for session_id, runs_count, claimed_us in (yield from fetch("lease_loads"))
    }


def stalled_lanes(environment: str, batch_id: str, silent_since_us: int) -> Script[list[StalledLane]]:
    """Return the lanes with waiting runs that no live worker takes, of an environment or of one batch."""
    if batch_id:
        rows = yield from fetch("waiting_lanes_of_batch", batch_id=batch_id, rows_max=LANES_MAX)
    else:
        rows = yield from fetch("waiting_lanes", environment=environment)
    if not rows:
        return []
    serving = serving_since((yield from sessions()), silent_since_us)
    return stalled((WaitingLane(queue, task, bool(paused)) for queue, task, paused in rows), serving, environment)


def duties() -> Script[dict[str, int]]:
    """Return when each duty of upkeep can be taken again."""
    return {name: int(free_us) for name, free_us in (yield from fetch("duties"))}


def verify(batch_id: str) -> Script[Verification]:
    """Count a batch from its blocks, spans and parts. The driver runs this on one snapshot."""
    batch = yield from find(batch_id)
    received = yield from received_of(batch_id)
    counted = dict.fromkeys((*runs_core.NAMES, ord("l")), 0)
    seen = IndexSet()
    differences: list[str] = []
    after_id = 0
    while True:
        blocks = yield from fetch("blocks_of_batch", batch_id=batch_id, after_id=after_id, rows_max=VERIFY_BLOCKS)
        if not blocks:
            break
        after_id = blocks[-1][0]
        for block_id, first_index, runs_count, gaps in blocks:
            indexes = indexes_of(first_index, runs_count, gaps)
            if any(index in seen for index in indexes):
                differences.append(f"block {block_id} holds an index that another block holds too")
            seen.add(indexes)
        yield from _count_blocks(
            [(block_id, runs_count) for block_id, _, runs_count, _ in blocks], counted, differences
        )
    if seen != received:
        differences.append(f"the received set names {len(received)} indexes, the blocks hold {len(seen)}")
    expected = batch.received_count if batch.expected_count is None else batch.expected_count
    counted_now = Ledger(
        expected=expected,
        missing=expected - len(seen),
        waiting=counted[runs_core.WAITING] + counted[runs_core.STARTED],
        leased=counted[ord("l")],
        completed=counted[runs_core.COMPLETED],
        failed=counted[runs_core.FAILED],
        cancelled=counted[runs_core.CANCELLED],
        expired=counted[runs_core.EXPIRED],
    )
    _, stored_ledger = yield from with_ledger(batch)
    differences += [
        f"{name}: the counters say {getattr(stored_ledger, name)}, the chunks {getattr(counted_now, name)}"
        for name in Ledger._fields
        if getattr(stored_ledger, name) != getattr(counted_now, name)
    ]
    if not counted_now.balances:
        differences.append(f"expected {counted_now.expected} runs, found {sum(counted_now[1:])}")
    if batch.is_finished and counted_now.waiting + counted_now.leased:
        differences.append(
            f"the batch is {batch.state}, yet {counted_now.waiting + counted_now.leased} of its runs are not final"
        )
    if batch.state != "open" and not batch.is_finished and not counted_now.waiting + counted_now.leased:
        differences.append(f"every run is final, yet the batch has not ended ({batch.state})")
    return Verification(batch_id=batch_id, ledger=counted_now, differences=differences)


def _count_blocks(
    blocks: Sequence[tuple[int, int]],
    counted: dict[int, int],
    differences: list[str],
) -> Script[None]:
    ids = [block_id for block_id, _ in blocks]
    spans_by_block: dict[int, list[Span]] = {block_id: [] for block_id in ids}
    for row in (yield from fetch("spans_of_blocks", ids=as_json(ids))):
        span = to_span(row)
        spans_by_block[span.block_id].append(span)
    recorded = {
        (shape.block_id, block_offset)
        for shape in (yield from _part_shapes(ids))
        for block_offset, code in shape.codes_by_offset
        if code in WITH_RESULT
    }
    for block_id, runs_count in blocks:
        living = [0] * runs_count
        for span in spans_by_block[block_id]:
            if span.unsettled_count != runs_core.unsettled_count(span.states):
                differences.append(f"span {span.id} counts {span.unsettled_count} unsettled runs wrongly")
            leased_byte = ord("l") if span.state == LEASED else 0
            for block_offset, state in zip(block_offsets_of(span), span.states, strict=True):
                if state == runs_core.MOVED:
                    continue
                living[block_offset] += 1
                counted[leased_byte if leased_byte and state in runs_core.UNSETTLED else state] += 1
                if state in WITH_RESULT and (block_id, block_offset) not in recorded:
                    differences.append(
                        f"block offset {block_offset} of block {block_id} ended without a recorded outcome"
                    )
        if any(count != 1 for count in living):
            differences.append(f"expected each run of block {block_id} in one span, got runs in none or in two")


def next_due_us(environment: str, tasks: Sequence[str]) -> Script[int | None]:
    """Return when the next delayed span of some tasks becomes claimable."""
    (due_us,) = yield from fetch_first("next_due", environment=environment, tasks=as_json(list(tasks)))
    return None if due_us is None else int(due_us)


def size_bytes() -> Script[int]:
    """Return the size of the database."""
    (size,) = yield from fetch_first("size_bytes")
    return int(size)
