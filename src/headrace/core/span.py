"""Spans: the unit that is claimed, fenced and split.

A span is a set of runs of one block with the same task, queue, priority, attempt and due time. It holds their states,
one byte each, and no payload. Claiming or settling hundreds of runs therefore rewrites one small row.

Rule 1: everything exceptional is a *split* (small claims, retries, suspects of a crash). Some runs move to a new span
over the same block, their old bytes become `moved`, and no payload is copied. Rule 2: a decision here takes spans and
returns spans. The store keeps them, in its own transaction.

A `span_slot` counts runs in a span, a `block_offset` in a block, an `index` in a batch.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Sequence
from typing import Final, NamedTuple

import msgspec

from headrace.core import run
from headrace.core.order import returned_order_no
from headrace.core.pack import count, pack, unpack
from headrace.core.retry import quantised_due_us
from headrace.foundation.errors import IllegalTransition

WAITING: Final = "waiting"
DELAYED: Final = "delayed"
LEASED: Final = "leased"
DONE: Final = "done"

RETRY: Final = ord("r")
"""Settlement code of a run that failed with attempts left: its byte becomes `moved`, and it waits in a new span."""

OVERDUE: Final = ord("d")
"""Settlement code of a run that was not reported in time: it waits again in a new span, and no attempt is used."""

RETURNING: Final = bytes((RETRY, OVERDUE))
_REPORTED: Final = run.FINAL + RETURNING

SETTLED: Final = "settled"
RECORDED: Final = "recorded"
LOST: Final = "lost"
WAITING_PART_NO: Final = 1 << 29
"""First part number of runs that complete while they wait; leases number their parts from 0, or from 1 << 30."""


class Key(NamedTuple):
    """Common properties of the runs of a span at creation. `due_us` 0 is now, `expires_us` 0 is never.

    `dead_letter`: a run that fails for good is kept as a dead letter until it is redriven or purged.
    """

    task: str
    queue: str = "default"
    priority: int = 0
    due_us: int = 0
    expires_us: int = 0
    at_most_once: bool = False
    dead_letter: bool = False


class Span(msgspec.Struct, kw_only=True):
    """One row of the span table. `block_offsets` is None while the span covers its whole block from the first run.

    `note`: text from the last holder of these runs to the next one. `since_us`: when the runs arrived, or returned for
    another attempt. `leased_us`: when a worker last leased them; 0 for never.
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

    `span_slots` is None if all runs of the span are reported, in order; otherwise 16-bit numbers. `codes` has one byte
    per run (`c`, `f`, `x`, `e`, `r` or `d`), `results` packs a result or failure for each, `dues_us` has one time for
    each `r`, in order, and `notes` one note for each `r` and `d`, or none at all. `part_no` numbers the lease's
    settlements, so that a repetition is recognised. With `is_shared` other servers may settle runs of the lease too:
    runs with an outcome keep it, and the rest is recorded.
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
    """One row of the part table: outcomes as recorded, never changed."""

    block_id: int
    span_id: int
    token: int
    part_no: int
    block_offsets: bytes | None
    codes: bytes
    results: bytes
    settled_us: int


class Counts(NamedTuple):
    """Numbers of runs of a batch by outcome, or changes of these numbers."""

    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0

    @property
    def settled(self) -> int:
        """Number of runs with an outcome."""
        return self.completed + self.failed + self.cancelled + self.expired

    def plus(self, other: Counts) -> Counts:
        """Add the counts of two objects, field by field."""
        return Counts(
            self.completed + other.completed,
            self.failed + other.failed,
            self.cancelled + other.cancelled,
            self.expired + other.expired,
        )


class Policy(NamedTuple):
    """The batch's decision about runs that would run again.

    `stopped`: the batch was cancelled or abandoned, so its runs are cancelled instead. `cancelled`: block offsets of
    single runs that were cancelled while they were leased.
    """

    stopped: bool = False
    cancelled: frozenset[int] = frozenset()
    crashes_max: int = 3


class SpanDecision(NamedTuple):
    """A decision about one span: the result of the call, the span after it, new spans, the part, and the change of
    counts.
    """

    word: str
    span: Span | None = None
    spans: tuple[Span, ...] = ()
    part: Part | None = None
    counts: Counts = Counts()


def block_offsets_of(span: Span) -> Sequence[int]:
    """Return the block offsets of the span's slots, in order."""
    return range(len(span.states)) if span.block_offsets is None else decode_uint16s(span.block_offsets)


def encode_uint16s(span_slots: Iterable[int]) -> bytes:
    """Encode slots or offsets as 16-bit little-endian numbers (a chunk holds at most 4,096 runs)."""
    return array("H", span_slots).tobytes()


def decode_uint16s(data: bytes) -> Sequence[int]:
    """Decode what `encode_uint16s` wrote."""
    return array("H", data)


def unsettled_slots(span: Span) -> list[int]:
    """Return the slots whose runs have no outcome and have not moved."""
    return run.slots_of(span.states, run.WAITING, run.STARTED)


def split(span: Span, span_slots: Sequence[int], **changes: object) -> tuple[Span, Span]:
    """Move the runs at `span_slots` to a new, unstored span that differs by `changes`; return `(kept, taken)`.

    The one primitive behind small claims, retries and the isolation of runs that crash their worker. Both spans refer
    to the same block. The new span keeps the token, so the tokens of the leases of one run only ever grow.
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
    )
    for name, value in changes.items():
        setattr(taken, name, value)
    if not kept.unsettled_count:
        kept = done_span(kept)
    return kept, taken


def take_first(span: Span, runs_count: int) -> tuple[Span, Span]:
    """Split off the first `runs_count` unsettled runs for a small claim; the rest stays claimable."""
    return split(span, unsettled_slots(span)[:runs_count])


def settle(
    span: Span | None, settlement: Settlement, *, recorded: bool, policy: Policy, clock: int, now_us: int
) -> SpanDecision:
    """Record outcomes under a lease. A repetition returns `recorded`, a stale token `lost`; neither changes anything.

    `clock` is the queue's clock, for runs that are due at once. Raises `IllegalTransition` if the settlement reports a
    run that already has an outcome in this span.
    """
    if recorded:
        return SpanDecision(RECORDED)
    if span is None or span.state != LEASED or span.token != settlement.token:
        return SpanDecision(LOST)
    codes = settlement.codes
    is_whole_span = settlement.span_slots is None
    span_slots: Sequence[int] = (
        range(len(span.states)) if settlement.span_slots is None else decode_uint16s(settlement.span_slots)
    )
    if len(span_slots) != len(codes) or (len(span_slots) and max(span_slots) >= len(span.states)):
        raise IllegalTransition(
            f"expected one run per outcome, got {len(codes)} outcomes for {len(span_slots)} of {len(span.states)} runs",
            span_id=span.id,
        )
    if codes.strip(_REPORTED) or count(settlement.results) != len(codes):
        raise IllegalTransition(
            f"invalid settlement: {len(codes)} outcomes, {codes!r}, with {count(settlement.results)} results",
            hint="the code of a run is c, f, x, e, r or d, and each has a result, empty or not",
            span_id=span.id,
        )
    before = span.states if is_whole_span else run.at(span.states, span_slots)
    if settlement.is_shared and before.strip(run.UNSETTLED):
        settlement = _unsettled_part(span, settlement, span_slots)
        if not settlement.codes:
            return SpanDecision(SETTLED, span)
        codes, span_slots, is_whole_span = settlement.codes, decode_uint16s(settlement.span_slots or b""), False
        before = run.at(span.states, span_slots)
    block_offsets = block_offsets_of(span)
    returning: dict[_ReturnConditions, list[int]] = {}
    if RETRY in codes or OVERDUE in codes:
        codes, returning = _split_returning(settlement, span_slots, block_offsets, policy, now_us)
    after = msgspec.structs.replace(span)
    is_once = is_whole_span or len(set(span_slots)) == len(span_slots)
    # the usual case: every pair is in the table
    if is_once and not before.strip(run.UNSETTLED) and not codes.strip(run.FINAL):
        after.states = codes if is_whole_span else run.ended(span.states, span_slots, codes)
    else:
        after.states = run.changed(span.states, zip(span_slots, codes, strict=True))
    after.unsettled_count = run.unsettled_count(after.states)
    fresh = tuple(
        _moved(span, [block_offsets[span_slot] for span_slot in moved], conditions, now_us=now_us, clock=clock)
        for conditions, moved in sorted(returning.items())
    )
    if not after.unsettled_count:
        after = done_span(after)
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
    """Reduce a settlement to the runs that have no outcome yet."""
    dues, notes = iter(settlement.dues_us), iter(settlement.notes)
    results, kinds = unpack(settlement.results)
    codes, kept_numbers, kept_dues, kept_notes = bytearray(), [], [], []
    for number, (span_slot, code) in enumerate(zip(span_slots, settlement.codes, strict=True)):
        due_us = next(dues, 0) if code == RETRY else 0
        note = next(notes, "") if code in RETURNING else ""
        if span.states[span_slot] not in run.UNSETTLED:
            continue
        codes.append(code)
        kept_numbers.append(number)
        if code == RETRY:
            kept_dues.append(due_us)
        if code in RETURNING:
            kept_notes.append(note)
    return msgspec.structs.replace(
        settlement,
        span_slots=encode_uint16s(span_slots[number] for number in kept_numbers),
        codes=bytes(codes),
        results=pack(
            [results[number] for number in kept_numbers], kinds and bytes(kinds[number] for number in kept_numbers)
        ),
        dues_us=tuple(kept_dues),
        notes=tuple(kept_notes),
    )


class _ReturnConditions(NamedTuple):
    """The conditions under which runs return; those with equal conditions share a span."""

    due_us: int
    attempts: int
    note: str


def _split_returning(
    settlement: Settlement, span_slots: Sequence[int], block_offsets: Sequence[int], policy: Policy, now_us: int
) -> tuple[bytes, dict[_ReturnConditions, list[int]]]:
    """Replace each `r` and `d` by `moved` with its conditions, or by `cancelled` if it may not run again."""
    codes = bytearray(settlement.codes)
    returning: dict[_ReturnConditions, list[int]] = {}
    dues, notes = iter(settlement.dues_us), iter(settlement.notes)
    for number, code in enumerate(codes):
        if code not in RETURNING:
            continue
        is_retry = code == RETRY
        due_us = quantised_due_us(next(dues, now_us), now_us) if is_retry else 0
        conditions = _ReturnConditions(due_us, int(is_retry), next(notes, ""))
        if policy.stopped or block_offsets[span_slots[number]] in policy.cancelled:
            codes[number] = run.CANCELLED
        else:
            codes[number] = run.MOVED
            returning.setdefault(conditions, []).append(span_slots[number])
    return bytes(codes), returning


def _moved(span: Span, block_offsets: list[int], conditions: _ReturnConditions, *, now_us: int, clock: int) -> Span:
    """Return the span of the next attempt, or of the same attempt again."""
    return msgspec.structs.replace(
        span,
        id=0,
        block_offsets=encode_uint16s(block_offsets),
        states=bytes((run.WAITING,)) * len(block_offsets),
        unsettled_count=len(block_offsets),
        state=DELAYED if conditions.due_us > now_us else WAITING,
        due_us=conditions.due_us,
        order_no=returned_order_no(clock=clock),
        attempt=span.attempt + conditions.attempts,
        session_id="",
        claim_no=0,
        note=conditions.note,
        since_us=now_us,
        leased_us=0,
    )


def complete_waiting(span: Span, block_offsets: Collection[int], result: bytes, *, now_us: int) -> SpanDecision:
    """Complete runs of a waiting span, each with `result`: their worker reported after its delivery was overdue.

    The part has a number that no lease uses: several waiting runs of one span may complete one after the other.
    """
    if span.state not in (WAITING, DELAYED):
        return SpanDecision(LOST)
    block_offset_at = block_offsets_of(span)
    span_slots = [span_slot for span_slot in unsettled_slots(span) if block_offset_at[span_slot] in block_offsets]
    if not span_slots:
        return SpanDecision(LOST)
    after, counts = _end(span, run.COMPLETED, block_offsets)
    part = Part(
        block_id=span.block_id,
        span_id=span.id,
        token=span.token,
        part_no=WAITING_PART_NO + span_slots[0],
        block_offsets=encode_uint16s(block_offset_at[span_slot] for span_slot in span_slots),
        codes=bytes((run.COMPLETED,)) * len(span_slots),
        results=pack([result] * len(span_slots)),
        settled_us=now_us,
    )
    return SpanDecision(SETTLED, after, (), part, counts)


def cancel(span: Span, block_offsets: Collection[int] | None = None) -> tuple[Span, Counts]:
    """Cancel waiting runs: all of the span's, or those at the given block offsets."""
    return _end(span, run.CANCELLED, block_offsets)


def expire(span: Span) -> tuple[Span, Counts]:
    """Expire all runs of a span that did not start before its `expires_us`."""
    return _end(span, run.EXPIRED, None)


def _end(span: Span, state: int, block_offsets: Collection[int] | None) -> tuple[Span, Counts]:
    block_offset_at = block_offsets_of(span)
    span_slots = [
        span_slot
        for span_slot in unsettled_slots(span)
        if block_offsets is None or block_offset_at[span_slot] in block_offsets
    ]
    if not span_slots:
        return span, Counts()
    after = msgspec.structs.replace(
        span, states=run.changed(span.states, ((span_slot, state) for span_slot in span_slots))
    )
    after.unsettled_count = run.unsettled_count(after.states)
    if not after.unsettled_count:
        after = done_span(after)
    return after, counts_of(bytes((state,)) * len(span_slots))


def redrive(
    span: Span, block_offsets: Collection[int] | None, *, clock: int, unrunnable: Collection[int] = ()
) -> tuple[Span, Span | None, Counts]:
    """Run failed runs again from their first attempt; return `(span after, new span or None, change of the counts)`.

    Without `block_offsets`, all failed runs of the span; with them, the named runs that did not succeed. Runs at
    `unrunnable` offsets were created as failed and have no input to run.
    """
    block_offset_at = block_offsets_of(span)
    if block_offsets is None:
        span_slots = run.slots_of(span.states, run.FAILED)
    else:
        ended = run.slots_of(span.states, run.FAILED, run.CANCELLED, run.EXPIRED)
        span_slots = [span_slot for span_slot in ended if block_offset_at[span_slot] in block_offsets]
    span_slots = [span_slot for span_slot in span_slots if block_offset_at[span_slot] not in unrunnable]
    if not span_slots:
        return span, None, Counts()
    redriven_counts = counts_of(bytes(span.states[span_slot] for span_slot in span_slots))
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
    return (
        kept,
        taken,
        Counts(
            -redriven_counts.completed, -redriven_counts.failed, -redriven_counts.cancelled, -redriven_counts.expired
        ),
    )


def started(span: Span) -> Span:
    """Return an at-most-once span with every waiting run recorded as started (R5, at-most-once runs are recorded
    first).
    """
    return msgspec.structs.replace(span, states=span.states.replace(bytes((run.WAITING,)), bytes((run.STARTED,))))


def leased(span: Span, *, session_id: str, claim_no: int, now_us: int) -> Span:
    """Return the span under a new lease; the new token fences off the previous lease."""
    after = started(span) if span.at_most_once else msgspec.structs.replace(span)
    after.state, after.session_id, after.claim_no, after.token = LEASED, session_id, claim_no, span.token + 1
    after.leased_us = now_us
    return after


def ends_all(settlement: Settlement) -> bool:
    """True if a settlement ends all of its runs for good, each with a result."""
    codes = settlement.codes
    return bool(codes) and not codes.strip(run.FINAL) and count(settlement.results) == len(codes)


def counts_of(codes: bytes) -> Counts:
    """Count runs by the outcome of their code."""
    return Counts(
        codes.count(run.COMPLETED),
        codes.count(run.FAILED),
        codes.count(run.CANCELLED),
        codes.count(run.EXPIRED),
    )


def results_of(part: Part) -> list[tuple[int, int, bytes, int]]:
    """Return `(block_offset, code, result, kind)` of each outcome in a part."""
    results, kinds = unpack(part.results)
    block_offsets = range(len(results)) if part.block_offsets is None else decode_uint16s(part.block_offsets)
    return list(zip(block_offsets, part.codes, results, kinds or bytes(len(results)), strict=True))


def dead_block_offsets(span: Span, part: Part) -> list[int]:
    """Return the block offsets of runs that a part ends as dead letters."""
    if not span.dead_letter or run.FAILED not in part.codes:
        return []
    block_offsets = range(len(part.codes)) if part.block_offsets is None else decode_uint16s(part.block_offsets)
    return [block_offset for block_offset, code in zip(block_offsets, part.codes, strict=True) if code == run.FAILED]


def done_span(span: Span) -> Span:
    """Return a span whose runs all have outcomes or have moved: no session holds it."""
    return msgspec.structs.replace(span, state=DONE, session_id="", claim_no=0)
