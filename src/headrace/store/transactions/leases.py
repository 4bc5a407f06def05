"""How runs are handed out and taken back: sessions, claim, settle, release, recover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from headrace.core import batch as batches
from headrace.core.order import returned_order_no
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
from headrace.core.span import release as release_span
from headrace.core.span import settle as settle_span
from headrace.foundation.errors import SessionEnded
from headrace.store.protocol import Claim, Heartbeat, HeldLease, Release, Session, Suspects
from headrace.store.transactions.cancel_redrive import count_in, sweep_stopped
from headrace.store.transactions.dead_letters import add_dead
from headrace.store.transactions.locate import clocks, locate, require_live
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
from headrace.store.transactions.sql_script import Script, TransactionConflict, fetch, fetch_as, fetch_column, fetch_one

PROMOTE_MAX: Final = 1_000
SWEEPS_MAX: Final = 4
CANDIDATES_MAX: Final = 1_000
USUAL_RUNS: Final = 256
CANCELLATIONS_MAX: Final = 10_000


class ClaimedSpans(NamedTuple):
    """What a claim took: spans under their new lease and the rows of their blocks by id."""

    spans: list[Span]
    blocks: dict[int, BlockRow]


def start_session(session: Session, now_us: int) -> Script[None]:
    """Make a process known."""
    yield from fetch(
        "insert_session",
        id=session.id,
        kind=session.kind,
        host=session.host,
        pid=session.pid,
        started_us=session.started_us,
        heartbeat_us=now_us,
    )
    yield from require_live(session.id)


def heartbeat(session_id: str, now_us: int) -> Script[Heartbeat]:
    """A sign of life, answered with what the store thinks this session holds (rule R1)."""
    beat = yield from fetch_one("beat", id=session_id, now_us=now_us)
    if beat is None:
        raise SessionEnded("the session was taken for dead and ended", hint="start a new one", session_id=session_id)
    rows = yield from fetch("leases_of_session", session_id=session_id)
    ids = as_json(sorted({batch_id for *_, batch_id in rows}))
    cancelled = yield from fetch("cancellations", ids=ids, rows_max=CANCELLATIONS_MAX)
    (database_us,) = beat
    return Heartbeat(
        leases=[HeldLease(span_id, token, claim_no) for span_id, token, claim_no, _ in rows],
        stopped=(yield from fetch_column("stopped_batches", ids=ids)),
        cancelled=[(batch_id, index) for batch_id, index in cancelled],
        database_us=database_us,
    )


def end_session(session_id: str, now_us: int) -> Script[None]:
    """Leave in good order: leases go back as they were and the session's stream is sealed."""
    yield from fetch("end_session", id=session_id, now_us=now_us)
    spans = yield from _held(session_id)
    yield from give_back(spans, Suspects(span_slots={}, evidence=""), 1, now_us)
    yield from _leave_batches(session_id, now_us)


def recover(
    session_id: str,
    suspects: Suspects,
    silent_since_us: int,
    crashes_max: int,
    now_us: int,
) -> Script[int]:
    """End a silent session, once (rule R3: it is ended before anything of it is touched), and free its leases."""
    ended = yield from fetch("end_silent_session", id=session_id, silent_since_us=silent_since_us, now_us=now_us)
    if not ended:
        return 0
    spans = yield from _held(session_id)
    count = yield from give_back(spans, suspects, crashes_max, now_us)
    yield from _leave_batches(session_id, now_us)
    return count


def give_back(spans: Sequence[Span], suspects: Suspects, crashes_max: int, now_us: int) -> Script[int]:
    """Free leases that their session can't free itself; answers how many."""
    releases = []
    for span in spans:
        if suspects.span_slots is None:
            span_slots = tuple(unsettled_slots(span))
        else:
            span_slots = suspects.span_slots.get((span.id, span.token), ())
        releases.append(Release(span_id=span.id, token=span.token, suspects=span_slots, evidence=suspects.evidence))
    yield from _release_all({span.id: span for span in spans}, releases, crashes_max, now_us)
    return len(spans)


def _held(session_id: str) -> Script[list[Span]]:
    """What an ended session has leased, locked, and then all batches that this will change (rule R8)."""
    rows = yield from fetch("lock_spans_of_session", session_id=session_id)
    yield from fetch("lock_streams_of_session", session_id=session_id)
    return [to_span(row) for row in rows]


def _leave_batches(session_id: str, now_us: int) -> Script[None]:
    for row in (yield from fetch("lock_streams_of_session", session_id=session_id)):
        batch = to_batch(row)
        if batch.session_id == session_id and batch.state == batches.OPEN:  # else a batch of its leases, locked too
            yield from put_batch(batches.left(batch, now_us))


def claim(wish: Claim, now_us: int) -> Script[ClaimedSpans]:
    """Lease the best spans to a live session; a claim asked for again answers the same spans (rule R1)."""
    yield from require_live(wish.session_id)
    rows = yield from fetch("claimed_before", session_id=wish.session_id, claim_no=wish.claim_no)
    if rows:
        spans = [to_span(row) for row in rows]
    else:
        yield from promote(now_us)
        spans = yield from _take(wish, now_us)
    ids = as_json([span.block_id for span in spans])
    blocks = (yield from fetch_as(BlockRow, "blocks", ids=ids)) if spans else []
    return ClaimedSpans(spans, {block.id: block for block in blocks})


def promote(now_us: int) -> Script[None]:
    """Delayed spans whose time has come join the line where it stands now."""
    due = yield from fetch("due_spans", now_us=now_us, rows_max=PROMOTE_MAX)
    if due:
        rows = [(span_id, returned_order_no(clock=clock)) for span_id, clock in due]
        yield from fetch("promote_spans", rows=as_json(rows))


def _take(wish: Claim, now_us: int) -> Script[list[Span]]:
    lanes = yield from fetch(
        "open_lanes",
        environment=wish.environment,
        tasks=as_json(list(wish.tasks)),
        queues=None if wish.queues is None else as_json(list(wish.queues)),
        queue_prefix=wish.queue_prefix,
    )
    locked: set[str] = set()
    for _ in range(SWEEPS_MAX):
        spans = yield from _candidates(wish, lanes, now_us)
        stopped = yield from _stopped(spans)
        if not stopped:
            return (yield from _lease(spans, wish, now_us))
        if not locked:  # rule R8: once for all rounds, in one order
            locked = set((yield from fetch_column("stopping_batches")))
            yield from fetch("lock_batches", ids=as_json(sorted(locked)))
        if not locked.issuperset(stopped):
            raise TransactionConflict
        for batch_id in stopped:  # rule R9: a claim that meets a cancelled batch sweeps its spans, bounded
            yield from sweep_stopped(batch_id, CANDIDATES_MAX, now_us)
    return []


def _candidates(wish: Claim, lanes: Sequence[tuple[str, str]], now_us: int) -> Script[list[Span]]:
    """The best spans over all lanes, each lane read from its own end of the index, until they hold enough runs."""
    best: list[Span] = []
    for queue, task in lanes:
        best += yield from _best_of_lane(wish, queue, task, now_us)
    if len(lanes) > 1:
        best.sort(key=lambda span: (-span.priority, span.order_no, span.batch_id, span.first_index, span.id))
    wanted = wish.runs_max
    for number, span in enumerate(best):
        wanted -= span.unsettled_count
        if wanted <= 0:
            return best[: number + 1]
    return best


def _best_of_lane(wish: Claim, queue: str, task: str, now_us: int) -> Script[list[Span]]:
    """The first spans of a lane: as many as whole chunks would need, and more while those hold too few runs."""
    rows_max = wish.runs_max // USUAL_RUNS + 8
    while True:
        rows = yield from fetch(
            "claim_candidates",
            environment=wish.environment,
            queue=queue,
            task=task,
            now_us=now_us,
            rows_max=min(rows_max, CANDIDATES_MAX),
        )
        spans = [to_span(row) for row in rows]
        enough = sum(span.unsettled_count for span in spans) >= wish.runs_max
        if enough or len(rows) < rows_max or rows_max >= CANDIDATES_MAX:
            return spans
        rows_max *= 4


def _stopped(spans: Sequence[Span]) -> Script[list[str]]:
    ids = as_json(sorted({span.batch_id for span in spans}))
    return (yield from fetch_column("stopped_batches", ids=ids)) if spans else []


def _lease(found: list[Span], wish: Claim, now_us: int) -> Script[list[Span]]:
    """Put the found spans under a lease; the last one is split when it holds more runs than are wanted."""
    if not found:
        return []
    over = sum(span.unsettled_count for span in found) - wish.runs_max
    kept: Span | None = None
    spans = found
    if over > 0:
        last = found[-1]
        kept, part = take_first(last, last.unsettled_count - over)
        spans = [*found[:-1], part]
    taken = [leased(span, session_id=wish.session_id, claim_no=wish.claim_no, now_us=now_us) for span in spans]
    changed = [kept] if kept is not None else []
    changed += [span for span in taken if span.at_most_once and span.id]  # rule R5: `started` is durable first
    yield from put_spans(changed)
    plain = [span.id for span in taken if span.id and not span.at_most_once]
    yield from fetch(
        "lease_spans", session_id=wish.session_id, claim_no=wish.claim_no, ids=as_json(plain), now_us=now_us
    )
    fresh = [span for span in taken if not span.id]
    if fresh:
        yield from add_spans(fresh, first_id=(yield from take_ids(spans_count=len(fresh)))[1])
    highest: dict[str, int] = {}
    for span in taken:
        highest[span.queue] = max(highest.get(span.queue, 0), span.order_no)
    for queue, order_no in sorted(highest.items()):
        yield from fetch("advance_clock", environment=wish.environment, name=queue, order_no=order_no)
    return taken


def pause_queue(environment: str, name: str, *, paused: bool) -> Script[None]:
    """Stop or go on handing out a queue's runs."""
    yield from fetch("know_queue", environment=environment, name=name)
    yield from fetch("pause_queue", environment=environment, name=name, paused=int(paused))


def move_waiting(environment: str, task: str, source: str, target: str, spans_max: int) -> Script[int]:
    """Let what waits in one queue wait in another; what is held by somebody stays for the next step."""
    span_ids = yield from fetch_column(
        "lock_waiting", environment=environment, task=task, queue=source, rows_max=spans_max
    )
    if span_ids:
        yield from fetch("know_queue", environment=environment, name=target)
        yield from fetch("know_lanes", environment=environment, rows=as_json([(target, task)]))
        yield from fetch("move_spans", ids=as_json(span_ids), queue=target)
    return len(span_ids)


def settle(settlements: Sequence[Settlement], now_us: int) -> Script[list[str]]:
    """Record outcomes of many leases; counters and completion are in the same transaction."""
    spans = yield from _spans_by_id([settlement.span_id for settlement in settlements])
    policies = _Policies(list(spans.values()))
    gathered = _Gathered()
    for settlement in settlements:
        span = gathered.spans.get(settlement.span_id, spans.get(settlement.span_id))
        again = (settlement.span_id, settlement.token, settlement.part_no) in gathered.part_names
        recorded = again or (span is not None and (yield from _is_recorded(span, settlement)))
        comes_back = RETRY in settlement.codes or OVERDUE in settlement.codes
        policy = (yield from policies.of(span)) if span is not None and comes_back else Policy()
        clock = (yield from policies.clock(span)) if span is not None and comes_back else 0
        gathered.add(settle_span(span, settlement, recorded=recorded, policy=policy, clock=clock, now_us=now_us))
    objects = [
        (key, spans[settlement.span_id].batch_id)
        for settlement, word in zip(settlements, gathered.words, strict=True)
        for key in settlement.object_keys
        if word != LOST
    ]
    yield from gathered.write(now_us)
    if objects:  # after the batches, as an append does it (rule R8)
        yield from fetch("insert_objects", rows=as_json(objects))
    return gathered.words


def _spans_by_id(ids: Sequence[int]) -> Script[dict[int, Span]]:
    rows = yield from fetch("lock_spans", ids=as_json(sorted(set(ids))))
    return {span.id: span for span in map(to_span, rows)}


def _is_recorded(span: Span, settlement: Settlement) -> Script[bool]:
    """Rule R2. The usual case, a first part under a fresh lease, is told from the states alone."""
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
    """Give leases back before their runs ended."""
    spans = yield from _spans_by_id([given.span_id for given in releases])
    return (yield from _release_all(spans, releases, crashes_max, now_us))


def _release_all(
    spans: dict[int, Span],
    releases: Sequence[Release],
    crashes_max: int,
    now_us: int,
) -> Script[list[str]]:
    policies = _Policies(list(spans.values()), crashes_max=crashes_max)
    gathered = _Gathered()
    for given in releases:
        span = gathered.spans.get(given.span_id, spans.get(given.span_id))
        verdict = release_span(
            span,
            given.token,
            span_slots=given.span_slots,
            suspects=frozenset(given.suspects),
            evidence=given.evidence,
            policy=(yield from policies.of(span)) if span is not None else Policy(),
            clock=(yield from policies.clock(span)) if span is not None else 0,
            now_us=now_us,
        )
        gathered.add(verdict)
    yield from gathered.write(now_us)
    return gathered.words


class _Gathered:
    """The verdicts of one transaction, written together."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.spans: dict[int, Span] = {}
        self.part_names: set[tuple[int, int, int]] = set()
        self._fresh: list[Span] = []
        self._parts: list[Part] = []
        self._counts: dict[str, Counts] = {}
        self._dead: list[tuple[Span, list[int]]] = []

    def add(self, verdict: SpanDecision) -> None:
        self.words.append(verdict.word)
        if verdict.span is None:
            return
        span = verdict.span
        self.spans[span.id] = span
        self._fresh += verdict.spans
        if verdict.part is not None:
            part = verdict.part
            self._parts.append(part)
            self.part_names.add((part.span_id, part.token, part.part_no))
            if block_offsets := dead_block_offsets(span, part):
                self._dead.append((span, block_offsets))
        self._counts[span.batch_id] = self._counts.get(span.batch_id, Counts()).plus(verdict.counts)

    def write(self, now_us: int) -> Script[None]:
        spans = self.spans.values()
        yield from put_states(span for span in spans if span.state == LEASED)  # still under the lease it was under
        yield from put_spans(span for span in spans if span.state != LEASED)
        if self._fresh:
            yield from add_spans(self._fresh, first_id=(yield from take_ids(spans_count=len(self._fresh)))[1])
        yield from add_parts(self._parts)
        if self._counts:
            yield from count_in(self._counts, now_us)
        if self._dead:  # after the batches, as objects are (rule R8)
            yield from add_dead(self._dead, now_us)


class _Policies:
    """What batches say of runs that would come back, and the clocks of their queues; read once, when first asked."""

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
            if span_slot := (yield from locate(batch_id, index)):
                self._cancelled.setdefault(span_slot[0], set()).add(span_slot[1])
        environments: dict[str, set[str]] = {}
        for span in self._spans:
            environments.setdefault(span.environment, set()).add(span.queue)
        for environment, queues in environments.items():
            for queue, clock in (yield from clocks(environment, queues)).items():
                self._clocks[environment, queue] = clock
