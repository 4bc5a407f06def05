"""Engines under test: on a SQLite file, on PostgreSQL or in memory, with a real or a manual clock; a faulty store."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace.app import Headrace
from headrace.compose import memory_engine, open_engine
from headrace.foundation.limits import Limits
from headrace.foundation.settings import load
from headrace.runtime.clock import Clock, SystemClock
from headrace.runtime.engine import Engine
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
