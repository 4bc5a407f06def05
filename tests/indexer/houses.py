"""Each house of entity tables, with the batches beside it, open for a test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from headrace.foundation.limits import DEFAULT
from headrace.store.entities.protocol import EntityStore
from headrace.store.memory import MemoryStore
from headrace.store.memory_entities import MemoryEntities
from headrace.store.postgres import PostgresStore
from headrace.store.postgres.entities import PostgresEntities
from headrace.store.protocol import Store
from headrace.store.sqlite import SqliteStore
from headrace.store.sqlite.entities import SqliteEntities
from tests.store.world import fresh_schema

RUNS_MAX = DEFAULT.batch_runs_max


class House(NamedTuple):
    """A store of batches and the tables of indexers beside it."""

    name: str
    store: Store
    entities: EntityStore


def _memory(_: Path) -> House:
    store = MemoryStore(DEFAULT)
    return House("memory", store, MemoryEntities(store))


def _sqlite(folder: Path) -> House:
    store = SqliteStore(folder / "headrace.db", DEFAULT)
    return House("sqlite", store, SqliteEntities(store, RUNS_MAX))


def _postgres(folder: Path) -> House:
    store = PostgresStore(fresh_schema(folder), DEFAULT)
    return House("postgres", store, PostgresEntities(store, RUNS_MAX))


HOUSES: Mapping[str, Callable[[Path], Any]] = {"memory": _memory, "sqlite": _sqlite, "postgres": _postgres}


@asynccontextmanager
async def opened(name: str, folder: Path) -> AsyncIterator[House]:
    """A house of that name in a folder, empty or as it was left there."""
    house: House = HOUSES[name](folder)
    await house.store.open()
    try:
        yield house
    finally:
        await house.entities.close()
        await house.store.close()
