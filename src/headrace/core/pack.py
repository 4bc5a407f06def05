"""Packing of many small byte strings into one value that is cheap to write and to read.

The inputs of a block and the results of a part are such lists. Layout, little-endian:

    byte 0        width of a length (1, 2 or 4), plus 8 when kinds follow
    bytes 1..4    count
    count * width lengths
    count         kinds, one byte each; absent when every kind is JSON, the usual case
    rest          the strings, end to end

A row of 256 hundred-byte items carries 261 bytes of overhead: about one byte per run.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final

from headrace.foundation.errors import StoreBroken

JSON: Final = 0
SUPER_JSON: Final = 1
TEXT: Final = 2
REFERENCE: Final = 3
MSGPACK: Final = 4
ACTIVATION: Final = 6
"""A `TaskActivation` as received, in protobuf."""
LINK: Final = 5
"""The id of another run, whose outcome this run has; only results have this kind."""

CONTENT_TYPES: Final[dict[int, str]] = {
    JSON: "application/json",
    SUPER_JSON: "application/super+json",
    TEXT: "text/plain",
    REFERENCE: "application/store",
    MSGPACK: "application/msgpack",
    ACTIVATION: "application/x-protobuf",
}
KINDS: Final[dict[str, int]] = {name: kind for kind, name in CONTENT_TYPES.items()}

_HEAD: Final = 5
_WITH_KINDS: Final = 8
_TYPECODES: Final[dict[int, str]] = {1: "B", 2: "H", 4: "I"}
_SWAPPED: Final = sys.byteorder == "big"


def pack(strings: Sequence[bytes], kinds: bytes | None = None) -> bytes:
    """Pack strings into one value; `kinds` has one byte per string, or is None if all are JSON."""
    if kinds is not None and not any(kinds):
        kinds = None
    longest = max(map(len, strings), default=0)
    width = 1 if longest < 1 << 8 else 2 if longest < 1 << 16 else 4
    lengths = array(_TYPECODES[width], map(len, strings))
    if _SWAPPED:
        lengths.byteswap()
    head = bytes((width | (_WITH_KINDS if kinds is not None else 0),)) + len(strings).to_bytes(4, "little")
    return b"".join((head, lengths.tobytes(), kinds or b"", *strings))


def unpack(packed: bytes) -> tuple[list[bytes], bytes | None]:
    """Return the strings and their kinds. Raises `StoreBroken` for a value that `pack` did not write."""
    offsets, kinds = _layout(packed)
    return [packed[start:end] for start, end in pairwise(offsets)], kinds


def unpack_some(packed: bytes, positions: Sequence[int]) -> tuple[list[bytes], bytes | None]:
    """Return the strings at `positions`, in that order, with their kinds."""
    offsets, kinds = _layout(packed)
    strings = [packed[offsets[position] : offsets[position + 1]] for position in positions]
    return strings, None if kinds is None else bytes(kinds[position] for position in positions)


def count(packed: bytes) -> int:
    """Return the number of strings in the value."""
    return int.from_bytes(packed[1:_HEAD], "little")


def _layout(packed: bytes) -> tuple[list[int], bytes | None]:
    width = packed[0] & 7 if packed else 0
    if width not in _TYPECODES or len(packed) < _HEAD:
        raise StoreBroken("a stored block or part is damaged: unknown head")
    strings_count = count(packed)
    lengths = array(_TYPECODES[width])
    start = _HEAD + strings_count * width
    if start > len(packed):
        raise StoreBroken("a stored block or part is damaged: it ends before its lengths")
    lengths.frombytes(packed[_HEAD:start])
    if _SWAPPED:
        lengths.byteswap()
    kinds = None
    if packed[0] & _WITH_KINDS:
        kinds = packed[start : start + strings_count]
        start += strings_count
    offsets = list(accumulate(lengths, initial=start))
    if offsets[-1] != len(packed) or len(lengths) != strings_count:
        raise StoreBroken("a stored block or part is damaged: its length does not match")
    return offsets, kinds
