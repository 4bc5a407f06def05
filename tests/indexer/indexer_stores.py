"""Stores for the tests of indexers: each implementation of entity tables, with the store of batches beside it."""

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


class IndexerStores(NamedTuple):
    """A store of batches and the entity tables of indexers beside it."""

    name: str
    store: Store
    entities: EntityStore
    url: str = ""


def _memory(_: Path) -> IndexerStores:
    store = MemoryStore(DEFAULT)
    return IndexerStores("memory", store, MemoryEntities(store))


def _sqlite(folder: Path) -> IndexerStores:
    return stores_at(f"sqlite:///{folder}/headrace.db")


def _postgres(folder: Path) -> IndexerStores:
    return stores_at(fresh_schema(folder))


def stores_at(url: str) -> IndexerStores:
    """Return the stores of a URL, without opening them."""
    if url.startswith("postgresql:"):
        store = PostgresStore(url, DEFAULT)
        return IndexerStores("postgres", store, PostgresEntities(store, RUNS_MAX), url)
    sqlite = SqliteStore(Path(url.removeprefix("sqlite:///")), DEFAULT)
    return IndexerStores("sqlite", sqlite, SqliteEntities(sqlite, RUNS_MAX), url)


STORES: Mapping[str, Callable[[Path], Any]] = {"memory": _memory, "sqlite": _sqlite, "postgres": _postgres}


@asynccontextmanager
async def stores_in(name: str, folder: Path) -> AsyncIterator[IndexerStores]:
    """Open the stores of an implementation in a folder: empty, or with what an earlier test run wrote there."""
    async with opened(STORES[name](folder)) as stores:
        yield stores


@asynccontextmanager
async def opened(stores: IndexerStores) -> AsyncIterator[IndexerStores]:
    """Open stores for the duration of a block."""
    await stores.store.open()
    try:
        yield stores
    finally:
        await stores.entities.close()
        await stores.store.close()
