"""Frames, fields and header blocks of gRPC for load generators, without any library."""

from __future__ import annotations

import struct
from typing import Final

HEAD: Final = struct.Struct(">HBBBI")
"""The head of an HTTP/2 frame: length (high, low), kind, flags, stream id."""


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    """Return a whole frame."""
    return HEAD.pack(len(payload) >> 8, len(payload) & 255, kind, flags, stream_id) + payload


def field(number: int, value: bytes) -> bytes:
    """Encode a bytes field of a message."""
    size, head = len(value), bytearray((number << 3 | 2,))
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes(head) + bytes((size,)) + value


def headers(path: str) -> bytes:
    """Return the header block of a call, with literal fields that are not indexed."""
    fields = {":path": path, ":authority": "x", "content-type": "application/grpc", "te": "trailers"}
    text = ((name.encode(), value.encode()) for name, value in fields.items())
    return b"\x83\x86" + b"".join(b"\0" + bytes((len(n),)) + n + bytes((len(v),)) + v for n, v in text)
