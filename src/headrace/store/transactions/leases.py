"""Sessions and leases: claim, settle, release and recover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from headrace.core import batch as batches
from headrace.core.order import clock_after, returned_order_no
from headrace.core.page import count_within
from headrace.core.serving import Serving
from headrace.core.span import (
    LEASED,
    LOST,
    OVERDUE,
    RETRY,
    Counts,
    Part,
    Policy,
    Settlement,
    Span,
    SpanDecision,
    dead_block_offsets,
    leased,
    take_first,
    unsettled_slots,
)
from headrace.core.span import complete_waiting as complete_waiting_runs
from headrace.core.span import settle as settle_span
from headrace.core.span_release import release as release_span
from headrace.foundation.errors import SessionEnded
from headrace.foundation.ids import session_name
from headrace.store.protocol import Claim, Heartbeat, HeldLease, Release, Session, SessionOwner, Suspects
from headrace.store.transactions.cancel_redrive import count_in, sweep_stopped
from headrace.store.transactions.dead_letters import add_dead
from headrace.store.transactions.locate import clocks, locate, lock_spans_of_blocks, require_live
from headrace.store.transactions.row_mapping import (
    BlockRow,
    add_parts,
    add_spans,
    as_json,
    put_batch,
    put_spans,
    put_states,
    take_ids,
    to_batch,
    to_span,
)
from headrace.store.transactions.sql_script import (
    Script,
    TransactionConflict,
    fetch,
    fetch_as,
    fetch_column,
    fetch_first,
    fetch_one,
)

PROMOTE_MAX: Final = 1_000
SWEEPS_MAX: Final = 4
CANDIDATES_MAX: Final = 1_000
USUAL_RUNS: Final = 256
CANCELLATIONS_MAX: Final = 10_000


class ClaimedSpans(NamedTuple):
    """The result of a claim: spans under their new lease, and the rows of their blocks by id."""

    spans: list[Span]
    blocks: dict[int, BlockRow]


def start_session(session: Session, now_us: int) -> Script[None]:
    """Register a process."""
    yield from fetch(
        "insert_session",
        id=session.id,
        kind=session.kind,
        host=session.host,
        pid=session.pid,
        started_us=session.started_us,
        heartbeat_us=now_us,
        serves="" if session.serves is None else msgspec.json.encode(session.serves).decode(),
        environment=session.environment,
        key_id=session.key_id,
    )
    yield from require_live(session.id, environment=session.environment, key_id=session.key_id)


def heartbeat(
    session_id: str, now_us: int, owner: SessionOwner | None, serves: Serving | None = None
) -> Script[Heartbeat]:
    """Renew a session, and return its leases (R1, claims are repeatable by number)."""
    beat = yield from fetch_one("beat", id=session_id, now_us=now_us, **_named(owner))
    if beat is None:
        raise SessionEnded(
            "another process recovered this session, since its heartbeats came too late",
            hint="start a new session",
            session=session_name(session_id),
        )
    (database_us,) = beat
    if serves is not None:  # after the lock on the session's row
        (text,) = yield from fetch_first("serves_of_session", id=session_id)
        if text:
            widened = msgspec.json.decode(text, type=Serving).widened(serves)
            yield from fetch("put_serves", id=session_id, serves=msgspec.json.encode(widened).decode())
    return msgspec.structs.replace((yield from _leases_of(session_id)), database_us=database_us)


def _named(owner: SessionOwner | None) -> dict[str, str | None]:
    """Return the values of an owner for a statement; nulls, which stand for any, without one."""
    return {"environment": None, "key_id": None} if owner is None else owner._asdict()


def unwanted_runs(session_id: str, owner: SessionOwner | None) -> Script[Heartbeat]:
    """Return which runs of a session are cancelled, with its leases if there are any."""
    if owner is not None and (yield from fetch_one("owned_session", id=session_id, **owner._asdict())) is None:
        return Heartbeat(leases=[], stopped=[], cancelled=[])
    if (yield from fetch_one("has_unwanted_runs", session_id=session_id)) is None:
        return Heartbeat(leases=[], stopped=[], cancelled=[])
    return (yield from _leases_of(session_id))


def _leases_of(session_id: str) -> Script[Heartbeat]:
    rows = yield from fetch("leases_of_session", session_id=session_id)
    if not rows:
        return Heartbeat(leases=[], stopped=[], cancelled=[])
    ids = as_json(sorted({batch_id for *_, batch_id in rows}))
    cancelled = yield from fetch("cancellations", ids=ids, rows_max=CANCELLATIONS_MAX)
    return Heartbeat(
        leases=[HeldLease(span_id, token, claim_no) for span_id, token, claim_no, _ in rows],
        stopped=(yield from fetch_column("stopped_batches", ids=ids)),
        cancelled=[(batch_id, index) for batch_id, index in cancelled],
    )


def end_session(session_id: str, now_us: int, owner: SessionOwner | None) -> Script[None]:
    """End a session in good order: release its leases unchanged, and seal its stream."""
    ended = yield from fetch("end_session", id=session_id, now_us=now_us, **_named(owner))
    if not ended:  # the transaction that ended it has released its leases, or it is a session of another owner
        return
    spans = yield from _locked_spans_of_session(session_id)
    yield from release_spans(spans, Suspects(span_slots={}, evidence=""), 1, now_us)
    yield from _leave_batches(session_id, now_us)


def recover(
    session_id: str,
    suspects: Suspects,
    silent_since_us: int,
    crashes_max: int,
    now_us: int,
) -> Script[int]:
    """End a lapsed session, once, and release its leases. It is ended first (R3, a lapsed session is ended before
    recovery).
    """
    ended = yield from fetch("end_silent_session", id=session_id, silent_since_us=silent_since_us, now_us=now_us)
    if not ended:
        return 0
    spans = yield from _locked_spans_of_session(session_id)
    count = yield from release_spans(spans, suspects, crashes_max, now_us)
    yield from _leave_batches(session_id, now_us)
    return count


def release_spans(spans: Sequence[Span], suspects: Suspects, crashes_max: int, now_us: int) -> Script[int]:
    """Release leases that their session can't release itself. Returns how many."""
    releases = []
    for span in spans:
        if suspects.span_slots is None:
            span_slots = tuple(unsettled_slots(span))
        else:
            span_slots = suspects.span_slots.get((span.id, span.token), ())
        releases.append(Release(span_id=span.id, token=span.token, suspects=span_slots, evidence=suspects.evidence))
    yield from _release_all({span.id: span for span in spans}, releases, crashes_max, now_us)
    return len(spans)


def _locked_spans_of_session(session_id: str) -> Script[list[Span]]:
    """Lock the spans that an ended session has leased, then all batches that will change (R8, rows are locked in id
    order).
    """
    rows = yield from fetch("lock_spans_of_session", session_id=session_id)
    yield from fetch("lock_streams_of_session", session_id=session_id)
    return [to_span(row) for row in rows]


def _leave_batches(session_id: str, now_us: int) -> Script[None]:
    for row in (yield from fetch("lock_streams_of_session", session_id=session_id)):
        batch = to_batch(row)
        # the others are batches of its leases, locked too
        if batch.session_id == session_id and batch.state == batches.OPEN:
            yield from put_batch(batches.owner_ended(batch, now_us))


def claim(claim_request: Claim, now_us: int, bytes_max: int) -> Script[ClaimedSpans]:
    """Lease the first spans in claim order to a live session, until the inputs of their blocks exceed `bytes_max`.

    A repeat returns the same spans (R1, claims are repeatable by number).
    """
    yield from require_live(
        claim_request.session_id, environment=claim_request.environment, key_id=claim_request.key_id
    )
    rows = yield from fetch("claimed_before", session_id=claim_request.session_id, claim_no=claim_request.claim_no)
    if rows:
        spans = [to_span(row) for row in rows]
    else:
        yield from promote(now_us)
        spans = yield from _take(claim_request, now_us, bytes_max)
    ids = as_json([span.block_id for span in spans])
    blocks = (yield from fetch_as(BlockRow, "blocks", ids=ids)) if spans else []
    return ClaimedSpans(spans, {block.id: block for block in blocks})


def promote(now_us: int) -> Script[None]:
    """Make delayed spans claimable whose time has come, at the current clock of their queue."""
    due = yield from fetch("due_spans", now_us=now_us, rows_max=PROMOTE_MAX)
    if due:
        rows = [(span_id, returned_order_no(clock=clock)) for span_id, clock in due]
        yield from fetch("promote_spans", rows=as_json(rows))


def _take(claim_request: Claim, now_us: int, bytes_max: int) -> Script[list[Span]]:
    lanes = yield from fetch(
        "open_lanes",
        environment=claim_request.environment,
        tasks=as_json(list(claim_request.tasks)),
        queues=None if claim_request.queues is None else as_json(list(claim_request.queues)),
        queue_prefix=claim_request.queue_prefix,
    )
    locked_batches: set[str] = set()
    for _ in range(SWEEPS_MAX):
        spans = yield from _candidates(claim_request, lanes, now_us)
        if len(spans) > 1:
            spans = yield from _within_bytes(spans, bytes_max)
        stopped = yield from _stopped(spans)
        if not stopped:
            return (yield from _lease(spans, claim_request, now_us))
        if not locked_batches:  # once for all rounds (R8, rows are locked in id order)
            locked_batches = set((yield from fetch_column("stopping_batches")))
            yield from fetch("lock_batches", ids=as_json(sorted(locked_batches)))
        if not locked_batches.issuperset(stopped):
            raise TransactionConflict
        for batch_id in stopped:  # a bounded number of spans (R9, claims read lane by lane and sweep cancelled batches)
            yield from sweep_stopped(batch_id, CANDIDATES_MAX, now_us)
    return []


def _candidates(claim_request: Claim, lanes: Sequence[tuple[str, str]], now_us: int) -> Script[list[Span]]:
    """Return the first spans over all lanes in claim order, as many as the claim needs. Each lane is read by its own
    index range.
    """
    best: list[Span] = []
    for queue, task in lanes:
        best += yield from _best_of_lane(claim_request, queue, task, now_us)
    if len(lanes) > 1:
        best.sort(key=lambda span: (-span.priority, span.order_no, span.batch_id, span.first_index, span.id))
    runs_left = claim_request.runs_max
    for spans_count, span in enumerate(best, 1):
        runs_left -= span.unsettled_count
        if runs_left <= 0:
            return best[:spans_count]
    return best


def _within_bytes(spans: list[Span], bytes_max: int) -> Script[list[Span]]:
    """Return the first spans, at least one, whose blocks have at most `bytes_max` of inputs."""
    sizes: dict[int, int] = dict((yield from fetch("sizes_of_blocks", ids=as_json([span.block_id for span in spans]))))
    return spans[: count_within((sizes[span.block_id] for span in spans), bytes_max)]


def _best_of_lane(claim_request: Claim, queue: str, task: str, now_us: int) -> Script[list[Span]]:
    """Return the first spans of a lane: as many as whole chunks would need, then more while they hold too few runs."""
    rows_max = claim_request.runs_max // USUAL_RUNS + 8
    while True:
        rows = yield from fetch(
            "claim_candidates",
            environment=claim_request.environment,
            queue=queue,
            task=task,
            now_us=now_us,
            rows_max=min(rows_max, CANDIDATES_MAX),
        )
        spans = [to_span(row) for row in rows]
        enough = sum(span.unsettled_count for span in spans) >= claim_request.runs_max
        if enough or len(rows) < rows_max or rows_max >= CANDIDATES_MAX:
            return spans
        rows_max *= 4


def _stopped(spans: Sequence[Span]) -> Script[list[str]]:
    ids = as_json(sorted({span.batch_id for span in spans}))
    return (yield from fetch_column("stopped_batches", ids=ids)) if spans else []


def _lease(candidates: list[Span], claim_request: Claim, now_us: int) -> Script[list[Span]]:
    """Lease the spans. The last one is split if it holds more runs than requested."""
    if not candidates:
        return []
    surplus = sum(span.unsettled_count for span in candidates) - claim_request.runs_max
    kept: Span | None = None
    spans = candidates
    if surplus > 0:
        last = candidates[-1]
        kept, part = take_first(last, last.unsettled_count - surplus)
        spans = [*candidates[:-1], part]
    session_id, claim_no = claim_request.session_id, claim_request.claim_no
    taken = [leased(span, session_id=session_id, claim_no=claim_no, now_us=now_us) for span in spans]
    changed = [kept] if kept is not None else []
    # R5, at-most-once runs are recorded as started before delivery
    changed += [span for span in taken if span.at_most_once and span.id]
    yield from put_spans(changed)
    plain = [span.id for span in taken if span.id and not span.at_most_once]
    yield from fetch("lease_spans", session_id=session_id, claim_no=claim_no, ids=as_json(plain), now_us=now_us)
    fresh = [span for span in taken if not span.id]
    if fresh:
        yield from add_spans(fresh, first_id=(yield from take_ids(spans_count=len(fresh)))[1])
    highest: dict[str, int] = {}
    for span in taken:
        highest[span.queue] = max(highest.get(span.queue, 0), span.order_no)
    for queue, order_no in sorted(highest.items()):
        clock = clock_after(clock=0, claimed_order_no=order_no)
        yield from fetch("advance_clock", environment=claim_request.environment, name=queue, order_no=clock)
    return taken


def pause_queue(environment: str, name: str, *, paused: bool) -> Script[None]:
    """Stop or resume claims from a queue."""
    yield from fetch("know_queue", environment=environment, name=name)
    yield from fetch("pause_queue", environment=environment, name=name, paused=int(paused))


def move_waiting(environment: str, task: str, source: str, target: str, spans_max: int) -> Script[int]:
    """Move waiting spans to another queue. Spans that are locked are left to the next step."""
    span_ids = yield from fetch_column(
        "lock_waiting", environment=environment, task=task, queue=source, rows_max=spans_max
    )
    if span_ids:
        yield from fetch("know_queue", environment=environment, name=target)
        yield from fetch("know_lanes", environment=environment, rows=as_json([(target, task)]))
        yield from fetch("move_spans", ids=as_json(span_ids), queue=target)
    return len(span_ids)


def settle(settlements: Sequence[Settlement], now_us: int) -> Script[list[str]]:
    """Record outcomes of leases, with counters and completion in the same transaction."""
    spans = yield from _spans_by_id([settlement.span_id for settlement in settlements])
    policies = _Policies(list(spans.values()))
    decisions = _Decisions()
    for settlement in settlements:
        span = decisions.spans.get(settlement.span_id, spans.get(settlement.span_id))
        is_repeat_here = (settlement.span_id, settlement.token, settlement.part_no) in decisions.part_names
        recorded = is_repeat_here or (span is not None and (yield from _is_recorded(span, settlement)))
        returns = RETRY in settlement.codes or OVERDUE in settlement.codes
        policy = (yield from policies.of(span)) if span is not None and returns else Policy()
        clock = (yield from policies.clock(span)) if span is not None and returns else 0
        decisions.add(settle_span(span, settlement, recorded=recorded, policy=policy, clock=clock, now_us=now_us))
    objects = [
        (key, spans[settlement.span_id].batch_id)
        for settlement, word in zip(settlements, decisions.words, strict=True)
        for key in settlement.object_keys
        if word != LOST
    ]
    yield from decisions.write(now_us)
    if objects:  # after the batches, as an append does it (R8, rows are locked in id order)
        yield from fetch("insert_objects", rows=as_json(objects))
    return decisions.words


def _spans_by_id(ids: Sequence[int]) -> Script[dict[int, Span]]:
    rows = yield from fetch("lock_spans", ids=as_json(sorted(set(ids))))
    return {span.id: span for span in map(to_span, rows)}


def _is_recorded(span: Span, settlement: Settlement) -> Script[bool]:
    """True if a settlement was recorded before (R2, settlements are recognised when repeated).

    The usual case, a first part under a fresh lease, is decided from the states alone.
    """
    if span.token == settlement.token and settlement.part_no == 0 and span.unsettled_count == len(span.states):
        return False
    part = yield from fetch_one(
        "recorded_part",
        block_id=span.block_id,
        span_id=span.id,
        token=settlement.token,
        part_no=settlement.part_no,
    )
    return part is not None


def release(releases: Sequence[Release], crashes_max: int, now_us: int) -> Script[list[str]]:
    """Release leases before their runs have ended."""
    spans = yield from _spans_by_id([released.span_id for released in releases])
    return (yield from _release_all(spans, releases, crashes_max, now_us))


def _release_all(
    spans: dict[int, Span],
    releases: Sequence[Release],
    crashes_max: int,
    now_us: int,
) -> Script[list[str]]:
    policies = _Policies(list(spans.values()), crashes_max=crashes_max)
    decisions = _Decisions()
    for released in releases:
        span = decisions.spans.get(released.span_id, spans.get(released.span_id))
        verdict = release_span(
            span,
            released.token,
            span_slots=released.span_slots,
            suspects=frozenset(released.suspects),
            evidence=released.evidence,
            policy=(yield from policies.of(span)) if span is not None else Policy(),
            clock=(yield from policies.clock(span)) if span is not None else 0,
            now_us=now_us,
        )
        decisions.add(verdict)
    yield from decisions.write(now_us)
    return decisions.words


def complete_waiting(environment: str, task: str, keys: Sequence[str], result: bytes, now_us: int) -> Script[int]:
    """Complete the runs that keys name and that wait."""
    names = as_json([(task, key) for key in sorted(set(keys))])
    offsets: dict[int, set[int]] = {}
    for _, _, batch_id, index in (yield from fetch("known_keys", environment=environment, rows=names, now_us=0)):
        if location := (yield from locate(batch_id, index)):
            offsets.setdefault(location.block_id, set()).add(location.block_offset)
    if not offsets:
        return 0
    spans_by_block = yield from lock_spans_of_blocks(offsets)
    decisions = _Decisions()
    for block_id, block_offsets in offsets.items():
        for span in spans_by_block[block_id]:
            decisions.add(complete_waiting_runs(span, block_offsets, result, now_us=now_us))
    yield from decisions.write(now_us)
    return decisions.settled_count


class _Decisions:
    """The decisions of one transaction, written together."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.spans: dict[int, Span] = {}
        self.part_names: set[tuple[int, int, int]] = set()
        self._new_runs: list[Span] = []
        self._parts: list[Part] = []
        self._counts: dict[str, Counts] = {}
        self._dead: list[tuple[Span, list[int]]] = []

    @property
    def settled_count(self) -> int:
        """Number of runs that ended."""
        return sum(counts.settled for counts in self._counts.values())

    def add(self, verdict: SpanDecision) -> None:
        self.words.append(verdict.word)
        if verdict.span is None:
            return
        span = verdict.span
        self.spans[span.id] = span
        self._new_runs += verdict.spans
        if verdict.part is not None:
            part = verdict.part
            self._parts.append(part)
            self.part_names.add((part.span_id, part.token, part.part_no))
            if block_offsets := dead_block_offsets(span, part):
                self._dead.append((span, block_offsets))
        self._counts[span.batch_id] = self._counts.get(span.batch_id, Counts()).plus(verdict.counts)

    def write(self, now_us: int) -> Script[None]:
        spans = self.spans.values()
        # its lease goes on: no indexed column changes
        yield from put_states(span for span in spans if span.state == LEASED)
        yield from put_spans(span for span in spans if span.state != LEASED)
        if self._new_runs:
            yield from add_spans(self._new_runs, first_id=(yield from take_ids(spans_count=len(self._new_runs)))[1])
        yield from add_parts(self._parts)
        if self._counts:
            yield from count_in(self._counts, now_us)
        if self._dead:  # after the batches, as objects are (R8, rows are locked in id order)
            yield from add_dead(self._dead, now_us)


class _Policies:
    """The batches' policies for runs that would run again, and the clocks of their queues; read once, when first
    needed.
    """

    def __init__(self, spans: Sequence[Span], *, crashes_max: int = 1) -> None:
        self._spans = spans
        self._crashes_max = crashes_max
        self._stopped: set[str] | None = None
        self._cancelled: dict[int, set[int]] = {}
        self._clocks: dict[tuple[str, str], int] = {}

    def of(self, span: Span) -> Script[Policy]:
        yield from self._read()
        assert self._stopped is not None
        return Policy(
            stopped=span.batch_id in self._stopped,
            cancelled=frozenset(self._cancelled.get(span.block_id, ())),
            crashes_max=self._crashes_max,
        )

    def clock(self, span: Span) -> Script[int]:
        yield from self._read()
        return self._clocks[span.environment, span.queue]

    def _read(self) -> Script[None]:
        if self._stopped is not None:
            return
        ids = as_json(sorted({span.batch_id for span in self._spans}))
        self._stopped = set((yield from fetch_column("stopped_batches", ids=ids)))
        asked = yield from fetch("cancellations", ids=ids, rows_max=CANCELLATIONS_MAX)
        for batch_id, index in asked:
            if location := (yield from locate(batch_id, index)):
                self._cancelled.setdefault(location.block_id, set()).add(location.block_offset)
        environments: dict[str, set[str]] = {}
        for span in self._spans:
            environments.setdefault(span.environment, set()).add(span.queue)
        for environment, queues in environments.items():
            for queue, clock in (yield from clocks(environment, queues)).items():
                self._clocks[environment, queue] = clock
