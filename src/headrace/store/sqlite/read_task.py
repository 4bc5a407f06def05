"""Reads that their callers may abandon, so that a reader is free at once."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from headrace.foundation.errors import StoreUnavailable
from headrace.store.sqlite.script_runner import run_script
from headrace.store.transactions.sql_script import Script

T = TypeVar("T")

AGAIN_S: Final = 0.01
"""Seconds after which an abandoned read is interrupted again, until it has ended: an interrupt has no effect between
two statements.
"""


class ReadTask(Generic[T]):
    """One read in a reader's thread. `abandon` may be called from any thread."""

    __slots__ = ("_connection", "_is_abandoned", "_lock", "_script")

    def __init__(self, script: Callable[[], Script[T]]) -> None:
        self._script = script
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._is_abandoned = False

    def run(self, connection: sqlite3.Connection) -> T:
        """Run the script on one snapshot. Raises `sqlite3.Error`, and `StoreUnavailable` for an abandoned read."""
        with self._lock:
            self._check()
            self._connection = connection
        try:
            connection.execute("BEGIN")
            return run_script(connection, self._script(), self._check)
        finally:
            with self._lock:  # what follows on this connection is never interrupted by this read's caller
                self._connection = None
            if connection.in_transaction:
                connection.execute("COMMIT")

    def abandon(self) -> bool:
        """Interrupt the read. Returns True while it may still run."""
        with self._lock:
            self._is_abandoned = True
            if self._connection is None:
                return False
            self._connection.interrupt()
            return True

    def _check(self) -> None:
        if self._is_abandoned:
            raise StoreUnavailable("expected a caller of the read, got one that has gone")
