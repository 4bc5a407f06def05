"""Decoder of a stream of messages, each prefixed by its length as a varint.

Rule 1: a message over the limit fails alone: it becomes a marker in its position, and its bytes are dropped as they
arrive. Rule 2: memory is bounded by one message, and the pieces in which the input arrives have no effect. Rule 3: an
invalid length ends the stream, because the start of the next message is unknown.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from headrace.core import varint
from headrace.foundation.errors import InvalidInput

LENGTH_BYTES_MAX: Final = 5
"""Bytes of a 32-bit varint."""


def with_length(message: bytes) -> bytes:
    """Prefix a message with its length."""
    length = bytearray()
    varint.put(length, len(message))
    return bytes(length) + message


class OversizedMessage(NamedTuple):
    """A message over the size limit."""

    actual_bytes: int


class DelimitedDecoder:
    """Decodes messages from pieces of a stream. Owned by one task; never waits."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._buffer = bytearray()
        self._left_to_drop = 0
        self._count = 0

    def feed(self, data: bytes) -> list[bytes | OversizedMessage]:
        """Return the messages that end in this piece. Raises `InvalidInput` for an invalid length."""
        messages: list[bytes | OversizedMessage] = []
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
                messages.append(OversizedMessage(length))
                available = min(length, len(self._buffer) - begin)
                self._left_to_drop = length - available
                start = begin + available
                continue
            if len(self._buffer) - begin < length:
                break
            self._count += 1
            messages.append(bytes(self._buffer[begin : begin + length]))
            start = begin + length
        del self._buffer[:start]
        return messages

    def end(self) -> None:
        """Check that the stream has ended between two messages. Raises `InvalidInput` otherwise."""
        if self._buffer or self._left_to_drop:
            raise InvalidInput(f"the stream ended inside message {self._count}", hint="send the stream again")

    def _length_at(self, start: int) -> tuple[int, int] | None:
        """Return `(length, start of the message)`; None if more bytes are needed."""
        length = 0
        for number, byte in enumerate(self._buffer[start : start + LENGTH_BYTES_MAX]):
            length |= (byte & 0x7F) << (7 * number)
            if byte < 0x80:
                return length, start + number + 1
        if len(self._buffer) - start >= LENGTH_BYTES_MAX:
            raise InvalidInput(
                f"message {self._count} has no valid length", hint="prefix each message with its length as a varint"
            )
        return None
