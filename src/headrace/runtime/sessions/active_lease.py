"""A lease while its runs execute: which runs have begun, which have ended, and how.

One object per span, a few list stores per run. The marks (one byte per run in memory that outlives the process) say
which runs had begun and not ended when the process ended, so that only those are suspects.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, NamedTuple

from headrace.core.pack import REFERENCE, pack
from headrace.core.page import count_within
from headrace.core.span import RETRY, Settlement, encode_uint16s
from headrace.foundation.limits import MIB
from headrace.store.protocol import Lease

NOT_BEGUN: Final = 0
BEGUN: Final = 1
ENDED: Final = 2


class DirectCall(NamedTuple):
    """A direct call of a task: an async function of one parameter, the decoder of its argument, and the check of its
    result in parts, as `ResultCodec` has them.
    """

    function: Callable[[Any], Coroutine[Any, Any, Any]]
    decode: Callable[[bytes], Any]
    plain_types: frozenset[Any]
    validate: Callable[[bytes], Any]
    checks_values: int
    check_values: Callable[[Any, bytes], None]


class ActiveLease:
    """One leased span. A `lease_offset` counts its runs from 0 in the order of `lease.payloads`.

    An at-most-once run that has begun stays marked until its outcome is durable. A crash before that leaves open
    whether it ran, and then it must not run again. `cancelled_offsets`: runs
    that were cancelled before they began.
    """

    __slots__ = (
        "cancelled_offsets", "codes", "count", "cursor", "dirty_since_us", "dues", "ended_count", "ended_mark",
        "evidence", "has_untaken", "kinds", "lease", "marks", "object_keys", "part_no", "plan", "results", "sent",
        "slot", "span_slots", "suspects",
    )  # fmt: skip

    def __init__(self, lease: Lease, marks: memoryview | bytearray | None = None, slot: int = -1) -> None:
        self.lease = lease
        self.span_slots = lease.span_slots
        self.count = len(lease.payloads)
        self.cursor = 0
        self.ended_count = 0
        self.codes = bytearray(self.count)
        self.results: list[bytes] = [b""] * self.count
        self.kinds: dict[int, int] = {}
        self.dues: dict[int, int] = {}
        self.object_keys: dict[int, str] = {}
        self.sent = bytearray(self.count)
        self.part_no = 0
        self.has_untaken = False
        self.dirty_since_us = 0
        self.slot = slot
        self.plan: DirectCall | None = None
        self.marks: memoryview | bytearray = marks if marks is not None else bytearray(lease.runs_count)
        self.ended_mark = BEGUN if lease.at_most_once else ENDED
        self.suspects: list[int] = []
        self.cancelled_offsets: set[int] = set()
        self.evidence = ""

    def begin(self) -> int:
        """Begin the next run; return its lease offset."""
        lease_offset = self.cursor
        self.cursor = lease_offset + 1
        self.marks[self.span_slots[lease_offset]] = BEGUN
        return lease_offset

    def mark_not_begun(self, lease_offset: int) -> None:
        """Unmark a run that the worker's own stop interrupted: it counts as not begun and is released with the lease.

        An at-most-once run stays marked, since it may have done its work.
        """
        if not self.lease.at_most_once:
            self.marks[self.span_slots[lease_offset]] = NOT_BEGUN

    def drop_last(self, runs_count: int) -> tuple[int, ...]:
        """Remove the last `runs_count` runs, none of which has begun; return their span slots."""
        count = self.count - runs_count
        assert count >= self.cursor
        span_slots = tuple(self.span_slots[count:])
        self.count, self.span_slots = count, self.span_slots[:count]
        del self.codes[count:], self.results[count:], self.sent[count:]
        return span_slots

    @property
    def is_idle(self) -> bool:
        """True if no run is in flight: each has ended or has not begun."""
        return self.ended_count == self.cursor

    @property
    def unbegun_count(self) -> int:
        """Number of runs that have not begun."""
        return self.count - self.cursor

    @property
    def is_over(self) -> bool:
        """True if every run has ended."""
        return self.ended_count == self.count

    def end(
        self, lease_offset: int, code: int, result: bytes, *, kind: int = 0, due_us: int = 0, object_key: str = ""
    ) -> None:
        """Record the end of one run: its state `code`, and `result` (a result or an encoded failure)."""
        self.marks[self.span_slots[lease_offset]] = self.ended_mark
        self.codes[lease_offset] = code
        self.results[lease_offset] = result
        self.ended_count += 1
        if kind:
            self.kinds[lease_offset] = kind
            if kind == REFERENCE:
                self.object_keys[lease_offset] = object_key
        if code == RETRY:
            self.dues[lease_offset] = due_us

    def outcome(self, lease_offset: int) -> tuple[int, int, bytes, int, int, str]:
        """Return how one run ended, for the parent of a child process."""
        return (
            lease_offset,
            self.codes[lease_offset],
            self.results[lease_offset],
            self.kinds.get(lease_offset, 0),
            self.dues.get(lease_offset, 0),
            self.object_keys.get(lease_offset, ""),
        )

    def take_settlement(self, bytes_max: int = MIB) -> Settlement | None:
        """Return outcomes that were not yet taken, as the next part; None if there are none.

        Large results are taken in several parts of at most `bytes_max`, or of one result: readers read whole parts.
        `has_untaken` is true then until the last of them.
        """
        lease = self.lease
        if self.part_no == 0 and self.ended_count == self.count and sum(map(len, self.results)) <= bytes_max:
            codes, results = bytes(self.codes), self.results
            is_cut = self.count < len(lease.span_slots)
            span_slots = None if lease.whole and not is_cut else encode_uint16s(self.span_slots)
            lease_offsets: Sequence[int] = range(self.count)
        else:
            untaken = [n for n, (code, sent) in enumerate(zip(self.codes, self.sent, strict=True)) if code and not sent]
            if not untaken:
                return None
            sizes = (len(self.results[lease_offset]) for lease_offset in untaken)
            lease_offsets = untaken[: count_within(sizes, bytes_max)]
            self.has_untaken = len(lease_offsets) < len(untaken)
            codes = bytes(self.codes[lease_offset] for lease_offset in lease_offsets)
            results = [self.results[lease_offset] for lease_offset in lease_offsets]
            span_slots = encode_uint16s(self.span_slots[lease_offset] for lease_offset in lease_offsets)
            for lease_offset in lease_offsets:
                self.sent[lease_offset] = 1
                self.results[lease_offset] = b""
        kinds = bytes(self.kinds.get(lease_offset, 0) for lease_offset in lease_offsets) if self.kinds else None
        settlement = Settlement(
            span_id=lease.span_id,
            token=lease.token,
            part_no=self.part_no,
            span_slots=span_slots,
            codes=codes,
            results=pack(results, kinds),
            dues_us=tuple(self.dues[lease_offset] for lease_offset in lease_offsets if lease_offset in self.dues)
            if self.dues
            else (),
            object_keys=tuple(self.object_keys[n] for n in lease_offsets if n in self.object_keys)
            if self.object_keys
            else (),
        )
        self.part_no += 1
        self.dirty_since_us = 0
        return settlement


class RetractedRuns(NamedTuple):
    """Runs that will not begin in this process: whole leases, and span slots of others."""

    whole: list[ActiveLease]
    parts: list[tuple[ActiveLease, tuple[int, ...]]]
    runs_count: int


def retract(ready: deque[ActiveLease], runs_count: int) -> RetractedRuns:
    """Take up to `runs_count` runs that have not begun out of the queue, the last first."""
    whole: list[ActiveLease] = []
    parts: list[tuple[ActiveLease, tuple[int, ...]]] = []
    remaining_count = runs_count
    for active in reversed(list(ready)):
        count = min(remaining_count, active.unbegun_count)
        if not count:
            break
        if count == active.count:
            whole.append(ready.pop())
        else:
            parts.append((active, active.drop_last(count)))
        remaining_count -= count
    return RetractedRuns(whole, parts, runs_count - remaining_count)
