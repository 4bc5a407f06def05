"""TCP options that find out that the peer of a connection is gone: a lost route ends no connection by itself."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any, Final

KEEPALIVE_IDLE_S: Final = 10
"""Seconds of silence before the first probe of a client's connection."""
KEEPALIVE_INTERVAL_S: Final = 5
KEEPALIVE_PROBES: Final = 3
UNACKNOWLEDGED_MS: Final = 20_000
"""Time after which a client's connection ends whose bytes the peer does not acknowledge."""


def keep_alive(connection: Any, *, idle_s: int = KEEPALIVE_IDLE_S, unacknowledged_ms: int = UNACKNOWLEDGED_MS) -> None:
    """Set the options of a TCP socket, as far as the system has them. Other sockets, and None, are left as they are."""
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    options = (
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", idle_s),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", KEEPALIVE_PROBES),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", unacknowledged_ms),
    )
    for level, name, value in options:
        with suppress(OSError, AttributeError):  # not on this system
            connection.setsockopt(level, getattr(socket, name), value)
