"""The release of a lease: by its worker, by recovery after a crash, or of some runs that have not begun.

A crash is charged only to suspects: runs that had started and not ended. Suspects are bisected from crash to crash, so
that the run that crashes its worker is found and fails alone.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import msgspec

from headrace.core import failure, run
from headrace.core.activation import LANE
from headrace.core.order import returned_order_no
from headrace.core.pack import pack
from headrace.core.span import (
    LEASED,
    LOST,
    SETTLED,
    WAITING,
    Counts,
    Part,
    Policy,
    Span,
    SpanDecision,
    block_offsets_of,
    cancel,
    done_span,
    encode_uint16s,
    split,
    unsettled_slots,
)

RECOVERY_PART_NO: Final = -1
"""Number of the part that ends a lease from outside; a worker's own parts count from 0."""


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
    """Release a lease: runs that had not started return unchanged; those that an ended worker had started are suspects.

    With `span_slots` only those runs return, none of which has begun, and the lease continues with the others.

    `suspects`: slots that had started and not ended when the worker ended; empty for a graceful release. Only suspects
    are charged a crash. From the second crash on a group of suspects is bisected, so a run that crashes its worker is
    soon alone. After `policy.crashes_max` crashes alone it fails with `evidence`, the crash details. An at-most-once
    run that was delivered fails at once, since it may have run. An activation executes in another process than the one
    that leases it, so a crash of that process is never charged to it.
    """
    if span is None or span.state != LEASED or span.token != token:
        return SpanDecision(LOST)
    unsettled = unsettled_slots(span)
    if span_slots is not None:
        return _release_some(span, [span_slot for span_slot in unsettled if span_slot in span_slots], policy, clock)
    suspected = [
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
    if suspected and span.at_most_once:
        error = failure.lost_once(attempts=span.attempt, evidence=evidence)
        back, part, counts = _failed(back, suspected, error, now_us)
    elif suspected:
        groups = _suspect_groups(back, suspected)
        alone = len(suspected) == 1
        if alone and span.crashes_alone_count + 1 >= policy.crashes_max:
            error = failure.crashed(crashes=span.crashes_count + 1, attempts=span.attempt, evidence=evidence)
            back, part, counts = _failed(back, suspected, error, now_us)
        elif len(groups) == 1 and len(suspected) == len(unsettled):
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


def _release_some(span: Span, span_slots: list[int], policy: Policy, clock: int) -> SpanDecision:
    """Return some runs of a lease (R19, claims start small). A repetition finds the runs moved and changes nothing."""
    if not span_slots:
        return SpanDecision(SETTLED, span)
    kept, taken = split(span, span_slots, order_no=returned_order_no(clock=clock))
    counts = Counts()
    if policy.stopped or policy.cancelled:
        taken, counts = cancel(taken, None if policy.stopped else policy.cancelled)
    return SpanDecision(SETTLED, kept, (taken,), None, counts)


def _suspect_groups(span: Span, suspected: list[int]) -> list[list[int]]:
    if span.crashes_count == 0 or len(suspected) == 1:
        return [suspected]
    half = (len(suspected) + 1) // 2
    return [suspected[:half], suspected[half:]]


def _failed(span: Span, span_slots: list[int], error: failure.Failure, now_us: int) -> tuple[Span, Part, Counts]:
    block_offsets = block_offsets_of(span)
    after = msgspec.structs.replace(
        span, states=run.changed(span.states, ((span_slot, run.FAILED) for span_slot in span_slots))
    )
    after.unsettled_count = run.unsettled_count(after.states)
    if not after.unsettled_count:
        after = done_span(after)
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


def _unless_stopped(back: Span, spans: list[Span], part: Part | None, counts: Counts, policy: Policy) -> SpanDecision:
    """Cancel the returned runs that may not run again."""
    if policy.stopped or policy.cancelled:
        ended: list[Span] = []
        for span in (back, *spans):
            cancelled_offsets = None if policy.stopped else policy.cancelled
            after, more = cancel(span, cancelled_offsets)
            ended.append(after)
            counts = counts.plus(more)
        back, spans = ended[0], ended[1:]
    return SpanDecision(SETTLED, back, tuple(spans), part, counts)
