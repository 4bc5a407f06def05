"""What is claimed, fenced and split.

A span is runs of one block that share task, queue, priority, attempt and due time; it holds their states, a byte
each, and no payload, so claiming or settling hundreds of runs rewrites one small row.

Rule 1: everything exceptional is a *split* (small claims, retries, suspects of a crash): some runs move to a new
span over the same block, their old bytes say `moved`, no payload is copied.
Rule 2: a decision here takes spans and returns spans; who keeps them, and in which transaction, is the store's.

A *place* counts runs inside a span, a *position* inside a block, an *index* inside a batch.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Sequence
from typing import Final, NamedTuple

import msgspec

from headrace.core import failure, run
from headrace.core.activation import LANE
from headrace.core.order import returned_order_no
from headrace.core.pack import count, pack, unpack
from headrace.core.retry import quantised_due_us
from headrace.foundation.errors import IllegalTransition

WAITING: Final = "waiting"
DELAYED: Final = "delayed"
LEASED: Final = "leased"
DONE: Final = "done"

RETRY: Final = ord("r")
"""A settlement's code for: failed, with attempts left; it becomes a `moved` byte and a run in a new span."""

OVERDUE: Final = ord("d")
"""A settlement's code for: not heard of in time; it waits again in a new span, and no attempt is used up."""

RETURNING: Final = bytes((RETRY, OVERDUE))
_REPORTED: Final = run.FINAL + RETURNING

SETTLED: Final = "settled"
RECORDED: Final = "recorded"
LOST: Final = "lost"


class Key(NamedTuple):
    """What the runs of one span have in common from the start. `due_us` and `expires_us`: 0 is now and never.

    `dead_letter`: what fails for good is kept for a person to look at, until it is redriven or purged.
    """

    task: str
    queue: str = "default"
    priority: int = 0
    due_us: int = 0
    expires_us: int = 0
    at_most_once: bool = False
    dead_letter: bool = False


class Span(msgspec.Struct, kw_only=True):
    """One row of the span table. `positions` is None while the span covers its whole block from the first run.

    `note` is what whoever held these runs last left for whoever holds them next. `since_us`: when they came, or came
    back for another attempt. `leased_us`: when a worker took them last; 0 for never.
    """

    id: int = 0
    block_id: int
    batch_id: str
    environment: str
    queue: str
    task: str
    priority: int = 0
    due_us: int = 0
    expires_us: int = 0
    at_most_once: bool = False
    order_no: int = 0
    first_index: int = 0
    attempt: int = 1
    crashes_count: int = 0
    crashes_alone_count: int = 0
    block_offsets: bytes | None = None
    states: bytes
    unsettled_count: int
    state: str = WAITING
    session_id: str = ""
    claim_no: int = 0
    token: int = 0
    dead_letter: bool = False
    note: str = ""
    since_us: int = 0
    leased_us: int = 0


class Settlement(msgspec.Struct, kw_only=True):
    """Outcomes of some runs of a leased span, as a worker reports them.

    `places` is None when all runs of the span are told of, in order, else 16-bit numbers; `codes` has a byte a
    run (`c`, `f`, `x`, `e`, `r` or `d`), `results` packs a result or failure for each, `dues_us` has one moment for
    each `r`, in order, and `notes` one note for each `r` and `d`, or none at all. `part_no` counts this lease's
    settlements, so a repeat is known as one. With `is_shared` others may settle runs of the lease too: what has an
    outcome already keeps it, and the rest is recorded.
    """

    span_id: int
    token: int
    part_no: int
    span_slots: bytes | None
    codes: bytes
    results: bytes
    dues_us: tuple[int, ...] = ()
    object_keys: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    is_shared: bool = False


class Part(msgspec.Struct, kw_only=True):
    """One row of the part table: outcomes as recorded, never changed. Positions are the block's."""

    block_id: int
    span_id: int
    token: int
    part_no: int
    block_offsets: bytes | None
    codes: bytes
    results: bytes
    settled_us: int


class Counts(NamedTuple):
    """How many runs of a batch came to each end, or by how much that changed."""

    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0

    @property
    def settled(self) -> int:
        """Runs with an outcome."""
        return self.completed + self.failed + self.cancelled + self.expired

    def plus(self, other: Counts) -> Counts:
        """The sum, field by field."""
        return Counts(
            self.completed + other.completed,
            self.failed + other.failed,
            self.cancelled + other.cancelled,
            self.expired + other.expired,
        )


class Policy(NamedTuple):
    """What the batch says of runs that would come back.

    `stopped`: the batch was cancelled or abandoned, so what would run again is cancelled instead.
    `cancelled`: positions of single runs that someone asked to cancel while they were leased.
    """

    stopped: bool = False
    cancelled: frozenset[int] = frozenset()
    crashes_max: int = 3


class SpanDecision(NamedTuple):
    """A decision about one span: what became of the call, the span after it, what is new, and what it counts."""

    word: str
    span: Span | None = None
    spans: tuple[Span, ...] = ()
    part: Part | None = None
    counts: Counts = Counts()


def block_offsets_of(span: Span) -> Sequence[int]:
    """The block positions of this span's places, in order."""
    return range(len(span.states)) if span.block_offsets is None else decode_uint16s(span.block_offsets)


def encode_uint16s(span_slots: Iterable[int]) -> bytes:
    """Places or positions as 16-bit little-endian numbers (a chunk holds at most 4,096 runs)."""
    return array("H", span_slots).tobytes()


def decode_uint16s(data: bytes) -> Sequence[int]:
    """What `encode_places` wrote."""
    return array("H", data)


def unsettled_slots(span: Span) -> list[int]:
    """The places whose runs live here and have no outcome."""
    return run.slots_of(span.states, run.WAITING, run.STARTED)


def split(span: Span, span_slots: Sequence[int], **changes: object) -> tuple[Span, Span]:
    """`(kept, taken)`: the runs at `places` moved to a new, unstored span that differs by `changes`.

    The one primitive behind small claims, retries and the hunt for poison. Both keep to the same block.
    """
    block_offsets = block_offsets_of(span)
    kept = msgspec.structs.replace(
        span, states=run.changed(span.states, ((span_slot, run.MOVED) for span_slot in span_slots))
    )
    kept.unsettled_count = run.unsettled_count(kept.states)
    states = bytes((run.WAITING,)) * len(span_slots)
    taken = msgspec.structs.replace(
        span,
        id=0,
        block_offsets=encode_uint16s(block_offsets[span_slot] for span_slot in span_slots),
        states=states,
        unsettled_count=len(span_slots),
        state=WAITING,
        session_id="",
        claim_no=0,
        token=0,
    )
    for name, value in changes.items():
        setattr(taken, name, value)
    if not kept.unsettled_count:
        kept = _done(kept)
    return kept, taken


def take_first(span: Span, runs_count: int) -> tuple[Span, Span]:
    """A small claim: the first `runs_count` unsettled runs leave, the rest stays claimable."""
    return split(span, unsettled_slots(span)[:runs_count])


def settle(
    span: Span | None, settlement: Settlement, *, recorded: bool, policy: Policy, clock: int, now_us: int
) -> SpanDecision:
    """Record outcomes under a lease: a repeat answers `recorded`, a stale token `lost`; neither changes anything.

    `clock` is the queue's (for what is due at once). Raises `IllegalTransition` when the settlement tells of a
    run that already has an outcome in this span.
    """
    if recorded:
        return SpanDecision(RECORDED)
    if span is None or span.state != LEASED or span.token != settlement.token:
        return SpanDecision(LOST)
    codes = settlement.codes
    everything = settlement.span_slots is None
    span_slots: Sequence[int] = (
        range(len(span.states)) if settlement.span_slots is None else decode_uint16s(settlement.span_slots)
    )
    if len(span_slots) != len(codes) or (len(span_slots) and max(span_slots) >= len(span.states)):
        raise IllegalTransition(
            f"a settlement of {len(codes)} outcomes names {len(span_slots)} of {len(span.states)} runs",
            span_id=span.id,
        )
    if codes.strip(_REPORTED) or count(settlement.results) != len(codes):
        raise IllegalTransition(
            f"a settlement tells of {len(codes)} outcomes, {codes!r}, with {count(settlement.results)} results",
            hint="a run ends as c, f, x, e, r or d, and each has a result, empty or not",
            span_id=span.id,
        )
    before = span.states if everything else run.at(span.states, span_slots)
    if settlement.is_shared and before.strip(run.UNSETTLED):
        settlement = _unsettled_part(span, settlement, span_slots)
        if not settlement.codes:
            return SpanDecision(SETTLED, span)
        codes, span_slots, everything = settlement.codes, decode_uint16s(settlement.span_slots or b""), False
        before = run.at(span.states, span_slots)
    block_offsets = block_offsets_of(span)
    returning: dict[_Return, list[int]] = {}
    if RETRY in codes or OVERDUE in codes:
        codes, returning = _returning(settlement, span_slots, block_offsets, policy, now_us)
    after = msgspec.structs.replace(span)
    is_once = everything or len(set(span_slots)) == len(span_slots)
    if is_once and not before.strip(run.UNSETTLED) and not codes.strip(run.FINAL):  # the usual case: pairs in the table
        after.states = codes if everything else run.ended(span.states, span_slots, codes)
    else:
        after.states = run.changed(span.states, zip(span_slots, codes, strict=True))
    after.unsettled_count = run.unsettled_count(after.states)
    fresh = tuple(
        _moved(span, [block_offsets[span_slot] for span_slot in moved], how, now_us=now_us, clock=clock)
        for how, moved in sorted(returning.items())
    )
    if not after.unsettled_count:
        after = _done(after)
    part = Part(
        block_id=span.block_id,
        span_id=span.id,
        token=span.token,
        part_no=settlement.part_no,
        block_offsets=settlement.span_slots
        if span.block_offsets is None
        else encode_uint16s(block_offsets[p] for p in span_slots),
        codes=codes,
        results=settlement.results,
        settled_us=now_us,
    )
    return SpanDecision(SETTLED, after, fresh, part, counts_of(codes))


def _unsettled_part(span: Span, settlement: Settlement, span_slots: Sequence[int]) -> Settlement:
    """What a settlement tells of runs that have no outcome yet."""
    dues, notes = iter(settlement.dues_us), iter(settlement.notes)
    results, kinds = unpack(settlement.results)
    codes, kept, kept_dues, kept_notes = bytearray(), [], [], []
    for number, (span_slot, code) in enumerate(zip(span_slots, settlement.codes, strict=True)):
        due_us = next(dues, 0) if code == RETRY else 0
        note = next(notes, "") if code in RETURNING else ""
        if span.states[span_slot] not in run.UNSETTLED:
            continue
        codes.append(code)
        kept.append(number)
        if code == RETRY:
            kept_dues.append(due_us)
        if code in RETURNING:
            kept_notes.append(note)
    return msgspec.structs.replace(
        settlement,
        span_slots=encode_uint16s(span_slots[number] for number in kept),
        codes=bytes(codes),
        results=pack([results[number] for number in kept], kinds and bytes(kinds[number] for number in kept)),
        dues_us=tuple(kept_dues),
        notes=tuple(kept_notes),
    )


class _Return(NamedTuple):
    """How runs come back; those that do so alike share a span."""

    due_us: int
    attempts: int
    note: str


def _returning(
    settlement: Settlement, span_slots: Sequence[int], block_offsets: Sequence[int], policy: Policy, now_us: int
) -> tuple[bytes, dict[_Return, list[int]]]:
    """Turn each `r` and `d` into `moved` with how it comes back, or into `cancelled` where nothing may run again."""
    codes = bytearray(settlement.codes)
    returning: dict[_Return, list[int]] = {}
    dues, notes = iter(settlement.dues_us), iter(settlement.notes)
    for number, code in enumerate(codes):
        if code not in RETURNING:
            continue
        is_retry = code == RETRY
        due_us = quantised_due_us(next(dues, now_us), now_us) if is_retry else 0
        how = _Return(due_us, int(is_retry), next(notes, ""))
        if policy.stopped or block_offsets[span_slots[number]] in policy.cancelled:
            codes[number] = run.CANCELLED
        else:
            codes[number] = run.MOVED
            returning.setdefault(how, []).append(span_slots[number])
    return bytes(codes), returning


def _moved(span: Span, block_offsets: list[int], how: _Return, *, now_us: int, clock: int) -> Span:
    """The span of the next attempt, or of this one once more."""
    return msgspec.structs.replace(
        span,
        id=0,
        block_offsets=encode_uint16s(block_offsets),
        states=bytes((run.WAITING,)) * len(block_offsets),
        unsettled_count=len(block_offsets),
        state=DELAYED if how.due_us > now_us else WAITING,
        due_us=how.due_us,
        order_no=returned_order_no(clock=clock),
        attempt=span.attempt + how.attempts,
        session_id="",
        claim_no=0,
        token=0,
        note=how.note,
        since_us=now_us,
        leased_us=0,
    )


def release(
    span: Span | None,
    token: int,
    *,
    span_slots: Collection[int] | None = None,
    suspects: Collection[int],
    evidence: str,
    policy: Policy,
    clock: int,
    now_us: int,
) -> SpanDecision:
    """Give a lease back: what had not started comes back as it was; what a dead worker had started is suspect.

    With `places` only those runs come back, which nobody has begun, and the lease goes on with the others.

    `suspects`: places that had started and not ended when the worker died; empty for a release in good order.
    A crash is charged to suspects only. From its second crash on a group of suspects is bisected, so a run that
    kills its worker is soon alone; after `policy.crashes_max` crashes alone it fails with `evidence`. An
    at-most-once run that was handed out fails at once: it may have run. An activation runs in another process than the
    one that leases it: no death of that one is its doing.
    """
    if span is None or span.state != LEASED or span.token != token:
        return SpanDecision(LOST)
    unsettled = unsettled_slots(span)
    if span_slots is not None:
        return _given_back(span, [span_slot for span_slot in unsettled if span_slot in span_slots], policy, clock)
    guilty = [
        span_slot for span_slot in unsettled if span_slot in suspects and (span.at_most_once or span.task != LANE)
    ]
    back = msgspec.structs.replace(
        span,
        states=bytes(run.WAITING if state == run.STARTED else state for state in span.states),
        state=WAITING,
        session_id="",
        claim_no=0,
        order_no=returned_order_no(clock=clock),
    )
    spans: list[Span] = []
    part: Part | None = None
    counts = Counts()
    if guilty and span.at_most_once:
        error = failure.lost_once(attempts=span.attempt, evidence=evidence)
        back, part, counts = _failed(back, guilty, error, now_us)
    elif guilty:
        groups = _suspect_groups(back, guilty)
        alone = len(guilty) == 1
        if alone and span.crashes_alone_count + 1 >= policy.crashes_max:
            error = failure.crashed(crashes=span.crashes_count + 1, attempts=span.attempt, evidence=evidence)
            back, part, counts = _failed(back, guilty, error, now_us)
        elif len(groups) == 1 and len(guilty) == len(unsettled):
            back.crashes_count += 1
            back.crashes_alone_count += alone
        else:
            for group in groups:
                back, taken = split(
                    back,
                    group,
                    crashes_count=span.crashes_count + 1,
                    crashes_alone_count=span.crashes_alone_count + alone,
                )
                spans.append(taken)
    return _unless_stopped(back, spans, part, counts, policy)


def _given_back(span: Span, span_slots: list[int], policy: Policy, clock: int) -> SpanDecision:
    """Rule R19. A repeat finds the runs gone and changes nothing."""
    if not span_slots:
        return SpanDecision(SETTLED, span)
    kept, taken = split(span, span_slots, order_no=returned_order_no(clock=clock))
    counts = Counts()
    if policy.stopped or policy.cancelled:
        taken, counts = cancel(taken, None if policy.stopped else policy.cancelled)
    return SpanDecision(SETTLED, kept, (taken,), None, counts)


def _suspect_groups(span: Span, guilty: list[int]) -> list[list[int]]:
    if span.crashes_count == 0 or len(guilty) == 1:
        return [guilty]
    half = (len(guilty) + 1) // 2
    return [guilty[:half], guilty[half:]]


def _failed(span: Span, span_slots: list[int], error: failure.Failure, now_us: int) -> tuple[Span, Part, Counts]:
    block_offsets = block_offsets_of(span)
    after = msgspec.structs.replace(
        span, states=run.changed(span.states, ((span_slot, run.FAILED) for span_slot in span_slots))
    )
    after.unsettled_count = run.unsettled_count(after.states)
    if not after.unsettled_count:
        after = _done(after)
    part = Part(
        block_id=span.block_id,
        span_id=span.id,
        token=span.token,
        part_no=RECOVERY_PART_NO,
        block_offsets=encode_uint16s(block_offsets[span_slot] for span_slot in span_slots),
        codes=bytes((run.FAILED,)) * len(span_slots),
        results=pack([error.encode()] * len(span_slots)),
        settled_us=now_us,
    )
    return after, part, Counts(failed=len(span_slots))


RECOVERY_PART_NO: Final = -1
"""The part that ends a lease from outside; a worker's own parts count from 0."""


def _unless_stopped(back: Span, spans: list[Span], part: Part | None, counts: Counts, policy: Policy) -> SpanDecision:
    """What may not run again is cancelled where it stands."""
    if policy.stopped or policy.cancelled:
        ended: list[Span] = []
        for span in (back, *spans):
            wanted = None if policy.stopped else policy.cancelled
            after, more = cancel(span, wanted)
            ended.append(after)
            counts = counts.plus(more)
        back, spans = ended[0], ended[1:]
    return SpanDecision(SETTLED, back, tuple(spans), part, counts)


def cancel(span: Span, block_offsets: Collection[int] | None = None) -> tuple[Span, Counts]:
    """End runs that wait: all of the span's, or those at the given block positions."""
    return _end(span, run.CANCELLED, block_offsets)


def expire(span: Span) -> tuple[Span, Counts]:
    """End all runs of a span that did not start before its `expires_us`."""
    return _end(span, run.EXPIRED, None)


def _end(span: Span, state: int, block_offsets: Collection[int] | None) -> tuple[Span, Counts]:
    own = block_offsets_of(span)
    span_slots = [
        span_slot for span_slot in unsettled_slots(span) if block_offsets is None or own[span_slot] in block_offsets
    ]
    if not span_slots:
        return span, Counts()
    after = msgspec.structs.replace(
        span, states=run.changed(span.states, ((span_slot, state) for span_slot in span_slots))
    )
    after.unsettled_count = run.unsettled_count(after.states)
    if not after.unsettled_count:
        after = _done(after)
    return after, counts_of(bytes((state,)) * len(span_slots))


def redrive(
    span: Span, block_offsets: Collection[int] | None, *, clock: int, unrunnable: Collection[int] = ()
) -> tuple[Span, Span | None, Counts]:
    """Run failed runs again from their first attempt: `(span after, new span or None, change of the counts)`.

    Without `positions`, the failed runs of the span; with them, the runs named that ended in anything but success.
    Runs at `unrunnable` positions were born failed: there is no input that could be run.
    """
    own = block_offsets_of(span)
    if block_offsets is None:
        span_slots = run.slots_of(span.states, run.FAILED)
    else:
        ended = run.slots_of(span.states, run.FAILED, run.CANCELLED, run.EXPIRED)
        span_slots = [span_slot for span_slot in ended if own[span_slot] in block_offsets]
    span_slots = [span_slot for span_slot in span_slots if own[span_slot] not in unrunnable]
    if not span_slots:
        return span, None, Counts()
    gone = counts_of(bytes(span.states[span_slot] for span_slot in span_slots))
    kept, taken = split(
        span,
        span_slots,
        attempt=1,
        crashes_count=0,
        crashes_alone_count=0,
        due_us=0,
        expires_us=0,
        order_no=returned_order_no(clock=clock),
        note="",
    )
    return kept, taken, Counts(-gone.completed, -gone.failed, -gone.cancelled, -gone.expired)


def started(span: Span) -> Span:
    """An at-most-once span as it is recorded before hand-out: every waiting run counts as started."""
    return msgspec.structs.replace(span, states=span.states.replace(bytes((run.WAITING,)), bytes((run.STARTED,))))


def leased(span: Span, *, session_id: str, claim_no: int, now_us: int) -> Span:
    """The span under a new lease; the token is the fence that the lease before it can't pass."""
    after = started(span) if span.at_most_once else msgspec.structs.replace(span)
    after.state, after.session_id, after.claim_no, after.token = LEASED, session_id, claim_no, span.token + 1
    after.leased_us = now_us
    return after


def ends_all(settlement: Settlement) -> bool:
    """Whether it tells of runs that all ended for good, each with a result."""
    codes = settlement.codes
    return bool(codes) and not codes.strip(run.FINAL) and count(settlement.results) == len(codes)


def counts_of(codes: bytes) -> Counts:
    """How many runs these codes end, by how they end."""
    return Counts(
        codes.count(run.COMPLETED),
        codes.count(run.FAILED),
        codes.count(run.CANCELLED),
        codes.count(run.EXPIRED),
    )


def results_of(part: Part) -> list[tuple[int, int, bytes, int]]:
    """`(position, code, result, kind)` of each outcome in a part."""
    results, kinds = unpack(part.results)
    block_offsets = range(len(results)) if part.block_offsets is None else decode_uint16s(part.block_offsets)
    return list(zip(block_offsets, part.codes, results, kinds or bytes(len(results)), strict=True))


def dead_block_offsets(span: Span, part: Part) -> list[int]:
    """The block positions of runs that a part ends as dead letters."""
    if not span.dead_letter or run.FAILED not in part.codes:
        return []
    block_offsets = range(len(part.codes)) if part.block_offsets is None else decode_uint16s(part.block_offsets)
    return [block_offset for block_offset, code in zip(block_offsets, part.codes, strict=True) if code == run.FAILED]


def _done(span: Span) -> Span:
    return msgspec.structs.replace(span, state=DONE, session_id="", claim_no=0)
