"""Each house of entity tables, with the batches beside it, open for a test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from headrace.foundation.limits import DEFAULT
from headrace.store.entities.protocol import EntityStore
from headrace.store.memory import MemoryEntities, MemoryStore
from headrace.store.postgres import PostgresStore
from headrace.store.postgres.entities import PostgresEntities
from headrace.store.protocol import Store
from headrace.store.sqlite import SqliteStore
from headrace.store.sqlite.entities import SqliteEntities
from tests.support.store_rig import fresh_schema

RUNS_MAX = DEFAULT.batch_runs_max


class House(NamedTuple):
    """A store of batches and the tables of indexers beside it."""

    name: str
    store: Store
    entities: EntityStore
    url: str = ""


def _memory(_: Path) -> House:
    store = MemoryStore(DEFAULT)
    return House("memory", store, MemoryEntities(store))


def _sqlite(folder: Path) -> House:
    return house_at(f"sqlite:///{folder}/headrace.db")


def _postgres(folder: Path) -> House:
    return house_at(fresh_schema(folder))


def house_at(url: str) -> House:
    """The house of a URL, not opened."""
    if url.startswith("postgresql:"):
        store = PostgresStore(url, DEFAULT)
        return House("postgres", store, PostgresEntities(store, RUNS_MAX), url)
    own = SqliteStore(Path(url.removeprefix("sqlite:///")), DEFAULT)
    return House("sqlite", own, SqliteEntities(own, RUNS_MAX), url)


HOUSES: Mapping[str, Callable[[Path], Any]] = {"memory": _memory, "sqlite": _sqlite, "postgres": _postgres}


@asynccontextmanager
async def opened(name: str, folder: Path) -> AsyncIterator[House]:
    """A house of that name in a folder, empty or as it was left there."""
    async with opened_house(HOUSES[name](folder)) as house:
        yield house


@asynccontextmanager
async def opened_house(house: House) -> AsyncIterator[House]:
    """A house for a block."""
    await house.store.open()
    try:
        yield house
    finally:
        await house.entities.close()
        await house.store.close()
