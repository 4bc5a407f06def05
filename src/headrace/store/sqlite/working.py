"""How runs are handed out and taken back: sessions, claim, settle, release, recover."""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from typing import Final, NamedTuple

import msgspec

from headrace.core import batch as batches
from headrace.core.order import returned_order_no
from headrace.core.span import (
    LOST,
    RETRY,
    Counts,
    Part,
    Policy,
    Settlement,
    Span,
    Verdict,
    leased,
    take_first,
    unsettled_places,
)
from headrace.core.span import release as release_span
from headrace.core.span import settle as settle_span
from headrace.foundation.errors import SessionEnded
from headrace.store.protocol import Claim, Heartbeat, Held, Release, Session, Suspects
from headrace.store.sqlite.appending import clocks, count_in, locate, sweep_stopped
from headrace.store.sqlite.rows import (
    add_parts,
    add_spans,
    as_json,
    execute,
    put_batch,
    put_spans,
    take_ids,
    to_batch,
    to_span,
)

PROMOTE_MAX: Final = 1_000
SWEEPS_MAX: Final = 4
CANDIDATES_MAX: Final = 1_000
CANCELLATIONS_MAX: Final = 10_000


class Taken(NamedTuple):
    """What a claim took: spans under their new lease and the rows of their blocks by id."""

    spans: list[Span]
    blocks: dict[int, tuple[int, bytes | None, bytes | None, bytes]]


def start_session(connection: sqlite3.Connection, session: Session, now_us: int) -> None:
    """Make a process known."""
    execute(
        connection,
        "insert_session",
        id=session.id,
        kind=session.kind,
        host=session.host,
        pid=session.pid,
        started_us=session.started_us,
        heartbeat_us=now_us,
    )
    _require_live(connection, session.id)


def _require_live(connection: sqlite3.Connection, session_id: str) -> None:
    """Rule R3: an ended session can't come back, under its old id least of all."""
    if execute(connection, "live_session", id=session_id).fetchone() is None:
        raise SessionEnded("the session has ended", hint="start a new one", session_id=session_id)


def heartbeat(connection: sqlite3.Connection, session_id: str, now_us: int) -> Heartbeat:
    """A sign of life, answered with what the store thinks this session holds (rule R1)."""
    if not execute(connection, "beat", id=session_id, now_us=now_us).rowcount:
        raise SessionEnded("the session was taken for dead and ended", hint="start a new one", session_id=session_id)
    rows = execute(connection, "leases_of_session", session_id=session_id).fetchall()
    ids = as_json(sorted({row[3] for row in rows}))
    return Heartbeat(
        leases=[Held(*row[:3]) for row in rows],
        stopped=[row[0] for row in execute(connection, "stopped_batches", ids=ids)],
        cancelled=[
            (row[0], row[1]) for row in execute(connection, "cancellations", ids=ids, rows_max=CANCELLATIONS_MAX)
        ],
    )


def end_session(connection: sqlite3.Connection, session_id: str, now_us: int) -> None:
    """Leave in good order: leases go back as they were and the session's stream is sealed."""
    execute(connection, "end_session", id=session_id, now_us=now_us)
    give_back(connection, _held(connection, session_id), Suspects(places={}, evidence=""), 1, now_us)
    _seal_streams(connection, session_id, now_us)


def recover(
    connection: sqlite3.Connection,
    session_id: str,
    suspects: Suspects,
    silent_since_us: int,
    crashes_max: int,
    now_us: int,
) -> int:
    """End a silent session, once (rule R3: it is ended before anything of it is touched), and free its leases."""
    ended = execute(connection, "end_silent_session", id=session_id, silent_since_us=silent_since_us, now_us=now_us)
    if not ended.rowcount:
        return 0
    count = give_back(connection, _held(connection, session_id), suspects, crashes_max, now_us)
    _seal_streams(connection, session_id, now_us)
    return count


def give_back(
    connection: sqlite3.Connection, spans: Sequence[Span], suspects: Suspects, crashes_max: int, now_us: int
) -> int:
    """Free leases that their session can't free itself; answers how many."""
    releases = []
    for span in spans:
        if suspects.places is None:
            places = tuple(unsettled_places(span))
        else:
            places = suspects.places.get((span.id, span.token), ())
        releases.append(Release(span_id=span.id, token=span.token, suspects=places, evidence=suspects.evidence))
    _release_all(connection, {span.id: span for span in spans}, releases, crashes_max, now_us)
    return len(spans)


def _held(connection: sqlite3.Connection, session_id: str) -> list[Span]:
    return [to_span(row) for row in execute(connection, "spans_of_session", session_id=session_id).fetchall()]


def _seal_streams(connection: sqlite3.Connection, session_id: str, now_us: int) -> None:
    for row in execute(connection, "streams_of_session", session_id=session_id).fetchall():
        batch = to_batch(row)
        after = msgspec.structs.replace(
            batch, state=batches.SEALED, expected_count=batch.received_count, sealed_us=now_us
        )
        put_batch(connection, batches.advanced(after, now_us))


def claim(connection: sqlite3.Connection, wish: Claim, now_us: int) -> Taken:
    """Lease the best spans to a live session; a claim asked for again answers the same spans (rule R1)."""
    _require_live(connection, wish.session_id)
    rows = execute(connection, "claimed_before", session_id=wish.session_id, claim_no=wish.claim_no).fetchall()
    if rows:
        spans = [to_span(row) for row in rows]
    else:
        promote(connection, now_us)
        spans = _take(connection, wish, now_us)
    blocks = execute(connection, "blocks", ids=as_json([span.block_id for span in spans])).fetchall() if spans else []
    return Taken(spans, {row[0]: row[1:] for row in blocks})


def promote(connection: sqlite3.Connection, now_us: int) -> None:
    """Delayed spans whose time has come join the line where it stands now."""
    due = execute(connection, "due_spans", now_us=now_us, rows_max=PROMOTE_MAX).fetchall()
    if due:
        rows = [(span_id, returned_order_no(clock=clock)) for span_id, clock in due]
        execute(connection, "promote_spans", rows=as_json(rows))


def _take(connection: sqlite3.Connection, wish: Claim, now_us: int) -> list[Span]:
    lanes = execute(
        connection,
        "open_lanes",
        environment=wish.environment,
        tasks=as_json(list(wish.tasks)),
        queues=None if wish.queues is None else as_json(list(wish.queues)),
    ).fetchall()
    for _ in range(SWEEPS_MAX):
        spans = _candidates(connection, wish, lanes, now_us)
        stopped = _stopped(connection, spans)
        if not stopped:
            return _lease(connection, spans, wish)
        for batch_id in stopped:  # rule R9: a claim that meets a cancelled batch sweeps its spans, bounded
            sweep_stopped(connection, batch_id, CANDIDATES_MAX, now_us)
    return []


def _candidates(
    connection: sqlite3.Connection, wish: Claim, lanes: Sequence[tuple[str, str]], now_us: int
) -> list[Span]:
    """The best spans over all lanes, each lane read from its own end of the index, until they hold enough runs."""
    cursors = [
        execute(
            connection,
            "claim_candidates",
            environment=wish.environment,
            queue=queue,
            task=task,
            now_us=now_us,
            rows_max=min(wish.runs_max, CANDIDATES_MAX),
        )
        for queue, task in lanes
    ]
    rows = (
        cursors[0]
        if len(cursors) == 1
        else heapq.merge(*cursors, key=lambda row: (-row[6], row[10], row[2], row[11], row[0]))
    )
    found: list[Span] = []
    wanted = wish.runs_max
    for row in rows:
        span = to_span(row)
        found.append(span)
        wanted -= span.unsettled_count
        if wanted <= 0:
            break
    for cursor in cursors:
        cursor.close()
    return found


def _stopped(connection: sqlite3.Connection, spans: Sequence[Span]) -> list[str]:
    ids = as_json(sorted({span.batch_id for span in spans}))
    return [row[0] for row in execute(connection, "stopped_batches", ids=ids).fetchall()] if spans else []


def _lease(connection: sqlite3.Connection, found: list[Span], wish: Claim) -> list[Span]:
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
    taken = [leased(span, session_id=wish.session_id, claim_no=wish.claim_no) for span in spans]
    changed = [kept] if kept is not None else []
    changed += [span for span in taken if span.at_most_once and span.id]  # rule R5: `started` is durable first
    put_spans(connection, changed)
    plain = [span.id for span in taken if span.id and not span.at_most_once]
    execute(connection, "lease_spans", session_id=wish.session_id, claim_no=wish.claim_no, ids=as_json(plain))
    fresh = [span for span in taken if not span.id]
    if fresh:
        add_spans(connection, fresh, first_id=take_ids(connection, spans_count=len(fresh))[1])
    highest: dict[str, int] = {}
    for span in taken:
        highest[span.queue] = max(highest.get(span.queue, 0), span.order_no)
    for queue, order_no in highest.items():
        execute(connection, "advance_clock", environment=wish.environment, name=queue, order_no=order_no)
    return taken


def settle(connection: sqlite3.Connection, settlements: Sequence[Settlement], now_us: int) -> list[str]:
    """Record outcomes of many leases; counters and completion are in the same transaction."""
    spans = _spans_by_id(connection, [settlement.span_id for settlement in settlements])
    policies = _Policies(connection, list(spans.values()))
    gathered = _Gathered()
    for settlement in settlements:
        span = gathered.spans.get(settlement.span_id, spans.get(settlement.span_id))
        again = (settlement.span_id, settlement.token, settlement.part_no) in gathered.part_names
        recorded = again or (span is not None and _is_recorded(connection, span, settlement))
        policy = policies.of(span) if span is not None and RETRY in settlement.codes else Policy()
        clock = policies.clock(span) if span is not None and RETRY in settlement.codes else 0
        gathered.add(settle_span(span, settlement, recorded=recorded, policy=policy, clock=clock, now_us=now_us))
    objects = [
        (key, spans[settlement.span_id].batch_id)
        for settlement, word in zip(settlements, gathered.words, strict=True)
        for key in settlement.object_keys
        if word != LOST
    ]
    if objects:
        execute(connection, "insert_objects", rows=as_json(objects))
    gathered.write(connection, now_us)
    return gathered.words


def _spans_by_id(connection: sqlite3.Connection, ids: Sequence[int]) -> dict[int, Span]:
    rows = execute(connection, "spans", ids=as_json(sorted(set(ids)))).fetchall()
    return {row[0]: to_span(row) for row in rows}


def _is_recorded(connection: sqlite3.Connection, span: Span, settlement: Settlement) -> bool:
    """Rule R2. The usual case, a first part under a fresh lease, is told from the states alone."""
    if span.token == settlement.token and settlement.part_no == 0 and span.unsettled_count == len(span.states):
        return False
    with closing(
        execute(
            connection,
            "recorded_part",
            block_id=span.block_id,
            span_id=span.id,
            token=settlement.token,
            part_no=settlement.part_no,
        )
    ) as cursor:
        return cursor.fetchone() is not None


def release(connection: sqlite3.Connection, releases: Sequence[Release], crashes_max: int, now_us: int) -> list[str]:
    """Give leases back before their runs ended."""
    spans = _spans_by_id(connection, [given.span_id for given in releases])
    return _release_all(connection, spans, releases, crashes_max, now_us)


def _release_all(
    connection: sqlite3.Connection,
    spans: dict[int, Span],
    releases: Sequence[Release],
    crashes_max: int,
    now_us: int,
) -> list[str]:
    policies = _Policies(connection, list(spans.values()), crashes_max=crashes_max)
    gathered = _Gathered()
    for given in releases:
        span = gathered.spans.get(given.span_id, spans.get(given.span_id))
        verdict = release_span(
            span,
            given.token,
            suspects=frozenset(given.suspects),
            evidence=given.evidence,
            policy=policies.of(span) if span is not None else Policy(),
            clock=policies.clock(span) if span is not None else 0,
            now_us=now_us,
        )
        gathered.add(verdict)
    gathered.write(connection, now_us)
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

    def add(self, verdict: Verdict) -> None:
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
        self._counts[span.batch_id] = self._counts.get(span.batch_id, Counts()).plus(verdict.counts)

    def write(self, connection: sqlite3.Connection, now_us: int) -> None:
        put_spans(connection, self.spans.values())
        if self._fresh:
            add_spans(connection, self._fresh, first_id=take_ids(connection, spans_count=len(self._fresh))[1])
        add_parts(connection, self._parts)
        if self._counts:
            count_in(connection, self._counts, now_us)


class _Policies:
    """What batches say of runs that would come back, and the clocks of their queues; read once, when first asked."""

    def __init__(self, connection: sqlite3.Connection, spans: Sequence[Span], *, crashes_max: int = 1) -> None:
        self._connection = connection
        self._spans = spans
        self._crashes_max = crashes_max
        self._stopped: set[str] | None = None
        self._cancelled: dict[int, set[int]] = {}
        self._clocks: dict[tuple[str, str], int] = {}

    def of(self, span: Span) -> Policy:
        self._read()
        assert self._stopped is not None
        return Policy(
            stopped=span.batch_id in self._stopped,
            cancelled=frozenset(self._cancelled.get(span.block_id, ())),
            crashes_max=self._crashes_max,
        )

    def clock(self, span: Span) -> int:
        self._read()
        return self._clocks[span.environment, span.queue]

    def _read(self) -> None:
        if self._stopped is not None:
            return
        ids = as_json(sorted({span.batch_id for span in self._spans}))
        self._stopped = {row[0] for row in execute(self._connection, "stopped_batches", ids=ids).fetchall()}
        asked = execute(self._connection, "cancellations", ids=ids, rows_max=CANCELLATIONS_MAX).fetchall()
        for batch_id, index in asked:
            if place := locate(self._connection, batch_id, index):
                self._cancelled.setdefault(place[0], set()).add(place[1])
        environments: dict[str, set[str]] = {}
        for span in self._spans:
            environments.setdefault(span.environment, set()).add(span.queue)
        for environment, queues in environments.items():
            for queue, clock in clocks(self._connection, environment, queues).items():
                self._clocks[environment, queue] = clock
