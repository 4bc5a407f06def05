"""Listings of runs, and of the tasks of batches."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple

from headrace.core import run as runs_core
from headrace.core.block import Extra
from headrace.core.span import DELAYED, LEASED, WAITING, block_offsets_of, results_of
from headrace.foundation.ids import INDEX_MAX
from headrace.store.projections import RunFilter, add_details, check_run_state, view_of
from headrace.store.protocol import RunRecord
from headrace.store.transactions.locate import decode_extras, locate, spans_of_block
from headrace.store.transactions.queries import home_of
from headrace.store.transactions.row_mapping import as_json, to_part, to_span
from headrace.store.transactions.sql_script import Script, fetch

NOWHERE: Final = ("", -1)
SPANS_A_BLOCK: Final = 256
TAGGED_MAX: Final = 10_000


class _Listed(NamedTuple):
    """A listed run and its place in the blocks."""

    record: RunRecord
    block_id: int
    block_offset: int


def list_runs(
    environment: str, batch_id: str, run_filter: RunFilter, after: tuple[str, int] | None, limit: int
) -> Script[list[RunRecord]]:
    """List runs that match, newest batch first and by index inside it."""
    check_run_state(run_filter.state)
    if run_filter.tag:
        listed = yield from _tagged_runs(environment, batch_id, run_filter, after, limit)
    else:
        listed = yield from _runs_of_spans(environment, batch_id, run_filter, after, limit)
    yield from _add_details(listed)
    return [run.record for run in listed]


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


def _add_details(listed: Sequence[_Listed]) -> Script[None]:
    """Complete listed runs from their blocks: three statements at most for all of them."""
    if not listed:
        return
    block_ids = as_json(sorted({run.block_id for run in listed}))
    extras = {block_id: decode_extras(data) for block_id, data in (yield from fetch("extras_of_blocks", ids=block_ids))}
    outcomes: dict[tuple[int, int], list[tuple[int, bytes, int, int]]] = {
        (run.block_id, run.block_offset): [] for run in listed
    }
    for row in (yield from fetch("parts_of_blocks", ids=block_ids)):
        part = to_part(row)
        for block_offset, code, data, kind in results_of(part):
            recorded = outcomes.get((part.block_id, block_offset))
            if recorded is not None:
                recorded.append((code, data, kind, part.settled_us))
    created_us: dict[int, int] = {}
    if retried := sorted({run.block_id for run in listed if not run.record.created_us}):
        for row in (yield from fetch("spans_of_blocks", ids=as_json(retried))):
            span = to_span(row)
            created_us[span.block_id] = min(span.since_us, created_us.get(span.block_id, span.since_us))
    for run in listed:
        run.record.created_us = run.record.created_us or created_us[run.block_id]
        extra = extras.get(run.block_id, {}).get(run.block_offset, Extra())
        add_details(run.record, extra, outcomes[run.block_id, run.block_offset])


def tasks_of_batches(environment: str, batch_ids: Sequence[str]) -> Script[dict[str, list[str]]]:
    """Return the tasks of the first and the last runs of some batches."""
    tasks: dict[str, list[str]] = {}
    for batch_id, task in (yield from fetch("tasks_of_batches", environment=environment, ids=as_json(list(batch_ids)))):
        tasks.setdefault(batch_id, []).append(task)
    return tasks
