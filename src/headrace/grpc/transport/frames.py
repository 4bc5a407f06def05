"""HTTP/2 frames (RFC 9113) as bytes: kinds, flags, error codes, settings, and functions that encode each frame."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
WITH_PRIORITY: Final = 0x20

HEADER_TABLE_SIZE: Final = 1
ENABLE_PUSH: Final = 2
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5
MAX_HEADER_LIST_SIZE: Final = 6

HEAD_BYTES: Final = 9
HEAD: Final = struct.Struct(">HBBBI")
"""Frame header: the length in two fields (16 bits and 8), kind, flags, stream id."""

SETTING: Final = struct.Struct(">HI")
WORD: Final = struct.Struct(">I")
WINDOW_MAX: Final = 2**31 - 1
WINDOW_FIRST: Final = 65_535
"""Initial flow-control window of both sides, until SETTINGS or WINDOW_UPDATE changes it."""

FRAME_BYTES: Final = 16_384
"""Largest frame accepted here. Every peer accepts at least this much."""


class ErrorCode(IntEnum):
    """HTTP/2 error codes, sent with RST_STREAM and GOAWAY."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


class ProtocolError(Exception):
    """The peer broke the protocol. The connection ends, and GOAWAY carries the error code and the reason."""

    def __init__(self, error_code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.error_code = error_code
        self.reason = reason


def frame_header(length: int, kind: int, flags: int, stream_id: int) -> bytes:
    """Encode the nine bytes of a frame header."""
    return HEAD.pack(length >> 8, length & 0xFF, kind, flags, stream_id)


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Encode a whole frame."""
    return frame_header(len(payload), kind, flags, stream_id) + payload


def settings(values: dict[int, int]) -> bytes:
    """Encode a SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(SETTING.pack(name, value) for name, value in values.items()))


def window_update(stream_id: int, increment: int) -> bytes:
    """Encode a WINDOW_UPDATE frame for a stream, or for the connection (stream 0)."""
    return frame(WINDOW_UPDATE, 0, stream_id, WORD.pack(increment))


def rst_stream(stream_id: int, error_code: ErrorCode) -> bytes:
    """Encode a RST_STREAM frame."""
    return frame(RST_STREAM, 0, stream_id, WORD.pack(error_code))


def goaway(last_id: int, error_code: ErrorCode, reason: str = "") -> bytes:
    """Encode a GOAWAY frame: streams after `last_id` are not processed. `reason` is cut to 200 bytes."""
    return frame(GOAWAY, 0, 0, WORD.pack(last_id) + WORD.pack(error_code) + reason.encode()[:200])


def strip_padding(payload: bytes, flags: int) -> bytes:
    """Strip the padding of a payload. Raises `ProtocolError`."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ProtocolError(
            ErrorCode.PROTOCOL_ERROR, "expected padding shorter than its frame, got a frame of nothing but padding"
        )
    return payload[1 : len(payload) - payload[0]]
