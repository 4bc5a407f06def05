"""The set of received indexes of a batch, as ranges.

Indexes that arrive in order are one range, so adding at its end costs nothing. Indexes in any order are merged one
sorted group at a time, in one pass over the ranges that the group spans. When there are so many ranges that one bit per
index is cheaper, the set becomes a bitmap (`headrace.core.bitmap`).

The ranges are half-open and stored in one flat array of bounds, `[start, stop, start, stop, …]`, strictly increasing.
The number of bounds at or before an index is therefore odd exactly if the index is in the set, and ranges that touch
are one.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain, islice, pairwise
from operator import eq
from typing import Final, Self

from headrace.core import varint
from headrace.core.bitmap import Bitmap
from headrace.foundation.errors import InvalidInput
from headrace.foundation.ids import INDEX_MAX

_RANGES: Final = 1
_BITS: Final = 2
"""The first byte of an encoded set names its form."""

RANGES_MAX: Final = 4_096
"""A set of fewer ranges never becomes a bitmap: merging them costs less than reading and writing the bits."""

RANGE_BYTES: Final = 64
"""Bytes of a bitmap that cost about as much time as one range to read, merge and write."""

GROWTH_MAX: Final = 4
"""One call may grow a bitmap by at most this factor."""

_BOUND_MAX: Final = INDEX_MAX + 1
_SHIFT_MAX: Final = 56
assert _BOUND_MAX < 2 ** (_SHIFT_MAX + 7), (
    "nine groups of seven bits hold any bound, and so does a signed 64-bit integer"
)


class IndexSet:
    """A set of indexes from 0 to `INDEX_MAX`.

    Raises `InvalidInput`, without a change, for an invalid index.
    """

    __slots__ = ("_bits", "_bounds", "_count")

    def __init__(self, indexes: Iterable[int] = ()) -> None:
        self._bounds: array[int] = array("q")
        self._count = 0
        self._bits: Bitmap | None = None
        self.add(indexes)

    @classmethod
    def from_ranges(cls, ranges: Iterable[tuple[int, int]]) -> Self:
        """Return the union of half-open ranges in any order."""
        received = cls()
        for start, stop in ranges:
            received.add_range(start, stop)
        return received

    def __len__(self) -> int:
        return self._count if self._bits is None else self._bits.count

    def __contains__(self, index: int) -> bool:
        if self._bits is not None:
            return index in self._bits
        return bisect_right(self._bounds, index) % 2 == 1

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(range(start, stop) for start, stop in self.ranges())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IndexSet):
            return NotImplemented
        if self._bits is None and other._bits is None:
            return self._bounds == other._bounds
        return len(self) == len(other) and self.end == other.end and all(map(eq, self.ranges(), other.ranges()))

    def __repr__(self) -> str:
        shown = ", ".join(f"{start}..{stop}" for start, stop in islice(self.ranges(), 5))
        return f"<IndexSet of {len(self)}: {shown}>"

    @property
    def end(self) -> int:
        """One past the highest index; 0 for an empty set."""
        if self._bits is not None:
            return self._bits.end
        return self._bounds[-1] if self._bounds else 0

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the half-open ranges, ascending; no two touch."""
        if self._bits is not None:
            return self._bits.ranges()
        bounds = iter(self._bounds)
        return zip(bounds, bounds, strict=True)

    def add_range(self, start: int, stop: int) -> int:
        """Add `start` to `stop - 1`; return how many of them are new."""
        if not 0 <= start <= stop <= _BOUND_MAX:
            raise InvalidInput(f"invalid range of indexes: {start}..{stop}", hint=f"indexes run from 0 to {INDEX_MAX}")
        if (bits := self._bits_for(stop)) is not None:
            return bits.add_range(start, stop)
        return self._merge(array("q", (start, stop))) if start < stop else 0

    def add(self, indexes: Iterable[int]) -> int:
        """Add indexes, in any order, repeated or not; return how many of them are new."""
        distinct = set(indexes)
        if not distinct:
            return 0
        least, most = min(distinct), max(distinct)
        if least < 0 or most > INDEX_MAX:
            raise InvalidInput(
                f"invalid index: {least if least < 0 else most}", hint=f"indexes run from 0 to {INDEX_MAX}"
            )
        if (bits := self._bits_for(most + 1)) is not None:
            return bits.add(distinct, most)
        if most - least + 1 == len(distinct):
            return self._merge(array("q", (least, most + 1)))
        return self._merge(_bounds_of(sorted(distinct)))

    def update(self, other: IndexSet) -> int:
        """Add all indexes of another set; return how many are new."""
        if self._bits is None and other._bits is None:
            return self._merge(other._bounds) if other._bounds else 0
        return sum(self.add_range(start, stop) for start, stop in list(other.ranges()))

    def union(self, other: IndexSet) -> IndexSet:
        """Return a new set with the indexes of both."""
        both = IndexSet()
        both._bounds, both._count = self._bounds[:], self._count
        both._bits = None if self._bits is None else self._bits.copy()
        both.update(other)
        return both

    def difference(self, indexes: Iterable[int]) -> list[int]:
        """Return those of `indexes` that are not in the set, in the given order, with repetitions."""
        asked_indexes = list(indexes)
        if self._bits is not None:
            held = self._bits
            return [index for index in asked_indexes if index not in held]
        shared = self._common_membership(asked_indexes)
        if shared is not None:
            return [] if shared else asked_indexes
        bounds = self._bounds
        return [index for index in asked_indexes if bisect_right(bounds, index) % 2 == 0]

    def overlap(self, indexes: Iterable[int]) -> list[int]:
        """Return those of `indexes` that are in the set, in the given order, with repetitions."""
        asked_indexes = list(indexes)
        if self._bits is not None:
            held = self._bits
            return [index for index in asked_indexes if index in held]
        shared = self._common_membership(asked_indexes)
        if shared is not None:
            return asked_indexes if shared else []
        bounds = self._bounds
        return [index for index in asked_indexes if bisect_right(bounds, index) % 2 == 1]

    def overlaps_range(self, start: int, stop: int) -> bool:
        """True if any index from `start` to `stop - 1` is in the set. Costs two searches for any length of the
        range.
        """
        if self._bits is not None:
            return self._bits.overlaps_range(start, stop)
        if start >= stop:
            return False
        place = bisect_right(self._bounds, start)
        return place % 2 == 1 or place != bisect_left(self._bounds, stop)

    def missing(self, expected_count: int, ranges_max: int) -> list[tuple[int, int]]:
        """Return the first `ranges_max` half-open ranges below `expected_count` that are not in the set.

        The cost depends on the size of the answer, not of the set.
        """
        if expected_count < 0 or ranges_max < 0:
            raise InvalidInput("expected counts of at least 0", expected_count=expected_count, ranges_max=ranges_max)
        gaps: list[tuple[int, int]] = []
        position = 0
        for start, stop in self.ranges():
            if len(gaps) >= ranges_max or start >= expected_count:
                break
            if start > position:
                gaps.append((position, start))
            position = stop
        if position < expected_count and len(gaps) < ranges_max:
            gaps.append((position, expected_count))
        return gaps

    def to_bytes(self) -> bytes:
        """Encode the set: one byte for the form, then the distance of each bound from the one before as varint, or the
        bits.

        A bitmap without a gap is encoded as one range.
        """
        if self._bits is not None:
            if self._bits.count < self._bits.end:
                return bytes((_BITS,)) + self._bits.to_bytes()
            self._bounds, self._count, self._bits = array("q", (0, self._bits.end)), self._bits.count, None
        encoded = bytearray((_RANGES,))
        for before, bound in zip(chain((0,), self._bounds), self._bounds, strict=False):
            varint.put(encoded, bound - before)
        return bytes(encoded)

    @classmethod
    def from_bytes(cls, encoded: bytes) -> Self:
        """Decode what `to_bytes` wrote. Raises `InvalidInput` for anything else.

        Memory is at most eight bytes per byte of `encoded`.
        """
        if encoded[:1] == bytes((_BITS,)):
            return cls._of_bits(encoded[1:])
        if not encoded or encoded[0] != _RANGES:
            raise _not_a_set("unknown form")
        distances = _varints(memoryview(encoded)[1:])
        if len(distances) % 2:
            raise _not_a_set("a range has no end")
        if 0 in distances[1:]:
            raise _not_a_set("ranges are empty or touch")
        if sum(distances) > _BOUND_MAX:
            raise _not_a_set("an index is too large")
        decoded = cls()
        decoded._bounds = array("q", accumulate(distances))
        decoded._count = sum(distances[1::2])
        return decoded

    @classmethod
    def _of_bits(cls, bits: bytes) -> Self:
        if not bits or not bits[-1]:
            raise _not_a_set("the last byte has no bit set")
        decoded = cls()
        decoded._bits = Bitmap(bits)
        if decoded._bits.count == decoded._bits.end:
            raise _not_a_set("bits without a gap must be encoded as one range")
        if decoded._bits.end > _BOUND_MAX:
            raise _not_a_set("an index is too large")
        return decoded

    def _bits_for(self, stop: int) -> Bitmap | None:
        """Return the bitmap if the set is one and stays one with indexes below `stop`; distant indexes turn it into
        ranges.
        """
        bits = self._bits
        if bits is not None and stop > GROWTH_MAX * (bits.end + 8 * RANGES_MAX * RANGE_BYTES):
            self._bounds, self._count = array("q", chain.from_iterable(bits.ranges())), bits.count
            bits = self._bits = None
        return bits

    def _common_membership(self, indexes: list[int]) -> bool | None:
        """True or False if all or none of `indexes` are in the set because no bound is between them; None if it must be
        searched.
        """
        if not indexes:
            return True
        place = bisect_right(self._bounds, min(indexes))
        return place % 2 == 1 if place == bisect_right(self._bounds, max(indexes)) else None

    def _merge(self, added: array[int]) -> int:
        """Add ranges, given as bounds; return how many indexes are new.

        One pass over the bounds between the first and the last of `added`; runs of unchanged bounds are copied at once.
        The set changes only when the result is complete.
        """
        bounds = self._bounds
        first = bisect_left(bounds, added[0])
        last = bisect_right(bounds, added[-1])
        merged: array[int] = array("q")
        place = first
        gained = 0
        starts_and_stops = iter(added)
        for start, stop in zip(starts_and_stops, starts_and_stops, strict=True):
            here = bisect_left(bounds, start, place, last)
            if here > place:
                merged.extend(bounds[place:here])
            if here % 2 == 0:  # start is in a gap and begins a range; otherwise it continues one
                merged.append(start)
                gained -= start
            place = here
            while place < last and bounds[place] <= stop:  # bounds within [start, stop] are removed
                gained += bounds[place] if place % 2 == 0 else -bounds[place]
                place += 1
            if place % 2 == 0:
                merged.append(stop)
                gained += stop
        merged.extend(bounds[place:last])
        bounds[first:last] = merged
        self._count += gained
        ranges_count = len(bounds) // 2
        if ranges_count > RANGES_MAX and bounds[-1] // 8 < ranges_count * RANGE_BYTES:
            self._bits = Bitmap.of(self.ranges(), bounds[-1])
            self._bounds, self._count = array("q"), 0
        return gained


def _bounds_of(ascending: list[int]) -> array[int]:
    """Return the bounds of the ranges of distinct ascending indexes."""
    bounds = array("q", (ascending[0],))
    for before, index in pairwise(ascending):
        if index - before > 1:
            bounds.append(before + 1)
            bounds.append(index)
    bounds.append(ascending[-1] + 1)
    return bounds


def _varints(encoded: memoryview) -> list[int]:
    values: list[int] = []
    value = shift = 0
    for byte in encoded:
        value |= (byte & 127) << shift
        if byte > 127:
            shift += 7
            if shift > _SHIFT_MAX:
                raise _not_a_set("a number is too long")
        else:
            if shift and not byte:
                raise _not_a_set("a number is longer than necessary")
            values.append(value)
            value = shift = 0
    if shift:
        raise _not_a_set("it ends inside a number")
    return values


def _not_a_set(reason: str) -> InvalidInput:
    return InvalidInput(f"invalid encoded set of indexes: {reason}")
