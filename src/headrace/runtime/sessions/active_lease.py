"""A lease while it is being run: which runs began, which ended and how.

One object a span, a few list stores a run. The marks (one byte a run in memory that outlives the process) say
which runs had begun and not ended when a process died, so that only those are suspects.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final, NamedTuple

from headrace.core.pack import REFERENCE, pack
from headrace.core.span import RETRY, Settlement, encode_uint16s
from headrace.store.protocol import Lease

NOT_BEGUN: Final = 0
BEGUN: Final = 1
ENDED: Final = 2


class DirectCall(NamedTuple):
    """The straight way to call a task: an async function of one argument, and what decodes that."""

    function: Callable[[Any], Coroutine[Any, Any, Any]]
    decode: Callable[[bytes], Any]


class ActiveLease:
    """One leased span. `number` counts its runs from 0 in the order of `lease.payloads`.

    An at-most-once run that began stays marked so until its outcome is durable: a crash before that leaves it open
    whether it ran, and then it must not run again. `unwanted`: numbers that were cancelled before they began.
    """

    __slots__ = (
        "codes", "count", "cursor", "dirty_since_us", "dues", "ended_count", "ended_mark", "evidence", "kinds", "lease",
        "marks", "object_keys", "part_no", "plan", "results", "sent", "slot", "span_slots", "suspects", "unwanted",
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
        self.dirty_since_us = 0
        self.slot = slot
        self.plan: DirectCall | None = None
        self.marks: memoryview | bytearray = marks if marks is not None else bytearray(lease.runs_count)
        self.ended_mark = BEGUN if lease.at_most_once else ENDED
        self.suspects: list[int] = []
        self.unwanted: set[int] = set()
        self.evidence = ""

    def begin(self) -> int:
        """Hand out the next run; answers its number."""
        number = self.cursor
        self.cursor = number + 1
        self.marks[self.span_slots[number]] = BEGUN
        return number

    def give_back(self, number: int) -> None:
        """A run was interrupted by its worker's own stop: it counts as never begun and goes back with the lease.

        Not so an at-most-once run, which may have done its work.
        """
        if not self.lease.at_most_once:
            self.marks[self.span_slots[number]] = NOT_BEGUN

    def cut(self, runs_count: int) -> tuple[int, ...]:
        """Let go of the last `runs_count` runs, which nobody has begun; answers their places."""
        count = self.count - runs_count
        assert count >= self.cursor
        span_slots = tuple(self.span_slots[count:])
        self.count, self.span_slots = count, self.span_slots[:count]
        del self.codes[count:], self.results[count:], self.sent[count:]
        return span_slots

    @property
    def is_idle(self) -> bool:
        """Nothing of it is under way: each run has ended or was not begun."""
        return self.ended_count == self.cursor

    @property
    def unbegun_count(self) -> int:
        """Runs that nobody has begun."""
        return self.count - self.cursor

    @property
    def is_over(self) -> bool:
        """Every run has ended."""
        return self.ended_count == self.count

    def end(
        self, number: int, code: int, result: bytes, *, kind: int = 0, due_us: int = 0, object_key: str = ""
    ) -> None:
        """One run came to `code` with `result` (a result or an encoded failure)."""
        self.marks[self.span_slots[number]] = self.ended_mark
        self.codes[number] = code
        self.results[number] = result
        self.ended_count += 1
        if kind:
            self.kinds[number] = kind
            if kind == REFERENCE:
                self.object_keys[number] = object_key
        if code == RETRY:
            self.dues[number] = due_us

    def outcome(self, number: int) -> tuple[int, int, bytes, int, int, str]:
        """How one run ended, for the parent of a child process."""
        return (
            number,
            self.codes[number],
            self.results[number],
            self.kinds.get(number, 0),
            self.dues.get(number, 0),
            self.object_keys.get(number, ""),
        )

    def take_settlement(self) -> Settlement | None:
        """The outcomes not yet handed over, as the next part; None when there are none."""
        lease = self.lease
        if self.part_no == 0 and self.ended_count == self.count:
            codes, results = bytes(self.codes), self.results
            is_cut = self.count < len(lease.span_slots)
            span_slots = None if lease.whole and not is_cut else encode_uint16s(self.span_slots)
            numbers: list[int] | range = range(self.count)
        else:
            numbers = [n for n, (code, sent) in enumerate(zip(self.codes, self.sent, strict=True)) if code and not sent]
            if not numbers:
                return None
            codes = bytes(self.codes[number] for number in numbers)
            results = [self.results[number] for number in numbers]
            span_slots = encode_uint16s(self.span_slots[number] for number in numbers)
            for number in numbers:
                self.sent[number] = 1
                self.results[number] = b""
        kinds = bytes(self.kinds.get(number, 0) for number in numbers) if self.kinds else None
        settlement = Settlement(
            span_id=lease.span_id,
            token=lease.token,
            part_no=self.part_no,
            span_slots=span_slots,
            codes=codes,
            results=pack(results, kinds),
            dues_us=tuple(self.dues[number] for number in numbers if number in self.dues) if self.dues else (),
            object_keys=tuple(self.object_keys[n] for n in numbers if n in self.object_keys)
            if self.object_keys
            else (),
        )
        self.part_no += 1
        self.dirty_since_us = 0
        return settlement


class RetractedRuns(NamedTuple):
    """Runs that will not begin here any more: whole leases, and places of others."""

    whole: list[ActiveLease]
    parts: list[tuple[ActiveLease, tuple[int, ...]]]
    runs_count: int


def retract(ready: deque[ActiveLease], runs_count: int) -> RetractedRuns:
    """Take `runs_count` runs that nobody has begun out of the line, the last first; fewer when there are fewer."""
    whole: list[ActiveLease] = []
    parts: list[tuple[ActiveLease, tuple[int, ...]]] = []
    left = runs_count
    for work in reversed(list(ready)):
        count = min(left, work.unbegun_count)
        if not count:
            break
        if count == work.count:
            whole.append(ready.pop())
        else:
            parts.append((work, work.cut(count)))
        left -= count
    return RetractedRuns(whole, parts, runs_count - left)
