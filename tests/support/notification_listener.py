"""A process that listens for the notifications of other processes on one PostgreSQL database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from headrace.store.postgres import PostgresNotifier
from headrace.store.postgres.dsn import address
from headrace.store.protocol import RECORDED, WORK


class Ear:
    """One process's notifier, and what it heard."""

    def __init__(self, url: str, schema: str, own: PostgresNotifier | None = None) -> None:
        self.notifier = own or PostgresNotifier(address(url), schema)
        self.heard: list[str] = []
        self.came = asyncio.Condition()
        for news in (WORK, RECORDED):
            self.notifier.listen(news, lambda news=news: self._hear(news))  # type: ignore[misc]  # bound to the loop's value

    def _hear(self, news: str) -> None:
        self.heard.append(news)
        self._note = asyncio.create_task(self._notify())

    async def _notify(self) -> None:
        async with self.came:
            self.came.notify_all()

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something holds, looking after each piece of news."""
        async with self.came:
            await self.came.wait_for(is_so)

    async def listening(self) -> None:
        """Begin to listen, and forget what was missed until now."""
        with self.notifier.awaited():
            await self.until(lambda: self.notifier.is_listening)
        self.heard.clear()
