"""Varints: seven bits per byte, the lowest first; the top bit is set while more bytes follow."""

from __future__ import annotations


def put(encoded: bytearray, number: int) -> None:
    """Append a number of at least 0."""
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
