"""Parameters and results of the statements that carry out a whole operation (R7, a hot operation is one statement)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

from headrace.core import run
from headrace.core.block import Chunk, check_names
from headrace.core.index_set import IndexSet
from headrace.core.order import CLOCK_STEP
from headrace.core.span import Settlement, Span, counts_of, decode_uint16s, encode_uint16s, ends_all
from headrace.store.protocol import Claim, Lease
from headrace.store.transactions.leases import CANDIDATES_MAX
from headrace.store.transactions.row_mapping import Blob, BlockRow, SpanRow, as_json, to_span
from headrace.store.transactions.scripted_store import lease_of_row
from headrace.store.transactions.sql_script import Rows

SHORT: Final = "short"
"""More rows of some lane are needed to reach the requested runs."""
BELOW: Final = "below"
"""Too few runs are waiting behind the cursors: scan everything."""
DUE: Final = "due"
"""Delayed spans have become due: promote them first."""
ANSWERED: Final = ("claimed", "again")
NEVER: Final = -1
WHOLE_SPAN_SLOTS: Final = encode_uint16s(range(4_096))
"""The slots of a whole span; those of a shorter span are its beginning."""
SPARE_ROWS: Final = 2
_SPAN_COLUMNS: Final = len(SpanRow._fields)


def lease_ended(settlement: Settlement) -> tuple[str, dict[str, Any]] | None:
    """Return the statement for one lease and its values; None unless its runs are sorted and all ended finally."""
    codes = settlement.codes
    if settlement.object_keys or not ends_all(settlement):
        return None
    span_slots = range(len(codes)) if settlement.span_slots is None else decode_uint16s(settlement.span_slots)
    if len(span_slots) != len(codes):
        return None
    values = {
        "span_id": settlement.span_id,
        "token": settlement.token,
        "part_no": settlement.part_no,
        "span_slots": settlement.span_slots,
        "codes": codes,
        "results": settlement.results,
        "runs_count": len(codes),
        **counts_of(codes)._asdict(),
    }
    span_slot = span_slots[0]
    if (
        settlement.span_slots is None
        or settlement.span_slots == WHOLE_SPAN_SLOTS[2 * span_slot : 2 * (span_slot + len(codes))]
    ):
        return "settle_stretch", values | {"span_slot": span_slot, "is_whole": int(settlement.span_slots is None)}
    kept_from, kept_count, codes_from, next_slot = [], [], [], 0
    for number, span_slot in enumerate(span_slots):
        if span_slot < next_slot:
            return None
        if span_slot > next_slot or not number:
            kept_from.append(next_slot)
            kept_count.append(span_slot - next_slot)
            codes_from.append(number)
        next_slot = span_slot + 1
    return "settle_stretches", values | {
        "kept_from": kept_from,
        "kept_count": kept_count,
        "codes_from": codes_from,
        "codes_count": [end - start for start, end in pairwise([*codes_from, len(codes)])],
        "end": next_slot,
    }


def ended(settlements: Sequence[Settlement]) -> dict[str, Any] | None:
    """Return the values of `settle_ended`; None unless all runs of each settlement are sorted and ended finally."""
    blob, rows, objects = Blob(), [], []
    for settlement in settlements:
        codes = settlement.codes
        if not ends_all(settlement):
            return None
        span_slot, mask = 0, b""
        if settlement.span_slots is not None:
            if len(settlement.span_slots) != 2 * len(codes):
                return None
            span_slots = decode_uint16s(settlement.span_slots)
            span_slot = span_slots[0]
            if settlement.span_slots != WHOLE_SPAN_SLOTS[2 * span_slot : 2 * (span_slot + len(codes))]:
                if any(slot >= next_slot for slot, next_slot in pairwise(span_slots)):
                    return None
                mask = run.ended(
                    bytes(span_slots[-1] - span_slot + 1), [slot - span_slot for slot in span_slots], codes
                )
        codes_at, _ = blob.put(codes)
        mask_at, width = blob.put(mask) if mask else (0, len(codes))
        rows.append(
            (
                settlement.span_id, settlement.token, len(codes), settlement.part_no, span_slot,
                int(settlement.span_slots is None), codes_at, *blob.put(settlement.results), *counts_of(codes), mask_at,
                width,
            )
        )  # fmt: skip
        objects += [(settlement.span_id, key) for key in settlement.object_keys]
    if not rows or len({settlement.span_id for settlement in settlements}) < len(rows):
        return None
    return {"rows": as_json(rows), "blob": blob.bytes(), "objects": as_json(objects), "span_slots": WHOLE_SPAN_SLOTS}


def in_order(chunks: Sequence[Chunk], cursor: bytes | None) -> dict[str, Any] | None:
    """Return the values of `append_in_order`; None unless the runs are consecutive and have no extras."""
    if not chunks:
        return None
    first_index = next_index = chunks[0].first_index
    for chunk in chunks:
        if chunk.gaps is not None or chunk.extras or chunk.first_index != next_index:
            return None
        check_names(chunk)
        next_index += chunk.runs_count
    if first_index < 0:
        return None
    blob, blocks = Blob(), []
    spans: list[tuple[object, ...]] = []
    for block_no, chunk in enumerate(chunks):
        blocks.append((block_no, chunk.first_index, chunk.runs_count, *blob.put(chunk.items)))
        for key, block_offsets in chunk.spans.items():
            offsets = range(chunk.runs_count) if block_offsets is None else decode_uint16s(block_offsets)
            spans.append(
                (
                    len(spans), block_no, key.queue, key.task, key.priority, key.due_us, key.expires_us,
                    int(key.at_most_once), chunk.first_index + offsets[0], chunk.first_index, len(offsets),
                    *blob.put(block_offsets), int(key.dead_letter),
                )
            )  # fmt: skip
    return {
        "lanes": as_json(sorted({(key.queue, key.task) for chunk in chunks for key in chunk.spans})),
        "blocks": as_json(blocks),
        "spans": as_json(spans),
        "blob": blob.bytes(),
        "received_before": _received_up_to(first_index),
        "received": _received_up_to(next_index),
        "last_index": next_index - 1,
        "runs_count": next_index - first_index,
        "block_width": max(chunk.runs_count for chunk in chunks),
        "cursor": cursor,
        "blocks_count": len(blocks),
        "spans_count": len(spans),
    }


def _received_up_to(index: int) -> bytes:
    return IndexSet.from_ranges([(0, index)]).to_bytes() if index else b""


def rows_wanted(runs_max: int, runs_a_span: int) -> int:
    """Return how many spans of a lane to read: enough if they hold as many runs as the last ones."""
    return min(runs_max // runs_a_span + SPARE_ROWS, CANDIDATES_MAX)


def claim_values(
    claim: Claim,
    *,
    bytes_max: int,
    rows_max: int,
    due_us: int,
    now_us: int,
    marks: Mapping[tuple[str, str], tuple[int, int]],
) -> dict[str, Any]:
    """Return the values of `claim_whole`; `marks` are the cursors, by queue and task."""
    by_queue: dict[str, dict[str, tuple[int, int]]] = {}
    for (queue, task), mark in marks.items():
        by_queue.setdefault(queue, {})[task] = mark
    return {
        "session_id": claim.session_id,
        "claim_no": claim.claim_no,
        "key_id": claim.key_id,
        "environment": claim.environment,
        "tasks": as_json(list(claim.tasks)),
        "queues": None if claim.queues is None else as_json(list(claim.queues)),
        "queue_prefix": claim.queue_prefix,
        "runs_max": claim.runs_max,
        "bytes_max": bytes_max,
        "marks": as_json(by_queue),
        "rows_max": rows_max,
        "due_us": due_us,
        "now_us": now_us,
        "span_slots": WHOLE_SPAN_SLOTS,
        "clock_step": CLOCK_STEP,
    }


class ClaimAnswer(NamedTuple):
    """The answer of `claim_whole`: its verdict, and the leased spans with their blocks, in claim order.

    `is_cut`: more spans are claimable, whose inputs would exceed the bound of a claim.
    """

    verdict: str
    is_cut: bool
    spans: list[Span]
    blocks: list[BlockRow]

    @property
    def leases(self) -> list[Lease]:
        """The leases of these spans."""
        return [lease_of_row(span, block) for span, block in zip(self.spans, self.blocks, strict=True)]


def claim_answer(rows: Rows) -> ClaimAnswer:
    """Read the rows of `claim_whole`: the verdict, the columns of a span, and those of its block."""
    verdict, is_cut, *_ = rows[0]
    spans, blocks = [], []
    for _, _, *columns in rows:
        if columns[0] is not None:  # a row without a span carries the verdict alone
            spans.append(to_span(columns[:_SPAN_COLUMNS]))
            blocks.append(BlockRow._make(columns[_SPAN_COLUMNS:]))
    return ClaimAnswer(verdict, is_cut, spans, blocks)


def runs_a_span(leases: Sequence[Lease]) -> int:
    """Return how many runs these leases hold on average, without the last one, which may be split; 0 if it is the only
    one.
    """
    sizes = [len(lease.span_slots) for lease in leases[:-1]]
    return max(sum(sizes) // len(sizes), 1) if sizes else 0
