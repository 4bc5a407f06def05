"""Large results that are not written yet: a bound in bytes for the outcomes that a worker holds.

The number of outcomes that wait for their flush is bounded, but with results of hundreds of kilobytes that would be
gigabytes. At the bound, the runner of a large result waits before it takes the next run, so a task that returns faster
than the store writes is slowed.
"""

from __future__ import annotations

import asyncio
from typing import Final

from headrace.foundation.limits import MIB
from headrace.runtime.clock import Clock

LARGE_BYTES: Final = 64 * 1024
"""Smaller results are not counted: thousands of them fit into memory."""
UNWRITTEN_BYTES_MAX: Final = 32 * MIB
WAIT_S: Final = 5.0
"""Longest wait of one runner: results of a lost lease are never written."""


class UnwrittenResults:
    """Bytes of large results that have ended and are not written."""

    def __init__(self, clock: Clock) -> None:
        self.held_bytes = 0
        self._clock = clock
        self._changed = asyncio.Event()

    async def hold(self, bytes_count: int) -> None:
        """Count a result, and wait while more than `UNWRITTEN_BYTES_MAX` are held."""
        self.held_bytes += bytes_count
        if self.held_bytes > UNWRITTEN_BYTES_MAX:
            self._changed.clear()
            await self._clock.wait_for(self._changed, WAIT_S)

    def release(self, bytes_count: int) -> None:
        """Forget results that were written, in a part of so many bytes."""
        if bytes_count >= LARGE_BYTES and self.held_bytes:
            self.held_bytes = max(0, self.held_bytes - bytes_count)
            self._changed.set()

    def clear(self) -> None:
        """Forget all results: their leases were lost."""
        self.held_bytes = 0
        self._changed.set()
