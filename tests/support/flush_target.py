"""Flush target and random producers for the tests of the flusher."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from headrace.foundation.errors import ClientFault, HeadraceError, StoreUnavailable
from headrace.runtime.clock import ManualClock
from headrace.runtime.flusher import Flusher


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


class SeededScenario:
    """Producers that are cancelled and a store that stalls, fails and refuses, all decided by a seed."""

    def __init__(self, seed: int, clock: ManualClock) -> None:
        self.random = random.Random(seed)
        self.clock = clock
        self.poison = {(producer, count) for producer in range(6) for count in range(60) if self.random.random() < 0.03}
        self.accepted: list[tuple[int, int]] = []
        self.landed: list[tuple[int, int]] = []
        self.flush_most = 0

    async def flush(self, updates: Sequence[tuple[int, int]]) -> None:
        self.flush_most = max(self.flush_most, len(updates))
        if self.random.random() < 0.5:
            await self.clock.sleep(self.random.random() * 0.2)
        if self.random.random() < 0.2:
            raise self.random.choice([OSError("down"), StoreUnavailable("busy"), asyncio.CancelledError()])
        if self.poison.intersection(updates):
            raise ClientFault("refused")
        self.landed.extend(updates)

    async def produce(self, producer: int, flusher: Flusher[tuple[int, int]]) -> None:
        for count in range(60):
            if self.random.random() < 0.2:
                await self.clock.sleep(self.random.random() * 0.1)
            put = asyncio.ensure_future(flusher.put((producer, count)))
            if self.random.random() < 0.1:
                for _ in range(self.random.randint(0, 6)):
                    await asyncio.sleep(0)
                put.cancel()
            try:
                await put
            except asyncio.CancelledError:
                continue
            self.accepted.append((producer, count))
