"""A process that listens for the notifications of other processes on one PostgreSQL database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from headrace.store.notifications import RECORDED, WORK
from headrace.store.postgres import PostgresNotifier
from headrace.store.postgres.dsn import address


class NotificationListener:
    """The notifier of one process, and the notifications that it received."""

    def __init__(self, url: str, schema: str, notifier: PostgresNotifier | None = None) -> None:
        self.notifier = notifier or PostgresNotifier(address(url), schema)
        self.received: list[str] = []
        self.arrived = asyncio.Condition()
        for kind in (WORK, RECORDED):
            self.notifier.listen(kind, lambda kind=kind: self._hear(kind))  # type: ignore[misc]  # bound to the loop's value

    def _hear(self, kind: str) -> None:
        self.received.append(kind)
        self._note = asyncio.create_task(self._notify())

    async def _notify(self) -> None:
        async with self.arrived:
            self.arrived.notify_all()

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until a condition holds, checked after each notification."""
        async with self.arrived:
            await self.arrived.wait_for(is_so)

    async def listening(self) -> None:
        """Begin to listen, and clear what was received until now."""
        with self.notifier.awaited():
            await self.until(lambda: self.notifier.is_listening)
        self.received.clear()
