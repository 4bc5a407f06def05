"""Encoding and decoding of HTTP/2 frames and gRPC messages in tests."""

from __future__ import annotations

import struct

from headrace.grpc.transport import frames
from headrace.grpc.transport.frames import PREFACE

GREETING = PREFACE + frames.settings({})


def framed(message: bytes, flag: int = 0) -> bytes:
    """Prefix a message with its compressed flag and length."""
    return bytes((flag,)) + struct.pack(">I", len(message)) + message


def parsed(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Split bytes into frames: kind, flags, stream id, payload. The bytes must be complete frames."""
    parsed_frames, offset = [], 0
    while offset < len(data):
        high, low, kind, flags, stream_id = frames.HEAD.unpack_from(data, offset)
        stop = offset + frames.HEAD_BYTES + (high << 8 | low)
        assert stop <= len(data), "incomplete frame"
        parsed_frames.append((kind, flags, stream_id, data[offset + frames.HEAD_BYTES : stop]))
        offset = stop
    return parsed_frames
