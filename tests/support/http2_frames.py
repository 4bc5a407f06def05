"""HTTP/2 frames and gRPC messages as bytes, and read back from bytes."""

from __future__ import annotations

import struct

from headrace.grpc.transport import frames
from headrace.grpc.transport.frames import PREFACE

GREETING = PREFACE + frames.settings({})


def framed(message: bytes, flag: int = 0) -> bytes:
    """A message behind its prefix."""
    return bytes((flag,)) + struct.pack(">I", len(message)) + message


def parsed(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """The frames of bytes: kind, flags, stream, payload. They must be whole."""
    found, place = [], 0
    while place < len(data):
        high, low, kind, flags, stream_id = frames.HEAD.unpack_from(data, place)
        stop = place + frames.HEAD_BYTES + (high << 8 | low)
        assert stop <= len(data), "a frame is cut"
        found.append((kind, flags, stream_id, data[place + frames.HEAD_BYTES : stop]))
        place = stop
    return found
