"""Best-effort news inside one process: work was appended, outcomes were recorded. Polling is the floor beneath it."""

from __future__ import annotations

import asyncio

from headrace.runtime.clock import Clock


class Doorbell:
    """Wakes everyone who waits; nothing depends on a ring.

    Who looks at the store first and waits then takes `rings_count` before it looks: a ring in between is not missed.
    """

    def __init__(self) -> None:
        self.rings_count = 0
        self._waiting: set[asyncio.Event] = set()

    def ring(self) -> None:
        """There is news. Costs nothing when nobody waits. On the loop of those who wait."""
        self.rings_count += 1
        for event in self._waiting:
            event.set()

    async def wait(self, clock: Clock, timeout_s: float, *, since: int | None = None) -> bool:
        """True when it rang within `timeout_s`, or has rung since `rings_count` was `since`."""
        if since is not None and since != self.rings_count:
            return True
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            return await clock.wait_for(event, timeout_s)
        finally:
            self._waiting.discard(event)
