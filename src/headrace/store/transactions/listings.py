"""Listings of runs, and of the tasks of batches."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import Final, NamedTuple

from headrace.core import run as runs_core
from headrace.core.block import Extra
from headrace.core.page import count_within
from headrace.core.span import DELAYED, LEASED, WAITING, block_offsets_of, results_of
from headrace.foundation.ids import INDEX_MAX
from headrace.store.projections import RunFilter, add_details, check_run_state, details_bytes, view_of
from headrace.store.protocol import RunRecord
from headrace.store.transactions.locate import decode_extras, locate, spans_of_block
from headrace.store.transactions.queries import NOTHING, home_of
from headrace.store.transactions.row_mapping import PartShape, as_json, to_part, to_span
from headrace.store.transactions.sql_script import Script, fetch, fetch_as

NOWHERE: Final = ("", -1)
SPANS_A_BLOCK: Final = 256
TAGGED_MAX: Final = 10_000
DETAILED_RUNS: Final = 256
"""Listed runs whose details are read at a time."""
SUCCESS: Final = bytes((runs_core.COMPLETED,))


class _Listed(NamedTuple):
    """A listed run and its place in the blocks."""

    record: RunRecord
    block_id: int
    block_offset: int


def list_runs(
    environment: str, batch_id: str, run_filter: RunFilter, after: tuple[str, int] | None, limit: int, bytes_max: int
) -> Script[list[RunRecord]]:
    """List runs that match, newest batch first and by index inside it, until their details exceed `bytes_max`."""
    check_run_state(run_filter.state)
    if run_filter.tag:
        listed = yield from _tagged_runs(environment, batch_id, run_filter, after, limit)
    else:
        listed = yield from _runs_of_spans(environment, batch_id, run_filter, after, limit)
    return (yield from _detailed(listed, bytes_max))


def _runs_of_spans(
    environment: str, batch_id: str, run_filter: RunFilter, after: tuple[str, int] | None, limit: int
) -> Script[list[_Listed]]:
    state = run_filter.state
    after_batch, after_index = after or NOWHERE
    byte = runs_core.BY_NAME["waiting" if state in (LEASED, DELAYED) else state] if state else None
    runs: list[_Listed] = []
    rows = yield from fetch(
        "list_spans",
        environment=environment,
        batch_id=batch_id,
        task=run_filter.task,
        queue=run_filter.queue,
        since_us=run_filter.since_us,
        state=None if byte is None else bytes((byte,)),
        span_state=state if state in (WAITING, LEASED, DELAYED) else "",
        after_batch=after_batch,
        after_index=after_index,
        rows_max=limit + SPANS_A_BLOCK,
    )
    block_id, newest = 0, ""
    pending: list[_Listed] = []  # several spans share a block, and blocks may overlap: sort by index here
    for row in rows:
        *columns, first_index, gaps = row
        span = to_span(columns)
        if span.block_id != block_id:
            reach = first_index if span.batch_id == newest else INDEX_MAX + 1
            pending.sort(key=_index_of)
            runs += [run for run in pending if run.record.index < reach]
            pending = [run for run in pending if run.record.index >= reach]
            block_id, newest = span.block_id, span.batch_id
            if len(runs) >= limit:
                break
        distances = array("I", gaps) if gaps is not None else None
        for block_offset, run_state in zip(block_offsets_of(span), span.states, strict=True):
            if run_state == runs_core.MOVED or (byte is not None and run_state != byte):
                continue
            index = first_index + (block_offset if distances is None else distances[block_offset])
            record = view_of(span, index, run_state)
            is_behind = span.batch_id != after_batch or index > after_index
            if is_behind and (not state or record.state == state):
                pending.append(_Listed(record, block_id, block_offset))
    return (runs + sorted(pending, key=_index_of))[:limit]


def _index_of(run: _Listed) -> int:
    return run.record.index


def _tagged_runs(
    environment: str, batch_id: str, run_filter: RunFilter, after: tuple[str, int] | None, limit: int
) -> Script[list[_Listed]]:
    runs: list[_Listed] = []
    after_batch, after_index = after or NOWHERE
    for name, index in (
        yield from fetch(
            "tagged_runs",
            environment=environment,
            tag=run_filter.tag,
            batch_id=batch_id,
            after_batch=after_batch,
            after_index=after_index,
            rows_max=TAGGED_MAX,
        )
    ):
        location = yield from locate(name, index)
        if location is None or len(runs) >= limit:
            break
        span, run_state = home_of((yield from spans_of_block(location.block_id)), location.block_offset)
        record = view_of(span, index, run_state)
        if run_filter.takes(record, span):
            runs.append(_Listed(record, location.block_id, location.block_offset))
    return runs


def _detailed(listed: Sequence[_Listed], bytes_max: int) -> Script[list[RunRecord]]:
    """Complete listed runs from their blocks, a group of blocks at a time, until the page is full."""
    records: list[RunRecord] = []
    held_bytes = 0
    for group in _groups(listed):
        yield from _add_details(group, bytes_max)
        for run in group:
            held_bytes += details_bytes(run.record)
            if records and held_bytes > bytes_max:
                return records
            records.append(run.record)
    return records


def _groups(listed: Sequence[_Listed]) -> Iterator[Sequence[_Listed]]:
    """Yield listed runs in groups of at most `DETAILED_RUNS`: one for a usual page."""
    for start in range(0, len(listed), DETAILED_RUNS):
        yield listed[start : start + DETAILED_RUNS]


def _add_details(listed: Sequence[_Listed], bytes_max: int) -> Script[None]:
    """Complete listed runs from their blocks. Results of completed runs are not read."""
    block_ids = as_json(sorted({run.block_id for run in listed}))
    extras = {block_id: decode_extras(data) for block_id, data in (yield from fetch("extras_of_blocks", ids=block_ids))}
    outcomes: dict[tuple[int, int], list[tuple[int, bytes, int, int]]] = {
        (run.block_id, run.block_offset): [] for run in listed
    }
    shapes = yield from fetch_as(PartShape, "shapes_of_parts", ids=block_ids)
    errors = yield from _errors(shapes, outcomes.keys(), bytes_max)
    for shape in shapes:
        for block_offset, code in shape.codes_by_offset:
            recorded = outcomes.get((shape.block_id, block_offset))
            if recorded is not None:
                data, kind = errors.get((shape.id, block_offset), NOTHING)
                recorded.append((code, data, kind, shape.settled_us))
    created_us: dict[int, int] = {}
    if retried := sorted({run.block_id for run in listed if not run.record.created_us}):
        for row in (yield from fetch("spans_of_blocks", ids=as_json(retried))):
            span = to_span(row)
            created_us[span.block_id] = min(span.since_us, created_us.get(span.block_id, span.since_us))
    for run in listed:
        run.record.created_us = run.record.created_us or created_us[run.block_id]
        extra = extras.get(run.block_id, {}).get(run.block_offset, Extra())
        add_details(run.record, extra, outcomes[run.block_id, run.block_offset])


def _errors(
    shapes: Sequence[PartShape], places: Collection[tuple[int, int]], bytes_max: int
) -> Script[dict[tuple[int, int], tuple[bytes, int]]]:
    """Return the error and its kind of each unsuccessful outcome of some runs, by part id and block offset.

    Parts are read until they exceed `bytes_max`, then the next ones; only the errors of these runs are kept.
    """
    errors: dict[tuple[int, int], tuple[bytes, int]] = {}
    wanted: dict[int, PartShape] = {
        shape.id: shape
        for shape in shapes
        if shape.codes.strip(SUCCESS)
        and any(
            code != runs_core.COMPLETED and (shape.block_id, block_offset) in places
            for block_offset, code in shape.codes_by_offset
        )
    }
    while wanted:
        count = count_within((shape.results_bytes for shape in wanted.values()), bytes_max)
        ids = list(islice(wanted, count))
        for part_id, row in zip(ids, (yield from fetch("parts_by_id", ids=as_json(ids))), strict=True):
            part = to_part(row)
            for block_offset, code, data, kind in results_of(part):
                if code != runs_core.COMPLETED and (part.block_id, block_offset) in places:
                    errors[part_id, block_offset] = (data, kind)
            del wanted[part_id]
    return errors


def tasks_of_batches(environment: str, batch_ids: Sequence[str]) -> Script[dict[str, list[str]]]:
    """Return the tasks of the first and the last runs of some batches."""
    tasks: dict[str, list[str]] = {}
    for batch_id, task in (yield from fetch("tasks_of_batches", environment=environment, ids=as_json(list(batch_ids)))):
        tasks.setdefault(batch_id, []).append(task)
    return tasks
