"""Best-effort wake-ups: runs were appended, or outcomes were recorded. Polling is the fallback."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Final

from headrace.runtime.clock import Clock
from headrace.store.notifications import Notifier

WATCHES_PER_S: Final = 1_000
"""Watches that are woken in a second by notifications that name no batch, beside one of them all."""


class Wakeup:
    """Wakes the waiting tasks of this process and, with a notifier, of the other processes.

    A wake-up may be lost; no promise depends on it. A caller that checks the store before it waits reads
    `notified_count` before the check and passes it as `since`, so that a wake-up in between is not missed.
    """

    def __init__(self, notifier: Notifier | None = None, channel: str = "") -> None:
        self.notified_count = 0
        self.watches_count = 0
        self._waiting: set[asyncio.Event] = set()
        self._watches: dict[str, dict[int | None, set[asyncio.Event]]] = {}
        self._clock: Clock | None = None
        self._swept_us = 0
        self._notifier = notifier
        self._channel = channel
        if notifier is not None:
            notifier.listen(channel, self.notify_local)

    def notify(self, ended: Mapping[str, Iterable[int] | None] | None = None) -> None:
        """Wake the tasks that wait, here and in other processes. Call it on the event loop of the waiting tasks.

        `ended`: indexes of runs that ended, by batch (None: all of its runs), if they are known: only watches of these
        are woken here.
        """
        self.notify_local(ended)
        if self._notifier is not None:
            self._notifier.notify(self._channel)

    def notify_local(self, ended: Mapping[str, Iterable[int] | None] | None = None) -> None:
        """Wake the tasks of this process only; the other processes were notified already."""
        self.notified_count += 1
        for event in self._waiting:
            event.set()
        if not self.watches_count:
            return
        if ended is None:
            self._wake_watches()
            return
        for batch_id, indexes in ended.items():
            by_index = self._watches.get(batch_id)
            if by_index is not None:
                for index in tuple(by_index) if indexes is None else (None, *indexes):
                    for event in by_index.get(index, ()):
                        event.set()

    def _wake_watches(self) -> None:
        """Wake all watches, unless that would be too many in a short time: those find out by polling."""
        now_us = 0 if self._clock is None else self._clock.now_us()
        if now_us - self._swept_us < self.watches_count * 1_000_000 // WATCHES_PER_S and self._swept_us:
            return
        self._swept_us = now_us
        for by_index in self._watches.values():
            for events in by_index.values():
                for event in events:
                    event.set()

    def watch(self, batch_id: str, index: int | None = None) -> Watch:
        """Return a watch on the runs of a batch, or on one of them."""
        return Watch(self, batch_id, index)

    def watched(self, batch_id: str, indexes: Sequence[int]) -> Sequence[int] | None:
        """Return those of a batch's indexes that a watch may wait for; None if there is no watch on the batch."""
        by_index = self._watches.get(batch_id)
        if by_index is None:
            return None
        return () if by_index.keys() == {None} else indexes

    def add_watch(self, batch_id: str, index: int | None, event: asyncio.Event, clock: Clock) -> None:
        """Begin a watch."""
        self._clock = clock
        self.watches_count += 1
        self._watches.setdefault(batch_id, {}).setdefault(index, set()).add(event)

    def remove_watch(self, batch_id: str, index: int | None, event: asyncio.Event) -> None:
        """End a watch."""
        self.watches_count -= 1
        by_index = self._watches[batch_id]
        by_index[index].discard(event)
        if not by_index[index]:
            del by_index[index]
        if not by_index:
            del self._watches[batch_id]

    async def wait(self, clock: Clock, timeout_s: float | None, *, since: int | None = None) -> bool:
        """Wait for a wake-up. True if one came within `timeout_s`, or since `notified_count` was `since`. None waits
        without a limit.
        """
        if since is not None and since != self.notified_count:
            return True
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            return await self.wait_for(event, clock, timeout_s)
        finally:
            self._waiting.discard(event)

    async def wait_for(self, event: asyncio.Event, clock: Clock, timeout_s: float | None) -> bool:
        """Wait for an event that a notification sets. True if it came within `timeout_s`."""
        with nullcontext() if self._notifier is None else self._notifier.awaited():
            return await clock.wait_for(event, timeout_s)


class Watch:
    """Wakes one waiting task when runs of its batch, or its run, may have ended.

    Thousands of tasks may watch at a time, so a notification about other batches wakes none of them.
    """

    def __init__(self, wakeup: Wakeup, batch_id: str, index: int | None) -> None:
        self._wakeup = wakeup
        self._batch_id = batch_id
        self._index = index
        self._event = asyncio.Event()

    def begin(self, clock: Clock) -> None:
        """Begin to watch."""
        self._wakeup.add_watch(self._batch_id, self._index, self._event, clock)

    def end(self) -> None:
        """Stop watching."""
        self._wakeup.remove_watch(self._batch_id, self._index, self._event)

    def clear(self) -> None:
        """Forget the notifications so far. Call it before the store is read."""
        self._event.clear()

    async def wait(self, clock: Clock, timeout_s: float) -> bool:
        """Wait for a notification since `clear`. True if one came within `timeout_s`."""
        poll_s = timeout_s * max(1.0, self._wakeup.watches_count / WATCHES_PER_S)
        return await self._wakeup.wait_for(self._event, clock, poll_s)
