"""Frames of HTTP/2 (RFC 9113) as bytes: their kinds, flags, errors and settings, and how each is written."""

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
"""Of a frame: its length in two fields (16 bits and 8), kind, flags, stream."""

SETTING: Final = struct.Struct(">HI")
WORD: Final = struct.Struct(">I")
WINDOW_MAX: Final = 2**31 - 1
WINDOW_FIRST: Final = 65_535
"""What both sides may send before anybody said anything."""

FRAME_BYTES: Final = 16_384
"""The largest frame we take, and the least that any peer takes."""


class Fault(IntEnum):
    """Why a connection or stream ends, in HTTP/2's own codes."""

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


class Broken(Exception):
    """The peer broke the protocol: the connection ends, and GOAWAY says why."""

    def __init__(self, fault: Fault, what: str) -> None:
        super().__init__(what)
        self.fault = fault
        self.what = what


def head(length: int, kind: int, flags: int, stream_id: int) -> bytes:
    """The first nine bytes of a frame."""
    return HEAD.pack(length >> 8, length & 0xFF, kind, flags, stream_id)


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return head(len(payload), kind, flags, stream_id) + payload


def settings(values: dict[int, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(SETTING.pack(name, value) for name, value in values.items()))


def window_update(stream_id: int, increment: int) -> bytes:
    """More may be sent, on a stream or (0) on the connection."""
    return frame(WINDOW_UPDATE, 0, stream_id, WORD.pack(increment))


def rst_stream(stream_id: int, fault: Fault) -> bytes:
    """A stream ends here."""
    return frame(RST_STREAM, 0, stream_id, WORD.pack(fault))


def goaway(last_id: int, fault: Fault, what: str = "") -> bytes:
    """No stream after `last_id` is looked at."""
    return frame(GOAWAY, 0, 0, WORD.pack(last_id) + WORD.pack(fault) + what.encode()[:200])


def unpadded(payload: bytes, flags: int) -> bytes:
    """A payload without its padding. Raises `Broken`."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise Broken(Fault.PROTOCOL_ERROR, "a frame is all padding")
    return payload[1 : len(payload) - payload[0]]
