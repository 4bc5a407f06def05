"""A set of indexes as one bit each: what a set of ranges turns into when indexes come in random order.

Ten million indexes in random order are two and a half million ranges half-way, but never more than 1.25 MB of bits. The
bits lie in one `bytearray`, the lowest index in the lowest bit of the first byte; the last byte is never zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

_HELD: Final = re.compile(rb"[^\x00]")
_OPEN: Final = re.compile(rb"[^\xff]")


class Bitmap:
    """Indexes from 0 on, each in it or not. `count` of them are; `end` is one past the highest."""

    __slots__ = ("_bits", "count")

    def __init__(self, bits: bytes | bytearray = b"") -> None:
        self._bits = bytearray(bits)
        self.count = int.from_bytes(bits, "little").bit_count()

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]], end: int) -> Bitmap:
        """The bits of ascending half-open ranges that end at `end`."""
        made = cls()
        made._bits = bytearray((end + 7) // 8)
        for start, stop in ranges:
            made.add_range(start, stop)
        return made

    def copy(self) -> Bitmap:
        """One of its own with the same indexes."""
        made = Bitmap()
        made._bits, made.count = self._bits[:], self.count
        return made

    def to_bytes(self) -> bytes:
        """The bits."""
        return bytes(self._bits)

    @property
    def end(self) -> int:
        """One past the highest index; 0 when there is none."""
        return (len(self._bits) - 1) * 8 + self._bits[-1].bit_length() if self._bits else 0

    def __contains__(self, index: int) -> bool:
        place = index >> 3
        return place < len(self._bits) and bool(self._bits[place] >> (index & 7) & 1)

    def add(self, indexes: Iterable[int], most: int) -> int:
        """Adds indexes, none over `most`; answers how many of them are new."""
        self._reach(most + 1)
        bits, gained = self._bits, 0
        for index in indexes:
            place, bit = index >> 3, 1 << (index & 7)
            held = bits[place]
            if not held & bit:
                bits[place] = held | bit
                gained += 1
        self.count += gained
        return gained

    def add_range(self, start: int, stop: int) -> int:
        """Adds `start` to `stop - 1`; answers how many of them are new."""
        if start >= stop:
            return 0
        self._reach(stop)
        first, last = start >> 3, (stop + 7) >> 3
        wanted = ((1 << (stop - start)) - 1) << (start & 7)
        held = int.from_bytes(self._bits[first:last], "little")
        gained = (wanted & ~held).bit_count()
        self._bits[first:last] = (held | wanted).to_bytes(last - first, "little")
        self.count += gained
        return gained

    def overlaps_range(self, start: int, stop: int) -> bool:
        """Whether any index from `start` to `stop - 1` is in it."""
        return start < stop and self.next_held(start) < min(stop, self.end)

    def next_held(self, index: int) -> int:
        """The first index from `index` on that is in it; `end` or more when there is none."""
        return self._next(_HELD, index, 0)

    def next_open(self, index: int) -> int:
        """The first index from `index` on that is not in it."""
        return self._next(_OPEN, index, 0xFF)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The half-open ranges, ascending; no two touch."""
        end = self.end
        start = self.next_held(0)
        while start < end:
            stop = self.next_open(start)
            yield start, stop
            start = self.next_held(stop)

    def _next(self, wanted: re.Pattern[bytes], index: int, flip: int) -> int:
        """The first bit from `index` on that differs from `flip`'s, looked for a byte at a time."""
        place = index >> 3
        if place >= len(self._bits):
            return index
        rest = (self._bits[place] ^ flip) >> (index & 7)
        if rest:
            return index + (rest & -rest).bit_length() - 1
        found = wanted.search(self._bits, place + 1)
        if found is None:
            return max(index, len(self._bits) * 8)
        byte = self._bits[found.start()] ^ flip
        return found.start() * 8 + (byte & -byte).bit_length() - 1

    def _reach(self, stop: int) -> None:
        """Have room for indexes below `stop`, the last of which is about to be added."""
        short = ((stop + 7) >> 3) - len(self._bits)
        if short > 0:
            self._bits += bytes(short)
