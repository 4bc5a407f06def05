"""`PostgresStore`: the verbs of the seam on a PostgreSQL database.

A script runs in one transaction, READ COMMITTED, with the rows it changes locked in one order (spans by id, then
batches by id), so two transactions never wait for each other in a circle. Nothing hangs on a connection: table names
carry their schema, and ids are numbered by the process from ranges it takes.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg

from headrace.core.span import SETTLED, Settlement
from headrace.foundation.errors import HeadraceError, InvalidInput, InvalidSetting, StoreBroken, StoreUnavailable
from headrace.foundation.limits import Limits
from headrace.store.postgres import hot
from headrace.store.protocol import Claim, Lease
from headrace.store.statements import migrations, statements
from headrace.store.verbs import working
from headrace.store.verbs.script import Ask, Overtaken, Rows, Script
from headrace.store.verbs.store import ScriptedStore
from headrace.store.verbs.working import CANDIDATES_MAX, USUAL_RUNS

T = TypeVar("T")

CONNECTIONS: Final = 8
ID_RANGE: Final = 65_536
TRIES: Final = 5
OLDEST_POSTGRES: Final = (14,)
MIGRATION_LOCK: Final = 0x68656164726163
SERVER_SETTINGS: Final = {
    "application_name": "headrace",
    "idle_in_transaction_session_timeout": "10000",
    # A plan made while the tables were small is kept: it must not be one that reads them whole when they are large.
    "enable_seqscan": "off",
    "jit": "off",
}
COMMAND_TIMEOUT_S: Final = 60
_SCHEMA: Final = re.compile(r"[a-z_][a-z0-9_]{0,62}\Z")
_NAME: Final = re.compile(r"(?<![:\w]):([a-z_]+)")


class PostgresStore(ScriptedStore):
    """Batches in one schema of a PostgreSQL database. `url` is a DSN that may name it: `?schema=headrace`."""

    def __init__(self, url: str, limits: Limits) -> None:
        super().__init__(limits)
        self._dsn, self._schema = _parts(url)
        self._sql = compiled(self._schema)
        self._pools: dict[asyncio.AbstractEventLoop, tuple[asyncpg.Pool[Any], AsyncGenerator[None, None]]] = {}
        self._block_ids, self._span_ids = _Range(), _Range()
        self._runs_a_span = USUAL_RUNS
        self._is_open = False

    async def open(self) -> None:
        """Connect, and bring the schema to the current version."""
        self._is_open = True
        try:
            async with (await self._pool()).acquire() as connection:
                await self._migrate(connection)
        except BaseException as error:
            await self.close()
            if isinstance(error, HeadraceError | asyncio.CancelledError):
                raise
            raise as_fault(error) from error

    async def close(self) -> None:
        """Close every connection; a second close does nothing."""
        self._is_open = False
        here = asyncio.get_running_loop()
        for loop, (pool, end) in list(self._pools.items()):
            self._pools.pop(loop, None)
            if loop is here:
                await pool.close()
                await end.aclose()
            else:
                with suppress(RuntimeError):  # it ended this moment, and its connections with it
                    loop.call_soon_threadsafe(pool.terminate)

    @property
    def identity(self) -> str:
        """Which database and schema this is, without who asks."""
        parts = urlsplit(self._dsn)
        return f"{parts.hostname}:{parts.port}{parts.path}/{self._schema}"

    async def clock_us(self) -> int:
        """The time of the database's machine, which all hosts follow."""
        ((now_us,),) = await self._alone("clock")
        return int(now_us)

    async def check(self) -> dict[str, object]:
        """A round trip, and the settings that durability hangs on."""
        async with (await self._pool()).acquire() as connection:
            ((server, fsync, synchronous_commit),) = await self._fetch(connection, "durability")
            ((version,),) = await self._fetch(connection, "version")
        return {
            "store": "postgres",
            "schema": self._schema,
            "server_version": server,
            "schema_version": version,
            "fsync": fsync,
            "synchronous_commit": synchronous_commit,
        }

    async def _migrate(self, connection: Any) -> None:
        """Bring the schema to the newest version this code knows, one process at a time."""
        if connection.get_server_version() < OLDEST_POSTGRES:
            raise StoreBroken("the server is older than PostgreSQL 14", hint="upgrade it")
        scripts = migrations("headrace.store.postgres")
        newest = scripts[-1][0]
        if await self._version(connection) == newest:
            return
        async with connection.transaction():
            await self._fetch(connection, "migration_lock", lock=MIGRATION_LOCK)
            version = await self._version(connection)
            if version > newest:
                raise StoreBroken(
                    f"the database has schema version {version}, this Headrace knows up to {newest}",
                    hint="upgrade Headrace, or name another schema",
                )
            for number, script in scripts[version:]:
                await connection.execute(script.replace("{schema}", f'"{self._schema}"'))
                await self._fetch(connection, "set_version", number=number)

    async def _version(self, connection: Any) -> int:
        if not await self._fetch(connection, "version_table", schema=self._schema):
            return 0
        ((number,),) = await self._fetch(connection, "version")
        return int(number)

    # -- hot verbs, one statement each (rule R7); the scripts do what is not usual, and say what is meant

    async def settle(self, settlements: Sequence[Settlement], *, now_us: int) -> list[str]:
        """Record outcomes: of consecutive runs in one statement, by the script when any of them is anything else."""
        values = hot.ranges(settlements)
        if values is not None:
            ((count,),) = await self._alone("settle_ranges", **values, now_us=now_us)
            if count:
                return [SETTLED] * count
        return await super().settle(settlements, now_us=now_us)

    async def claim(self, claim: Claim, *, now_us: int) -> list[Lease]:
        """Lease spans in one statement, which says when it takes the script."""
        if claim.runs_max < 1:
            return await super().claim(claim, now_us=now_us)
        rows_max, due_us = hot.rows_wanted(claim.runs_max, self._runs_a_span), now_us
        while True:
            values = hot.wish(claim, rows_max=rows_max, due_us=due_us, now_us=now_us)
            rows = await self._claim_whole(values)
            word = rows[0][0]
            if word == hot.SHORT:
                rows_max = min(rows_max * 4, CANDIDATES_MAX)
            elif word == hot.DUE:
                await self._write(lambda: working.promote(now_us))
                due_us = hot.NEVER
            elif word in hot.ANSWERED:
                leases, runs_a_span = hot.leases_of(rows)
                self._runs_a_span = runs_a_span or self._runs_a_span
                return leases
            else:
                return await super().claim(claim, now_us=now_us)

    async def _claim_whole(self, values: dict[str, Any]) -> Rows:
        async def work(connection: Any) -> Rows:
            span_id = await self._take(connection, self._span_ids, "next_span_ids", 1)
            return await self._fetch(connection, "claim_whole", **values, span_id=span_id)

        return await self._tried(work)

    # -- running scripts

    async def _write(self, script: Callable[[], Script[T]]) -> T:
        """In one transaction."""

        async def work(connection: Any) -> T:
            async with connection.transaction():
                return await self._run(connection, script())

        return await self._tried(work)

    async def _alone(self, name: str, /, **values: Any) -> Rows:
        """One statement that the server commits by itself (rule R7)."""
        return await self._tried(lambda connection: self._fetch(connection, name, **values))

    async def _tried(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """What the server undid to keep transactions apart is done again."""
        for tries_left in range(TRIES - 1, -1, -1):
            try:
                async with (await self._pool()).acquire() as connection:
                    return await work(connection)
            except (Overtaken, asyncpg.SerializationError, asyncpg.DeadlockDetectedError) as error:
                if not tries_left:
                    raise as_fault(error) from error
                await asyncio.sleep(0)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
                raise as_fault(error) from error
        raise AssertionError

    async def _read(self, script: Callable[[], Script[T]]) -> T:
        try:
            async with (
                (await self._pool()).acquire() as connection,
                connection.transaction(isolation="repeatable_read", readonly=True),
            ):
                return await self._run(connection, script())
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
            raise as_fault(error) from error

    async def _run(self, connection: Any, script: Script[T]) -> T:
        try:
            ask = next(script)
            while True:
                ask = script.send(await self._answer(connection, ask))
        except StopIteration as done:
            answer: T = done.value
            return answer

    async def _answer(self, connection: Any, ask: Ask) -> Rows:
        if ask.name == "take_ids":
            first_block = await self._take(connection, self._block_ids, "next_block_ids", ask.values["blocks_count"])
            first_span = await self._take(connection, self._span_ids, "next_span_ids", ask.values["spans_count"])
            return [(first_block, first_span)]
        return await self._fetch(connection, ask.name, **ask.values)

    async def _fetch(self, connection: Any, name: str, /, **values: Any) -> Rows:
        sql, names = self._sql[name]
        return [tuple(row) for row in await connection.fetch(sql, *(values[name] for name in names))]

    async def _take(self, connection: Any, own: _Range, name: str, count: int) -> int:
        """The first of `count` consecutive ids; a fresh range is fetched when the one at hand is too short."""
        if count > ID_RANGE:
            raise InvalidInput(f"one transaction makes at most {ID_RANGE} new rows of a kind, not {count}")
        while (first := own.take(count)) is None:
            ((start,),) = await self._fetch(connection, name)
            own.start(start)
        return first

    async def _pool(self) -> asyncpg.Pool[Any]:
        """The connections of the loop that asks: a connection belongs to the loop it was made on."""
        if not self._is_open:
            raise StoreUnavailable("the store is closed")
        loop = asyncio.get_running_loop()
        if loop not in self._pools:
            pool = asyncpg.create_pool(
                self._dsn,
                min_size=0,
                max_size=CONNECTIONS,
                command_timeout=COMMAND_TIMEOUT_S,
                reset=_keep,
                server_settings=SERVER_SETTINGS,
            )
            end = self._ended_with(loop, pool)
            self._pools[loop] = pool, end
            await anext(end)
        pool, _ = self._pools[loop]
        await pool
        return pool

    async def _ended_with(self, loop: asyncio.AbstractEventLoop, pool: asyncpg.Pool[Any]) -> AsyncGenerator[None, None]:
        """A loop closes its generators before it ends: the only notice there is that its connections end too."""
        try:
            yield
        finally:
            if self._pools.get(loop, (None,))[0] is pool:
                del self._pools[loop]
            pool.terminate()


class _Range:
    """Ids of one range that are still free; the loops of several threads may share it."""

    __slots__ = ("_left", "_lock", "_next")

    def __init__(self) -> None:
        self._next = 0
        self._left = 0
        self._lock = threading.Lock()

    def start(self, first: int) -> None:
        """Go on in a new range."""
        with self._lock:
            self._next, self._left = first, ID_RANGE

    def take(self, count: int) -> int | None:
        """The first of `count` consecutive ids, or None when the range holds fewer."""
        with self._lock:
            if self._left < count:
                return None
            first = self._next
            self._next += count
            self._left -= count
            return first


async def _keep(_connection: object) -> None:
    """Nothing hangs on a connection, so nothing is reset: that would be a round trip for each verb."""


def compiled(schema: str) -> dict[str, tuple[str, list[str]]]:
    """Each statement with its schema filled in and its values numbered: `(sql, names in that order)`."""
    found: dict[str, tuple[str, list[str]]] = {}
    for statement in statements("headrace.store.postgres").values():
        names: list[str] = []

        def number(match: re.Match[str], names: list[str] = names) -> str:
            if match[1] not in names:
                names.append(match[1])
            return f"${names.index(match[1]) + 1}"

        sql = statement.sql.replace("{schema}", f'"{schema}"')
        found[statement.name] = (_NAME.sub(number, sql), names)
    return found


def _parts(url: str) -> tuple[str, str]:
    """The DSN without Headrace's own parameters, and the schema. Raises `InvalidSetting`."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # a port that is no number is found out by asking
    except ValueError as error:
        raise InvalidSetting(
            f"this can't be the URL of a database: {error}", hint="postgresql://user:password@host:port/database"
        ) from error
    query = dict(parse_qsl(parts.query))
    schema = query.pop("schema", "headrace")
    if not _SCHEMA.match(schema):
        raise InvalidSetting(
            f"{schema!r} can't name a schema", hint="lower-case letters, digits and underscores, at most 63"
        )
    return urlunsplit(parts._replace(query=urlencode(query))), schema


def as_fault(error: BaseException) -> HeadraceError:
    """What a driver's error means for the caller: try again later, or call a person."""
    text = str(error) or type(error).__name__
    fault: HeadraceError
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError | asyncpg.InvalidPasswordError):
        fault = StoreBroken(f"the database does not let this user in: {text}", hint="check user and password")
    elif isinstance(error, asyncpg.InvalidCatalogNameError):
        fault = StoreBroken(f"there is no such database: {text}", hint="create it, or name another")
    elif isinstance(error, asyncpg.InsufficientPrivilegeError):
        fault = StoreBroken(
            f"the user may not do this: {text}", hint="grant it CREATE on the database, or make it owner of the schema"
        )
    elif isinstance(error, asyncpg.UndefinedTableError | asyncpg.InvalidSchemaNameError):
        fault = StoreBroken(f"the schema is not Headrace's: {text}", hint="run `headrace migrate`")
    elif isinstance(error, asyncpg.TooManyConnectionsError):
        fault = StoreUnavailable(
            f"the server has no connection left: {text}", hint="raise max_connections, or use a pooler"
        )
    elif isinstance(error, asyncpg.DiskFullError):
        fault = StoreUnavailable(
            f"the server's disk is full: {text}", hint="free disk space; nothing acknowledged was lost"
        )
    elif isinstance(error, asyncpg.ReadOnlySQLTransactionError):
        fault = StoreUnavailable(f"the server only answers reads: {text}", hint="name the primary, not a replica")
    elif isinstance(error, asyncpg.DataError | asyncpg.IntegrityConstraintViolationError | asyncpg.SyntaxOrAccessError):
        fault = StoreBroken(f"the store met an error it does not know: {type(error).__name__}: {text}")
    else:
        fault = StoreUnavailable(f"the database did not answer: {text}", hint="it is tried again; is the server up?")
    fault.__cause__ = error
    return fault
