"""Stores that say which statement they are about to send, so that harm can be done just there.

A place is a verb and a statement, `settle:lock_spans`; `begin` and `commit` are the ends of a transaction, `answered`
is when the answer is back and nobody has acted on it.
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
from tests.support.store_scenario import Story, Told

T = TypeVar("T")
At = Callable[[str], None]


class HarmedPostgres(PostgresStore):
    """Tells `at` of each statement before it is sent."""

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


class HarmedSqlite(SqliteStore):
    """Tells `at` of each statement before it is run, in the thread that runs it."""

    at: At = staticmethod(lambda statement: None)

    async def _write(self, script: Callable[[], Script[T]]) -> T:
        return await super()._write(lambda: self._watched(script()))

    async def _read(self, script: Callable[[], Script[T]]) -> T:
        return await super()._read(lambda: self._watched(script()))

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


Harmed = HarmedPostgres | HarmedSqlite


def harmed_store(url: str) -> Harmed:
    """A store that can be harmed."""
    if url.startswith("postgresql:"):
        return HarmedPostgres(url, DEFAULT)
    return HarmedSqlite(Path(url.removeprefix("sqlite:///")), DEFAULT)


def harmed_story(store: Harmed, environment: str, now_us: int, at: At, **more: Any) -> Story:
    """A story that says `verb:statement` to `at`, each place the first time it comes there."""
    seen: set[str] = set()

    def first(statement: str) -> None:
        place = f"{story.verb}:{statement}"
        if story.verb and place not in seen:
            seen.add(place)
            at(place)

    story = Story(store, environment, now_us, harm=lambda verb: first("answered"), **more)
    store.at = first
    return story


def read_log(path: Path) -> Iterator[Told]:
    """What a story was told before it ended; a last line that is cut was never acknowledged."""
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            batch_id, run_index, state = line.rstrip("\n").split(" ")
            yield Told(batch_id, int(run_index), state)
