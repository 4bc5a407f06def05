"""Settlement of a few leases whose runs all ended finally, each updated directly.

The task broker settles parts of a lease or two, again and again. The script for any number of leases takes as many
statements for hundreds as for one (R13, bulk writes are one statement with one blob). It passes values as JSON and
reads whole spans, which costs more than a few rows are worth. Here it takes some statements a lease, so it is used for
up to `FEW` leases. Unusual cases are left to the script.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from headrace.core import run
from headrace.core.span import SETTLED, Counts, Settlement, counts_of, decode_uint16s, encode_uint16s, ends_all
from headrace.store.transactions import leases
from headrace.store.transactions.cancel_redrive import count_in
from headrace.store.transactions.sql_script import Script, fetch, fetch_one

FEW: Final = 2


def settle(settlements: Sequence[Settlement], now_us: int) -> Script[list[str]]:
    """Settle each settlement. Returns their results, in order."""
    counts: dict[str, Counts] = {}
    words = []
    for settlement in settlements:
        batch_id = yield from _recorded(settlement, now_us)
        if batch_id is None:
            words += yield from leases.settle([settlement], now_us)
        else:
            counts[batch_id] = counts.get(batch_id, Counts()).plus(counts_of(settlement.codes))
            words.append(SETTLED)
    yield from count_in(counts, now_us)
    return words


def _at(block_offsets: bytes, span_slots: Sequence[int]) -> list[int]:
    offsets = decode_uint16s(block_offsets)
    return [offsets[span_slot] for span_slot in span_slots]


def _recorded(settlement: Settlement, now_us: int) -> Script[str | None]:
    """Record one settlement. Returns the batch whose counters are still to be changed, or None if nothing was
    changed.
    """
    codes, span_slots = (
        settlement.codes,
        None if settlement.span_slots is None else decode_uint16s(settlement.span_slots),
    )
    if settlement.object_keys or not ends_all(settlement):
        return None
    row = yield from fetch_one(
        "ending_span", id=settlement.span_id, token=settlement.token, has_failures=int(run.FAILED in codes)
    )
    if row is None:
        return None
    block_id, batch_id, block_offsets, states, unsettled_count = row
    if span_slots is None:
        before, after = states, codes
    elif len(set(span_slots)) == len(codes) and max(span_slots) < len(states):
        before, after = run.at(states, span_slots), run.ended(states, span_slots, codes)
        block_offsets = (
            settlement.span_slots if block_offsets is None else encode_uint16s(_at(block_offsets, span_slots))
        )
    else:
        return None
    if len(after) != len(states) or before.strip(run.UNSETTLED):
        return None
    left_count = unsettled_count - len(codes)
    yield from fetch(
        "end_states" if left_count else "end_span", id=settlement.span_id, unsettled_count=left_count, states=after
    )
    yield from fetch(
        "insert_part",
        block_id=block_id,
        span_id=settlement.span_id,
        token=settlement.token,
        part_no=settlement.part_no,
        settled_us=now_us,
        block_offsets=block_offsets,
        codes=codes,
        results=settlement.results,
    )
    return str(batch_id)
