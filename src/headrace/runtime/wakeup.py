"""Best-effort wake-ups: runs were appended, or outcomes were recorded. Polling is the fallback."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext

from headrace.runtime.clock import Clock
from headrace.store.notifications import Notifier


class Wakeup:
    """Wakes the waiting tasks of this process and, with a notifier, of the other processes.

    A wake-up may be lost; no promise depends on it. A caller that checks the store before it waits reads
    `notified_count` before the check and passes it as `since`, so that a wake-up in between is not missed.
    """

    def __init__(self, notifier: Notifier | None = None, channel: str = "") -> None:
        self.notified_count = 0
        self._waiting: set[asyncio.Event] = set()
        self._notifier = notifier
        self._channel = channel
        if notifier is not None:
            notifier.listen(channel, self.notify_local)

    def notify(self) -> None:
        """Wake the tasks that wait, here and in other processes. Call it on the event loop of the waiting tasks."""
        self.notify_local()
        if self._notifier is not None:
            self._notifier.notify(self._channel)

    def notify_local(self) -> None:
        """Wake the tasks of this process only; the other processes were notified already."""
        self.notified_count += 1
        for event in self._waiting:
            event.set()

    async def wait(self, clock: Clock, timeout_s: float | None, *, since: int | None = None) -> bool:
        """Wait for a wake-up. True if one came within `timeout_s`, or since `notified_count` was `since`. None waits
        without a limit.
        """
        if since is not None and since != self.notified_count:
            return True
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            with nullcontext() if self._notifier is None else self._notifier.awaited():
                return await clock.wait_for(event, timeout_s)
        finally:
            self._waiting.discard(event)
