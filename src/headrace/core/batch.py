"""The life of a batch, decided in one place.

    open -> sealed -> completed
      |        `--> cancelled          (a batch that is cancelled or abandoned ends when its last lease has ended)
      `--> abandoned

Rule 1: seal, settlement and completion are one decision over one value. `advanced` runs after every change, so a
batch whose last outcome came before its seal is completed by the seal, and one whose seal came first by its last
outcome; there is no third order and no second store to disagree.
Rule 2: a batch completes once. Only `redrive`, which a person asks for, opens a finished batch again.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from headrace.core.index_set import IndexSet
from headrace.core.span import Counts
from headrace.foundation.errors import Conflict, InvalidInput

OPEN: Final = "open"
SEALED: Final = "sealed"
COMPLETED: Final = "completed"
CANCELLED: Final = "cancelled"
ABANDONED: Final = "abandoned"
STATES: Final = (OPEN, SEALED, COMPLETED, CANCELLED, ABANDONED)

LISTED: Final = "batch"
STREAM: Final = "stream"
SINGLE: Final = "single"
"""Kinds: a `batch` is created, streamed and sealed; a `stream` holds the single enqueues of one session."""


class BatchRecord(msgspec.Struct, kw_only=True):
    """One row of the batch table, without its set of received indexes.

    `expected_count` is None while the batch is open-ended. `order_bases`: the clock each queue showed when the
    batch first met it. `cursor`: where its source stood at the last append, for whoever feeds it.
    """

    id: str
    environment: str = "default"
    key: str | None = None
    kind: str = LISTED
    task: str = ""
    state: str = OPEN
    expected_count: int | None = None
    received_count: int = 0
    counts: Counts = Counts()
    order_bases: dict[str, int] = {}
    cursor: bytes = b""
    metadata: dict[str, object] = {}
    session_id: str = ""
    created_us: int = 0
    appended_us: int = 0
    sealed_us: int = 0
    finished_us: int = 0
    seal_timeout_ms: int = 0

    @property
    def unsettled_count(self) -> int:
        """Received runs that have no outcome yet, waiting or leased."""
        return self.received_count - self.counts.settled

    @property
    def is_stopped(self) -> bool:
        """Nothing of this batch may start any more."""
        return self.state in (CANCELLED, ABANDONED)

    @property
    def is_finished(self) -> bool:
        """The last outcome is in and none will follow."""
        return self.finished_us > 0


class Ledger(NamedTuple):
    """Where every run of a batch is: `expected = missing + waiting + leased + completed + failed + …`."""

    expected: int
    missing: int
    waiting: int
    leased: int
    completed: int
    failed: int
    cancelled: int
    expired: int

    @property
    def balances(self) -> bool:
        """The law that holds at every commit."""
        return self.expected == sum(self[1:])


def ledger(batch: BatchRecord, *, leased_count: int) -> Ledger:
    """The ledger from the batch's counters; `leased_count` comes from its spans, since a claim counts nothing."""
    expected = batch.received_count if batch.expected_count is None else batch.expected_count
    return Ledger(
        expected=expected,
        missing=expected - batch.received_count,
        waiting=batch.unsettled_count - leased_count,
        leased=leased_count,
        completed=batch.counts.completed,
        failed=batch.counts.failed,
        cancelled=batch.counts.cancelled,
        expired=batch.counts.expired,
    )


def check_created(*, expected_count: int | None, runs_max: int) -> None:
    """Raise unless a batch of this size may be created; None is open-ended."""
    if expected_count is not None and not 0 <= expected_count <= runs_max:
        raise InvalidInput(
            f"a batch holds from 0 to {runs_max} runs, not {expected_count}",
            hint="raise batch_runs_max, or make several batches",
        )


def check_append(batch: BatchRecord, *, first_index: int, last_index: int, runs_max: int) -> None:
    """Raise unless runs from `first_index` to `last_index` may be offered to this batch.

    A sealed batch takes a re-stream of what it has (which adds nothing); a cancelled or abandoned one takes
    nothing. An index at or past the announced count is refused before any state changes.
    """
    if batch.is_stopped:
        raise Conflict(
            f"the batch is {batch.state}; it takes no more items",
            hint="create a new batch",
            batch_id=batch.id,
        )
    bound = runs_max if batch.expected_count is None or batch.kind == STREAM else batch.expected_count
    if first_index < 0 or last_index >= bound:
        raise InvalidInput(
            f"index {first_index if first_index < 0 else last_index} is outside the batch, which holds {bound} runs",
            hint="indexes run from 0 to the announced count less one",
            batch_id=batch.id,
        )


def appended(
    batch: BatchRecord, *, accepted_count: int, born: Counts, cursor: bytes | None, now_us: int
) -> BatchRecord:
    """The batch after `accepted_count` new runs became durable, `born` of them at their end at birth."""
    if accepted_count and batch.state != OPEN:
        raise Conflict(f"the batch is {batch.state}; it takes no more items", batch_id=batch.id)
    after = msgspec.structs.replace(
        batch,
        received_count=batch.received_count + accepted_count,
        counts=batch.counts.plus(born),
        appended_us=now_us,
        cursor=batch.cursor if cursor is None else cursor,
    )
    return advanced(after, now_us)


def is_whole(batch: BatchRecord) -> bool:
    """Whether an open batch has received all that it announced."""
    return batch.state == OPEN and batch.received_count == batch.expected_count


def sealed(batch: BatchRecord, received: IndexSet, *, expected_count: int | None, now_us: int) -> BatchRecord:
    """Close the batch at `expected_count` runs, or at what was announced, or at what was received.

    Idempotent: a sealed or completed batch answers itself. Raises `Conflict`, changing nothing, while indexes
    are missing, when the count contradicts an earlier one, and when the batch was cancelled or abandoned.
    """
    if batch.is_stopped:
        raise Conflict(f"the batch is {batch.state} and can't be sealed", batch_id=batch.id)
    announced = batch.expected_count if expected_count is None else expected_count
    if batch.expected_count is not None and announced != batch.expected_count:
        raise Conflict(
            f"the batch holds {batch.expected_count} runs, not {announced}",
            hint="seal with the count that was announced, or without one",
            batch_id=batch.id,
        )
    if batch.state in (SEALED, COMPLETED):
        return batch
    if announced is None:
        announced = batch.received_count
    missing = received.missing(announced, 3) if batch.kind == LISTED else []
    if batch.received_count != announced or missing:
        ranges = ", ".join(f"{start}..{end - 1}" for start, end in missing)
        raise Conflict(
            f"{batch.received_count} of {announced} runs are durable; missing: {ranges or 'none, there are too many'}",
            hint="send the missing indexes, then seal again",
            batch_id=batch.id,
        )
    after = msgspec.structs.replace(batch, state=SEALED, expected_count=announced, sealed_us=now_us)
    return advanced(after, now_us)


def settled(batch: BatchRecord, counts: Counts, now_us: int) -> BatchRecord:
    """The batch after some of its runs came to an end."""
    return advanced(msgspec.structs.replace(batch, counts=batch.counts.plus(counts)), now_us)


def stopped(batch: BatchRecord, state: str, now_us: int) -> BatchRecord:
    """The batch cancelled by a person or abandoned past its seal deadline; finished batches stay as they are."""
    if state not in (CANCELLED, ABANDONED):
        raise InvalidInput(f"a batch is stopped as {CANCELLED} or {ABANDONED}, not as {state!r}", batch_id=batch.id)
    if batch.is_finished or batch.is_stopped:
        return batch
    return advanced(msgspec.structs.replace(batch, state=state), now_us)


def left(batch: BatchRecord, now_us: int) -> BatchRecord:
    """An open batch after the session that owned it ended, in good order or not.

    A stream is sealed at what it received: all of that was asked for. A batch whose items were still coming is
    abandoned: nobody else can send the rest.
    """
    if batch.state != OPEN:
        return batch
    if batch.kind != STREAM:
        return stopped(batch, ABANDONED, now_us)
    return advanced(
        msgspec.structs.replace(batch, state=SEALED, expected_count=batch.received_count, sealed_us=now_us), now_us
    )


def redriven(batch: BatchRecord, counts: Counts) -> BatchRecord:
    """A batch some of whose ended runs were sent round again: sealed once more until they end."""
    state = SEALED if batch.state == COMPLETED else batch.state
    return msgspec.structs.replace(batch, state=state, counts=batch.counts.plus(counts), finished_us=0)


def advanced(batch: BatchRecord, now_us: int) -> BatchRecord:
    """Completion, decided after every change: nothing is unsettled, and nothing more can come."""
    if batch.is_finished or batch.state == OPEN or batch.unsettled_count:
        return batch
    state = COMPLETED if batch.state == SEALED else batch.state
    return msgspec.structs.replace(batch, state=state, finished_us=now_us)


def seal_due_us(batch: BatchRecord) -> int | None:
    """When an open batch counts as abandoned: `seal_timeout_ms` after its last accepted item. None: never."""
    if batch.state != OPEN or not batch.seal_timeout_ms:
        return None
    return max(batch.created_us, batch.appended_us) + batch.seal_timeout_ms * 1_000
