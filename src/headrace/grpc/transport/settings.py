"""SETTINGS of a peer, decoded and checked (RFC 9113, section 6.5)."""

from __future__ import annotations

from headrace.grpc.transport import frames
from headrace.grpc.transport.frames import FRAME_BYTES, ErrorCode, ProtocolError


def decode_settings(payload: bytes, *, is_from_server: bool) -> tuple[dict[int, int], int]:
    """Return the last value of each setting, and the largest initial window among all values.

    Every value is checked, also one that a later one replaces. Raises `ProtocolError`.
    """
    if len(payload) % frames.SETTING.size:
        raise ProtocolError(
            ErrorCode.FRAME_SIZE_ERROR,
            f"expected SETTINGS of {frames.SETTING.size} bytes each, got {len(payload)} bytes together",
        )
    values: dict[int, int] = {}
    window_max = 0
    for name, value in frames.SETTING.iter_unpack(payload):
        _check(name, value, is_from_server=is_from_server)
        values[name] = value
        if name == frames.INITIAL_WINDOW_SIZE:
            window_max = max(window_max, value)
    return values, window_max


def _check(name: int, value: int, *, is_from_server: bool) -> None:
    if name == frames.INITIAL_WINDOW_SIZE and value > frames.WINDOW_MAX:
        raise ProtocolError(
            ErrorCode.FLOW_CONTROL_ERROR, f"expected an initial window of at most 2^31-1 bytes, got {value}"
        )
    if name == frames.MAX_FRAME_SIZE and not FRAME_BYTES <= value < 1 << 24:
        raise ProtocolError(
            ErrorCode.PROTOCOL_ERROR, f"expected a maximum frame size from {FRAME_BYTES} to 2^24-1, got {value}"
        )
    if name == frames.ENABLE_PUSH and (value > 1 or (is_from_server and value)):
        raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"expected ENABLE_PUSH of 0 or 1 (from a server: 0), got {value}")
