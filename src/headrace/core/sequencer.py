"""Several ordered sources as one order: by time, then by the sources' order, then by position.

A machine: `feed` what a source has, `close` one that ended, `take` what can be said to come next. An event comes
next only when every other source that has not ended shows a later one, so the order is the same however the sources
race each other. With one source nothing waits for anything.

Rule 1: inside a source positions only rise. One that is repeated or goes back is refused, by name: a source that has
changed its mind says `Rewind`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from headrace.foundation.errors import InvalidInput

Position: TypeAlias = int | str
"""Where an event stands in its source: whole numbers or texts, one of them in one source."""

POSITION_CHARS_MAX: Final = 500
POSITION_MAX: Final = 2**63 - 1


class Arrived(NamedTuple):
    """Consecutive events of one source: `times` in microseconds, None where only one source is read."""

    positions: Sequence[Position]
    events: Sequence[Any]
    times: Sequence[int] | None = None


class Rewind(NamedTuple):
    """A source goes back: what came after `to` is no longer so, and other events follow. None: nothing was so."""

    to: Position | None


class Sequenced(NamedTuple):
    """Consecutive events in their one order. `sources` is the index of each event's source, or None: all are of 0."""

    positions: Sequence[Position]
    events: Sequence[Any]
    times: Sequence[int] | None
    sources: Sequence[int] | None

    @property
    def events_count(self) -> int:
        """How many events these are."""
        return len(self.positions)


class Sequencer:
    """Merges sources, known by their index in `names`. `after` is where each begins, None for its very beginning."""

    def __init__(self, names: Sequence[str], after: Sequence[Position | None]) -> None:
        self._names = names
        self._last: list[Position | None] = list(after)
        self._last_time: list[int | None] = [None] * len(names)
        self._waiting: list[deque[tuple[int, Position, Any]]] = [deque() for _ in names]
        self._plain: deque[tuple[Sequence[Position], Sequence[Any], Sequence[int] | None]] = deque()
        self._open = set(range(len(names)))
        self.waiting_count = 0
        self.last_taken: Position | None = None

    @property
    def is_over(self) -> bool:
        """Every source has ended and everything was taken."""
        return not self._open and not self.waiting_count

    @property
    def left(self) -> int | None:
        """How many events there are still, once every source has ended."""
        return None if self._open else self.waiting_count

    def wants(self, source: int, count_max: int) -> bool:
        """Whether a source should go on: what waits of it is less than `count_max`."""
        if len(self._names) == 1:
            return self.waiting_count < count_max
        return len(self._waiting[source]) < count_max

    def feed(self, source: int, arrived: Arrived) -> None:
        """Take events of a source. Raises `InvalidInput`, taking none, when their positions do not rise."""
        positions = arrived.positions
        if not positions:
            return
        self._check(source, positions)
        if len(self._names) == 1:
            self._plain.append((positions, arrived.events, arrived.times))
        else:
            times = self._checked_times(source, arrived)
            self._waiting[source].extend(zip(times, positions, arrived.events, strict=True))
        self._last[source] = positions[-1]
        self.waiting_count += len(positions)

    def close(self, source: int) -> None:
        """A source has ended."""
        self._open.discard(source)

    def rewind(self, source: int, to: Position | None) -> None:
        """A source takes back what came after `to` and was not taken yet."""
        if len(self._names) == 1:
            kept: deque[tuple[Sequence[Position], Sequence[Any], Sequence[int] | None]] = deque()
            for positions, events, times in self._plain:
                count = sum(1 for own in positions if to is not None and not is_after(own, to))
                if count:
                    kept.append((positions[:count], events[:count], None if times is None else times[:count]))
            self._plain = kept
            self.waiting_count = sum(len(own[0]) for own in kept)
        else:
            own = [one for one in self._waiting[source] if to is not None and not is_after(one[1], to)]
            self.waiting_count -= len(self._waiting[source]) - len(own)
            self._waiting[source] = deque(own)
            self._last_time[source] = own[-1][0] if own else None
        self._last[source] = to

    def take(self, count_max: int) -> Sequenced | None:
        """The next events, at most so many; None when nothing can be said yet."""
        found = self._take_plain(count_max) if len(self._names) == 1 else self._take_merged(count_max)
        if found is not None:
            self.waiting_count -= found.events_count
            self.last_taken = found.positions[-1]
        return found

    def _take_plain(self, count_max: int) -> Sequenced | None:
        if not self._plain:
            return None
        positions, events, times = self._plain.popleft()
        if len(positions) > count_max:
            rest = None if times is None else times[count_max:]
            self._plain.appendleft((positions[count_max:], events[count_max:], rest))
            times = None if times is None else times[:count_max]
            return Sequenced(positions[:count_max], events[:count_max], times, None)
        while self._plain and len(positions) + len(self._plain[0][0]) <= count_max:
            more = self._plain.popleft()
            positions, events = [*positions, *more[0]], [*events, *more[1]]
            times = None if times is None or more[2] is None else [*times, *more[2]]
        return Sequenced(positions, events, times, None)

    def _take_merged(self, count_max: int) -> Sequenced | None:
        if any(not self._waiting[source] for source in self._open):
            return None
        heads = [(waiting[0][0], source) for source, waiting in enumerate(self._waiting) if waiting]
        heapq.heapify(heads)
        positions: list[Position] = []
        events: list[Any] = []
        times: list[int] = []
        sources: list[int] = []
        while heads and len(positions) < count_max:
            time_us, source = heads[0]
            waiting = self._waiting[source]
            _, position, event = waiting.popleft()
            positions.append(position)
            events.append(event)
            times.append(time_us)
            sources.append(source)
            if waiting:
                heapq.heapreplace(heads, (waiting[0][0], source))
            elif source in self._open:
                break
            else:
                heapq.heappop(heads)
        return Sequenced(positions, events, times, sources) if positions else None

    def _check(self, source: int, positions: Sequence[Position]) -> None:
        before = self._last[source]
        name = self._names[source]
        if not isinstance(positions, range):
            kinds = set(map(type, positions))
            if kinds - {int} and kinds - {str}:
                raise InvalidInput(
                    "a position is a whole number or a text, one of them in one source",
                    hint=f"these are {', '.join(sorted(kind.__name__ for kind in kinds))}",
                    source=name,
                )
        if before is not None and type(before) is not type(positions[0]):
            raise InvalidInput(
                f"the source was read up to {before!r}, and now its positions are {type(positions[0]).__name__}",
                hint="is it the same source? `headrace index reset` begins anew",
                source=name,
            )
        previous = before
        if not (isinstance(positions, range) and positions.step > 0 and (before is None or positions[0] > before)):  # type: ignore[operator]  # both are of one type, see above
            for position in positions:
                if previous is not None and not is_after(position, previous):
                    raise _disordered(name, position, previous)
                previous = position
        for position in (positions[0], positions[-1]):
            if isinstance(position, int) and not -POSITION_MAX <= position <= POSITION_MAX:
                raise InvalidInput(f"position {position} needs more than 64 bits", source=name)
        if isinstance(positions[0], str):
            for own in positions:
                if not 0 < len(str(own)) <= POSITION_CHARS_MAX or "\0" in str(own):
                    raise InvalidInput(
                        f"a position is 1 to {POSITION_CHARS_MAX} characters without NUL, not {own!r:.80}", source=name
                    )

    def _checked_times(self, source: int, arrived: Arrived) -> Sequence[int]:
        name = self._names[source]
        if arrived.times is None:
            raise InvalidInput(
                "several sources are merged by time, and this one's events have none",
                hint='say where it is: ndjson(path, time="at")',
                source=name,
            )
        last = self._last_time[source]
        for time_us, position in zip(arrived.times, arrived.positions, strict=True):
            if last is not None and time_us < last:
                raise InvalidInput(
                    f"the event at {position!r} is older than the one before it", hint="order the source by time",
                    source=name, position=position,
                )  # fmt: skip
            last = time_us
        self._last_time[source] = last
        return arrived.times


def is_after(one: Position, other: Position) -> bool:
    """Whether a position comes after another one of its source. Raises `InvalidInput` when they are not of one type."""
    if isinstance(one, int) and isinstance(other, int):
        return one > other
    if isinstance(one, str) and isinstance(other, str):
        return one > other
    raise InvalidInput(f"positions of this source are like {one!r}, not like {other!r}")


def _disordered(name: str, position: Position, previous: Position) -> InvalidInput:
    again = position == previous
    return InvalidInput(
        f"the event at {position!r} {'comes twice' if again else f'comes after the one at {previous!r}'}",
        hint="positions rise from event to event; a source that goes back says Rewind(to)",
        source=name,
        position=position,
    )
