"""Engines under test: on each kind of store, with a real or a manual clock; and stores that fail or are away."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace.app import Headrace
from headrace.compose import memory_engine, open_engine
from headrace.foundation.errors import StoreUnreachable
from headrace.foundation.limits import Limits
from headrace.foundation.settings import load
from headrace.runtime.clock import Clock, SystemClock
from headrace.runtime.engine import Engine
from headrace.runtime.outage import Outage
from headrace.store.reachability import Reachability
from tests.support import invariants
from tests.support.store_rig import fresh_schema

KINDS = ("memory", "sqlite")
on_each_store = pytest.mark.parametrize("kind", KINDS)


async def engine_of(kind: str, folder: Path, *, clock: Clock | None = None, **limits: int) -> Engine:
    """Open an engine; the caller closes it."""
    if kind == "memory":
        return await memory_engine(Limits(**limits), clock or SystemClock())
    store = fresh_schema(folder) if kind == "postgres" else f"sqlite:///{folder / 'headrace.db'}"
    flags = {"store": store, **limits}
    engine = await open_engine(load(flags, {}, folder))
    return engine if clock is None else dataclasses.replace(engine, clock=clock)


@asynccontextmanager
async def opened(kind: str, folder: Path, **more: Any) -> AsyncGenerator[Engine, None]:
    """Open an engine while the block lasts; every invariant must hold at its end."""
    engine = await engine_of(kind, folder, **more)
    try:
        yield engine
        assert await invariants.faults(engine.store, engine.environment) == []
    finally:
        await engine.close()


@asynccontextmanager
async def app_on(engine: Engine) -> AsyncGenerator[Headrace, None]:
    """Return an app on this engine; closing the app leaves the engine open."""
    app = Headrace("test")
    app.use_engine(engine)
    try:
        yield app
    finally:
        if app._producer is not None:
            await app._producer.close()


class Faulty:
    """A store whose operations fail: `before` raises without effect, `after` performs it and loses the answer."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.before: dict[str, list[BaseException]] = {}
        self.after: dict[str, list[BaseException]] = {}
        self.calls: list[str] = []
        self.watch: dict[str, Callable[[], None]] = {}

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._store, name)

        async def called(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if faults := self.before.get(name):
                raise faults.pop(0)
            answer = await verb(*args, **kwargs)
            if name in self.watch:
                self.watch[name]()
            if faults := self.after.get(name):
                raise faults.pop(0)
            return answer

        return called


class DetachableStore:
    """The connection of one process to a store that other processes share. While `is_away` nothing gets through.

    `sent` holds the time and name of each operation that the process sent, `probe` for probes.
    """

    def __init__(self, store: Any, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self.is_away = False
        self.sent: list[tuple[int, str]] = []
        self.reachability = Reachability(self._probe)

    def sent_since(self, since_us: int) -> Counter[str]:
        """Count the operations that were sent since a time, by name."""
        return Counter(name for sent_us, name in self.sent if sent_us >= since_us)

    def _send(self, name: str) -> None:
        self.sent.append((self._clock.now_us(), name))
        if self.is_away:
            error = StoreUnreachable("away")
            self.reachability.failed(error)
            raise error

    async def _probe(self) -> None:
        self._send("probe")

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._store, name)

        async def called(*args: Any, **kwargs: Any) -> Any:
            self._send(name)
            answer = await operation(*args, **kwargs)
            self.reachability.succeeded()
            return answer

        return called


def detachable_engine(engine: Engine, clock: Clock) -> tuple[Engine, DetachableStore]:
    """Return the engine of another process on the same store, and its connection."""
    store: Any = DetachableStore(engine.store, clock)
    outage = Outage(store.reachability, jitter=lambda: 0.0)
    return dataclasses.replace(engine, store=store, clock=clock, beats_beside=False, outage=outage), store
