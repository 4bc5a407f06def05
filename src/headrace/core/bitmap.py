"""A set of indexes with one bit each: the form of an index set whose indexes arrive in random order.

Ten million indexes in random order are two and a half million ranges half-way, but never more than 1.25 MB of bits. The
bits are in one `bytearray`, with the lowest index in the lowest bit of the first byte; the last byte is never zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

_HELD: Final = re.compile(rb"[^\x00]")
_OPEN: Final = re.compile(rb"[^\xff]")


class Bitmap:
    """A set of indexes from 0 on. `count`: their number; `end`: one past the highest."""

    __slots__ = ("_bits", "count")

    def __init__(self, bits: bytes | bytearray = b"") -> None:
        self._bits = bytearray(bits)
        self.count = int.from_bytes(bits, "little").bit_count()

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]], end: int) -> Bitmap:
        """Return the bitmap of ascending half-open ranges that end at `end`."""
        bitmap = cls()
        bitmap._bits = bytearray((end + 7) // 8)
        for start, stop in ranges:
            bitmap.add_range(start, stop)
        return bitmap

    def copy(self) -> Bitmap:
        """Return an independent copy."""
        copied = Bitmap()
        copied._bits, copied.count = self._bits[:], self.count
        return copied

    def to_bytes(self) -> bytes:
        """Return the bits."""
        return bytes(self._bits)

    @property
    def end(self) -> int:
        """One past the highest index; 0 for an empty set."""
        return (len(self._bits) - 1) * 8 + self._bits[-1].bit_length() if self._bits else 0

    def __contains__(self, index: int) -> bool:
        byte_no = index >> 3
        return byte_no < len(self._bits) and bool(self._bits[byte_no] >> (index & 7) & 1)

    def add(self, indexes: Iterable[int], most: int) -> int:
        """Add indexes up to `most`; return how many of them are new."""
        self._reach(most + 1)
        bits, gained = self._bits, 0
        for index in indexes:
            byte_no, bit = index >> 3, 1 << (index & 7)
            held = bits[byte_no]
            if not held & bit:
                bits[byte_no] = held | bit
                gained += 1
        self.count += gained
        return gained

    def add_range(self, start: int, stop: int) -> int:
        """Add `start` to `stop - 1`; return how many of them are new."""
        if start >= stop:
            return 0
        self._reach(stop)
        first, last = start >> 3, (stop + 7) >> 3
        added_bits = ((1 << (stop - start)) - 1) << (start & 7)
        held = int.from_bytes(self._bits[first:last], "little")
        gained = (added_bits & ~held).bit_count()
        self._bits[first:last] = (held | added_bits).to_bytes(last - first, "little")
        self.count += gained
        return gained

    def overlaps_range(self, start: int, stop: int) -> bool:
        """True if any index from `start` to `stop - 1` is in the set."""
        return start < stop and self.next_held(start) < min(stop, self.end)

    def next_held(self, index: int) -> int:
        """Return the first index from `index` on that is in the set; `end` or more if there is none."""
        return self._next(_HELD, index, 0)

    def next_open(self, index: int) -> int:
        """Return the first index from `index` on that is not in the set."""
        return self._next(_OPEN, index, 0xFF)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the half-open ranges, ascending; no two touch."""
        end = self.end
        start = self.next_held(0)
        while start < end:
            stop = self.next_open(start)
            yield start, stop
            start = self.next_held(stop)

    def _next(self, pattern: re.Pattern[bytes], index: int, flip: int) -> int:
        """Return the first bit from `index` on that differs from `flip`'s, searched one byte at a time."""
        byte_no = index >> 3
        if byte_no >= len(self._bits):
            return index
        rest = (self._bits[byte_no] ^ flip) >> (index & 7)
        if rest:
            return index + (rest & -rest).bit_length() - 1
        match = pattern.search(self._bits, byte_no + 1)
        if match is None:
            return max(index, len(self._bits) * 8)
        byte = self._bits[match.start()] ^ flip
        return match.start() * 8 + (byte & -byte).bit_length() - 1

    def _reach(self, stop: int) -> None:
        """Grow the bits for indexes below `stop`, the last of which is about to be added."""
        short = ((stop + 7) >> 3) - len(self._bits)
        if short > 0:
            self._bits += bytes(short)
