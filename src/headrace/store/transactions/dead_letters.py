"""Dead letters: runs that failed finally are listed until an operator redrives or purges them."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.core.run import UNSETTLED
from headrace.core.span import LEASED, Span, block_offsets_of
from headrace.store.projections import named_lease
from headrace.store.protocol import DeadLetter, NamedLease
from headrace.store.transactions.locate import decode_extras, locate, shapes_of, spans_of_block
from headrace.store.transactions.row_mapping import as_json
from headrace.store.transactions.sql_script import Script, fetch


def add_dead(failed: Sequence[tuple[Span, Sequence[int]]], now_us: int) -> Script[None]:
    """Add runs at some block offsets of some spans to the dead letters."""
    shapes = yield from shapes_of(span.block_id for span, _ in failed)
    rows = sorted(
        (span.batch_id, shapes[span.block_id][block_offset], span.environment, span.queue, span.task)
        for span, block_offsets in failed
        for block_offset in block_offsets
    )
    yield from fetch("insert_dead", rows=as_json(rows), now_us=now_us)


def dead_letters(
    environment: str, queue: str, before_us: int, after: DeadLetter | None, limit: int
) -> Script[list[DeadLetter]]:
    """List dead letters, oldest first."""
    rows = yield from fetch(
        "list_dead",
        environment=environment,
        queue=queue,
        before_us=before_us,
        after_us=-1 if after is None else after.died_us,
        after_batch="" if after is None else after.batch_id,
        after_index=-1 if after is None else after.index,
        rows_max=limit,
    )
    return [
        DeadLetter(batch_id=batch_id, index=index, queue=queue_name, task=task, died_us=died_us)
        for batch_id, index, queue_name, task, died_us in rows
    ]


def purge_dead(environment: str, runs: Sequence[tuple[str, int]]) -> Script[int]:
    """Remove runs from the dead letters."""
    return len((yield from fetch("purge_dead", environment=environment, rows=as_json(sorted(set(runs))))))


def named_leases(environment: str, task: str, keys: Sequence[str]) -> Script[list[NamedLease]]:
    """Return the leases of the runs that keys name."""
    names = as_json([(task, key) for key in sorted(set(keys))])
    leases = []
    for _, key, batch_id, index in (yield from fetch("known_keys", environment=environment, rows=names, now_us=0)):
        location = yield from locate(batch_id, index)
        if location is None:
            continue
        ((_, extras),) = yield from fetch("extras_of_blocks", ids=as_json([location.block_id]))
        extra = decode_extras(extras)[location.block_offset]
        for span in (yield from spans_of_block(location.block_id)):
            leases += [
                named_lease(span, key, span_slot, extra)
                for span_slot, block_offset in enumerate(block_offsets_of(span))
                if block_offset == location.block_offset
                and span.state == LEASED
                and span.states[span_slot] in UNSETTLED
            ]
    return leases
