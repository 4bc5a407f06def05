"""`MemoryStore`: the seam's promises as plain dicts, for tests and as the specification the other houses keep.

Rule 1: the same pure decisions as every house, and nothing else: no index, no bound that only a database needs,
no word of SQL. Where two houses differ, this one is right, or the difference is a rule nobody has written down.
Rule 2: a verb works on a copy of the tables, which takes their place when the verb is done. So a raised error
changes nothing, and since no verb waits inside, each is one transaction.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from headrace.core import batch as batches
from headrace.core import span as spans
from headrace.core.batch import Batch, Ledger
from headrace.core.block import Chunk, check_names, narrowed
from headrace.core.index_set import IndexSet
from headrace.core.order import clock_after, first_order_no, returned_order_no
from headrace.core.pack import pack, unpack
from headrace.core.run import FAILED, UNSETTLED, WAITING
from headrace.core.span import Counts, Key, Part, Policy, Settlement, Span, Verdict, encode_places, positions_of
from headrace.foundation.errors import Conflict, InvalidInput, SessionEnded, StoreUnavailable
from headrace.foundation.limits import Limits
from headrace.store import memory_reading as reading
from headrace.store.memory_reading import Known, Queue, Tables
from headrace.store.protocol import (
    Appended,
    Claim,
    Heartbeat,
    Held,
    Lease,
    NewBatch,
    Outcome,
    Pruned,
    QueueView,
    Release,
    RunView,
    Session,
    Suspects,
    Swept,
    Verification,
)

SWEEP_SPANS_MAX = 1_000


class MemoryStore:
    """Batches in this process's memory, gone with it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._tables = Tables()
        self._is_open = False

    @contextmanager
    def _changing(self) -> Iterator[Tables]:
        tables = self._now().copied()
        yield tables
        self._tables = tables

    def _now(self) -> Tables:
        if not self._is_open:
            raise StoreUnavailable("the store is closed")
        return self._tables

    async def open(self) -> None:
        """Let verbs in. What was there before a close is still there."""
        self._is_open = True

    async def close(self) -> None:
        """Let no more verbs in."""
        self._is_open = False

    async def check(self) -> dict[str, object]:
        """The settings that durability hangs on: there are none."""
        self._now()
        return {"store": "memory", "durable": False}

    # batches

    async def create_batch(self, new: NewBatch, *, now_us: int) -> tuple[Batch, bool]:
        """Open a batch, or answer the one its key names."""
        batches.check_created(expected_count=new.expected_count, runs_max=self._limits.batch_runs_max)
        with self._changing() as tables:
            if new.key is not None and (known := reading.named(tables, new.environment, new.key)):
                return known, False
            if new.id in tables.batches:
                return tables.batches[new.id], False
            batch = Batch(**msgspec.structs.asdict(new), created_us=now_us)
            tables.batches[new.id] = batch
            tables.received[new.id] = IndexSet()
        return batch, True

    async def append(
        self, batch_id: str, chunks: Sequence[Chunk], *, now_us: int, cursor: bytes | None = None
    ) -> Appended:
        """Make runs durable, each index once."""
        answer = Appended(accepted_count=0, duplicates_count=0, conflicts=[], existing={})
        with self._changing() as tables:
            batch = reading.find(tables, batch_id)
            for chunk in chunks:
                check_names(chunk)
                batches.check_append(
                    batch,
                    first_index=chunk.first_index,
                    last_index=chunk.last_index,
                    runs_max=self._limits.batch_runs_max,
                )
            failed_count = 0
            for chunk in chunks:
                fresh = narrowed(chunk, _new_positions(tables, batch, chunk, answer, now_us))
                if fresh is not None:
                    batch = _with_lanes(tables, batch, fresh)
                    failed_count += _insert(tables, batch, fresh, now_us)
                    answer.accepted_count += fresh.runs_count
            tables.batches[batch_id] = batches.appended(
                batch,
                accepted_count=answer.accepted_count,
                failed_count=failed_count,
                cursor=cursor,
                now_us=now_us,
            )
        return answer

    async def seal(self, batch_id: str, expected_count: int | None, *, now_us: int) -> Batch:
        """Close the batch; completes it when its runs have all ended."""
        with self._changing() as tables:
            batch = reading.find(tables, batch_id)
            received = tables.received[batch_id]
            after = batches.sealed(batch, received, expected_count=expected_count, now_us=now_us)
            tables.batches[batch_id] = after
        return after

    async def stop_batch(self, batch_id: str, state: str, *, now_us: int) -> Batch:
        """Move to `cancelled` or `abandoned`; what waits is cancelled, a bounded part of it at once."""
        with self._changing() as tables:
            _stop(tables, batch_id, state, now_us)
        return self._tables.batches[batch_id]

    async def cancel_runs(self, batch_id: str, indexes: Sequence[int], *, now_us: int) -> int:
        """Cancel single runs: those that wait now, those leased when their worker hears of it."""
        with self._changing() as tables:
            batch = reading.find(tables, batch_id)
            asked = 0
            change = Counts()
            for block_id, positions in _by_block(tables, batch, indexes).items():
                for span in reading.spans_of_block(tables, block_id):
                    live = [own for own, state in _homes(span) if state in UNSETTLED and own in positions]
                    if span.state == spans.LEASED:
                        tables.cancellations |= {(batch_id, positions[own]) for own in live}
                        asked += len(live)
                    elif live:
                        tables.spans[span.id], counts = spans.cancel(span, live)
                        change = change.plus(counts)
            _count_in(tables, batch_id, change, now_us)
        return change.settled + asked

    async def redrive(self, batch_id: str, indexes: Sequence[int] | None) -> int:
        """Run again what failed (all of it), or what ended badly at `indexes`."""
        with self._changing() as tables:
            batch = reading.find(tables, batch_id)
            if batch.is_stopped:
                raise Conflict(f"the batch is {batch.state}; its runs can't run again", batch_id=batch_id)
            wanted = None if indexes is None else _by_block(tables, batch, indexes)
            change = Counts()
            for span in reading.spans_of_batch(tables, batch_id):
                positions = None if wanted is None else wanted.get(span.block_id, {})
                after, again, gone = spans.redrive(span, positions, clock=_clock(tables, span))
                if again is not None:
                    tables.spans[span.id] = after
                    _add_span(tables, again)
                    tables.cancellations -= {(batch_id, index) for index in reading.indexes_of_span(tables, again)}
                    change = change.plus(gone)
            if change.settled:
                tables.batches[batch_id] = batches.redriven(batch, change)
        return -change.settled

    # sessions

    async def start_session(self, session: Session, *, now_us: int) -> None:
        """Make a process known; an id that ended never lives again."""
        with self._changing() as tables:
            known = tables.sessions.get(session.id)
            if known is not None and known.ended_us:
                raise _ended(session.id)
            if known is None:
                tables.sessions[session.id] = msgspec.structs.replace(session, heartbeat_us=now_us, ended_us=0)

    async def heartbeat(self, session_id: str, *, now_us: int) -> Heartbeat:
        """A sign of life, answered with what the store thinks this session holds."""
        with self._changing() as tables:
            session = _live(tables, session_id)
            seen_us = max(session.heartbeat_us, now_us)
            tables.sessions[session_id] = msgspec.structs.replace(session, heartbeat_us=seen_us)
            held = reading.spans_of_session(tables, session_id)
            touched = {span.batch_id for span in held}
        return Heartbeat(
            leases=[Held(span.id, span.token, span.claim_no) for span in held],
            stopped=sorted(batch_id for batch_id in touched if tables.batches[batch_id].is_stopped),
            cancelled=sorted(asked for asked in tables.cancellations if asked[0] in touched),
        )

    async def end_session(self, session_id: str, *, now_us: int) -> None:
        """Leave in good order: leases go back as they were, its stream is sealed."""
        with self._changing() as tables:
            session = tables.sessions.get(session_id)
            if session is not None and not session.ended_us:
                _end(tables, session, Suspects(places={}, evidence=""), self._limits.crashes_max, now_us)

    async def sessions(self) -> list[Session]:
        """The sessions that have not ended."""
        known = self._now().sessions
        return [known[name] for name in sorted(known) if not known[name].ended_us]

    async def recover(
        self, session_id: str, suspects: Suspects, *, silent_since_us: int, crashes_max: int, now_us: int
    ) -> int:
        """End a session that fell silent, once, and give its leases back."""
        with self._changing() as tables:
            session = tables.sessions.get(session_id)
            if session is None or session.ended_us or session.heartbeat_us > silent_since_us:
                return 0
            return _end(tables, session, suspects, crashes_max, now_us)

    # work

    async def claim(self, claim: Claim, *, now_us: int) -> list[Lease]:
        """Lease the best spans to a live session; a claim asked for again answers the same spans."""
        if claim.runs_max < 1:
            raise InvalidInput(f"a claim is for one run or more, not for {claim.runs_max}")
        with self._changing() as tables:
            _live(tables, claim.session_id)
            held = reading.spans_of_session(tables, claim.session_id)
            taken = [span for span in held if span.claim_no == claim.claim_no]
            if not taken:
                _promote(tables, now_us)
                taken = _take(tables, claim, now_us)
        return [reading.lease(tables, span) for span in taken]

    async def settle(self, settlements: Sequence[Settlement], *, now_us: int) -> list[str]:
        """Record outcomes: `settled`, `recorded` (a repeat) or `lost` (a stale token) for each, in order."""
        words = []
        with self._changing() as tables:
            for settlement in settlements:
                span = tables.spans.get(settlement.span_id)
                verdict = spans.settle(
                    span,
                    settlement,
                    recorded=(settlement.span_id, settlement.token, settlement.part_no) in tables.parts,
                    policy=Policy() if span is None else _policy(tables, span),
                    clock=0 if span is None else _clock(tables, span),
                    now_us=now_us,
                )
                _apply(tables, verdict, now_us)
                words.append(verdict.word)
                if span is not None and verdict.word != spans.LOST:
                    for key in settlement.object_keys:
                        tables.objects.setdefault(key, span.batch_id)
        return words

    async def release(self, releases: Sequence[Release], *, crashes_max: int, now_us: int) -> list[str]:
        """Give leases back before their runs ended: `settled` or `lost` for each."""
        with self._changing() as tables:
            return [_release(tables, given, crashes_max, now_us) for given in releases]

    # reading

    async def batch(self, batch_id: str) -> tuple[Batch, Ledger]:
        """One batch and its ledger."""
        tables = self._now()
        return reading.with_ledger(tables, reading.find(tables, batch_id))

    async def find_batch(self, environment: str, key: str) -> Batch | None:
        """The batch that a key names."""
        return reading.named(self._now(), environment, key)

    async def batches(
        self, environment: str, *, states: Sequence[str] | None = None, before_id: str = "", limit: int = 50
    ) -> list[tuple[Batch, Ledger]]:
        """Batches, newest first."""
        tables = self._now()
        found = [
            batch
            for batch_id, batch in sorted(tables.batches.items(), reverse=True)
            if batch.environment == environment
            and (states is None or batch.state in states)
            and (not before_id or batch_id < before_id)
        ]
        return [reading.with_ledger(tables, batch) for batch in found[:limit]]

    async def missing(self, batch_id: str, ranges_max: int) -> list[tuple[int, int]]:
        """Ranges of announced indexes that are not durable yet."""
        tables = self._now()
        batch, received = reading.find(tables, batch_id), tables.received[batch_id]
        expected = received.end if batch.expected_count is None else batch.expected_count
        return received.missing(expected, ranges_max)

    async def outcomes(self, batch_id: str, from_index: int, runs_max: int) -> list[Outcome]:
        """Consecutive final outcomes from `from_index` on, in index order."""
        return reading.outcomes(self._now(), batch_id, from_index, runs_max)

    async def run(self, batch_id: str, index: int) -> RunView:
        """One run."""
        return reading.run(self._now(), batch_id, index)

    async def runs(
        self,
        environment: str,
        *,
        batch_id: str = "",
        state: str = "",
        task: str = "",
        tag: str = "",
        limit: int = 50,
    ) -> list[RunView]:
        """Runs that match, newest batch first and by index inside it."""
        return reading.runs(self._now(), environment, batch_id, state, task, tag, limit)

    async def queues(self, environment: str) -> list[QueueView]:
        """The queues that were ever used or paused."""
        return reading.queues(self._now(), environment)

    async def pause_queue(self, environment: str, name: str, *, paused: bool) -> None:
        """Stop or go on handing out a queue's runs."""
        with self._changing() as tables:
            queue = tables.queues.get((environment, name), Queue())
            tables.queues[environment, name] = queue._replace(paused=paused)

    async def verify(self, batch_id: str) -> Verification:
        """Count a batch from its chunks and compare."""
        return reading.verify(self._now(), batch_id)

    # upkeep

    async def sweep(self, *, now_us: int, rows_max: int) -> Swept:
        """Expire, abandon and cancel what is due; give back what no live session holds."""
        swept = Swept()
        with self._changing() as tables:
            late = [span for span in reading.waiting(tables) if 0 < span.expires_us <= now_us]
            for span in late[:rows_max]:
                tables.spans[span.id], counts = spans.expire(span)
                swept.expired_count += counts.settled
                _count_in(tables, span.batch_id, counts, now_us)
            overdue = [batch for batch in tables.batches.values() if _is_overdue(batch, now_us)]
            for batch in overdue[:rows_max]:
                _stop(tables, batch.id, batches.ABANDONED, now_us)
                swept.abandoned.append(batch.id)
            stopping = [batch for batch in tables.batches.values() if batch.is_stopped and not batch.is_finished]
            left = rows_max
            for batch in stopping:
                spans_count, runs_count = _sweep_stopped(tables, batch.id, left, now_us)
                left -= spans_count
                swept.cancelled_count += runs_count
            live = {session.id for session in tables.sessions.values() if not session.ended_us}
            lost = [
                span for span in tables.spans.values() if span.state == spans.LEASED and span.session_id not in live
            ]
            for span in lost[:rows_max]:
                unknown = _given_back(span, Suspects(places=None, evidence="its session is gone"))
                _release(tables, unknown, self._limits.crashes_max, now_us)
            swept.more = max(len(late), len(overdue), rows_max - left, len(lost)) >= rows_max
        return swept

    async def prune(self, finished_before_us: int, *, batches_max: int, rows_max: int) -> Pruned:
        """Delete batches that finished before then, whole; memory has no need of steps."""
        del rows_max
        with self._changing() as tables:
            due = sorted(
                (batch.finished_us, batch.id, batch.environment)
                for batch in tables.batches.values()
                if 0 < batch.finished_us <= finished_before_us
            )
            for _, batch_id, _ in due[:batches_max]:
                tables.forget(batch_id)
            owners = {span.session_id for span in tables.spans.values() if span.state == spans.LEASED}
            owners |= {batch.session_id for batch in tables.batches.values() if not batch.is_finished}
            for session in list(tables.sessions.values()):
                if 0 < session.ended_us < finished_before_us and session.id not in owners:
                    del tables.sessions[session.id]
        gone = [(environment, batch_id) for _, batch_id, environment in due[:batches_max]]
        return Pruned(batches=gone, more=len(due) > batches_max)

    async def unnamed(self, keys: Sequence[str]) -> list[str]:
        """Those of these object keys that no row names."""
        named = self._now().objects
        return [key for key in keys if key not in named]

    async def next_due_us(self, environment: str, tasks: Sequence[str]) -> int | None:
        """When the next delayed span becomes claimable."""
        return min(
            (
                span.due_us
                for span in reading.waiting(self._now())
                if span.state == spans.DELAYED and span.environment == environment and span.task in tasks
            ),
            default=None,
        )


def _new_positions(tables: Tables, batch: Batch, chunk: Chunk, answer: Appended, now_us: int) -> list[int]:
    """The positions whose runs are new; what is not is told in `answer`. Indexes and keys are taken at once."""
    received = tables.received[batch.id] = tables.received[batch.id].union(IndexSet())
    tasks = {at: key.task for key, positions in chunk.spans.items() for at in _covered(chunk, positions)}
    payloads, kinds = unpack(chunk.items)
    keep = []
    for position, index in enumerate(reading.indexes_of(chunk)):
        extra = chunk.extras.get(position)
        if index in received:
            answer.duplicates_count += 1
            if reading.payload(tables, batch, index) != (payloads[position], kinds[position] if kinds else 0):
                answer.conflicts.append(index)
            continue
        if extra is not None and extra.idempotency_key:
            name = (batch.environment, tasks[position], extra.idempotency_key)
            known = tables.keys.get(name)
            if known is not None and not 0 < known.expires_us <= now_us:
                answer.existing[index] = (known.batch_id, known.run_index)
                continue
            tables.keys[name] = Known(batch.id, index, extra.idempotency_expires_us)
        received.add_range(index, index + 1)
        keep.append(position)
    return keep


def _covered(chunk: Chunk, positions: bytes | None) -> Sequence[int]:
    return range(chunk.runs_count) if positions is None else spans.decode_places(positions)


def _with_lanes(tables: Tables, batch: Batch, chunk: Chunk) -> Batch:
    """Make queues known, and note the clock each shows when the batch first meets it."""
    bases = dict(batch.order_bases)
    for key in chunk.spans:
        queue = tables.queues.setdefault((batch.environment, key.queue), Queue())
        bases.setdefault(key.queue, queue.clock)
    return msgspec.structs.replace(batch, order_bases=bases)


def _insert(tables: Tables, batch: Batch, chunk: Chunk, now_us: int) -> int:
    """Keep a block, its spans and what only some runs have; answers how many runs were born failed."""
    block_id = tables.add_block(batch.id, chunk)
    failures = {position: extra.failure for position, extra in chunk.extras.items() if extra.failure}
    for key, positions in chunk.spans.items():
        own = _covered(chunk, positions)
        good = [position for position in own if position not in failures]
        bad = [position for position in own if position in failures]
        if good:
            state = spans.DELAYED if key.due_us > now_us else spans.WAITING
            span = _new_span(tables, batch, block_id, chunk, key, good, WAITING, state)
            _add_span(tables, msgspec.structs.replace(span, positions=None) if len(good) == chunk.runs_count else span)
        if bad:
            dead = _new_span(tables, batch, block_id, chunk, key, bad, FAILED, spans.DONE)
            _add_span(tables, dead)
            tables.add_part(
                Part(
                    block_id=block_id,
                    span_id=dead.id,
                    token=0,
                    part_no=0,
                    positions=dead.positions,
                    codes=dead.states,
                    results=pack([failures[position] for position in bad]),
                    settled_us=now_us,
                )
            )
    for position, extra in chunk.extras.items():
        index = chunk.index_at(position)
        tables.tags |= {(batch.environment, tag, batch.id, index) for tag in extra.tags}
        if extra.object_key:
            tables.objects.setdefault(extra.object_key, batch.id)
    return len(failures)


def _new_span(
    tables: Tables, batch: Batch, block_id: int, chunk: Chunk, key: Key, own: list[int], state: int, stands: str
) -> Span:
    clock = tables.queues[batch.environment, key.queue].clock
    return Span(
        **key._asdict(),
        block_id=block_id,
        batch_id=batch.id,
        environment=batch.environment,
        order_no=first_order_no(clock=clock, base=batch.order_bases[key.queue], index=chunk.index_at(own[0])),
        first_index=chunk.first_index,
        positions=encode_places(own),
        states=bytes((state,)) * len(own),
        unsettled_count=len(own) if state == WAITING else 0,
        state=stands,
    )


def _add_span(tables: Tables, span: Span) -> None:
    span.id = tables.next_span_id
    tables.next_span_id += 1
    tables.spans[span.id] = span


def _homes(span: Span) -> Iterator[tuple[int, int]]:
    """`(position, state)` of each run of a span."""
    return zip(positions_of(span), span.states, strict=True)


def _by_block(tables: Tables, batch: Batch, indexes: Collection[int]) -> dict[int, dict[int, int]]:
    """`{block id: {position: index}}`; an index nobody received is `NotFound`."""
    found: dict[int, dict[int, int]] = {}
    for index in indexes:
        block_id, position = reading.locate(tables, batch, index)
        found.setdefault(block_id, {})[position] = index
    return found


def _clock(tables: Tables, span: Span) -> int:
    return tables.queues[span.environment, span.queue].clock


def _policy(tables: Tables, span: Span, crashes_max: int = 1) -> Policy:
    indexes = reading.indexes_of(tables.blocks[span.block_id].chunk)
    return Policy(
        stopped=tables.batches[span.batch_id].is_stopped,
        cancelled=frozenset(
            position for position, index in enumerate(indexes) if (span.batch_id, index) in tables.cancellations
        ),
        crashes_max=crashes_max,
    )


def _count_in(tables: Tables, batch_id: str, counts: Counts, now_us: int) -> None:
    if any(counts):
        tables.batches[batch_id] = batches.settled(tables.batches[batch_id], counts, now_us)


def _apply(tables: Tables, verdict: Verdict, now_us: int) -> None:
    if verdict.span is None:
        return
    tables.spans[verdict.span.id] = verdict.span
    for span in verdict.spans:
        _add_span(tables, span)
    if verdict.part is not None:
        tables.add_part(verdict.part)
    _count_in(tables, verdict.span.batch_id, verdict.counts, now_us)


def _stop(tables: Tables, batch_id: str, state: str, now_us: int) -> None:
    after = batches.stopped(reading.find(tables, batch_id), state, now_us)
    tables.batches[batch_id] = after
    if after.is_stopped and not after.is_finished:
        _sweep_stopped(tables, batch_id, SWEEP_SPANS_MAX, now_us)


def _sweep_stopped(tables: Tables, batch_id: str, spans_max: int, now_us: int) -> tuple[int, int]:
    """Cancel what waits in a stopped batch; answers how many spans and how many runs."""
    found = [span for span in reading.waiting(tables) if span.batch_id == batch_id][:spans_max]
    change = Counts()
    for span in found:
        tables.spans[span.id], counts = spans.cancel(span)
        change = change.plus(counts)
    _count_in(tables, batch_id, change, now_us)
    return len(found), change.settled


def _is_overdue(batch: Batch, now_us: int) -> bool:
    due_us = batches.seal_due_us(batch)
    return due_us is not None and due_us <= now_us


def _live(tables: Tables, session_id: str) -> Session:
    session = tables.sessions.get(session_id)
    if session is None or session.ended_us:
        raise _ended(session_id)
    return session


def _ended(session_id: str) -> SessionEnded:
    return SessionEnded("the session has ended", hint="start a new one", session_id=session_id)


def _end(tables: Tables, session: Session, suspects: Suspects, crashes_max: int, now_us: int) -> int:
    """End a session, then give its leases back and seal its streams; answers how many leases there were."""
    tables.sessions[session.id] = msgspec.structs.replace(session, ended_us=now_us)
    held = reading.spans_of_session(tables, session.id)
    for span in held:
        _release(tables, _given_back(span, suspects), crashes_max, now_us)
    for batch in list(tables.batches.values()):
        if batch.session_id == session.id and batch.state == batches.OPEN:
            closed = msgspec.structs.replace(
                batch, state=batches.SEALED, expected_count=batch.received_count, sealed_us=now_us
            )
            tables.batches[batch.id] = batches.advanced(closed, now_us)
    return len(held)


def _given_back(span: Span, suspects: Suspects) -> Release:
    if suspects.places is None:
        places = tuple(spans.unsettled_places(span))
    else:
        places = suspects.places.get((span.id, span.token), ())
    return Release(span_id=span.id, token=span.token, suspects=places, evidence=suspects.evidence)


def _release(tables: Tables, given: Release, crashes_max: int, now_us: int) -> str:
    span = tables.spans.get(given.span_id)
    verdict = spans.release(
        span,
        given.token,
        suspects=frozenset(given.suspects),
        evidence=given.evidence,
        policy=Policy() if span is None else _policy(tables, span, crashes_max),
        clock=0 if span is None else _clock(tables, span),
        now_us=now_us,
    )
    _apply(tables, verdict, now_us)
    return verdict.word


def _promote(tables: Tables, now_us: int) -> None:
    """Delayed spans whose time has come join the line where it stands now."""
    for span in reading.waiting(tables):
        if span.state == spans.DELAYED and span.due_us <= now_us:
            tables.spans[span.id] = msgspec.structs.replace(
                span, state=spans.WAITING, order_no=returned_order_no(clock=_clock(tables, span))
            )


def _take(tables: Tables, claim: Claim, now_us: int) -> list[Span]:
    """Put the best spans under a lease; the last is split when it holds more runs than are wanted."""
    line = [
        span
        for span in reading.waiting(tables)
        if span.state == spans.WAITING
        and span.environment == claim.environment
        and span.task in claim.tasks
        and (claim.queues is None or span.queue in claim.queues)
        and not tables.queues[span.environment, span.queue].paused
        and not 0 < span.expires_us <= now_us
    ]
    line.sort(key=lambda span: (-span.priority, span.order_no, span.batch_id, span.first_index, span.id))
    taken: list[Span] = []
    wanted = claim.runs_max
    for span in line:
        if tables.batches[span.batch_id].is_stopped:
            _sweep_stopped(tables, span.batch_id, SWEEP_SPANS_MAX, now_us)
            continue
        if span.unsettled_count > wanted:
            tables.spans[span.id], part = spans.take_first(span, wanted)
            _add_span(tables, part)
            span = part
        under = spans.leased(span, session_id=claim.session_id, claim_no=claim.claim_no)
        tables.spans[span.id] = under
        taken.append(under)
        queue = tables.queues[span.environment, span.queue]
        clock = clock_after(clock=queue.clock, claimed_order_no=span.order_no)
        tables.queues[span.environment, span.queue] = queue._replace(clock=clock)
        wanted -= under.unsettled_count
        if not wanted:
            break
    return taken
