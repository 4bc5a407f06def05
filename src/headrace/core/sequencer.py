"""Merging of several ordered sources: by time, then by the sources' order, then by position.

A state machine: `feed` the events of a source, `close` a source that ended, `take` the events that are known to come
next. An event comes next only if every other source that has not ended has a later one, so the order is the same
at any speed of the sources. With one source nothing waits.

Rule 1: positions of a source only rise. A position that is repeated or lower is refused, naming the source; a source
that goes back yields `Rewind`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from headrace.foundation.errors import InvalidInput

Position: TypeAlias = int | str
"""The position of an event in its source: integers or strings, one type per source."""

POSITION_CHARS_MAX: Final = 500
POSITION_MAX: Final = 2**63 - 1


class Arrived(NamedTuple):
    """Consecutive events of one source: `times` in microseconds, None if only one source is read.

    All sequences have the same length.
    """

    positions: Sequence[Position]
    events: Sequence[Any]
    times: Sequence[int] | None = None


class Rewind(NamedTuple):
    """A rewind of a source: its events after `to` are invalid, and other events follow. None: all are invalid."""

    to: Position | None


class Sequenced(NamedTuple):
    """Consecutive events in their one order. `sources` is the index of each event's source, or None if all are of
    source 0.
    """

    positions: Sequence[Position]
    events: Sequence[Any]
    times: Sequence[int] | None
    sources: Sequence[int] | None

    @property
    def events_count(self) -> int:
        """Return how many events there are."""
        return len(self.positions)


class Sequencer:
    """Merges sources, known by their index in `names`. `after`: where each begins, None for its beginning."""

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
        """True if every source has ended and every event was taken."""
        return not self._open and not self.waiting_count

    @property
    def left(self) -> int | None:
        """Number of remaining events, once every source has ended; None before."""
        return None if self._open else self.waiting_count

    def wants(self, source: int, count_max: int) -> bool:
        """True if a source should continue: fewer than `count_max` of its events wait."""
        if len(self._names) == 1:
            return self.waiting_count < count_max
        return len(self._waiting[source]) < count_max

    def feed(self, source: int, arrived: Arrived) -> None:
        """Add events of a source. Raises `InvalidInput`, adding none, if their positions do not rise, or if positions,
        events and times differ in number.
        """
        positions = arrived.positions
        self._check_counts(source, arrived)
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
        """Note that a source has ended."""
        self._open.discard(source)

    def rewind(self, source: int, to: Position | None) -> None:
        """Remove the events of a source after `to` that were not taken yet."""
        if len(self._names) == 1:
            remaining_pieces: deque[tuple[Sequence[Position], Sequence[Any], Sequence[int] | None]] = deque()
            for positions, events, times in self._plain:
                count = sum(1 for remaining in positions if to is not None and not is_after(remaining, to))
                if count:
                    remaining_pieces.append(
                        (positions[:count], events[:count], None if times is None else times[:count])
                    )
            self._plain = remaining_pieces
            self.waiting_count = sum(len(remaining[0]) for remaining in remaining_pieces)
        else:
            remaining = [entry for entry in self._waiting[source] if to is not None and not is_after(entry[1], to)]
            self.waiting_count -= len(self._waiting[source]) - len(remaining)
            self._waiting[source] = deque(remaining)
            self._last_time[source] = remaining[-1][0] if remaining else None
        self._last[source] = to

    def take(self, count_max: int) -> Sequenced | None:
        """Return the next events, at most `count_max`; None if none is known to come next."""
        taken = self._take_plain(count_max) if len(self._names) == 1 else self._take_merged(count_max)
        if taken is not None:
            self.waiting_count -= taken.events_count
            self.last_taken = taken.positions[-1]
        return taken

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

    def _check_counts(self, source: int, arrived: Arrived) -> None:
        count = len(arrived.positions)
        for noun, values in (("events", arrived.events), ("times", arrived.times)):
            if values is not None and len(values) != count:
                raise InvalidInput(
                    f"the source {self._names[source]!r}: expected {count} {noun}, as many as positions, "
                    f"got {len(values)}",
                    hint="Arrived needs one position and one event each; times may be None",
                    source=self._names[source],
                )

    def _check(self, source: int, positions: Sequence[Position]) -> None:
        before = self._last[source]
        name = self._names[source]
        if not isinstance(positions, range):
            kinds = set(map(type, positions))
            if kinds - {int} and kinds - {str}:
                raise InvalidInput(
                    "expected integers or strings as positions, one type per source",
                    hint=f"got {', '.join(sorted(kind.__name__ for kind in kinds))}",
                    source=name,
                )
        if before is not None and type(before) is not type(positions[0]):
            raise InvalidInput(
                f"expected positions like {before!r}, where the source was left, got {type(positions[0]).__name__}",
                hint="check that it is the same source; `headrace index reset` starts over",
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
                raise InvalidInput(f"position {position} needs more than 64 bits, expected at most 64", source=name)
        if isinstance(positions[0], str):
            for text_position in positions:
                if not 0 < len(str(text_position)) <= POSITION_CHARS_MAX or "\0" in str(text_position):
                    raise InvalidInput(
                        f"position: expected 1 to {POSITION_CHARS_MAX} characters, no NUL, got {text_position!r:.80}",
                        source=name,
                    )

    def _checked_times(self, source: int, arrived: Arrived) -> Sequence[int]:
        name = self._names[source]
        if arrived.times is None:
            raise InvalidInput(
                "several sources are merged by time, but the events of this one have no time",
                hint='name the field of the time: ndjson(path, time="at")',
                source=name,
            )
        last = self._last_time[source]
        for time_us, position in zip(arrived.times, arrived.positions, strict=True):
            if last is not None and time_us < last:
                raise InvalidInput(
                    f"the event at {position!r} is older than the event before it", hint="sort the source by time",
                    source=name, position=position,
                )  # fmt: skip
            last = time_us
        self._last_time[source] = last
        return arrived.times


def is_after(position: Position, reference: Position) -> bool:
    """True if a position comes after another one of its source. Raises `InvalidInput` if their types differ."""
    if isinstance(position, int) and isinstance(reference, int):
        return position > reference
    if isinstance(position, str) and isinstance(reference, str):
        return position > reference
    raise InvalidInput(f"expected a position like {position!r}, got {reference!r}")


def _disordered(name: str, position: Position, previous: Position) -> InvalidInput:
    return InvalidInput(
        f"expected a position after {previous!r}, got {position!r}",
        hint="positions must rise from event to event; a source that goes back yields Rewind(to)",
        source=name,
        position=position,
    )
