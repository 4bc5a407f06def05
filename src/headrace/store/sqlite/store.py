"""`SqliteStore`: the operations of a store on one file.

With WAL and `synchronous=FULL`, an acknowledged commit survives a power cut. One thread writes (group commit), a few
threads read beside it, and one more reads what takes long. The standard library's driver is used instead of apsw,
although apsw releases the interpreter lock more often: two SQLite libraries on one file in one process lose each
other's locks, and users open the file with the standard one.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, Final, TypeVar

from headrace.core.span import Settlement
from headrace.foundation.errors import StoreBroken, StoreUnavailable, StoreUnreachable
from headrace.foundation.limits import Limits
from headrace.store.caller_transaction import CallerTransaction
from headrace.store.reachability import Reachability
from headrace.store.schema_version import check_current, check_known
from headrace.store.sqlite import fast_path
from headrace.store.sqlite.opened_file import OpenedFile
from headrace.store.sqlite.read_task import AGAIN_S, ReadTask
from headrace.store.sqlite.script_runner import SQL, run_script, statements_of
from headrace.store.sqlite.writer import Writer, store_error
from headrace.store.statements import migrations, numbered
from headrace.store.transactions.scripted_store import ScriptedStore
from headrace.store.transactions.sql_script import Script, fetch_first

T = TypeVar("T")

READERS: Final = 2
PRIVATE_MODE: Final = 0o600
BUSY_TIMEOUT_MS: Final = 10_000
WAL_RETRY_S: Final = 0.01
OLDEST_SQLITE: Final = (3, 35, 0)
MIGRATIONS: Final = migrations("headrace.store.sqlite")
NEWEST: Final = MIGRATIONS[-1][0]
VERSION_TABLE: Final = "headrace_version"
"""A table that every version of the schema has."""
_SYNCHRONOUS: Final = {0: "off", 1: "normal", 2: "full", 3: "extra"}


class SqliteStore(ScriptedStore):
    """Batches in one SQLite file. `path` is the database file; its directory must exist.

    Without `migrates`, opening creates and changes nothing: the file must have the schema of this code.
    """

    def __init__(
        self, path: Path, limits: Limits, *, migrates: bool = True, busy_timeout_ms: int = BUSY_TIMEOUT_MS
    ) -> None:
        super().__init__(limits)
        self.path = path
        self._migrates = migrates
        self._store_id = ""
        self._busy_timeout_ms = busy_timeout_ms
        self._file = OpenedFile(path)
        self._writer = Writer(path, self.connect, self._file.check)
        self.reachability = Reachability(self._probe)
        self._local = threading.local()
        self._closing = threading.Event()
        self._readers: ThreadPoolExecutor | None = None
        self._scanner: ThreadPoolExecutor | None = None
        self._reading: list[sqlite3.Connection] = []

    # -- opening and closing

    async def open(self) -> None:
        """Connect, and migrate the file to the current schema.

        Without `migrates`, raises `SchemaOutdated` for a file that has an older schema, or none, or does not exist.
        """
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise StoreBroken(
                f"expected SQLite {'.'.join(map(str, OLDEST_SQLITE))} or newer, got {sqlite3.sqlite_version}",
                hint="use a Python with a newer SQLite",
            )
        self._closing.clear()
        if self._readers is None:
            self._file.forget()
        self._writer.start()
        self._readers = self._readers or ThreadPoolExecutor(READERS, thread_name_prefix="headrace-sqlite-reader")
        self._scanner = self._scanner or ThreadPoolExecutor(1, thread_name_prefix="headrace-sqlite-scanner")
        try:
            (self._store_id,) = await self._writer.run(
                lambda connection: connection.execute(SQL["store_id"]).fetchone()
            )
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Finish the requests that were accepted, and close every connection."""
        self._closing.set()
        await asyncio.to_thread(self._writer.close)
        if self._readers is not None and self._scanner is not None:
            readers, self._readers = self._readers, None
            scanner, self._scanner = self._scanner, None
            await asyncio.to_thread(readers.shutdown)
            await asyncio.to_thread(scanner.shutdown)
            for connection in self._reading:
                connection.close()
            self._reading.clear()

    def connect(self) -> sqlite3.Connection:
        """Open a connection that writes, to a file of the current schema."""
        connection = self._plain()
        try:
            if not self._migrates:
                check_current(str(self.path), _version(connection, self.path), NEWEST)
            self._enter_wal(connection)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA wal_autocheckpoint = 4000")
            if self._migrates:
                _migrate(connection, self.path)
        except BaseException:
            connection.close()
            raise
        return connection

    def _enter_wal(self, connection: sqlite3.Connection) -> None:
        """Switch the file to write-ahead logging, once. SQLite does not wait for this lock: two processes that create
        the same file at the same moment both switch it, so the waiting is done here.
        """
        deadline = monotonic() + self._busy_timeout_ms / 1_000
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorname != "SQLITE_BUSY" or monotonic() > deadline:
                    raise
                self._closing.wait(WAL_RETRY_S)
            else:
                return

    def check_file(self) -> None:
        """Raise `StoreBroken` if the file was deleted or replaced since it was opened."""
        self._file.check()

    def _plain(self) -> sqlite3.Connection:
        self._file.check()  # connecting would create another file in its place
        if not self._migrates and not self.path.exists():  # connecting would create the file
            check_current(str(self.path), 0, NEWEST)
        if self._migrates:
            _create_private(self.path)
        connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, timeout=self._busy_timeout_ms / 1_000
        )
        self._file.opened()
        return connection

    async def settle(self, settlements: Sequence[Settlement], *, now_us: int) -> list[str]:
        """Record outcomes: of a few leases one by one, of many with one statement for all."""
        if len(settlements) > fast_path.FEW:
            return await super().settle(settlements, now_us=now_us)
        return await self._write(lambda: fast_path.settle(settlements, now_us))

    async def _write(self, script: Callable[[], Script[T]]) -> T:
        return await self._written(lambda connection: run_script(connection, script()))

    async def _written(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run work in a transaction of the writer. A file that can be read and not be written is unreachable."""
        try:
            answer: T = await self._writer.run(work)
        except StoreUnreachable as error:
            self.reachability.failed(error)
            raise
        self.reachability.succeeded()
        return answer

    async def _probe(self) -> None:
        """Write without a change: reading would work while another process locks the file or the disk is full."""

        def work(connection: sqlite3.Connection) -> None:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            connection.execute(f"PRAGMA user_version = {version:d}")

        await self._written(work)

    async def _read(self, script: Callable[[], Script[T]]) -> T:
        return await self._read_in(self._readers, script)

    async def _scan(self, script: Callable[[], Script[T]]) -> T:
        return await self._read_in(self._scanner, script)

    async def _read_in(self, threads: ThreadPoolExecutor | None, script: Callable[[], Script[T]]) -> T:
        """Run a script in one of these threads. If the caller is cancelled, the thread is free at once."""
        if threads is None:
            raise StoreUnavailable("the store is closed")
        loop, task = asyncio.get_running_loop(), ReadTask(script)

        def interrupt() -> None:
            if task.abandon() and not loop.is_closed():
                loop.call_later(AGAIN_S, interrupt)

        try:
            return await loop.run_in_executor(threads, self._read_now, task)
        except asyncio.CancelledError:
            interrupt()
            raise

    def _read_now(self, task: ReadTask[T]) -> T:
        try:
            connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = self._plain()
                connection.execute("PRAGMA query_only = 1")
                self._reading.append(connection)
            self._file.check()
            return task.run(connection)
        except sqlite3.Error as error:
            raise store_error(error, self.path) from error

    def joined(self, connection: Any) -> CallerTransaction:
        """Return the scripts of this file on a caller's connection, in the transaction that is open there."""
        return CallerTransaction(connection, lambda name: numbered(SQL[name]), is_sqlite=True, store_id=self._store_id)

    async def change(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run other work than an operation of the store, in a transaction of the writer."""
        return await self._written(work)

    async def read(self, script: Callable[[], Script[T]]) -> T:
        """Run a script that changes nothing and is no operation of the store."""
        return await self._read(script)

    async def check(self) -> dict[str, object]:
        """Make a round trip through the writer and a reader, and return the settings that durability depends on."""

        def work(connection: sqlite3.Connection) -> dict[str, object]:
            return {
                "store": "sqlite",
                "path": str(self.path),
                "sqlite_version": sqlite3.sqlite_version,
                "schema_version": _version(connection, self.path),
                "journal_mode": connection.execute("PRAGMA journal_mode").fetchone()[0],
                "synchronous": _SYNCHRONOUS[connection.execute("PRAGMA synchronous").fetchone()[0]],
            }

        settings: dict[str, object] = await self._writer.run(work)
        await self._read(lambda: fetch_first("store_id"))
        return settings


def _create_private(path: Path) -> None:
    """Create a missing file that only this user may read: it holds payloads and keys. SQLite gives its log the same
    mode. A file that exists keeps its mode, and errors are left to SQLite.
    """
    with suppress(OSError, ValueError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, PRIVATE_MODE))


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Migrate to the newest version of this code; a newer schema is left unchanged."""
    if _version(connection, path) == NEWEST:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _version(connection, path)
        check_known(str(path), version, NEWEST)
        for number, script in MIGRATIONS[version:]:
            for statement in statements_of(script):
                connection.execute(statement)
            connection.execute(SQL["set_version"], {"number": number})
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection, path: Path) -> int:
    """Return the version of the schema, 0 for a file without Headrace tables.

    Raises `StoreBroken` for a file in which another program has made tables with our prefix.
    """
    tables = [name for (name,) in connection.execute(SQL["headrace_tables"])]
    if VERSION_TABLE in tables:
        (number,) = connection.execute(SQL["version"]).fetchone()
        return int(number)
    if tables:
        raise StoreBroken(
            f"{path} is not a Headrace database: expected the table {VERSION_TABLE}, got only {', '.join(tables)}",
            hint="name another file with --store; Headrace creates it",
        )
    return 0
