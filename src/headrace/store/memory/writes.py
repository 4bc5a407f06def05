"""Changes to the tables of `MemoryStore`: one function a step, on tables that no other operation sees yet."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Final

import msgspec

from headrace.core import batch as batches
from headrace.core import span as spans
from headrace.core.batch import BatchRecord
from headrace.core.block import Chunk, check_names, ended_at_creation, linked, narrowed
from headrace.core.index_set import IndexSet
from headrace.core.order import clock_after, first_order_no, returned_order_no
from headrace.core.pack import unpack
from headrace.core.run import COMPLETED, ENDED_BADLY, WAITING
from headrace.core.span import Counts, Key, Part, Policy, Span, SpanDecision, block_offsets_of, encode_uint16s
from headrace.core.span_release import release as release_span
from headrace.foundation.errors import Conflict, SessionEnded
from headrace.foundation.ids import run_id, session_name
from headrace.store.memory import reads
from headrace.store.memory.reads import Known, Queue, Tables
from headrace.store.projections import birth_part
from headrace.store.protocol import (
    Appended,
    Claim,
    DeadLetter,
    NewBatch,
    Release,
    Schedule,
    Session,
    Suspects,
    Tick,
    Ticked,
)

SWEEP_SPANS_MAX: Final = 1_000
_encode_extras: Final = msgspec.msgpack.Encoder().encode


def create(tables: Tables, new: NewBatch, now_us: int) -> BatchRecord:
    """Insert a batch."""
    batch = tables.batches[new.id] = BatchRecord(**msgspec.structs.asdict(new), created_us=now_us)
    tables.received[new.id] = IndexSet()
    return batch


def append(
    tables: Tables,
    batch_id: str,
    chunks: Sequence[Chunk],
    cursor: bytes | None,
    runs_max: int,
    now_us: int,
    *,
    seals: bool = False,
) -> Appended:
    """Make those runs of `chunks` durable that are new, and store `cursor`; with `seals`, seal a complete batch."""
    answer = Appended(accepted_count=0, duplicates_count=0, conflicts=[], existing={})
    batch = reads.find(tables, batch_id)
    for chunk in chunks:
        check_names(chunk)
        batches.check_append(batch, first_index=chunk.first_index, last_index=chunk.last_index, runs_max=runs_max)
    born_counts = Counts()
    for chunk in chunks:
        fresh = fresh_part(tables, batch, chunk, answer, now_us)
        if fresh is not None:
            batch = with_lanes(tables, batch, fresh)
            born_counts = born_counts.plus(insert(tables, batch, fresh, now_us))
            answer.accepted_count += fresh.runs_count
    after = tables.batches[batch_id] = batches.appended(
        batch, accepted_count=answer.accepted_count, created_with_outcome=born_counts, cursor=cursor, now_us=now_us
    )
    if seals and batches.is_whole(after):
        answer.sealed = seal(tables, batch_id, None, now_us)
    return answer


def seal(tables: Tables, batch_id: str, expected_count: int | None, now_us: int) -> BatchRecord:
    """Seal a batch; complete it if all its runs have ended."""
    batch, received = reads.find(tables, batch_id), tables.received[batch_id]
    after = tables.batches[batch_id] = batches.sealed(batch, received, expected_count=expected_count, now_us=now_us)
    return after


def keep_schedules(
    tables: Tables, environment: str, app: str, declared: Sequence[Schedule], now_us: int
) -> list[Schedule]:
    """Store all schedules of an app. One that is new, was gone, or has another expression or time zone begins now."""
    names = {schedule.name for schedule in declared}
    for (owner, name), stored in tables.schedules.items():
        if owner == environment and stored.app == app and name not in names and not stored.gone_us:
            tables.schedules[owner, name] = msgspec.structs.replace(stored, gone_us=now_us)
    for schedule in declared:
        before = tables.schedules.get((environment, schedule.name))
        last_us, ticked_us = now_us, 0
        if before is not None:
            ticked_us = before.ticked_us
            is_same = not before.gone_us and (before.expression, before.zone) == (schedule.expression, schedule.zone)
            last_us = before.last_us if is_same else max(before.last_us, now_us)
        tables.schedules[environment, schedule.name] = msgspec.structs.replace(
            schedule, environment=environment, app=app, last_us=last_us, ticked_us=ticked_us, gone_us=0
        )
    return [tables.schedules[environment, name] for name in sorted(names)]


def tick(tables: Tables, environment: str, ticks: Tick, now_us: int) -> Ticked:
    """Advance a schedule and enqueue the runs of its ticks."""
    schedule = tables.schedules.get((environment, ticks.name))
    if schedule is None:
        return Ticked(False, None)
    is_unchanged = (schedule.expression, schedule.zone, schedule.last_us) == (
        ticks.expression,
        ticks.zone,
        ticks.last_us,
    )
    if not is_unchanged or ticks.until_us <= schedule.last_us:
        return Ticked(False, schedule)
    ticked_us = ticks.until_us if ticks.runs else schedule.ticked_us
    after = msgspec.structs.replace(schedule, last_us=ticks.until_us, ticked_us=ticked_us, gone_us=0)
    tables.schedules[environment, ticks.name] = after
    for new, chunk in ticks.runs:
        if new.id in tables.batches:
            raise Conflict(f"a batch with the id {new.id!r} exists already", batch_id=new.id)
        create(tables, new, now_us)
        append(tables, new.id, [chunk], None, 1, now_us)
        seal(tables, new.id, 1, now_us)
    return Ticked(True, after)


def fresh_part(tables: Tables, batch: BatchRecord, chunk: Chunk, answer: Appended, now_us: int) -> Chunk | None:
    """Return the new runs as a chunk, and report the others in `answer`. Their indexes and keys are taken at once.

    A run whose key already names a run is linked to that run; in a stream it is left out.
    """
    received = tables.received[batch.id] = tables.received[batch.id].union(IndexSet())
    tasks = {at: key.task for key, block_offsets in chunk.spans.items() for at in _covered(chunk, block_offsets)}
    payloads, kinds = unpack(chunk.items)
    keep = []
    links: dict[int, str] = {}
    for block_offset, index in enumerate(reads.indexes_of(chunk)):
        extra = chunk.extras.get(block_offset)
        if index in received:
            answer.duplicates_count += 1
            if reads.payload(tables, batch, index) != (payloads[block_offset], kinds[block_offset] if kinds else 0):
                answer.conflicts.append(index)
            continue
        if extra is not None and extra.idempotency_key:
            name = (batch.environment, tasks[block_offset], extra.idempotency_key)
            named_run = tables.keys.get(name)
            if named_run is not None and not _is_free(tables, named_run, now_us):
                answer.existing[index] = (named_run.batch_id, named_run.run_index)
                if batch.kind == batches.STREAM:
                    continue
                links[block_offset] = run_id(named_run.batch_id, named_run.run_index)
            else:
                tables.keys[name] = Known(batch.id, index, extra.idempotency_expires_us)
        received.add_range(index, index + 1)
        keep.append(block_offset)
    return narrowed(linked(chunk, links), keep)


def _is_free(tables: Tables, named_run: Known, now_us: int) -> bool:
    """True if a key names no run any more: it expired, or its run failed, was cancelled or expired and may run
    again.
    """
    if 0 < named_run.expires_us <= now_us:
        return True
    return any(
        location.run_index == named_run.run_index and location.state in ENDED_BADLY and not location.span.at_most_once
        for location in reads.run_locations(tables, named_run.batch_id)
    )


def _covered(chunk: Chunk, block_offsets: bytes | None) -> Sequence[int]:
    return range(chunk.runs_count) if block_offsets is None else spans.decode_uint16s(block_offsets)


def with_lanes(tables: Tables, batch: BatchRecord, chunk: Chunk) -> BatchRecord:
    """Create the queues of a chunk, and store the clock at which the batch first uses each."""
    bases = dict(batch.order_bases)
    for key in chunk.spans:
        tables.queues.setdefault((batch.environment, key.queue), Queue())
        bases.setdefault(key.queue, environment_clock(tables, batch.environment))
    return msgspec.structs.replace(batch, order_bases=bases)


def insert(tables: Tables, batch: BatchRecord, chunk: Chunk, now_us: int) -> Counts:
    """Insert a block, its spans, and rows for what only some runs have. Returns the counts of runs that ended at
    creation.
    """
    block_id = tables.add_block(batch.id, chunk)
    at_birth = ended_at_creation(chunk)
    ended = Counts()
    for key, block_offsets in chunk.spans.items():
        by_state: dict[int, list[int]] = {}
        for block_offset in _covered(chunk, block_offsets):
            by_state.setdefault(at_birth[block_offset].state if block_offset in at_birth else WAITING, []).append(
                block_offset
            )
        for state, offsets in by_state.items():
            stands = spans.DELAYED if key.due_us > now_us else spans.WAITING
            span = _new_span(
                tables, batch, block_id, chunk, key, offsets, state, stands if state == WAITING else spans.DONE
            )
            span.since_us = now_us
            if state == WAITING and len(offsets) == chunk.runs_count:
                span = msgspec.structs.replace(span, block_offsets=None)
            add_span(tables, span)
            if state != WAITING:
                tables.add_part(birth_part(span, at_birth, now_us))
                ended = ended.plus(
                    Counts(completed=len(offsets)) if state == COMPLETED else Counts(failed=len(offsets))
                )
    for block_offset, extra in chunk.extras.items():
        index = chunk.index_at(block_offset)
        tables.tags |= {(batch.environment, tag, batch.id, index) for tag in extra.tags}
        if extra.object_key:
            tables.objects.setdefault(extra.object_key, batch.id)
    return ended


def _new_span(
    tables: Tables,
    batch: BatchRecord,
    block_id: int,
    chunk: Chunk,
    key: Key,
    offsets: list[int],
    state: int,
    span_state: str,
) -> Span:
    clock = environment_clock(tables, batch.environment)
    return Span(
        **key._asdict(),
        block_id=block_id,
        batch_id=batch.id,
        environment=batch.environment,
        order_no=first_order_no(clock=clock, base=batch.order_bases[key.queue], index=chunk.index_at(offsets[0])),
        first_index=chunk.first_index,
        block_offsets=encode_uint16s(offsets),
        states=bytes((state,)) * len(offsets),
        unsettled_count=len(offsets) if state == WAITING else 0,
        state=span_state,
    )


def add_span(tables: Tables, span: Span) -> None:
    """Insert a span under a new id."""
    span.id = tables.next_span_id
    tables.next_span_id += 1
    tables.spans[span.id] = span


def states_by_offset(span: Span) -> Iterator[tuple[int, int]]:
    """Yield `(block offset, state)` of each run of a span."""
    return zip(block_offsets_of(span), span.states, strict=True)


def by_block(tables: Tables, batch: BatchRecord, indexes: Collection[int]) -> dict[int, dict[int, int]]:
    """Group runs as `{block id: {block offset: index}}`. Raises `NotFound` for an index that was not received."""
    by_block_id: dict[int, dict[int, int]] = {}
    for index in indexes:
        block_id, block_offset = reads.locate(tables, batch, index)
        by_block_id.setdefault(block_id, {})[block_offset] = index
    return by_block_id


def environment_clock(tables: Tables, environment: str) -> int:
    """Return the highest clock of an environment's queues: the virtual time of new runs."""
    return max(
        (queue.clock for (queue_environment, _), queue in tables.queues.items() if queue_environment == environment),
        default=0,
    )


def clock(tables: Tables, span: Span) -> int:
    """Return the clock of a span's queue."""
    return tables.queues[span.environment, span.queue].clock


def policy(tables: Tables, span: Span, crashes_max: int = 1) -> Policy:
    """Return the batch's policy for runs of a span that would run again."""
    indexes = reads.indexes_of(tables.blocks[span.block_id].chunk)
    return Policy(
        stopped=tables.batches[span.batch_id].is_stopped,
        cancelled=frozenset(
            block_offset for block_offset, index in enumerate(indexes) if (span.batch_id, index) in tables.cancellations
        ),
        crashes_max=crashes_max,
    )


def count_in(tables: Tables, batch_id: str, counts: Counts, now_us: int) -> None:
    """Add outcomes to a batch's counters; complete the batch if they were the last."""
    if any(counts):
        tables.batches[batch_id] = batches.settled(tables.batches[batch_id], counts, now_us)


def apply(tables: Tables, verdict: SpanDecision, now_us: int) -> None:
    """Write a decision about one span."""
    if verdict.span is None:
        return
    tables.spans[verdict.span.id] = verdict.span
    for span in verdict.spans:
        add_span(tables, span)
    if verdict.part is not None:
        tables.add_part(verdict.part)
        add_dead_letters(tables, verdict.span, verdict.part, now_us)
    count_in(tables, verdict.span.batch_id, verdict.counts, now_us)


def complete_waiting(
    tables: Tables, environment: str, task: str, keys: Sequence[str], result: bytes, now_us: int
) -> int:
    """Complete the runs that keys name and that wait. Returns how many."""
    completed_count = 0
    for key in sorted(set(keys)):
        named_run = tables.keys.get((environment, task, key))
        if named_run is None:
            continue
        block_id, block_offset = reads.locate(tables, tables.batches[named_run.batch_id], named_run.run_index)
        for span in reads.spans_of_block(tables, block_id):
            verdict = spans.complete_waiting(span, (block_offset,), result, now_us=now_us)
            apply(tables, verdict, now_us)
            completed_count += verdict.counts.settled
    return completed_count


def add_dead_letters(tables: Tables, span: Span, part: Part, now_us: int) -> None:
    """Add the runs that failed finally in a part to the dead letters."""
    indexes = reads.indexes_of(tables.blocks[span.block_id].chunk)
    for block_offset in spans.dead_block_offsets(span, part):
        dead = DeadLetter(
            batch_id=span.batch_id, index=indexes[block_offset], queue=span.queue, task=span.task, died_us=now_us
        )
        tables.dead[span.batch_id, dead.index] = span.environment, dead


def stop(tables: Tables, batch_id: str, state: str, now_us: int) -> None:
    """Cancel or abandon a batch; a bounded part of its waiting runs ends at once."""
    after = batches.stopped(reads.find(tables, batch_id), state, now_us)
    tables.batches[batch_id] = after
    if after.is_stopped and not after.is_finished:
        sweep_stopped(tables, batch_id, SWEEP_SPANS_MAX, now_us)


def sweep_stopped(tables: Tables, batch_id: str, spans_max: int, now_us: int) -> tuple[int, int]:
    """Cancel waiting runs of a stopped batch. Returns the numbers of spans and of runs."""
    waiting = [span for span in reads.waiting(tables) if span.batch_id == batch_id][:spans_max]
    change = Counts()
    for span in waiting:
        tables.spans[span.id], counts = spans.cancel(span)
        change = change.plus(counts)
    count_in(tables, batch_id, change, now_us)
    return len(waiting), change.settled


def is_overdue(batch: BatchRecord, now_us: int) -> bool:
    """True if a batch is past its seal deadline."""
    due_us = batches.seal_due_us(batch)
    return due_us is not None and due_us <= now_us


def live(tables: Tables, session_id: str, *, environment: str | None = None, key_id: str | None = None) -> Session:
    """Return the session. Raises `SessionEnded`, also for a session of another environment or key."""
    session = tables.sessions.get(session_id)
    if (
        session is None
        or session.ended_us
        or environment not in (None, session.environment)
        or key_id not in (None, session.key_id)
    ):
        raise ended(session_id)
    return session


def ended(session_id: str) -> SessionEnded:
    """Return the error for a session that has ended."""
    return SessionEnded(
        "the session has ended: another process recovered it, or it was closed",
        hint="start a new session",
        session=session_name(session_id),
    )


def end(tables: Tables, session: Session, suspects: Suspects, crashes_max: int, now_us: int) -> int:
    """End a session, release its leases and leave its batches. Returns how many leases there were."""
    tables.sessions[session.id] = msgspec.structs.replace(session, ended_us=now_us)
    leased = reads.spans_of_session(tables, session.id)
    for span in leased:
        release(tables, release_of_session(span, suspects), crashes_max, now_us)
    for batch in list(tables.batches.values()):
        if batch.session_id == session.id:
            tables.batches[batch.id] = batches.owner_ended(batch, now_us)
    return len(leased)


def release_of_session(span: Span, suspects: Suspects) -> Release:
    """Make the release of a lease whose session can't release it itself."""
    if suspects.span_slots is None:
        span_slots = tuple(spans.unsettled_slots(span))
    else:
        span_slots = suspects.span_slots.get((span.id, span.token), ())
    return Release(span_id=span.id, token=span.token, suspects=span_slots, evidence=suspects.evidence)


def release(tables: Tables, released: Release, crashes_max: int, now_us: int) -> str:
    """Release one lease. Returns `settled` or `lost`."""
    span = tables.spans.get(released.span_id)
    verdict = release_span(
        span,
        released.token,
        span_slots=released.span_slots,
        suspects=frozenset(released.suspects),
        evidence=released.evidence,
        policy=Policy() if span is None else policy(tables, span, crashes_max),
        clock=0 if span is None else clock(tables, span),
        now_us=now_us,
    )
    apply(tables, verdict, now_us)
    return verdict.word


def promote(tables: Tables, now_us: int) -> None:
    """Make delayed spans claimable whose time has come, at the current clock of their queue."""
    for span in reads.waiting(tables):
        if span.state == spans.DELAYED and span.due_us <= now_us:
            tables.spans[span.id] = msgspec.structs.replace(
                span, state=spans.WAITING, order_no=returned_order_no(clock=clock(tables, span))
            )


def move_waiting(tables: Tables, environment: str, task: str, source: str, target: str, spans_max: int) -> int:
    """Move waiting spans to another queue."""
    movable = [
        span
        for span in reads.waiting(tables)
        if (span.state, span.environment, span.task, span.queue) == (spans.WAITING, environment, task, source)
    ]
    if movable:
        tables.queues.setdefault((environment, target), Queue())
    for span in sorted(movable, key=reads.claim_order)[:spans_max]:
        tables.spans[span.id] = msgspec.structs.replace(span, queue=target)
    return min(len(movable), spans_max)


def input_bytes(chunk: Chunk) -> int:
    """Return how many bytes a block takes, as databases store it."""
    return len(chunk.items) + (len(_encode_extras(chunk.extras)) if chunk.extras else 0)


def take(tables: Tables, claim: Claim, bytes_max: int, now_us: int) -> list[Span]:
    """Lease the first spans in claim order, until the inputs of their blocks exceed `bytes_max`.

    The last one is split if it holds more runs than requested.
    """
    waiting = [
        span
        for span in reads.waiting(tables)
        if span.state == spans.WAITING
        and span.environment == claim.environment
        and span.task in claim.tasks
        and (claim.queues is None or span.queue in claim.queues)
        and span.queue.startswith(claim.queue_prefix)
        and not tables.queues[span.environment, span.queue].paused
        and not 0 < span.expires_us <= now_us
    ]
    waiting.sort(key=reads.claim_order)
    taken: list[Span] = []
    runs_left, held_bytes = claim.runs_max, 0
    for span in waiting:
        if tables.batches[span.batch_id].is_stopped:
            sweep_stopped(tables, span.batch_id, SWEEP_SPANS_MAX, now_us)
            continue
        held_bytes += input_bytes(tables.blocks[span.block_id].chunk)
        if taken and held_bytes > bytes_max:
            break
        if span.unsettled_count > runs_left:
            tables.spans[span.id], part = spans.take_first(span, runs_left)
            add_span(tables, part)
            span = part
        lease_span = spans.leased(span, session_id=claim.session_id, claim_no=claim.claim_no, now_us=now_us)
        tables.spans[span.id] = lease_span
        taken.append(lease_span)
        queue = tables.queues[span.environment, span.queue]
        clock = clock_after(clock=queue.clock, claimed_order_no=span.order_no)
        tables.queues[span.environment, span.queue] = queue._replace(clock=clock)
        runs_left -= lease_span.unsettled_count
        if not runs_left:
            break
    return taken
