"""Leased activations in memory: those in line, by queue, and those in somebody's hands, by the id they went out under.

Rule 1: nothing here waits or asks a store; what must be told to one is answered, and told by the dispatcher.
Rule 2: of two queues that a wish covers the one goes first whose runs were claimed first, so the order between queues
is the order of claims, and inside a queue it is the queue's own.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, TypeVar

from headrace.core.activation import LANE, SEPARATOR, Delivery, Note, note_of, queue_of, wire_id
from headrace.core.block import Extra
from headrace.core.pack import JSON
from headrace.runtime.work import Work

T = TypeVar("T")

NO_EXTRA: Final = Extra()
BUCKET_US: Final = 100_000


class Wish(NamedTuple):
    """Whose activations somebody asks for: of all applications, of one, or of some namespaces of one."""

    application: str | None = None
    namespaces: tuple[str, ...] | None = None

    @property
    def is_answerable(self) -> bool:
        """A namespace alone names nothing: two applications may have one of that name."""
        if self.application is None:
            return self.namespaces is None
        return SEPARATOR not in self.application

    @property
    def prefix(self) -> str:
        """How the names of all queues begin that are asked for."""
        return "" if self.application is None else self.application + SEPARATOR

    @property
    def queues(self) -> list[str] | None:
        """The queues that are asked for; None for all that begin with the prefix."""
        if self.namespaces is None or self.application is None:
            return None
        return [queue_of(self.application, namespace) for namespace in self.namespaces]


class Held:
    """A lease whose runs are handed out one by one. `claimed_no`: leases are counted as they come.

    `suffix`: what the ids of its runs go out with; none for a first delivery.
    """

    __slots__ = (
        "bytes_count",
        "claimed_no",
        "is_left",
        "note",
        "open_count",
        "part_no",
        "queue",
        "since_us",
        "suffix",
        "work",
    )

    def __init__(self, work: Work, claimed_no: int, now_us: int) -> None:
        self.work = work
        self.queue = work.lease.queue
        self.claimed_no = claimed_no
        self.note: Note = note_of(work.lease.note)
        self.suffix = wire_id(Delivery("", work.lease.attempt, self.note.overdue_count))
        self.open_count = 0
        self.part_no = 0
        self.since_us = now_us
        self.bytes_count = sum(map(len, work.lease.payloads))
        self.is_left = False

    def next_part_no(self) -> int:
        """Numbers the settlements of this lease."""
        self.part_no += 1
        return self.part_no - 1

    @property
    def is_over(self) -> bool:
        """Nothing of it is in line or in anybody's hands."""
        return not self.open_count and not self.work.unbegun_count


class Handout:
    """One run in somebody's hands. `name` is the id it went out under, `place` where it is in its lease; `is_claimed`:
    on its way to a worker still.

    `extra` is what the activation was kept with.
    """

    __slots__ = ("deadline_us", "extra", "held", "is_claimed", "is_ended", "kind", "name", "number", "payload", "place")

    def __init__(self, held: Held, number: int, place: int, extra: Extra) -> None:
        lease = held.work.lease
        self.held = held
        self.number = number
        self.place = place
        self.extra = extra
        self.name = extra.idempotency_key + held.suffix
        self.payload = lease.payloads[number]
        self.kind = JSON if lease.kinds is None else lease.kinds[number]
        self.deadline_us = 0
        self.is_claimed = False
        self.is_ended = False

    @property
    def attempt(self) -> int:
        """Which attempt this is, from 1."""
        return self.held.work.lease.attempt


class Line:
    """Leased runs that nobody has been given: of each application its leases, in the order they were claimed."""

    def __init__(self) -> None:
        self._leases: dict[str, deque[Held]] = {}
        self._returned: dict[str, deque[Handout]] = {}
        self.bytes_count = 0

    def __len__(self) -> int:
        """Runs in line."""
        waiting = sum(held.work.unbegun_count for line in self._leases.values() for held in line)
        return waiting + sum(map(len, self._returned.values()))

    def add(self, held: Held) -> None:
        """A lease has come."""
        self._leases.setdefault(_application_of(held.queue), deque()).append(held)
        self.bytes_count += held.bytes_count

    def put_back(self, handout: Handout, now_us: int) -> None:
        """A run did not reach the worker it was meant for: it goes first."""
        handout.held.since_us = now_us
        self._returned.setdefault(_application_of(handout.held.queue), deque()).appendleft(handout)

    def take(self, wish: Wish, now_us: int) -> Handout | None:
        """The next run that a wish covers, begun; None when there is none in memory."""
        for returned in _of(self._returned, wish):
            for handout in returned:
                if _covers(wish, handout.held.queue):
                    returned.remove(handout)
                    self._keep(self._returned, _application_of(handout.held.queue), returned)
                    return handout
        best: Held | None = None
        for line in _of(self._leases, wish):
            for held in line:
                if _covers(wish, held.queue):
                    if best is None or held.claimed_no < best.claimed_no:
                        best = held
                    break
        return None if best is None else self._begin(best, now_us)

    def _begin(self, held: Held, now_us: int) -> Handout:
        work = held.work
        number = work.begin()
        held.open_count += 1
        held.since_us = now_us
        place = work.lease.places[number]
        handout = Handout(held, number, place, work.lease.extras.get(place, NO_EXTRA))
        work.lease.payloads[number] = b""
        self.bytes_count -= len(handout.payload)
        if not work.unbegun_count:
            application = _application_of(held.queue)
            line = self._leases[application]
            line.remove(held)
            self._keep(self._leases, application, line)
        return handout

    def cut(self, is_cut: Callable[[Held], bool]) -> list[tuple[Held, tuple[int, ...]]]:
        """Take what nobody has been given of some leases out of line; answers the places of their runs."""
        found = []
        for application, line in list(self._leases.items()):
            for held in [held for held in line if is_cut(held)]:
                work = held.work
                self.bytes_count -= sum(map(len, work.lease.payloads[work.cursor : work.count]))
                found.append((held, work.cut(work.unbegun_count)))
                line.remove(held)
            self._keep(self._leases, application, line)
        for application, returned in list(self._returned.items()):
            for handout in [handout for handout in returned if is_cut(handout.held)]:
                handout.held.open_count -= 1
                found.append((handout.held, (handout.place,)))
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
        self._leases.clear()
        self._returned.clear()
        self.bytes_count = 0


def _application_of(queue: str) -> str:
    """How the name of a queue begins, as `Wish.prefix` says it; of one without an application the whole name."""
    return queue[: queue.find(SEPARATOR) + 1] or queue


def _of(lines: dict[str, deque[T]], wish: Wish) -> Iterable[deque[T]]:
    """The lines in which there may be something for a wish."""
    if wish.application is None:
        return lines.values()
    line = lines.get(wish.prefix)
    return () if line is None else (line,)


def _covers(wish: Wish, queue: str) -> bool:
    """Whether a wish covers a queue of its application."""
    return wish.namespaces is None or queue.partition(SEPARATOR)[2] in wish.namespaces


class Deadlines:
    """Who must be heard of by when, in buckets of a tenth of a second, so that it holds nobody who was heard of."""

    def __init__(self) -> None:
        self._buckets: dict[int, dict[Handout, None]] = {}
        self._order: list[int] = []

    def add(self, handout: Handout, deadline_us: int) -> None:
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

    def remove(self, handout: Handout) -> None:
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

    def overdue(self, now_us: int, count_max: int) -> list[Handout]:
        """Those who were not heard of in time, at most so many."""
        found: list[Handout] = []
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


def is_activation(handout: Handout) -> bool:
    """Whether a run of the lane can be handed out under a name: another door may have let anything in."""
    return handout.held.work.lease.task == LANE and bool(handout.extra.idempotency_key)
