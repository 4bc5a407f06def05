"""Connections of one event loop: few, long-lived, and without session state that a pooler could mix up.

A connection is a server session, or it leads to a pooler that may use another session for each transaction. The server
reports its process id when a connection begins and when asked; a pooler hides the true one, and is detected by that.

On a session of its own, a connection prepares each statement once, planned for tables that will grow. Behind a pooler,
each statement is sent whole, in one message that the server commits, and is planned for the tables as they are;
settings are sent with each transaction. The name of a prepared statement is made from its text, so a mistake about the
pooler can never run another statement.

After a statement or a heartbeat without an answer, no connection from before it is used again: the network may have
forgotten all of them. Statements in progress on them get `SILENT_GRACE_S` once a new connection works.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, NamedTuple

import asyncpg

from headrace.foundation.errors import StoreUnavailable
from headrace.foundation.tcp_keepalive import keep_alive
from headrace.store.postgres.dsn import DatabaseAddress
from headrace.store.reachability import Reachability
from headrace.store.statements import numbered, statements
from headrace.store.transactions.sql_script import Rows

PACKAGE: Final = "headrace.store.postgres"
COMMAND_TIMEOUT_S: Final = 60
CONNECT_TIMEOUT_S: Final = 15
CLOSE_TIMEOUT_S: Final = 10
IDLE_S: Final = 300
SILENT_GRACE_S: Final = 2.0
PARAMETERS: Final = {"application_name": "headrace"}
"""All parameters at connection start: stock poolers refuse parameters that they don't know."""
SETTINGS: Final = {
    "idle_in_transaction_session_timeout": "10000",
    # A plan that was made while the tables were small is kept, so it must not scan whole tables.
    "enable_seqscan": "off",
    # The values never change which plan is best, and planning a large statement takes milliseconds.
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
}
BEGIN_WRITING: Final = "BEGIN ISOLATION LEVEL READ COMMITTED"
BEGIN_READING: Final = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_SESSION_BEHIND: Final = statements(PACKAGE)["session_behind"].sql
_FOR_SESSION: Final = "; ".join(
    [f"SET {name} = {value}" for name, value in SETTINGS.items()]
    + ["SET default_transaction_isolation = 'read committed'"]
)
_FOR_TRANSACTION: Final = "".join(f"; SET LOCAL {name} = {value}" for name, value in SETTINGS.items())


class Prepared(NamedTuple):
    """A statement as it is sent: values are numbered in the order of `names`. `title` is unique to its text."""

    sql: str
    names: list[str]
    title: str


def compiled(schema: str) -> dict[str, Prepared]:
    """Return all statements with the schema filled in and the values numbered."""
    statements_by_name: dict[str, Prepared] = {}
    for statement in statements(PACKAGE).values():
        sql, names = numbered(statement.sql.replace("{schema}", f'"{schema}"'))
        statements_by_name[statement.name] = prepared(sql, names)
    return statements_by_name


def prepared(sql: str, names: list[str]) -> Prepared:
    """Make a statement whose values are numbered, in the order of `names`."""
    return Prepared(sql, names, f"headrace_{hashlib.sha256(sql.encode()).hexdigest()[:32]}")


class PostgresConnection:
    """One connection. `is_pooled`: each transaction may use another server session."""

    __slots__ = ("_statements", "idle_since_s", "is_pooled", "raw", "silences_count")

    def __init__(self, raw: Any, *, is_pooled: bool) -> None:
        self.raw = raw
        self.is_pooled = is_pooled
        self.idle_since_s = 0.0
        self.silences_count = 0
        self._statements: dict[str, Any] = {}

    async def fetch(self, statement: Prepared, values: Mapping[str, Any], *, timeout_s: float | None = None) -> Rows:
        """Return all rows of a statement, within `timeout_s` or `COMMAND_TIMEOUT_S`."""
        handle = self._statements.get(statement.title)
        if handle is None:
            title = None if self.is_pooled else statement.title
            handle = self._statements[statement.title] = await self.raw.prepare(statement.sql, name=title)
        arguments = (values[name] for name in statement.names)
        return [tuple(row) for row in await handle.fetch(*arguments, timeout=timeout_s)]

    async def begin(self, how: str) -> None:
        """Begin a transaction."""
        await self.raw.execute(how + _FOR_TRANSACTION if self.is_pooled else how)

    async def commit(self) -> None:
        """Commit. Raises an error if the server rolls back instead, after an error in the transaction."""
        if await self.raw.execute("COMMIT") != "COMMIT":
            raise StoreUnavailable("the server rolled the transaction back at its commit", hint="repeat the call")

    async def undo(self) -> None:
        """Roll back any open transaction; close the connection if that fails."""
        if self.raw.is_closed() or not self.raw.is_in_transaction():
            return
        try:
            await self.raw.execute("ROLLBACK", timeout=CLOSE_TIMEOUT_S)
        except BaseException as error:
            self.raw.terminate()
            if not isinstance(error, Exception):
                raise

    @property
    def is_usable(self) -> bool:
        """True if another operation may use the connection."""
        return not self.raw.is_closed() and not self.raw.is_in_transaction()


async def connect(address: DatabaseAddress) -> PostgresConnection:
    """Connect, and detect a pooler."""
    raw = await asyncpg.connect(
        address.dsn,
        timeout=CONNECT_TIMEOUT_S,
        command_timeout=COMMAND_TIMEOUT_S,
        statement_cache_size=0,
        server_settings=PARAMETERS,
    )
    keep_alive(raw._transport.get_extra_info("socket"))  # noqa: SLF001 - the driver offers no other way to its socket
    try:
        is_pooled = address.pooler == "transaction"
        if address.pooler == "auto":
            is_pooled = await raw.fetchval(_SESSION_BEHIND) != raw.get_server_pid()
        if not is_pooled:
            await raw.execute(_FOR_SESSION)
    except BaseException:
        raw.terminate()
        raise
    return PostgresConnection(raw, is_pooled=is_pooled)


class Pool:
    """The connections of one event loop, opened when needed; the most recently used one is taken first."""

    def __init__(self, address: DatabaseAddress, size: int, reachability: Reachability | None = None) -> None:
        """`reachability`: counts the silences after which connections are not used again."""
        self.address = address
        self._reachability = reachability or Reachability()
        self._size = size
        self._slots = asyncio.Semaphore(size)
        self._idle: list[PostgresConnection] = []
        self._open: set[PostgresConnection] = set()
        self._is_closed = False

    @asynccontextmanager
    async def borrowed(self) -> AsyncIterator[PostgresConnection]:
        """Lend a connection to a block, and leave no transaction open on it."""
        connection = await self._take()
        try:
            yield connection
        except (asyncpg.InterfaceError, asyncpg.InternalClientError, TimeoutError):
            connection.raw.terminate()  # the protocol state is unknown, or an answer is still pending
            raise
        except Exception:
            await connection.undo()
            raise
        except BaseException:
            connection.raw.terminate()  # cancelled: a BEGIN may have been sent or not
            raise
        finally:
            self._put_back(connection)

    async def _take(self) -> PostgresConnection:
        await self._slots.acquire()
        try:
            self._check_open()
            while self._idle:
                connection = self._idle.pop()
                if self._is_reusable(connection):
                    return connection
                self._end(connection)
            silences_count = self._reachability.silences_count
            connection = await connect(self.address)
            connection.silences_count = silences_count
        except BaseException:
            self._slots.release()
            raise
        self._open.add(connection)
        return connection

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreUnavailable("the store is closed")

    def _put_back(self, connection: PostgresConnection) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._is_reusable(connection) and not self._is_closed:
            connection.idle_since_s = now_s
            self._idle.append(connection)
        else:
            self._end(connection)
        while self._idle and self._idle[0].idle_since_s < now_s - IDLE_S:
            self._end(self._idle.pop(0))
        self._slots.release()

    def _is_reusable(self, connection: PostgresConnection) -> bool:
        """True if another operation may use the connection: not if it was opened before a pooler was detected, or
        before the network fell silent.
        """
        if connection.silences_count != self._reachability.silences_count:
            return False
        return connection.is_usable and (connection.is_pooled or self.address.pooler != "transaction")

    def _end(self, connection: PostgresConnection) -> None:
        self._open.discard(connection)
        connection.raw.terminate()

    def end_silent(self) -> None:
        """Close the connections from before the last silence: unused ones now, the others after `SILENT_GRACE_S`."""
        self._idle, idle = [], self._idle
        for connection in idle:
            if self._is_reusable(connection):
                self._idle.append(connection)
            else:
                self._end(connection)
        suspects = [
            connection for connection in self._open if connection.silences_count != self._reachability.silences_count
        ]
        if suspects:
            asyncio.get_running_loop().call_later(SILENT_GRACE_S, self._end_all, suspects)

    def _end_all(self, connections: list[PostgresConnection]) -> None:
        for connection in connections:
            if connection in self._open:
                self._end(connection)

    def forget(self) -> None:
        """Close all idle connections."""
        for connection in self._idle:
            self._end(connection)
        self._idle.clear()

    async def close(self) -> None:
        """Wait for running operations, for a limited time, and close every connection."""
        self._is_closed = True
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                for _ in range(self._size):
                    await self._slots.acquire()
                while self._idle:
                    connection = self._idle.pop()
                    self._open.discard(connection)
                    with suppress(Exception):
                        await connection.raw.close(timeout=CLOSE_TIMEOUT_S)
        self.terminate()
        for _ in range(self._size):  # waiting operations find the pool closed
            self._slots.release()

    def terminate(self) -> None:
        """Close every connection at once."""
        self._is_closed = True
        for connection in list(self._open):
            self._end(connection)
        self._idle.clear()
