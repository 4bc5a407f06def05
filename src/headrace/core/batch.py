"""The states of a batch, decided in one place.

    open -> sealed -> completed
      |        `--> cancelled          (a cancelled or abandoned batch ends when its last lease has ended)
      `--> abandoned

Rule 1: seal, settlement and completion are one decision over one value. `advanced` runs after every change. A batch
whose last outcome came before its seal is completed by the seal, one whose seal came first by its last outcome. There
is no third order, and no second store that could disagree. Rule 2: a batch completes once. Only `redrive`, which a
person requests, opens a finished batch again.
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

    `expected_count` is None while the batch is open-ended. `order_bases`: the clock of each queue when the batch first
    used it. `cursor`: the position of its source at the last append, for the feed.
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
        """Number of received runs without outcome, waiting or leased."""
        return self.received_count - self.counts.settled

    @property
    def is_stopped(self) -> bool:
        """True if no run of this batch may start any more."""
        return self.state in (CANCELLED, ABANDONED)

    @property
    def is_finished(self) -> bool:
        """True if the last outcome is recorded and none will follow."""
        return self.finished_us > 0


class Ledger(NamedTuple):
    """The counts of all runs of a batch: `expected = missing + waiting + leased + completed + failed + …`."""

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
        """True if the counts add up, which they do at every commit."""
        return self.expected == sum(self[1:])


def ledger(batch: BatchRecord, *, leased_count: int) -> Ledger:
    """Return the ledger from the batch's counters; `leased_count` comes from its spans (R14, a claim changes no
    counters).
    """
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
    """Raise `InvalidInput` unless a batch of this size may be created; None is open-ended."""
    if expected_count is not None and not 0 <= expected_count <= runs_max:
        raise InvalidInput(
            f"expected_count: expected 0 to {runs_max} runs, got {expected_count}",
            hint="raise batch_runs_max, or create several batches",
        )


def check_append(batch: BatchRecord, *, first_index: int, last_index: int, runs_max: int) -> None:
    """Raise unless runs from `first_index` to `last_index` may be appended to this batch.

    A sealed batch accepts runs that it already has (which adds nothing); a cancelled or abandoned one accepts nothing.
    An index at or past the announced count is refused before any state changes.
    """
    if batch.is_stopped:
        raise Conflict(
            f"the batch is {batch.state} and accepts no more items",
            hint="create a new batch",
            batch_id=batch.id,
        )
    bound = runs_max if batch.expected_count is None or batch.kind == STREAM else batch.expected_count
    if first_index < 0 or last_index >= bound:
        raise InvalidInput(
            f"index {first_index if first_index < 0 else last_index} is not in the batch, which holds {bound} runs",
            hint="indexes run from 0 to the announced count minus one",
            batch_id=batch.id,
        )


def appended(
    batch: BatchRecord, *, accepted_count: int, created_with_outcome: Counts, cursor: bytes | None, now_us: int
) -> BatchRecord:
    """Return a batch after `accepted_count` new runs, `created_with_outcome` of which were created with an outcome."""
    if accepted_count and batch.state != OPEN:
        raise Conflict(f"the batch is {batch.state} and accepts no more items", batch_id=batch.id)
    after = msgspec.structs.replace(
        batch,
        received_count=batch.received_count + accepted_count,
        counts=batch.counts.plus(created_with_outcome),
        appended_us=now_us,
        cursor=batch.cursor if cursor is None else cursor,
    )
    return advanced(after, now_us)


def is_whole(batch: BatchRecord) -> bool:
    """True if an open batch has received all runs that it announced."""
    return batch.state == OPEN and batch.received_count == batch.expected_count


def sealed(batch: BatchRecord, received: IndexSet, *, expected_count: int | None, now_us: int) -> BatchRecord:
    """Seal the batch at `expected_count` runs, or at the announced number, or at the received number.

    Idempotent: a sealed or completed batch is returned unchanged. Raises `Conflict`, without a change, while indexes
    are missing, if the count contradicts an earlier one, and if the batch was cancelled or abandoned.
    """
    if batch.is_stopped:
        raise Conflict(f"the batch is {batch.state} and can't be sealed", batch_id=batch.id)
    announced = batch.expected_count if expected_count is None else expected_count
    if batch.expected_count is not None and announced != batch.expected_count:
        raise Conflict(
            f"the batch was announced with {batch.expected_count} runs, can't be sealed with {announced}",
            hint="seal with the announced count, or without a count",
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
    """Return the batch after some of its runs got outcomes."""
    return advanced(msgspec.structs.replace(batch, counts=batch.counts.plus(counts)), now_us)


def stopped(batch: BatchRecord, state: str, now_us: int) -> BatchRecord:
    """Return the batch cancelled by a person or abandoned past its seal deadline; a finished batch is returned
    unchanged.
    """
    if state not in (CANCELLED, ABANDONED):
        raise InvalidInput(
            f"expected {CANCELLED} or {ABANDONED} as the state of a stopped batch, got {state!r}", batch_id=batch.id
        )
    if batch.is_finished or batch.is_stopped:
        return batch
    return advanced(msgspec.structs.replace(batch, state=state), now_us)


def owner_ended(batch: BatchRecord, now_us: int) -> BatchRecord:
    """Return an open batch after its owner's session ended, gracefully or not.

    A stream is sealed at what it received: every run in it was requested. A batch whose items were still arriving is
    abandoned, since no other process can send the rest.
    """
    if batch.state != OPEN:
        return batch
    if batch.kind != STREAM:
        return stopped(batch, ABANDONED, now_us)
    return advanced(
        msgspec.structs.replace(batch, state=SEALED, expected_count=batch.received_count, sealed_us=now_us), now_us
    )


def redriven(batch: BatchRecord, counts: Counts) -> BatchRecord:
    """Return a batch some of whose ended runs were redriven: sealed again until they end."""
    state = SEALED if batch.state == COMPLETED else batch.state
    return msgspec.structs.replace(batch, state=state, counts=batch.counts.plus(counts), finished_us=0)


def advanced(batch: BatchRecord, now_us: int) -> BatchRecord:
    """Complete or end the batch if nothing is unsettled and nothing more can come; decided after every change."""
    if batch.is_finished or batch.state == OPEN or batch.unsettled_count:
        return batch
    state = COMPLETED if batch.state == SEALED else batch.state
    return msgspec.structs.replace(batch, state=state, finished_us=now_us)


def seal_due_us(batch: BatchRecord) -> int | None:
    """Return when an open batch counts as abandoned: `seal_timeout_ms` after its last accepted item. None: never."""
    if batch.state != OPEN or not batch.seal_timeout_ms:
        return None
    return max(batch.created_us, batch.appended_us) + batch.seal_timeout_ms * 1_000
