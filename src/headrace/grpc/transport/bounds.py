"""Bounds of one HTTP/2 connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from headrace.grpc.transport.headers import Headers


class Bounds(NamedTuple):
    """Bounds of one connection. `calls_max`: concurrent streams, with those ended while their handlers still run.

    `message_bytes_max_of`: the bound of the message of a call with these headers; by default that of all messages.
    `free_bytes`: a message of this size is within the bound of every call.
    """

    message_bytes_max: int
    calls_max: int
    message_bytes_max_of: Callable[[Headers], int] | None = None
    free_bytes: int = 0

    def of_message(self, headers: Headers | None) -> int:
        """Return the bound of a call's message."""
        if self.message_bytes_max_of is None or headers is None:
            return self.message_bytes_max
        return self.message_bytes_max_of(headers)
