"""Events that an HTTP/2 connection makes of the frames that it has received."""

from __future__ import annotations

from typing import NamedTuple

from headrace.grpc.transport.frames import ErrorCode
from headrace.grpc.transport.headers import Headers


class RequestReceived(NamedTuple):
    """A complete call has arrived."""

    stream_id: int
    headers: Headers
    message: bytes
    is_compressed: bool


class ResponseReceived(NamedTuple):
    """A call made here was answered. `message` is None for a response without one; the status is in `trailers`."""

    stream_id: int
    headers: Headers
    trailers: Headers
    message: bytes | None
    is_compressed: bool


class StreamReset(NamedTuple):
    """The peer has reset a stream."""

    stream_id: int
    error_code: int


class GoAwayReceived(NamedTuple):
    """The peer accepts no streams after `last_id`."""

    last_id: int
    error_code: int


class ConnectionFailed(NamedTuple):
    """The peer broke the protocol. The connection is over, and GOAWAY carries the reason."""

    error_code: ErrorCode
    reason: str


Event = RequestReceived | ResponseReceived | StreamReset | GoAwayReceived | ConnectionFailed
