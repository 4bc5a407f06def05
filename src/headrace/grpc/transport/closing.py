"""How a connection is closed from here: what was written goes out, a peer that says no goodbye is not waited for."""

from __future__ import annotations

import asyncio
from typing import Final

GOODBYE_S: Final = 1.0
"""How long a peer has to end TLS in good order. Some never do, and the loop would wait half a minute for each."""


def part(transport: asyncio.Transport) -> None:
    """Close a connection, or see to it that one which closes does."""
    if not transport.is_closing():  # closed twice, asyncio's own forgets what it closes
        transport.close()
    asyncio.get_running_loop().call_later(GOODBYE_S, _insist, transport)


def _insist(transport: asyncio.Transport) -> None:
    """End it, unless something still goes out."""
    try:
        is_busy = transport.get_write_buffer_size() > 0
    except AttributeError:  # it was closed twice, by others
        return
    if is_busy:
        asyncio.get_running_loop().call_later(GOODBYE_S, _insist, transport)
    else:
        transport.abort()
