"""The lease buffer: leased activations in memory, undelivered ones by queue, delivered ones by the id of their
delivery.

Rule 1: nothing here waits or calls a store. A method returns what must be written, and the dispatcher writes it. Rule
2: of several queues that a filter selects, the run comes first whose lease was claimed first. The order between queues
is the order of claims; inside a queue it is the queue's own.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Protocol, TypeVar

from headrace.core.activation import SEPARATOR, Delivery, Note, fenced_id, note_of, queue_of
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
    """The queues that a request selects: of all applications, of one, or of some namespaces of one."""

    application: str | None = None
    namespaces: tuple[str, ...] | None = None

    @cached_property
    def is_answerable(self) -> bool:
        """False for a namespace without an application, which is ambiguous."""
        if self.application is None:
            return self.namespaces is None
        return SEPARATOR not in self.application

    @cached_property
    def prefix(self) -> str:
        """Prefix of the names of the selected queues."""
        return "" if self.application is None else self.application + SEPARATOR

    @cached_property
    def queues(self) -> list[str] | None:
        """The selected queues; None for all whose names begin with the prefix."""
        if self.namespaces is None or self.application is None:
            return None
        return [queue_of(self.application, namespace) for namespace in self.namespaces]


class RequestRate:
    """The request rate of one filter, and the buffered runs of the leases that were claimed for it.

    `waiting`: the requests that wait for the claim in flight, and `silence`, the timer that ends their wait.
    `half_count`: when this many runs are left, more are claimed; `NEVER` to wait for a request instead.
    """

    __slots__ = (
        "ahead_count",
        "claimed_us",
        "empty_rings",
        "empty_until_us",
        "half_count",
        "is_claiming",
        "leased_count",
        "left_count",
        "queue_filter",
        "silence",
        "waiting",
    )  # fmt: skip

    def __init__(self, queue_filter: QueueFilter, ahead_count: int) -> None:
        self.queue_filter = queue_filter
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
        """Count claimed runs; `is_more`: claim again when half of them were delivered."""
        self.left_count += count
        self.leased_count = self.left_count
        self.half_count = count // 2 if is_more else NEVER

    def overlaps(self, queue_filter: QueueFilter) -> bool:
        """True if runs claimed for this filter may satisfy another one."""
        return (
            None in (self.queue_filter.application, queue_filter.application)
            or self.queue_filter.application == queue_filter.application
        )

    def lasts_us(self, now_us: int) -> int:
        """Return how long `ahead_count` runs last, at the rate since the last claim, in microseconds."""
        used_count = max(self.leased_count - self.left_count, 1)
        return (now_us - self.claimed_us) * self.ahead_count // used_count


class BufferedLease:
    """A lease whose runs are delivered one by one. `claimed_no` numbers the leases in the order of their claims.

    `rate`: the rate of the filter that it was claimed for.
    """

    __slots__ = (
        "active",
        "bytes_count",
        "claimed_no",
        "is_left",
        "note",
        "open_count",
        "part_no",
        "queue",
        "rate",
        "since_us",
    )

    def __init__(self, active: ActiveLease, claimed_no: int, now_us: int, rate: RequestRate) -> None:
        self.active = active
        self.rate = rate
        self.queue = active.lease.queue
        self.claimed_no = claimed_no
        self.note: Note = note_of(active.lease.note)
        self.open_count = 0
        self.part_no = 0
        self.since_us = now_us
        self.bytes_count = sum(map(len, active.lease.payloads))
        self.is_left = False

    @property
    def is_over(self) -> bool:
        """True if none of its runs is buffered or delivered."""
        return not self.open_count and not self.active.unbegun_count


class Holder(Protocol):
    """The connection of a worker."""

    @property
    def is_connected(self) -> bool:
        """True while the worker may still send reports on it."""
        ...


class DeliveredRun:
    """One delivered run. `name` is the id that its worker sees, `key` names this very delivery, `span_slot` is the slot
    in its span; `is_claimed`: it is still being sent to a worker. `holder`: the connection on which its worker fetched
    it; None for one that was pushed.

    `extra` is what the activation was stored with. Once it has ended: `outcome`; `part_no`, the number of
    a settlement that begins with it; and `waiter`, its reporter.
    """

    __slots__ = (
        "buffered",
        "deadline_us",
        "extra",
        "holder",
        "is_claimed",
        "is_ended",
        "is_fenced",
        "kind",
        "lease_offset",
        "outcome",
        "part_no",
        "payload",
        "returns_count",
        "span_slot",
        "waiter",
    )  # fmt: skip

    def __init__(
        self, buffered: BufferedLease, lease_offset: int, span_slot: int, extra: Extra, *, is_fenced: bool
    ) -> None:
        lease = buffered.active.lease
        self.buffered = buffered
        self.lease_offset = lease_offset
        self.span_slot = span_slot
        self.extra = extra
        self.is_fenced = is_fenced
        self.returns_count = 0
        self.holder: Holder | None = None
        self.payload = lease.payloads[lease_offset]
        self.kind = JSON if lease.kinds is None else lease.kinds[lease_offset]
        self.deadline_us = 0
        self.is_claimed = False
        self.is_ended = False
        self.outcome = COMPLETE
        self.part_no = 0
        self.waiter: ReportWaiter | None = None

    def end(self, outcome: ReportOutcome, waiter: ReportWaiter | None) -> None:
        """Note that the end of the run is being written."""
        self.is_ended = True
        self.outcome = outcome
        self.waiter = waiter
        self.part_no = self.buffered.part_no
        self.buffered.part_no += 1

    @property
    def attempt(self) -> int:
        """Number of the attempt, from 1."""
        return self.buffered.active.lease.attempt

    @property
    def key(self) -> str:
        """The id of this very delivery."""
        return fenced_id(Delivery(self.extra.idempotency_key, self.buffered.active.lease.token, self.returns_count))

    @property
    def name(self) -> str:
        """The id that its worker sees."""
        return self.key if self.is_fenced else self.extra.idempotency_key

    @property
    def is_unchanged(self) -> bool:
        """True if its worker gets the activation as it was stored."""
        return self.attempt == 1 and self.name == self.extra.idempotency_key

    def is_held_by(self, reporter: Holder | None) -> bool:
        """True if a report on `reporter`, None if unknown, may be of the current delivery.

        After a missed deadline, an earlier worker may still report. Its connection tells them apart,
        unless that of the current one has closed, or the run was pushed.
        """
        if self.is_fenced or not self.buffered.note.overdue_count or self.holder is None or reporter is None:
            return True
        return reporter is self.holder or not self.holder.is_connected


class LeaseBuffer:
    """Leased runs that were not delivered: for each application its leases, in the order of their claims."""

    def __init__(self, *, is_fenced: bool) -> None:
        """`is_fenced`: the ids that workers see name the delivery."""
        self._is_fenced = is_fenced
        self._leases: dict[str, deque[BufferedLease]] = {}
        self._returned: dict[str, deque[DeliveredRun]] = {}
        self.bytes_count = 0

    def __len__(self) -> int:
        """Number of buffered runs."""
        waiting = sum(buffered.active.unbegun_count for leases in self._leases.values() for buffered in leases)
        return waiting + sum(map(len, self._returned.values()))

    def add(self, buffered: BufferedLease) -> None:
        """Add a lease."""
        self._leases.setdefault(_application_of(buffered.queue), deque()).append(buffered)
        self.bytes_count += buffered.bytes_count

    def put_back(self, delivered: DeliveredRun, now_us: int) -> None:
        """Put back a run that did not reach its worker; it is delivered next."""
        delivered.buffered.since_us = now_us
        self._returned.setdefault(_application_of(delivered.buffered.queue), deque()).appendleft(delivered)

    def take(self, queue_filter: QueueFilter, now_us: int) -> DeliveredRun | None:
        """Begin the next run that a filter selects and return it; None if there is none in memory."""
        if self._returned and (delivered := self._take_returned(queue_filter)) is not None:
            return delivered
        buffered = self._first(queue_filter)
        return None if buffered is None else self._begin(buffered, now_us)

    def has(self, queue_filter: QueueFilter) -> bool:
        """True if the buffer has a run that the filter selects."""
        return self._first(queue_filter) is not None

    def _take_returned(self, queue_filter: QueueFilter) -> DeliveredRun | None:
        leases_by_application = list(self._returned.values())
        if queue_filter.application is not None:
            leases_by_application = [self._returned.get(queue_filter.prefix, deque())]
        for returned in leases_by_application:
            for delivered in returned:
                if queue_filter.queues is None or delivered.buffered.queue in queue_filter.queues:
                    returned.remove(delivered)
                    self._drop_if_empty(self._returned, _application_of(delivered.buffered.queue), returned)
                    return delivered
        return None

    def _first(self, queue_filter: QueueFilter) -> BufferedLease | None:
        """Return the lease that was claimed first of those that a filter selects."""
        if queue_filter.application is None:
            return min(
                (leases[0] for leases in self._leases.values()), key=lambda buffered: buffered.claimed_no, default=None
            )
        queues = queue_filter.queues
        for buffered in self._leases.get(queue_filter.prefix, ()):
            if queues is None or buffered.queue in queues:
                return buffered
        return None

    def _begin(self, buffered: BufferedLease, now_us: int) -> DeliveredRun:
        active = buffered.active
        lease_offset = active.begin()
        buffered.rate.left_count -= 1
        buffered.open_count += 1
        buffered.since_us = now_us
        span_slot = active.lease.span_slots[lease_offset]
        extra = active.lease.extras.get(span_slot, NO_EXTRA)
        delivered = DeliveredRun(buffered, lease_offset, span_slot, extra, is_fenced=self._is_fenced)
        active.lease.payloads[lease_offset] = b""
        self.bytes_count -= len(delivered.payload)
        if not active.unbegun_count:
            application = _application_of(buffered.queue)
            leases = self._leases[application]
            leases.remove(buffered)
            self._drop_if_empty(self._leases, application, leases)
        return delivered

    def remove_undelivered(
        self, is_selected: Callable[[BufferedLease], bool]
    ) -> list[tuple[BufferedLease, tuple[int, ...]]]:
        """Remove the undelivered runs of some leases; return their span slots."""
        removed = []
        for application, leases in list(self._leases.items()):
            for buffered in [buffered for buffered in leases if is_selected(buffered)]:
                active = buffered.active
                self.bytes_count -= sum(map(len, active.lease.payloads[active.cursor : active.count]))
                buffered.rate.left_count -= active.unbegun_count
                removed.append((buffered, active.drop_last(active.unbegun_count)))
                leases.remove(buffered)
            self._drop_if_empty(self._leases, application, leases)
        for application, returned in list(self._returned.items()):
            for delivered in [delivered for delivered in returned if is_selected(delivered.buffered)]:
                delivered.buffered.open_count -= 1
                removed.append((delivered.buffered, (delivered.span_slot,)))
                returned.remove(delivered)
            self._drop_if_empty(self._returned, application, returned)
        return removed

    @staticmethod
    def _drop_if_empty(leases_by_application: dict[str, deque[T]], application: str, leases: deque[T]) -> None:
        """Remove the entry of an application without buffered runs."""
        if not leases:
            del leases_by_application[application]

    def clear(self) -> None:
        """Forget all runs: their leases belong to other sessions."""
        for leases in self._leases.values():
            for buffered in leases:
                buffered.rate.left_count = 0
        self._leases.clear()
        self._returned.clear()
        self.bytes_count = 0


def _application_of(queue: str) -> str:
    """Return the prefix of a queue's name, as in `QueueFilter.prefix`; the whole name of a queue without
    application.
    """
    return queue[: queue.find(SEPARATOR) + 1] or queue


class DeliveryDeadlines:
    """Deadlines of delivered runs, in buckets of a tenth of a second."""

    def __init__(self) -> None:
        self._buckets: dict[int, dict[DeliveredRun, None]] = {}
        self._order: list[int] = []

    def add(self, delivered: DeliveredRun, deadline_us: int) -> None:
        """Set or move the deadline of a run."""
        if delivered.deadline_us:
            self.remove(delivered)
        delivered.deadline_us = deadline_us
        no = deadline_us // BUCKET_US
        bucket = self._buckets.get(no)
        if bucket is None:
            bucket = self._buckets[no] = {}
            heapq.heappush(self._order, no)
        bucket[delivered] = None

    def remove(self, delivered: DeliveredRun) -> None:
        """Remove the deadline of a run that was reported or forgotten."""
        bucket = self._buckets.get(delivered.deadline_us // BUCKET_US)
        if bucket is not None:
            bucket.pop(delivered, None)

    @property
    def next_us(self) -> int | None:
        """The next time at which a run may be overdue."""
        while self._order and not self._buckets[self._order[0]]:
            del self._buckets[heapq.heappop(self._order)]
        if not self._order:
            return None
        return min(delivered.deadline_us for delivered in self._buckets[self._order[0]])

    def overdue(self, now_us: int, count_max: int) -> list[DeliveredRun]:
        """Remove and return at most `count_max` runs that are overdue."""
        overdue_runs: list[DeliveredRun] = []
        while len(overdue_runs) < count_max and (next_us := self.next_us) is not None and next_us <= now_us:
            bucket = self._buckets[self._order[0]]
            late = [delivered for delivered in bucket if delivered.deadline_us <= now_us][
                : count_max - len(overdue_runs)
            ]
            for delivered in late:
                del bucket[delivered]
            overdue_runs += late
        return overdue_runs

    def clear(self) -> None:
        """Remove all deadlines."""
        self._buckets.clear()
        self._order.clear()
