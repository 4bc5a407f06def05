"""Leased activations in memory: those in line, by queue, and those in somebody's hands, by the id they went out under.

Rule 1: nothing here waits or asks a store; what must be told to one is answered, and told by the dispatcher.
Rule 2: of two queues that a wish covers the one goes first whose runs were claimed first, so the order between queues
is the order of claims, and inside a queue it is the queue's own.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Final, TypeVar

from headrace.core.activation import SEPARATOR, Delivery, Note, note_of, queue_of, wire_id
from headrace.core.block import Extra
from headrace.core.pack import JSON
from headrace.runtime.clock import Timer
from headrace.runtime.dispatch.report_outcome import COMPLETE, ReportOutcome, ReportWaiter
from headrace.runtime.sessions.active_lease import ActiveLease

T = TypeVar("T")

NO_EXTRA: Final = Extra()
NEVER: Final = -1
BUCKET_US: Final = 100_000


@dataclass(frozen=True)
class QueueFilter:
    """Whose activations somebody asks for: of all applications, of one, or of some namespaces of one."""

    application: str | None = None
    namespaces: tuple[str, ...] | None = None

    @cached_property
    def is_answerable(self) -> bool:
        """A namespace alone names nothing: two applications may have one of that name."""
        if self.application is None:
            return self.namespaces is None
        return SEPARATOR not in self.application

    @cached_property
    def prefix(self) -> str:
        """How the names of all queues begin that are asked for."""
        return "" if self.application is None else self.application + SEPARATOR

    @cached_property
    def queues(self) -> list[str] | None:
        """The queues that are asked for; None for all that begin with the prefix."""
        if self.namespaces is None or self.application is None:
            return None
        return [queue_of(self.application, namespace) for namespace in self.namespaces]


class RequestRate:
    """How fast one wish is granted, and what of the leases that were claimed for it is in line.

    `waiting`: who waits for the claim that is under way, and `silence`, when they have waited too long. `half_count`:
    when so many are left in line, it is time to claim more, `NEVER` to wait until somebody asks.
    """

    __slots__ = (
        "ahead_count", "claimed_us", "empty_rings", "empty_until_us", "half_count", "is_claiming", "leased_count",
        "left_count", "silence", "waiting", "wish",
    )  # fmt: skip

    def __init__(self, wish: QueueFilter, ahead_count: int) -> None:
        self.wish = wish
        self.ahead_count = ahead_count
        self.left_count = 0
        self.leased_count = 0
        self.half_count = NEVER
        self.claimed_us = 0
        self.is_claiming = False
        self.waiting: list[asyncio.Future[None]] = []
        self.silence: Timer | None = None
        self.empty_rings = -1
        self.empty_until_us = 0

    def leased(self, count: int, *, is_more: bool) -> None:
        """So many were claimed; `is_more`: to be claimed when half of them is used up."""
        self.left_count += count
        self.leased_count = self.left_count
        self.half_count = count // 2 if is_more else NEVER

    def overlaps(self, wish: QueueFilter) -> bool:
        """Whether what is claimed for this wish may be what another one waits for."""
        return None in (self.wish.application, wish.application) or self.wish.application == wish.application

    def lasts_us(self, now_us: int) -> int:
        """How long `ahead_count` runs last, as fast as they went since the last claim."""
        used_count = max(self.leased_count - self.left_count, 1)
        return (now_us - self.claimed_us) * self.ahead_count // used_count


class BufferedLease:
    """A lease whose runs are handed out one by one. `claimed_no`: leases are counted as they come.

    `pace`: whose claim it was. `suffix`: what the ids of its runs go out with; none for a first delivery.
    """

    __slots__ = (
        "bytes_count",
        "claimed_no",
        "is_left",
        "note",
        "open_count",
        "pace",
        "part_no",
        "queue",
        "since_us",
        "suffix",
        "work",
    )

    def __init__(self, work: ActiveLease, claimed_no: int, now_us: int, pace: RequestRate) -> None:
        self.work = work
        self.pace = pace
        self.queue = work.lease.queue
        self.claimed_no = claimed_no
        self.note: Note = note_of(work.lease.note)
        self.suffix = wire_id(Delivery("", work.lease.attempt, self.note.overdue_count))
        self.open_count = 0
        self.part_no = 0
        self.since_us = now_us
        self.bytes_count = sum(map(len, work.lease.payloads))
        self.is_left = False

    @property
    def is_over(self) -> bool:
        """Nothing of it is in line or in anybody's hands."""
        return not self.open_count and not self.work.unbegun_count


class DeliveredRun:
    """One run in somebody's hands. `name` is the id it went out under, `place` where it is in its lease; `is_claimed`:
    on its way to a worker still.

    `extra` is what the activation was kept with. Once it is ended: `verdict`, what it came to, `part_no`, the number of
    a settlement that begins with it, and `answer`, who waits for that.
    """

    __slots__ = (
        "answer", "deadline_us", "extra", "held", "is_claimed", "is_ended", "kind", "name", "number", "part_no",
        "payload", "span_slot", "verdict",
    )  # fmt: skip

    def __init__(self, held: BufferedLease, number: int, span_slot: int, extra: Extra) -> None:
        lease = held.work.lease
        self.held = held
        self.number = number
        self.span_slot = span_slot
        self.extra = extra
        self.name = extra.idempotency_key + held.suffix
        self.payload = lease.payloads[number]
        self.kind = JSON if lease.kinds is None else lease.kinds[number]
        self.deadline_us = 0
        self.is_claimed = False
        self.is_ended = False
        self.verdict = COMPLETE
        self.part_no = 0
        self.answer: ReportWaiter | None = None

    def end(self, verdict: ReportOutcome, answer: ReportWaiter | None) -> None:
        """Its end is on its way into the store."""
        self.is_ended = True
        self.verdict = verdict
        self.answer = answer
        self.part_no = self.held.part_no
        self.held.part_no += 1

    @property
    def attempt(self) -> int:
        """Which attempt this is, from 1."""
        return self.held.work.lease.attempt


class LeaseBuffer:
    """Leased runs that nobody has been given: of each application its leases, in the order they were claimed."""

    def __init__(self) -> None:
        self._leases: dict[str, deque[BufferedLease]] = {}
        self._returned: dict[str, deque[DeliveredRun]] = {}
        self.bytes_count = 0

    def __len__(self) -> int:
        """Runs in line."""
        waiting = sum(held.work.unbegun_count for line in self._leases.values() for held in line)
        return waiting + sum(map(len, self._returned.values()))

    def add(self, held: BufferedLease) -> None:
        """A lease has come."""
        self._leases.setdefault(_application_of(held.queue), deque()).append(held)
        self.bytes_count += held.bytes_count

    def put_back(self, handout: DeliveredRun, now_us: int) -> None:
        """A run did not reach the worker it was meant for: it goes first."""
        handout.held.since_us = now_us
        self._returned.setdefault(_application_of(handout.held.queue), deque()).appendleft(handout)

    def take(self, wish: QueueFilter, now_us: int) -> DeliveredRun | None:
        """The next run that a wish covers, begun; None when there is none in memory."""
        if self._returned and (handout := self._take_returned(wish)) is not None:
            return handout
        held = self._first(wish)
        return None if held is None else self._begin(held, now_us)

    def has(self, wish: QueueFilter) -> bool:
        """Whether there is a leased run in line that nobody has been given yet."""
        return self._first(wish) is not None

    def _take_returned(self, wish: QueueFilter) -> DeliveredRun | None:
        lines = list(self._returned.values())
        if wish.application is not None:
            lines = [self._returned.get(wish.prefix, deque())]
        for returned in lines:
            for handout in returned:
                if wish.queues is None or handout.held.queue in wish.queues:
                    returned.remove(handout)
                    self._keep(self._returned, _application_of(handout.held.queue), returned)
                    return handout
        return None

    def _first(self, wish: QueueFilter) -> BufferedLease | None:
        """The lease that was claimed first of those which a wish covers."""
        if wish.application is None:
            return min((line[0] for line in self._leases.values()), key=lambda held: held.claimed_no, default=None)
        queues = wish.queues
        for held in self._leases.get(wish.prefix, ()):
            if queues is None or held.queue in queues:
                return held
        return None

    def _begin(self, held: BufferedLease, now_us: int) -> DeliveredRun:
        work = held.work
        number = work.begin()
        held.pace.left_count -= 1
        held.open_count += 1
        held.since_us = now_us
        span_slot = work.lease.span_slots[number]
        handout = DeliveredRun(held, number, span_slot, work.lease.extras.get(span_slot, NO_EXTRA))
        work.lease.payloads[number] = b""
        self.bytes_count -= len(handout.payload)
        if not work.unbegun_count:
            application = _application_of(held.queue)
            line = self._leases[application]
            line.remove(held)
            self._keep(self._leases, application, line)
        return handout

    def cut(self, is_cut: Callable[[BufferedLease], bool]) -> list[tuple[BufferedLease, tuple[int, ...]]]:
        """Take what nobody has been given of some leases out of line; answers the places of their runs."""
        found = []
        for application, line in list(self._leases.items()):
            for held in [held for held in line if is_cut(held)]:
                work = held.work
                self.bytes_count -= sum(map(len, work.lease.payloads[work.cursor : work.count]))
                held.pace.left_count -= work.unbegun_count
                found.append((held, work.drop_last(work.unbegun_count)))
                line.remove(held)
            self._keep(self._leases, application, line)
        for application, returned in list(self._returned.items()):
            for handout in [handout for handout in returned if is_cut(handout.held)]:
                handout.held.open_count -= 1
                found.append((handout.held, (handout.span_slot,)))
                returned.remove(handout)
            self._keep(self._returned, application, returned)
        return found

    @staticmethod
    def _keep(lines: dict[str, deque[T]], application: str, line: deque[T]) -> None:
        """An application of which nothing is in line is not known here."""
        if not line:
            del lines[application]

    def clear(self) -> None:
        """What is in line is others' now."""
        for line in self._leases.values():
            for held in line:
                held.pace.left_count = 0
        self._leases.clear()
        self._returned.clear()
        self.bytes_count = 0


def _application_of(queue: str) -> str:
    """How the name of a queue begins, as `QueueFilter.prefix` says it; of one without an application the whole name."""
    return queue[: queue.find(SEPARATOR) + 1] or queue


class DeliveryDeadlines:
    """Who must be heard of by when, in buckets of a tenth of a second, so that it holds nobody who was heard of."""

    def __init__(self) -> None:
        self._buckets: dict[int, dict[DeliveredRun, None]] = {}
        self._order: list[int] = []

    def add(self, handout: DeliveredRun, deadline_us: int) -> None:
        """From now on this is when."""
        if handout.deadline_us:
            self.remove(handout)
        handout.deadline_us = deadline_us
        no = deadline_us // BUCKET_US
        bucket = self._buckets.get(no)
        if bucket is None:
            bucket = self._buckets[no] = {}
            heapq.heappush(self._order, no)
        bucket[handout] = None

    def remove(self, handout: DeliveredRun) -> None:
        """It was heard of, or is nobody's any more."""
        bucket = self._buckets.get(handout.deadline_us // BUCKET_US)
        if bucket is not None:
            bucket.pop(handout, None)

    @property
    def next_us(self) -> int | None:
        """The next moment at which somebody may be overdue."""
        while self._order and not self._buckets[self._order[0]]:
            del self._buckets[heapq.heappop(self._order)]
        if not self._order:
            return None
        return min(handout.deadline_us for handout in self._buckets[self._order[0]])

    def overdue(self, now_us: int, count_max: int) -> list[DeliveredRun]:
        """Those who were not heard of in time, at most so many."""
        found: list[DeliveredRun] = []
        while len(found) < count_max and (next_us := self.next_us) is not None and next_us <= now_us:
            bucket = self._buckets[self._order[0]]
            late = [handout for handout in bucket if handout.deadline_us <= now_us][: count_max - len(found)]
            for handout in late:
                del bucket[handout]
            found += late
        return found

    def clear(self) -> None:
        """Nobody is waited for any more."""
        self._buckets.clear()
        self._order.clear()
