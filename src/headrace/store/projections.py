"""Views of stored rows, the same for every store: a run for an operator, a lease for a worker."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from headrace.core import batch as batches
from headrace.core import run
from headrace.core.block import EndedAtCreation, Extra
from headrace.core.failure import decode
from headrace.core.pack import pack, unpack, unpack_some
from headrace.core.serving import Serving
from headrace.core.span import DELAYED, LEASED, Part, Span, block_offsets_of, unsettled_slots
from headrace.foundation.errors import InvalidInput, NotFound
from headrace.foundation.ids import run_id
from headrace.foundation.suggestions import hint_of
from headrace.store.protocol import Lease, NamedLease, RunRecord, Session

WITH_RESULT: Final = bytes((run.COMPLETED, run.FAILED))
"""The states for which a recorded outcome has a result."""

_ENDED_STATES: Final = tuple(run.NAMES[state] for state in run.FINAL)
RUN_STATES: Final = (run.NAMES[run.WAITING], DELAYED, LEASED, run.NAMES[run.STARTED], *_ENDED_STATES)
"""The states that a view of a run may have. A run that moved to another span is shown with its state there."""


def check_run_state(state: str) -> str:
    """Return `state` if a view of a run may have it, or if it is empty. Raises `InvalidInput`."""
    return _checked_state(state, "run", "batch") if state else state


def check_batch_state(state: str) -> str:
    """Return `state` if it is a state of a batch. Raises `InvalidInput`."""
    return _checked_state(state, "batch", "run")


_STATES: Final = {"run": RUN_STATES, "batch": batches.STATES}
_PLURALS: Final = {"run": "runs", "batch": "batches"}


def _checked_state(state: str, noun: str, other: str) -> str:
    """Return a state of a run or batch. The error's hint names the command that lists what has this state."""
    states = _STATES[noun]
    if state in states:
        return state
    hint = hint_of(state, states, "its states")
    if state in _STATES[other]:
        hint = (
            f"a {noun} has no such state; `headrace {other} list --state {state}` lists {_PLURALS[other]}; "
            f"states of a {noun}: {', '.join(states)}"
        )
    raise InvalidInput(f"expected a state of a {noun}, got {state!r}", hint=hint)


def no_run(batch_id: str, index: int) -> NotFound:
    """Return the error for a run that does not exist."""
    return NotFound(f"no run has the id {run_id(batch_id, index)!r}", hint="`headrace run list` shows the runs")


class RunFilter(NamedTuple):
    """Properties that listed runs must have; an empty one is any.

    `since_us`: only runs that arrived, or returned for another attempt, at this time or later.
    """

    state: str = ""
    task: str = ""
    queue: str = ""
    tag: str = ""
    since_us: int = 0

    def takes(self, record: RunRecord, span: Span) -> bool:
        """True if a run of a span has them, apart from the tag."""
        return (
            self.state in ("", record.state)
            and self.task in ("", record.task)
            and self.queue in ("", record.queue)
            and span.since_us >= self.since_us
        )


def add_details(record: RunRecord, extra: Extra, outcomes: Iterable[tuple[int, bytes, int, int]]) -> None:
    """Complete a listed run: what only some runs have, its attempts, and its error if it failed.

    `outcomes`: code, result, kind and time of each recorded outcome, oldest first.
    """
    record.headers, record.tags, record.idempotency_key = extra.headers, list(extra.tags), extra.idempotency_key
    record.kept, record.name = extra.kept, extra.name
    for code, data, kind, settled_us in outcomes:
        record.attempts.append(attempt_of(code, data, settled_us))
        if code == run.FAILED and record.state == run.NAMES[run.FAILED]:
            record.result, record.result_kind = data, kind


def details_bytes(record: RunRecord) -> int:
    """Return about how many bytes the details of a listed run have: its attempts, its error and its options."""
    texts = sum(len(str(value)) for attempt in record.attempts for value in attempt.values())
    headers = sum(len(name) + len(value) for name, value in record.headers.items())
    return texts + headers + len(record.result) + len(record.kept)


def view_of(span: Span, index: int, state: int) -> RunRecord:
    """One run without its payload and attempts. A waiting run is shown as what its span is: leased or delayed."""
    name = run.NAMES[state]
    if state == run.WAITING and span.state in (LEASED, DELAYED):
        name = span.state
    return RunRecord(
        batch_id=span.batch_id,
        index=index,
        environment=span.environment,
        task=span.task,
        queue=span.queue,
        priority=span.priority,
        state=name,
        attempt=span.attempt,
        crashes_count=span.crashes_count,
        due_us=span.due_us,
        expires_us=span.expires_us,
        payload=b"",
        kind=0,
        headers={},
        tags=[],
        idempotency_key="",
        result=b"",
        result_kind=0,
        attempts=[],
        created_us=span.since_us if span.attempt == 1 else 0,
        started_us=0 if name in ("waiting", DELAYED) else span.leased_us,
        session_id=span.session_id,
    )


def serving_since(sessions: Iterable[Session], silent_since_us: int) -> list[Serving]:
    """Return what the sessions serve that sent a heartbeat after a time."""
    return [
        session.serves
        for session in sessions
        if session.serves is not None and max(session.heartbeat_us, session.started_us) > silent_since_us
    ]


def birth_part(span: Span, at_birth: Mapping[int, EndedAtCreation], now_us: int) -> Part:
    """Return the part for the runs of a span that ended at creation."""
    ends = [at_birth[block_offset] for block_offset in block_offsets_of(span)]
    return Part(
        block_id=span.block_id,
        span_id=span.id,
        token=0,
        part_no=0,
        block_offsets=span.block_offsets,
        codes=span.states,
        results=pack([end.result for end in ends], bytes(end.kind for end in ends)),
        settled_us=now_us,
    )


def attempt_of(code: int, data: bytes, settled_us: int) -> dict[str, object]:
    """One recorded attempt: how it ended, when, and why if it failed."""
    ended = "retried" if code == run.MOVED else run.NAMES[code]
    attempt: dict[str, object] = {"ended": ended, "settled_us": settled_us}
    if code != run.COMPLETED and data:
        error = decode(data)
        attempt |= {"type": error.type, "message": error.message}
        if error.trace:
            attempt["trace"] = error.trace
    return attempt


def lease_of(span: Span, first_index: int, gaps: bytes | None, extras: Mapping[int, Extra], items: bytes) -> Lease:
    """Make the lease of a claimed span from its block; `extras` is by block offset."""
    whole = span.block_offsets is None and span.unsettled_count == len(span.states)
    if whole:
        span_slots: Sequence[int] = range(len(span.states))
        block_offsets: Sequence[int] = span_slots
        payloads, kinds = unpack(items)
    else:
        span_slots = unsettled_slots(span)
        offsets = block_offsets_of(span)
        block_offsets = [offsets[span_slot] for span_slot in span_slots]
        payloads, kinds = unpack_some(items, block_offsets)
    if gaps is not None:
        distances = array("I", gaps)
        indexes: Sequence[int] = [first_index + distances[block_offset] for block_offset in block_offsets]
    elif whole:
        indexes = range(first_index, first_index + len(span_slots))
    else:
        indexes = [first_index + block_offset for block_offset in block_offsets]
    by_span_slot = {}
    if extras:
        by_span_slot = {
            span_slot: extras[at] for span_slot, at in zip(span_slots, block_offsets, strict=True) if at in extras
        }
    return Lease(
        span_id=span.id,
        token=span.token,
        batch_id=span.batch_id,
        task=span.task,
        queue=span.queue,
        attempt=span.attempt,
        crashes_count=span.crashes_count,
        at_most_once=span.at_most_once,
        due_us=span.due_us,
        expires_us=span.expires_us,
        whole=whole,
        span_slots=span_slots,
        indexes=indexes,
        payloads=payloads,
        kinds=kinds if kinds is not None and any(kinds) else None,
        extras=by_span_slot,
        runs_count=len(span.states),
        note=span.note,
        dead_letter=span.dead_letter,
    )


def named_lease(span: Span, key: str, span_slot: int, extra: Extra) -> NamedLease:
    """A run of a leased span that a key names."""
    return NamedLease(
        key=key,
        span_id=span.id,
        token=span.token,
        span_slot=span_slot,
        attempt=span.attempt,
        at_most_once=span.at_most_once,
        note=span.note,
        extra=extra,
    )
