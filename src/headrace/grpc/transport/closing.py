"""Closing of connections: written bytes are sent, and a slow TLS shutdown of the peer is cut off."""

from __future__ import annotations

import asyncio
from typing import Final

CLOSE_TIMEOUT_S: Final = 1.0
"""Seconds a peer has to complete the TLS shutdown. Some never do, and asyncio alone would wait 30 seconds for each."""


def close_gracefully(transport: asyncio.Transport) -> None:
    """Close a connection, and abort it if it has not closed after `CLOSE_TIMEOUT_S`."""
    if not transport.is_closing():  # a second close makes asyncio's TLS transport lose track of the connection
        transport.close()
    asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, _abort_when_sent, transport)


def _abort_when_sent(transport: asyncio.Transport) -> None:
    """Abort the transport unless it still sends."""
    try:
        is_busy = transport.get_write_buffer_size() > 0
    except AttributeError:  # the transport was closed twice, by other code
        return
    if is_busy:
        asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, _abort_when_sent, transport)
    else:
        transport.abort()
