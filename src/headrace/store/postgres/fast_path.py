"""What the hot statements are given, and what their rows mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

from headrace.core import run
from headrace.core.block import Chunk, check_names
from headrace.core.index_set import IndexSet
from headrace.core.span import Settlement, counts_of, decode_places, encode_places, ends_all
from headrace.store.protocol import Claim, Lease
from headrace.store.transactions.leases import CANDIDATES_MAX
from headrace.store.transactions.row_mapping import Blob, as_json, to_span
from headrace.store.transactions.scripted_store import lease_of_row
from headrace.store.transactions.sql_script import Rows

SHORT: Final = "short"
"""More rows of some lane are needed to make up the wanted runs."""
BELOW: Final = "below"
"""From the marks on there is not enough: everything is looked at."""
DUE: Final = "due"
"""Delayed spans join the line first."""
ANSWERED: Final = ("claimed", "again")
NEVER: Final = -1
PLACES: Final = encode_places(range(4_096))
"""The places of a whole span; a shorter one's are its beginning."""
SPARE_ROWS: Final = 2
_BLOCK_AT: Final = 26


def lease_ended(told: Settlement) -> tuple[str, dict[str, Any]] | None:
    """The statement for one lease and its values, or None when it is not of runs in order that all ended for good."""
    codes = told.codes
    if told.object_keys or not ends_all(told):
        return None
    places = range(len(codes)) if told.places is None else decode_places(told.places)
    if len(places) != len(codes):
        return None
    values = {
        "span_id": told.span_id,
        "token": told.token,
        "part_no": told.part_no,
        "places": told.places,
        "codes": codes,
        "results": told.results,
        "runs_count": len(codes),
        **counts_of(codes)._asdict(),
    }
    place = places[0]
    if told.places is None or told.places == PLACES[2 * place : 2 * (place + len(codes))]:
        return "settle_stretch", values | {"place": place, "is_whole": int(told.places is None)}
    kept_from, kept_count, codes_from, next_place = [], [], [], 0
    for number, place in enumerate(places):
        if place < next_place:
            return None
        if place > next_place or not number:
            kept_from.append(next_place)
            kept_count.append(place - next_place)
            codes_from.append(number)
        next_place = place + 1
    return "settle_stretches", values | {
        "kept_from": kept_from,
        "kept_count": kept_count,
        "codes_from": codes_from,
        "codes_count": [end - start for start, end in pairwise([*codes_from, len(codes)])],
        "end": next_place,
    }


def ended(settlements: Sequence[Settlement]) -> dict[str, Any] | None:
    """The values of `settle_ended`, or None when a settlement is not of runs in order that all ended for good."""
    blob, rows, objects = Blob(), [], []
    for told in settlements:
        codes = told.codes
        if not ends_all(told):
            return None
        place, mask = 0, b""
        if told.places is not None:
            if len(told.places) != 2 * len(codes):
                return None
            places = decode_places(told.places)
            place = places[0]
            if told.places != PLACES[2 * place : 2 * (place + len(codes))]:
                if any(one >= other for one, other in pairwise(places)):
                    return None
                mask = run.ended(bytes(places[-1] - place + 1), [one - place for one in places], codes)
        codes_at, _ = blob.put(codes)
        mask_at, width = blob.put(mask) if mask else (0, len(codes))
        rows.append(
            (
                told.span_id, told.token, len(codes), told.part_no, place, int(told.places is None), codes_at,
                *blob.put(told.results), *counts_of(codes), mask_at, width,
            )
        )  # fmt: skip
        objects += [(told.span_id, key) for key in told.object_keys]
    if not rows or len({row[0] for row in rows}) < len(rows):
        return None
    return {"rows": as_json(rows), "blob": blob.bytes(), "objects": as_json(objects), "places": PLACES}


def in_order(chunks: Sequence[Chunk], cursor: bytes | None) -> dict[str, Any] | None:
    """The values of `append_in_order`, or None when these are not consecutive runs without anything of their own."""
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
    for number, chunk in enumerate(chunks):
        blocks.append((number, chunk.first_index, chunk.runs_count, *blob.put(chunk.items)))
        for key, positions in chunk.spans.items():
            places = range(chunk.runs_count) if positions is None else decode_places(positions)
            spans.append(
                (
                    len(spans), number, key.queue, key.task, key.priority, key.due_us, key.expires_us,
                    int(key.at_most_once), chunk.first_index + places[0], chunk.first_index, len(places),
                    *blob.put(positions), int(key.dead_letter),
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
    """How many spans of a lane to look at: those that would do if they were as large as the last ones."""
    return min(runs_max // runs_a_span + SPARE_ROWS, CANDIDATES_MAX)


def wish(
    claim: Claim, *, rows_max: int, due_us: int, now_us: int, marks: Mapping[tuple[str, str], tuple[int, int]]
) -> dict[str, Any]:
    """The values of `claim_whole`; `marks` by queue and task."""
    by_queue: dict[str, dict[str, tuple[int, int]]] = {}
    for (queue, task), mark in marks.items():
        by_queue.setdefault(queue, {})[task] = mark
    return {
        "session_id": claim.session_id,
        "claim_no": claim.claim_no,
        "environment": claim.environment,
        "tasks": as_json(list(claim.tasks)),
        "queues": None if claim.queues is None else as_json(list(claim.queues)),
        "queue_prefix": claim.queue_prefix,
        "runs_max": claim.runs_max,
        "marks": as_json(by_queue),
        "rows_max": rows_max,
        "due_us": due_us,
        "now_us": now_us,
        "places": PLACES,
    }


def leases_of(rows: Rows) -> tuple[list[Lease], int]:
    """The leases, and how many runs those hold that were not split, on average (0 when there is none)."""
    leases = [lease_of_row(to_span(row[1:_BLOCK_AT]), *row[_BLOCK_AT:]) for row in rows if row[1] is not None]
    sizes = [len(lease.places) for lease in leases[:-1]]
    return leases, max(sum(sizes) // len(sizes), 1) if sizes else 0
