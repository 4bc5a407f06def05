"""Where a scenario is measured: a fresh store each time, on a disk or on a server, and the floor of its kind."""

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


class Place(Protocol):
    """A kind of store, somewhere."""

    kind: str

    def fresh(self) -> Any:
        """A context with the URL of an empty store, which is gone after it; the scenarios' app is on it."""

    def floors(self) -> dict[str, Callable[[int], float]]:
        """The same work without Headrace, by scenario, from the repository. Raises `ImportError` outside it."""


class OnDisk:
    """SQLite files in a directory."""

    kind = "sqlite"

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """A file in a directory of its own."""
        with tempfile.TemporaryDirectory(dir=self.directory, prefix="bench-") as folder:
            url = f"sqlite:///{Path(folder).resolve()}/bench.db"
            app.use(load({"store": url}, os.environ, Path(folder)))
            yield url

    def floors(self) -> dict[str, Callable[[int], float]]:
        """Checked first: a slow floor would flatter."""
        from bench.floors import dispatch_floor, sqlite_floor

        def check(size: int) -> float:
            raw = sqlite_floor.raw_insert_rate(directory=self.directory)
            append = sqlite_floor.append_floor(size, self.directory)
            sqlite_floor.check_floor(raw, append, sqlite_floor.drain_floor(size, self.directory))
            return raw

        return {
            "append": lambda size: sqlite_floor.append_floor(size, self.directory),
            "drain": lambda size: sqlite_floor.drain_floor(size, self.directory),
            "sleep100ms": dispatch_floor.sleep_floor,
            "check": check,
        }


class Footprint(NamedTuple):
    """What the work of a schema has cost its server so far."""

    wal_bytes: int
    dead_rows: int


class OnServer:
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
        """A schema of its own."""
        self.schema = f"bench_{secrets.token_hex(6)}"
        parts = urlsplit(self.dsn)
        url = urlunsplit(parts._replace(query=urlencode([*parse_qsl(parts.query), ("schema", self.schema)])))
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            app.use(load({"store": url, "objects": f"{folder}/objects"}, os.environ, Path(folder)))
            try:
                yield url
            finally:
                run(self._ask(f'DROP SCHEMA IF EXISTS "{self.schema}" CASCADE'))

    def floors(self) -> dict[str, Callable[[int], float]]:
        """On the same server."""
        from bench.floors import dispatch_floor, postgres_floor

        return {
            "append": lambda size: asyncio.run(postgres_floor.append_floor(self.dsn, size)),
            "drain": lambda size: asyncio.run(postgres_floor.drain_floor(self.dsn, size)),
            "sleep100ms": dispatch_floor.sleep_floor,
        }

    async def footprint(self) -> Footprint:
        """Bytes of WAL the server has written, and row versions of this schema that updates and deletes left behind."""
        await self._ask("SELECT pg_stat_clear_snapshot()")
        ((wal_bytes,),) = await self._ask("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint")
        ((dead_rows,),) = await self._ask(
            "SELECT coalesce(sum(n_tup_upd + n_tup_del), 0)::bigint FROM pg_stat_all_tables WHERE schemaname = $1",
            self.schema,
        )
        return Footprint(wal_bytes, dead_rows)

    async def connect(self) -> Any:
        """A connection of one's own."""
        import asyncpg

        return await asyncpg.connect(self.dsn)

    async def _ask(self, sql: str, *values: object) -> list[Any]:
        connection = await self.connect()
        try:
            rows: list[Any] = await connection.fetch(sql, *values)
            return rows
        finally:
            await connection.close()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run on a loop as commands have it."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)
