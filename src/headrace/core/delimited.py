"""Messages one after the other, each after its length as a varint: bytes in, messages out.

Rule 1: a message over the limit fails alone: it becomes a marker at its own place and is dropped as it arrives.
Rule 2: memory is bounded by one message, and how the input was cut into pieces changes nothing.
Rule 3: a length that is none ends it all: where the next message begins can't be known.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from headrace.core import varint
from headrace.foundation.errors import InvalidInput

LENGTH_BYTES_MAX: Final = 5
"""A varint of 32 bits."""


def headed(message: bytes) -> bytes:
    """A message after its length."""
    length = bytearray()
    varint.put(length, len(message))
    return bytes(length) + message


class OversizedMessage(NamedTuple):
    """A message of more bytes than one may have."""

    actual_bytes: int


class DelimitedDecoder:
    """Owned by one task; never waits."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._buffer = bytearray()
        self._left_to_drop = 0
        self._count = 0

    def feed(self, data: bytes) -> list[bytes | OversizedMessage]:
        """The messages that end in this piece. Raises `InvalidInput` where there is no length."""
        found: list[bytes | OversizedMessage] = []
        if self._left_to_drop:
            dropped = min(self._left_to_drop, len(data))
            self._left_to_drop -= dropped
            data = data[dropped:]
        self._buffer += data
        start = 0
        while (head := self._length_at(start)) is not None:
            length, begin = head
            if length > self._bytes_max:
                self._count += 1
                found.append(OversizedMessage(length))
                there = min(length, len(self._buffer) - begin)
                self._left_to_drop = length - there
                start = begin + there
                continue
            if len(self._buffer) - begin < length:
                break
            self._count += 1
            found.append(bytes(self._buffer[begin : begin + length]))
            start = begin + length
        del self._buffer[:start]
        return found

    def end(self) -> None:
        """No more comes. Raises `InvalidInput` when that is in the middle of a message."""
        if self._buffer or self._left_to_drop:
            raise InvalidInput(f"the stream ends in the middle of message {self._count}", hint="send it again")

    def _length_at(self, start: int) -> tuple[int, int] | None:
        """`(length, where the message begins)`; None when more bytes are needed to tell."""
        length = 0
        for number, byte in enumerate(self._buffer[start : start + LENGTH_BYTES_MAX]):
            length |= (byte & 0x7F) << (7 * number)
            if byte < 0x80:
                return length, start + number + 1
        if len(self._buffer) - start >= LENGTH_BYTES_MAX:
            raise InvalidInput(
                f"message {self._count} has no length", hint="each message comes after its length, as a varint"
            )
        return None
