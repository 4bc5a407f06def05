"""Numbers of as many bytes as they need: seven bits a byte, the lowest first, the top bit set while more follow."""

from __future__ import annotations


def put(encoded: bytearray, number: int) -> None:
    """Add one, from 0 on."""
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
