"""One thread that writes, with group commit: waiting requests join the next transaction.

A file has one writer at a time anyway; one thread turns a hundred callers into one fsync. Nothing is acknowledged
before the outer COMMIT. If anything in a group fails, the group is rolled back, and each request is replayed alone, so
that one failure fails alone (R12, a failed group is replayed one request at a time). There are no savepoints, since a
full disk ends the whole transaction with them or without.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from headrace.foundation.errors import HeadraceError, StoreBroken, StoreUnavailable, StoreUnreachable
from headrace.store.sqlite.write_fence import FENCED

GROUP_MAX: Final = 128
"""Requests in one transaction; others wait for the next."""

Work = Callable[[sqlite3.Connection], Any]


class _Request:
    __slots__ = ("answer", "done", "error", "future", "loop", "work")

    def __init__(self, work: Work, loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any]) -> None:
        self.work = work
        self.loop = loop
        self.future = future
        self.answer: Any = None
        self.error: BaseException | None = None
        self.done = False


class Writer:
    """Runner of requests on one connection, in order, in its own thread, called from any event loop."""

    def __init__(
        self, path: Path, connect: Callable[[], sqlite3.Connection], check_file: Callable[[], None] = lambda: None
    ) -> None:
        """`check_file` raises if the file can't be written before a group; all requests of the group get the error."""
        self._path = path
        self._check_file = check_file
        self._connect = connect
        self._waiting: deque[_Request] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        self.groups_count = 0
        self.requests_count = 0

    def start(self) -> None:
        """Start the thread, which opens the connection. A second start does nothing."""
        if self._thread is None:
            self._closing = False
            self._thread = threading.Thread(target=self._run, name="headrace-sqlite-writer", daemon=True)
            self._thread.start()

    async def run(self, work: Work) -> Any:
        """Run `work` in a transaction, and return after its commit.

        `work` may run more than once (a replay) and must use nothing but the connection. Cancelling the caller does not
        undo what is in flight: operations are safe to repeat.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        with self._wake:
            if self._closing or self._thread is None:
                raise StoreUnavailable("the store is closed")
            self._waiting.append(_Request(work, loop, future))
            self._wake.notify()
        return await future

    def close(self) -> None:
        """Finish the waiting requests, then end the thread. Blocks. A second close does nothing."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        connection: sqlite3.Connection | None = None
        while group := self._next_group():
            try:
                if connection is None:
                    connection = self._connect()
                self._check_file()
                self._commit(connection, group)
            except sqlite3.Error as error:
                _fail(group, store_error(error, self._path))
            except Exception as error:  # noqa: BLE001 - every waiting request gets the error, and the thread continues
                _fail(group, error)
            _deliver(group)
        if connection is not None:
            connection.close()

    def _next_group(self) -> list[_Request]:
        with self._wake:
            while not self._waiting and not self._closing:
                self._wake.wait()
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), GROUP_MAX))]

    def _commit(self, connection: sqlite3.Connection, group: list[_Request]) -> None:
        self.groups_count += 1
        self.requests_count += len(group)
        try:
            connection.execute("BEGIN IMMEDIATE")
        # another process has locked the file: each request alone would wait as long again
        except sqlite3.Error as error:
            _fail(group, store_error(error, self._path))
            return
        try:
            _transact(connection, group)
        except Exception as error:  # noqa: BLE001 - the request that caused an error gets it
            if connection.in_transaction:
                connection.rollback()
            if len(group) == 1:
                group[0].error = store_error(error, self._path) if isinstance(error, sqlite3.Error) else error
                return
            for request in group:
                request.error = None
                self._commit(connection, [request])


def _transact(connection: sqlite3.Connection, group: list[_Request]) -> None:
    for request in group:
        changes_before = connection.total_changes
        try:
            request.answer = request.work(connection)
        except HeadraceError as error:
            if connection.total_changes != changes_before or not connection.in_transaction:
                raise
            request.error = error  # refused before it wrote anything: the other requests of the group are not affected
    connection.execute("COMMIT")


def _fail(group: list[_Request], error: BaseException) -> None:
    for request in group:
        request.error = error


def _deliver(group: list[_Request]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[_Request]] = {}
    for request in group:
        by_loop.setdefault(request.loop, []).append(request)
    for loop, requests in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, requests)
        except RuntimeError:  # the loop of these callers is closed: no caller is waiting
            continue


def _resolve(requests: list[_Request]) -> None:
    for request in requests:
        if request.future.done():
            continue
        if request.error is not None:
            request.future.set_exception(request.error)
        else:
            request.future.set_result(request.answer)


def store_error(error: sqlite3.Error, path: Path) -> HeadraceError:
    """Translate an error of SQLite on the file `path`: try again later, or have a person change something."""
    text = str(error)
    name = getattr(error, "sqlite_errorname", "")
    translated: HeadraceError
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or "malformed" in text or "not a database" in text:
        translated = StoreBroken(
            f"the database file {path} is damaged or is not an SQLite database: {text}",
            hint="restore it from a backup, or name another file with --store",
        )
    elif name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        translated = StoreUnreachable(
            f"another process holds a lock on {path}: {text}", hint="end that process, or wait and try again"
        )
    elif name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
        translated = StoreUnreachable(
            f"the disk did not take a write to {path}: {text}", hint="free disk space; nothing acknowledged was lost"
        )
    elif name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")):
        problem, hint = _not_writable(path)
        translated = StoreUnreachable(f"can't write {path}: {problem} ({text})", hint=hint)
    elif FENCED in text:
        translated = StoreBroken(
            f"{path} takes no writes: it was moved to another store, or is being moved",
            hint="`headrace move` shows where to; `headrace move --undo` undoes a move that is not complete",
        )
    else:
        translated = StoreBroken(
            f"SQLite failed on {path} with an unexpected error: {type(error).__name__}: {text}",
            hint="is it a Headrace database? `headrace doctor` checks it; --store names another file",
        )
    translated.__cause__ = error
    return translated


def _not_writable(path: Path) -> tuple[str, str]:
    """Find out why a database file can't be written: `(problem, hint)`."""
    directory = path.absolute().parent
    if not directory.is_dir():
        return f"the directory {directory} does not exist", "create it, or name another file with --store"
    if path.is_dir():
        return "it is a directory, expected a file", "name a file with --store: sqlite:///path/to/file.db"
    if path.exists() and not os.access(path, os.W_OK):
        return "the file is not writable by this user", f"change its owner or its mode: chmod u+w {path}"
    if not os.access(directory, os.W_OK):
        return (
            f"the directory {directory} is not writable by this user, and SQLite keeps its log beside the file",
            f"change its owner or its mode: chmod u+w {directory}",
        )
    return "the file or its directory is on a read-only file system, or locked by a mount", "name another file"
