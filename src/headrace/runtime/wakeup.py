"""Best-effort news: work was appended, outcomes were recorded. Polling is the floor beneath it."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext

from headrace.runtime.clock import Clock
from headrace.store.protocol import Notifier


class Wakeup:
    """Wakes everyone who waits, here and, with a notifier, in the other processes; nothing depends on a ring.

    Who looks at the store first and waits then takes `notified_count` before it looks: a ring in between is not missed.
    """

    def __init__(self, notifier: Notifier | None = None, news: str = "") -> None:
        self.notified_count = 0
        self._waiting: set[asyncio.Event] = set()
        self._notifier = notifier
        self._news = news
        if notifier is not None:
            notifier.listen(news, self.notify_local)

    def notify(self) -> None:
        """There is news. Costs nothing when nobody waits. On the loop of those who wait."""
        self.notify_local()
        if self._notifier is not None:
            self._notifier.tell(self._news)

    def notify_local(self) -> None:
        """There is news that the other processes know of."""
        self.notified_count += 1
        for event in self._waiting:
            event.set()

    async def wait(self, clock: Clock, timeout_s: float, *, since: int | None = None) -> bool:
        """True when it rang within `timeout_s`, or has rung since `notified_count` was `since`."""
        if since is not None and since != self.notified_count:
            return True
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            with nullcontext() if self._notifier is None else self._notifier.awaited():
                return await clock.wait_for(event, timeout_s)
        finally:
            self._waiting.discard(event)
