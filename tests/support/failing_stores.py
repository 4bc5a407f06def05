"""Stores that report each statement before it is sent, so that a fault can be injected at that point.

A fault point is an operation and a statement: `settle:lock_spans`. `begin` and `commit` are the ends of a transaction;
`answered` is after the answer and before the caller uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from headrace.foundation.limits import DEFAULT
from headrace.store.postgres import PostgresStore
from headrace.store.postgres.pool import PostgresConnection
from headrace.store.sqlite import SqliteStore
from headrace.store.transactions.sql_script import Rows, Script
from tests.support.store_scenario import Acknowledged, StoreScenario

T = TypeVar("T")
At = Callable[[str], None]


class FaultyPostgres(PostgresStore):
    """A store that reports each statement to `at` before it is sent."""

    at: At = staticmethod(lambda statement: None)

    async def _fetch(self, connection: PostgresConnection, name: str, /, **values: Any) -> Rows:
        self.at(name)
        return await super()._fetch(connection, name, **values)

    async def _begin(self, connection: PostgresConnection, how: str) -> None:
        self.at("begin")
        await super()._begin(connection, how)

    async def _commit(self, connection: PostgresConnection) -> None:
        self.at("commit")
        await super()._commit(connection)


class FaultySqlite(SqliteStore):
    """A store that reports each statement to `at` before it is run, in the thread that runs it."""

    at: At = staticmethod(lambda statement: None)

    async def _write(self, script: Callable[[], Script[T]]) -> T:
        return await super()._write(lambda: self._watched(script()))

    async def _read(self, script: Callable[[], Script[T]]) -> T:
        return await super()._read(lambda: self._watched(script()))

    async def _scan(self, script: Callable[[], Script[T]]) -> T:
        return await self._read(script)

    def _watched(self, script: Script[T]) -> Script[T]:
        self.at("begin")
        try:
            ask = next(script)
            while True:
                self.at(ask.name)
                rows = yield ask
                ask = script.send(rows)
        except StopIteration as done:
            self.at("commit")
            answer: T = done.value
            return answer


FaultyStore = FaultyPostgres | FaultySqlite


def faulty_store(url: str) -> FaultyStore:
    """Make a store for fault injection."""
    if url.startswith("postgresql:"):
        return FaultyPostgres(url, DEFAULT)
    return FaultySqlite(Path(url.removeprefix("sqlite:///")), DEFAULT)


def faulty_scenario(store: FaultyStore, environment: str, now_us: int, at: At, **more: Any) -> StoreScenario:
    """Make a scenario that reports each fault point `operation:statement` to `at`, once."""
    seen: set[str] = set()

    def first(statement: str) -> None:
        place = f"{scenario.verb}:{statement}"
        if scenario.verb and place not in seen:
            seen.add(place)
            at(place)

    scenario = StoreScenario(store, environment, now_us, inject=lambda verb: first("answered"), **more)
    store.at = first
    return scenario


def read_log(path: Path) -> Iterator[Acknowledged]:
    """Read what was acknowledged to a scenario before it ended. A cut last line was never acknowledged."""
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            batch_id, run_index, state = line.rstrip("\n").split(" ")
            yield Acknowledged(batch_id, int(run_index), state)
