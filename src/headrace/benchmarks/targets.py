"""Targets of measurements: an empty store for each, on a disk or on a server, and the baselines of its kind."""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import uvloop

from headrace.benchmarks.tasks import app
from headrace.foundation.settings import load

T = TypeVar("T")
TABLES: Final = ("block", "span", "part", "batch", "queue", "session")


class BenchmarkTarget(Protocol):
    """A kind of store to measure."""

    kind: str

    def fresh(self) -> Any:
        """Return a context manager for the URL of an empty store, which is deleted after it; the scenarios' app uses
        it.
        """

    def baselines(self) -> dict[str, Callable[[int], float]]:
        """Return the baselines by scenario: functions from a size to a rate."""


class SqliteTarget:
    """SQLite files in a folder."""

    kind = "sqlite"

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """Create a file in a folder of its own."""
        with tempfile.TemporaryDirectory(dir=self.directory, prefix="bench-") as folder:
            url = f"sqlite:///{Path(folder).resolve()}/bench.db"
            app.use(load({"store": url}, os.environ, Path(folder)))
            yield url

    def baselines(self) -> dict[str, Callable[[int], float]]:
        """Return the baselines of SQLite, with a check of them: a slow baseline would flatter the product."""
        from headrace.benchmarks.baselines import dispatch, sqlite

        def check(size: int) -> float:
            raw = sqlite.raw_insert_rate(directory=self.directory)
            append = sqlite.measure_append(size, self.directory)
            sqlite.check_baseline(raw, append, sqlite.measure_drain(size, self.directory))
            return raw

        return {
            "append": lambda size: sqlite.measure_append(size, self.directory),
            "drain": lambda size: sqlite.measure_drain(size, self.directory),
            "sleep100ms": dispatch.measure_sleep,
            "check": check,
        }


class Footprint(NamedTuple):
    """Costs of a schema's work on its server so far."""

    wal_bytes: int
    dead_rows: int


class PostgresTarget:
    """Schemas of a PostgreSQL database."""

    kind = "postgres"

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        query = [(name, value) for name, value in parse_qsl(parts.query) if name != "schema"]
        self.dsn = urlunsplit(parts._replace(query=urlencode(query)))
        self.schema = ""

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """Create a schema of its own."""
        self.schema = f"bench_{secrets.token_hex(6)}"
        parts = urlsplit(self.dsn)
        url = urlunsplit(parts._replace(query=urlencode([*parse_qsl(parts.query), ("schema", self.schema)])))
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            objects = {"objects": f"{folder}/objects", "objects_shared": True}  # only this process uses the schema
            app.use(load({"store": url, **objects}, os.environ, Path(folder)))
            try:
                yield url
            finally:
                run(self._fetch(f'DROP SCHEMA IF EXISTS "{self.schema}" CASCADE'))

    def baselines(self) -> dict[str, Callable[[int], float]]:
        """Return the baselines of PostgreSQL, on the same server."""
        from headrace.benchmarks.baselines import dispatch, postgres

        return {
            "append": lambda size: asyncio.run(postgres.measure_append(self.dsn, size)),
            "drain": lambda size: asyncio.run(postgres.measure_drain(self.dsn, size)),
            "sleep100ms": dispatch.measure_sleep,
        }

    async def footprint(self) -> Footprint:
        """Return the bytes of WAL that the server has written, and the row versions that updates and deletes left in
        this schema.
        """
        await self._fetch("SELECT pg_stat_clear_snapshot()")
        ((wal_bytes,),) = await self._fetch("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint")
        ((dead_rows,),) = await self._fetch(
            "SELECT coalesce(sum(n_tup_upd + n_tup_del), 0)::bigint FROM pg_stat_all_tables WHERE schemaname = $1",
            self.schema,
        )
        return Footprint(wal_bytes, dead_rows)

    async def connect(self) -> Any:
        """Open a connection."""
        import asyncpg

        return await asyncpg.connect(self.dsn)

    async def _fetch(self, sql: str, *values: object) -> list[Any]:
        connection = await self.connect()
        try:
            rows: list[Any] = await connection.fetch(sql, *values)
            return rows
        finally:
            await connection.close()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the event loop that commands use."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)
