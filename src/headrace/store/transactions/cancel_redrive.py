"""Operations on a running batch: stop it, cancel runs, redrive runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from headrace.core import batch as batches
from headrace.core import run
from headrace.core.batch import BatchRecord
from headrace.core.span import DELAYED, WAITING, Counts, Span, block_offsets_of, cancel
from headrace.core.span import redrive as redrive_span
from headrace.foundation.errors import Conflict, InvalidInput
from headrace.store.projections import no_run
from headrace.store.transactions.locate import (
    clocks,
    decode_extras,
    find,
    locate,
    lock,
    lock_spans_of_blocks,
    shapes_of,
)
from headrace.store.transactions.row_mapping import (
    add_spans,
    as_json,
    put_batch,
    put_spans,
    take_ids,
    to_batch,
    to_span,
)
from headrace.store.transactions.sql_script import Script, fetch

SWEEP_SPANS_MAX: Final = 1_000


def stop(batch_id: str, state: str, now_us: int) -> Script[BatchRecord]:
    """Cancel or abandon a batch. A bounded number of spans is cancelled now; claims and upkeep cancel the others."""
    yield from find(batch_id)
    rows = yield from fetch("unsettled_spans_of_batch", batch_id=batch_id, rows_max=SWEEP_SPANS_MAX)
    batch = yield from lock(batch_id)
    after = batches.stopped(batch, state, now_us)
    yield from put_batch(after)
    if after.is_stopped and not after.is_finished:
        yield from end_spans([cancel(to_span(row)) for row in rows], now_us)
    return (yield from find(batch_id))


def sweep_stopped(batch_id: str, spans_max: int, now_us: int) -> Script[tuple[int, int]]:
    """Cancel waiting runs of a stopped batch, at most `spans_max` spans. Returns the numbers of spans and of runs."""
    rows = yield from fetch("unsettled_spans_of_batch", batch_id=batch_id, rows_max=spans_max)
    return len(rows), (yield from end_spans([cancel(to_span(row)) for row in rows], now_us))


def end_spans(ended: Sequence[tuple[Span, Counts]], now_us: int) -> Script[int]:
    """Write spans of which some runs ended without a worker, and count these in their batches."""
    yield from put_spans([span for span, _ in ended])
    changes: dict[str, Counts] = {}
    for span, counts in ended:
        changes[span.batch_id] = changes.get(span.batch_id, Counts()).plus(counts)
    yield from count_in(changes, now_us)
    return sum(counts.settled for counts in changes.values())


def count_in(changes: dict[str, Counts], now_us: int) -> Script[None]:
    """Add outcomes to their batches' counters; complete a batch in the same transaction."""
    changes = {batch_id: counts for batch_id, counts in changes.items() if any(counts)}
    if not changes:
        return
    if len(changes) == 1:  # several batches are locked first (R8, rows are locked in id order)
        ((batch_id, counts),) = changes.items()
        if (yield from fetch("count_outcomes", id=batch_id, **counts._asdict())):
            return
    rows = yield from fetch("lock_batches", ids=as_json(sorted(changes)))
    for row in rows:
        batch = to_batch(row)
        yield from put_batch(batches.settled(batch, changes[batch.id], now_us))


def cancel_runs(batch_id: str, indexes: Sequence[int], now_us: int) -> Script[int]:
    """Cancel single runs: waiting runs at once, leased runs when their worker's heartbeat is answered."""
    yield from find(batch_id)
    by_block = yield from _by_block(batch_id, indexes)
    ended, leased = [], []
    spans_by_block = yield from lock_spans_of_blocks(by_block)
    for block_id, block_offsets in by_block.items():
        for span in spans_by_block[block_id]:
            live = {
                offset
                for offset, state in zip(block_offsets_of(span), span.states, strict=True)
                if state in run.UNSETTLED
            }
            if cancelled_offsets := live & block_offsets.keys():
                if span.state in (WAITING, DELAYED):
                    ended.append(cancel(span, cancelled_offsets))
                else:
                    leased += [block_offsets[block_offset] for block_offset in cancelled_offsets]
    if leased:
        yield from fetch("ask_to_cancel", batch_id=batch_id, indexes=as_json(sorted(leased)))
    return (yield from end_spans(ended, now_us)) + len(leased)


def _by_block(batch_id: str, indexes: Sequence[int]) -> Script[dict[int, dict[int, int]]]:
    """Group runs as `{block id: {block offset: index}}`. Raises `NotFound` for an index that was not received."""
    by_block_id: dict[int, dict[int, int]] = {}
    for index in indexes:
        location = yield from locate(batch_id, index)
        if location is None:
            raise no_run(batch_id, index)
        by_block_id.setdefault(location.block_id, {})[location.block_offset] = index
    return by_block_id


def redrive(batch_id: str, indexes: Sequence[int] | None) -> Script[int]:
    """Run failed runs again; a completed batch is sealed again until they end."""
    batch = yield from find(batch_id)
    if batch.is_stopped:
        raise Conflict(f"the batch is {batch.state}; its runs can't run again", batch_id=batch_id)
    spans_and_offsets: list[tuple[Span, set[int] | None]]
    if indexes is None:
        spans_and_offsets = [(span, None) for span in (yield from _failed_spans(batch_id))]
    else:
        if len(indexes) > SWEEP_SPANS_MAX:
            raise InvalidInput(f"expected at most {SWEEP_SPANS_MAX} indexes to redrive at once, got {len(indexes)}")
        by_block = yield from _by_block(batch_id, indexes)
        spans_by_block = yield from lock_spans_of_blocks(by_block)
        spans_and_offsets = [
            (span, set(offsets)) for block_id, offsets in by_block.items() for span in spans_by_block[block_id]
        ]
    now_clocks = yield from clocks(batch.environment, {span.queue for span, _ in spans_and_offsets})
    unrunnable = yield from _born_failed(sorted({span.block_id for span, _ in spans_and_offsets}))
    changed_spans, redriven_spans, total = [], [], Counts()
    for span, block_offsets in spans_and_offsets:
        after, taken, counts = redrive_span(
            span, block_offsets, clock=now_clocks[span.queue], unrunnable=unrunnable.get(span.block_id, ())
        )
        if taken is not None:
            changed_spans.append(after)
            redriven_spans.append(taken)
            total = total.plus(counts)
    if redriven_spans:
        yield from put_spans(changed_spans)
        yield from add_spans(redriven_spans, first_id=(yield from take_ids(spans_count=len(redriven_spans)))[1])
        indexes_json = as_json((yield from indexes_of_spans(redriven_spans)))
        yield from fetch("forget_cancellations", batch_id=batch_id, indexes=indexes_json)
        yield from fetch("forget_dead", batch_id=batch_id, indexes=indexes_json)
        yield from put_batch(batches.redriven((yield from lock(batch_id)), total))
    return -total.settled


def _born_failed(block_ids: Sequence[int]) -> Script[dict[int, set[int]]]:
    """Return the offsets of unreadable items, by block id."""
    rows = yield from fetch("extras_of_blocks", ids=as_json(block_ids))
    return {
        block_id: {block_offset for block_offset, extra in decode_extras(extras).items() if extra.failure}
        for block_id, extras in rows
    }


def indexes_of_spans(spans: Sequence[Span]) -> Script[list[int]]:
    """Return the batch indexes of the runs of some spans."""
    shapes = yield from shapes_of(span.block_id for span in spans)
    return [shapes[span.block_id][block_offset] for span in spans for block_offset in block_offsets_of(span)]


def _failed_spans(batch_id: str) -> Script[list[Span]]:
    spans: list[Span] = []
    after_id = 0
    while True:
        rows = yield from fetch(
            "spans_with_state",
            batch_id=batch_id,
            state=bytes((run.FAILED,)),
            after_id=after_id,
            rows_max=SWEEP_SPANS_MAX,
        )
        spans += [to_span(row) for row in rows]
        if len(rows) < SWEEP_SPANS_MAX:
            return spans
        after_id = spans[-1].id
