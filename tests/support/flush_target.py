"""Flush target for the tests of the flusher."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from headrace.foundation.errors import ClientFault, HeadraceError


class FlushTarget:
    """A store that records flushed updates, and fails, refuses or stalls as a test sets it."""

    def __init__(self) -> None:
        self.flushes: list[tuple[Any, ...]] = []
        self.tries: list[tuple[Any, ...]] = []
        self.refused: list[tuple[Any, HeadraceError]] = []
        self.errors: list[BaseException] = []
        self.poison: set[Any] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.in_flight = 0
        self.in_flight_most = 0

    async def flush(self, updates: Sequence[Any]) -> None:
        self.tries.append(tuple(updates))
        self.in_flight += 1
        self.in_flight_most = max(self.in_flight_most, self.in_flight)
        try:
            await self.gate.wait()
            if self.errors:
                raise self.errors.pop(0)
            if self.poison.intersection(updates):
                raise ClientFault("the store refuses this")
            self.flushes.append(tuple(updates))
        finally:
            self.in_flight -= 1

    def refuse(self, update: Any, error: HeadraceError) -> None:
        self.refused.append((update, error))

    @property
    def landed(self) -> list[Any]:
        return [update for flush in self.flushes for update in flush]
