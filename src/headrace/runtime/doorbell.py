"""Best-effort news inside one process: work was appended, outcomes were recorded. Polling is the floor beneath it."""

from __future__ import annotations

import asyncio

from headrace.runtime.clock import Clock


class Doorbell:
    """Wakes everyone who waits. A ring that nobody waits for is forgotten; nothing depends on one."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Event] = set()

    def ring(self) -> None:
        """There is news. Costs nothing when nobody waits. On the loop of those who wait."""
        for event in self._waiting:
            event.set()

    async def wait(self, clock: Clock, timeout_s: float) -> bool:
        """True when it rang within `timeout_s`."""
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            return await clock.wait_for(event, timeout_s)
        finally:
            self._waiting.discard(event)
