"""Tables of `MemoryStore`, and the functions that read them without changing anything."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Final, NamedTuple, Self

from headrace.core import batch as batches
from headrace.core import run as runs_core
from headrace.core import span as spans
from headrace.core.batch import BatchRecord, Ledger
from headrace.core.block import Chunk, Extra
from headrace.core.index_set import IndexSet
from headrace.core.pack import unpack
from headrace.core.page import count_within
from headrace.core.serving import WaitingLane
from headrace.core.span import Part, Span, block_offsets_of, results_of
from headrace.foundation.errors import NotFound
from headrace.store.projections import (
    WITH_RESULT,
    RunFilter,
    add_details,
    attempt_of,
    check_run_state,
    details_bytes,
    lease_of,
    named_lease,
    no_run,
    view_of,
)
from headrace.store.protocol import (
    ApiKey,
    DeadLetter,
    Lease,
    LeaseLoad,
    NamedLease,
    QueueView,
    RunOutcome,
    RunRecord,
    Schedule,
    Session,
    SessionOwner,
    Verification,
)

NOTHING: Final = (b"", 0)


class Block(NamedTuple):
    """The immutable inputs of some runs of one batch."""

    id: int
    batch_id: str
    chunk: Chunk


class Queue(NamedTuple):
    """A queue: its clock (the highest order number claimed in it), and whether claims from it are paused."""

    clock: int = 0
    paused: bool = False


class Known(NamedTuple):
    """The run that an idempotency key names."""

    batch_id: str
    run_index: int
    expires_us: int


@dataclass
class Tables:
    """All rows of the store. Values are replaced, never changed in place, so a shallow copy is a snapshot."""

    batches: dict[str, BatchRecord] = field(default_factory=dict)
    received: dict[str, IndexSet] = field(default_factory=dict)
    blocks: dict[int, Block] = field(default_factory=dict)
    spans: dict[int, Span] = field(default_factory=dict)
    parts: dict[tuple[int, int, int], Part] = field(default_factory=dict)
    sessions: dict[str, Session] = field(default_factory=dict)
    queues: dict[tuple[str, str], Queue] = field(default_factory=dict)
    keys: dict[tuple[str, str, str], Known] = field(default_factory=dict)
    tags: set[tuple[str, str, str, int]] = field(default_factory=set)
    objects: dict[str, str] = field(default_factory=dict)
    cancellations: set[tuple[str, int]] = field(default_factory=set)
    api_keys: dict[str, ApiKey] = field(default_factory=dict)
    signing_keys: dict[str, bytes] = field(default_factory=dict)
    buckets: dict[tuple[str, str], int] = field(default_factory=dict)
    duties: dict[str, tuple[str, int]] = field(default_factory=dict)
    schedules: dict[tuple[str, str], Schedule] = field(default_factory=dict)
    dead: dict[tuple[str, int], tuple[str, DeadLetter]] = field(default_factory=dict)
    rules: dict[tuple[str, str], bytes] = field(default_factory=dict)
    next_block_id: int = 1
    next_span_id: int = 1

    def copied(self) -> Self:
        """Return a copy with the same values."""
        return type(self)(**{table.name: copy(getattr(self, table.name)) for table in fields(self)})

    def add_block(self, batch_id: str, chunk: Chunk) -> int:
        """Store a chunk's inputs under a new id."""
        block = Block(self.next_block_id, batch_id, chunk)
        self.next_block_id += 1
        self.blocks[block.id] = block
        return block.id

    def add_part(self, part: Part) -> None:
        """Store outcomes; no part is ever recorded twice."""
        name = (part.span_id, part.token, part.part_no)
        assert name not in self.parts, name
        self.parts[name] = part

    def forget(self, batch_id: str) -> None:
        """Delete a batch with all its rows."""
        block_ids = {block.id for block in self.blocks.values() if block.batch_id == batch_id}
        del self.batches[batch_id], self.received[batch_id]
        self.blocks = {name: block for name, block in self.blocks.items() if name not in block_ids}
        self.spans = {name: span for name, span in self.spans.items() if span.block_id not in block_ids}
        self.parts = {name: part for name, part in self.parts.items() if part.block_id not in block_ids}
        self.keys = {name: named_run for name, named_run in self.keys.items() if named_run.batch_id != batch_id}
        self.tags = {row for row in self.tags if row[2] != batch_id}
        self.objects = {key: owner for key, owner in self.objects.items() if owner != batch_id}
        self.cancellations = {row for row in self.cancellations if row[0] != batch_id}


def find(tables: Tables, batch_id: str) -> BatchRecord:
    """Return the batch. Raises `NotFound`."""
    if batch_id not in tables.batches:
        raise NotFound("no batch has this id", hint="`headrace batch list` shows the batches", batch_id=batch_id)
    return tables.batches[batch_id]


def named(tables: Tables, environment: str, key: str) -> BatchRecord | None:
    """Return the batch that a key names."""
    for batch in tables.batches.values():
        if batch.environment == environment and batch.key == key:
            return batch
    return None


def indexes_of(chunk: Chunk) -> Sequence[int]:
    """Return the batch index at each block offset."""
    if chunk.gaps is None:
        return range(chunk.first_index, chunk.first_index + chunk.runs_count)
    return [chunk.first_index + gap for gap in array("I", chunk.gaps)]


def indexes_of_span(tables: Tables, span: Span) -> list[int]:
    """Return the batch index at each slot of a span."""
    indexes = indexes_of(tables.blocks[span.block_id].chunk)
    return [indexes[block_offset] for block_offset in block_offsets_of(span)]


def locate(tables: Tables, batch: BatchRecord, index: int) -> tuple[int, int]:
    """Return the `(block id, block offset)` of a run. Raises `NotFound`."""
    for block in tables.blocks.values():
        if block.batch_id == batch.id and block.chunk.first_index <= index <= block.chunk.last_index:
            indexes = indexes_of(block.chunk)
            if index in indexes:
                return block.id, indexes.index(index)
    raise no_run(batch.id, index)


def payload(tables: Tables, batch: BatchRecord, index: int) -> tuple[bytes, int]:
    """Return the stored input of a run, and its kind."""
    block_id, block_offset = locate(tables, batch, index)
    payloads, kinds = unpack(tables.blocks[block_id].chunk.items)
    return payloads[block_offset], kinds[block_offset] if kinds else 0


def spans_of_block(tables: Tables, block_id: int) -> list[Span]:
    """Return all spans over one block."""
    return [span for span in tables.spans.values() if span.block_id == block_id]


def spans_of_batch(tables: Tables, batch_id: str) -> list[Span]:
    """Return all spans of a batch."""
    return [span for span in tables.spans.values() if span.batch_id == batch_id]


def is_owned(tables: Tables, session_id: str, owner: SessionOwner) -> bool:
    """True if a session is live and belongs to an owner."""
    session = tables.sessions.get(session_id)
    return session is not None and not session.ended_us and (session.environment, session.key_id) == owner


def spans_of_session(tables: Tables, session_id: str) -> list[Span]:
    """Return the spans that a session has leased."""
    return [span for span in tables.spans.values() if span.state == spans.LEASED and span.session_id == session_id]


def waiting(tables: Tables) -> list[Span]:
    """Return the spans that are not leased and have unsettled runs, also delayed ones."""
    return [span for span in tables.spans.values() if span.state in (spans.WAITING, spans.DELAYED)]


def claim_order(span: Span) -> tuple[int, int, str, int, int]:
    """Sort key of claims: by priority, then by virtual time, then by batch and index."""
    return -span.priority, span.order_no, span.batch_id, span.first_index, span.id


def with_ledger(tables: Tables, batch: BatchRecord) -> tuple[BatchRecord, Ledger]:
    """Return a batch with its ledger."""
    leased = [span for span in spans_of_batch(tables, batch.id) if span.state == spans.LEASED]
    return batch, batches.ledger(batch, leased_count=sum(span.unsettled_count for span in leased))


class _RunInSpan(NamedTuple):
    """The span that has the state of one run."""

    run_index: int
    block_id: int
    block_offset: int
    span: Span
    state: int


def run_locations(tables: Tables, batch_id: str) -> list[_RunInSpan]:
    """Return every run of a batch, by index, with the span that has its state."""
    indexes_by_block = {
        block.id: indexes_of(block.chunk) for block in tables.blocks.values() if block.batch_id == batch_id
    }
    locations = [
        _RunInSpan(indexes_by_block[span.block_id][block_offset], span.block_id, block_offset, span, state)
        for span in spans_of_batch(tables, batch_id)
        for block_offset, state in zip(block_offsets_of(span), span.states, strict=True)
        if state != runs_core.MOVED
    ]
    return sorted(locations, key=lambda location: location.run_index)


def _results(tables: Tables, batch_id: str) -> dict[tuple[int, int], tuple[bytes, int]]:
    """Return the last recorded result for each `(block id, block offset)` of a batch."""
    return {
        (part.block_id, block_offset): (result, kind)
        for part in tables.parts.values()
        if tables.blocks[part.block_id].batch_id == batch_id
        for block_offset, code, result, kind in results_of(part)
        if code in WITH_RESULT
    }


def outcomes(
    tables: Tables, batch_id: str, from_index: int, runs_max: int, *, bytes_max: int, passing: bool = False
) -> list[RunOutcome]:
    """Return final outcomes from `from_index` on. Gaps are skipped in a stream, and everywhere with `passing`.

    The page ends before its results exceed `bytes_max`; it has at least one outcome.
    """
    batch = find(tables, batch_id)
    results = _results(tables, batch_id)
    final: list[RunOutcome] = []
    expected = from_index
    for index, block_id, block_offset, _, state in run_locations(tables, batch_id):
        if index < from_index:
            continue
        is_gap = index != expected and batch.kind != batches.STREAM
        if passing and batch.kind != batches.STREAM and index >= from_index + runs_max:
            break
        if passing and state not in runs_core.FINAL:
            continue
        if (is_gap and not passing) or state not in runs_core.FINAL or len(final) == runs_max:
            break
        result, kind = results.get((block_id, block_offset), NOTHING) if state in WITH_RESULT else NOTHING
        final.append(RunOutcome(index=index, state=state, result=result, kind=kind))
        expected = index + 1
    return final[: count_within((len(outcome.result) for outcome in final), bytes_max)]


def lease(tables: Tables, span: Span) -> Lease:
    """Make the lease of a claimed span."""
    chunk = tables.blocks[span.block_id].chunk
    return lease_of(span, chunk.first_index, chunk.gaps, chunk.extras, chunk.items)


def run(tables: Tables, batch_id: str, index: int) -> RunRecord:
    """Return a run with its input, its result and its attempts."""
    batch = tables.batches.get(batch_id)
    if batch is None:
        raise no_run(batch_id, index)
    block_id, block_offset = locate(tables, batch, index)
    (location,) = (location for location in run_locations(tables, batch_id) if location.run_index == index)
    extra = tables.blocks[block_id].chunk.extras.get(block_offset, Extra())
    view = view_of(location.span, location.run_index, location.state)
    view.payload, view.kind = payload(tables, batch, index)
    view.headers, view.tags, view.idempotency_key = extra.headers, list(extra.tags), extra.idempotency_key
    view.kept = extra.kept
    view.name = extra.name
    view.created_us = min(span.since_us for span in spans_of_block(tables, block_id))
    if location.state in WITH_RESULT:
        view.result, view.result_kind = _results(tables, batch_id).get((block_id, block_offset), NOTHING)
    view.attempts = [
        attempt_of(code, data, part.settled_us)
        for part in tables.parts.values()
        if part.block_id == block_id
        for at, code, data, _ in results_of(part)
        if at == block_offset
    ]
    return view


def runs(
    tables: Tables,
    environment: str,
    batch_id: str,
    run_filter: RunFilter,
    after: tuple[str, int] | None,
    limit: int,
    bytes_max: int,
) -> list[RunRecord]:
    """List runs that match, newest batch first and by index inside it, without payloads, up to about `bytes_max`."""
    check_run_state(run_filter.state)
    listed = (
        (view_of(location.span, location.run_index, location.state), location)
        for name in sorted(tables.batches, reverse=True)
        if batch_id in ("", name) and tables.batches[name].environment == environment
        if after is None or name <= after[0]
        for location in run_locations(tables, name)
        if after is None or name < after[0] or location.run_index > after[1]
        if not run_filter.tag or (environment, run_filter.tag, name, location.run_index) in tables.tags
    )
    matching = list(
        islice(((record, location) for record, location in listed if run_filter.takes(record, location.span)), limit)
    )
    outcomes: dict[tuple[int, int], list[tuple[int, bytes, int, int]]] = {
        (location.block_id, location.block_offset): [] for _, location in matching
    }
    for part in tables.parts.values():
        for block_offset, code, data, kind in results_of(part):
            recorded = outcomes.get((part.block_id, block_offset))
            if recorded is not None:
                recorded.append((code, data, kind, part.settled_us))
    for record, location in matching:
        if not record.created_us:
            record.created_us = min(span.since_us for span in spans_of_block(tables, location.block_id))
        extra = tables.blocks[location.block_id].chunk.extras.get(location.block_offset, Extra())
        add_details(record, extra, outcomes[location.block_id, location.block_offset])
    records = [record for record, _ in matching]
    return records[: count_within(map(details_bytes, records), bytes_max)]


def tasks_of_batches(tables: Tables, environment: str, batch_ids: Sequence[str]) -> dict[str, list[str]]:
    """Return the tasks of the first and the last runs of some batches."""
    tasks: dict[str, list[str]] = {}
    for batch_id in batch_ids:
        batch = tables.batches.get(batch_id)
        blocks = [block for block in tables.blocks.values() if block.batch_id == batch_id]
        if batch is None or batch.environment != environment or not blocks:
            continue
        by_index = sorted(blocks, key=lambda block: (block.chunk.first_index, block.id))
        outer = {by_index[0].id, by_index[-1].id}
        tasks[batch_id] = sorted({span.task for span in tables.spans.values() if span.block_id in outer})
    return tasks


def queues(tables: Tables, environment: str) -> list[QueueView]:
    """List queues with the numbers of their runs."""
    return [_queue(tables, environment, name) for owner, name in sorted(tables.queues) if owner == environment]


def _queue(tables: Tables, environment: str, name: str) -> QueueView:
    counts: Counter[str] = Counter()
    oldest_us = []
    for span in tables.spans.values():
        if (span.environment, span.queue) == (environment, name):
            counts[span.state] += span.unsettled_count
            if span.state == spans.WAITING:
                oldest_us.append(max(span.since_us, span.due_us))
    return QueueView(
        name=name,
        environment=environment,
        paused=tables.queues[environment, name].paused,
        waiting_count=counts[spans.WAITING],
        delayed_count=counts[spans.DELAYED],
        leased_count=counts[spans.LEASED],
        oldest_us=min(oldest_us, default=0),
    )


def lease_loads(tables: Tables) -> dict[str, LeaseLoad]:
    """Return how many runs each session has leased."""
    loads: dict[str, LeaseLoad] = {}
    for span in tables.spans.values():
        if span.state == spans.LEASED:
            before = loads.get(span.session_id, LeaseLoad(0, 0))
            loads[span.session_id] = LeaseLoad(
                before.runs_count + span.unsettled_count, max(before.claimed_us, span.leased_us)
            )
    return loads


def waiting_lanes(tables: Tables, environment: str, batch_id: str) -> set[WaitingLane]:
    """Return the lanes that have waiting runs."""
    return {
        WaitingLane(span.queue, span.task, tables.queues[span.environment, span.queue].paused)
        for span in tables.spans.values()
        if span.state == spans.WAITING
        and (span.batch_id == batch_id or (not batch_id and span.environment == environment))
    }


def named_leases(tables: Tables, environment: str, task: str, keys: Sequence[str]) -> list[NamedLease]:
    """Return the leases of the runs that keys name."""
    leases = []
    for key in sorted(set(keys)):
        named_run = tables.keys.get((environment, task, key))
        if named_run is None:
            continue
        block_id, block_offset = locate(tables, tables.batches[named_run.batch_id], named_run.run_index)
        for span in spans_of_block(tables, block_id):
            leases += [
                named_lease(span, key, span_slot, tables.blocks[block_id].chunk.extras[block_offset])
                for span_slot, offset in enumerate(block_offsets_of(span))
                if offset == block_offset
                and span.state == spans.LEASED
                and span.states[span_slot] in runs_core.UNSETTLED
            ]
    return leases


def dead_letters(
    tables: Tables, environment: str, queue: str, before_us: int, after: DeadLetter | None
) -> list[DeadLetter]:
    """List dead letters, oldest first."""
    letters = [
        dead
        for owner, dead in tables.dead.values()
        if owner == environment and queue in ("", dead.queue) and (not before_us or dead.died_us < before_us)
        if after is None or _age(dead) > _age(after)
    ]
    return sorted(letters, key=_age)


def _age(dead: DeadLetter) -> tuple[int, str, int]:
    return dead.died_us, dead.batch_id, dead.index


def verify(tables: Tables, batch_id: str) -> Verification:
    """Count a batch from its blocks, spans and parts, and compare with its counters."""
    batch, received = find(tables, batch_id), tables.received[batch_id]
    stored = [
        (block.id, block_offset, index)
        for block in tables.blocks.values()
        if block.batch_id == batch_id
        for block_offset, index in enumerate(indexes_of(block.chunk))
    ]
    counted_ledger = _counted(tables, batch, len(stored))
    _, stored_ledger = with_ledger(tables, batch)
    differences = [
        f"{name}: the counters say {getattr(stored_ledger, name)}, the chunks {getattr(counted_ledger, name)}"
        for name in Ledger._fields
        if getattr(stored_ledger, name) != getattr(counted_ledger, name)
    ]
    if received != IndexSet(index for _, _, index in stored) or len(received) != len(stored):
        differences.append(f"the received set names {len(received)} indexes, the blocks hold {len(stored)}")
    differences += _location_faults(tables, batch_id, stored)
    is_done = not counted_ledger.waiting + counted_ledger.leased
    if not counted_ledger.balances:
        differences.append(f"expected {counted_ledger.expected} runs, found {sum(counted_ledger[1:])}")
    if batch.is_finished and not is_done:
        differences.append(f"the batch is {batch.state}, yet some of its runs are not final")
    if batch.state != batches.OPEN and not batch.is_finished and is_done:
        differences.append(f"every run is final, yet the batch has not ended ({batch.state})")
    return Verification(batch_id=batch_id, ledger=counted_ledger, differences=differences)


def _counted(tables: Tables, batch: BatchRecord, stored_count: int) -> Ledger:
    counts = Counter(
        "leased"
        if location.span.state == spans.LEASED and location.state in runs_core.UNSETTLED
        else _word(location.state)
        for location in run_locations(tables, batch.id)
    )
    expected = batch.received_count if batch.expected_count is None else batch.expected_count
    words = ("waiting", "leased", "completed", "failed", "cancelled", "expired")
    return Ledger(expected, expected - stored_count, *(counts[word] for word in words))


def _word(state: int) -> str:
    return runs_core.NAMES[runs_core.WAITING if state in runs_core.UNSETTLED else state]


def _location_faults(tables: Tables, batch_id: str, stored: list[tuple[int, int, int]]) -> Iterator[str]:
    """Report runs without exactly one span, wrong counts of spans, and final runs without a recorded outcome."""
    span_counts = Counter((location.block_id, location.block_offset) for location in run_locations(tables, batch_id))
    results = _results(tables, batch_id)
    for block_id, block_offset, _ in stored:
        if span_counts[block_id, block_offset] != 1:
            count = span_counts[block_id, block_offset]
            yield f"expected one span for block offset {block_offset} of block {block_id}, got {count}"
    for span in spans_of_batch(tables, batch_id):
        if span.unsettled_count != runs_core.unsettled_count(span.states):
            yield f"span {span.id} counts {span.unsettled_count} unsettled runs wrongly"
    for location in run_locations(tables, batch_id):
        if location.state in WITH_RESULT and (location.block_id, location.block_offset) not in results:
            yield f"block offset {location.block_offset} of block {location.block_id} ended without a recorded outcome"
