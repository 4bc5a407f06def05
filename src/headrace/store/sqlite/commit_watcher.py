"""Notifications between the processes on one file, by polling SQLite's counter of commits.

`PRAGMA data_version` reads a few bytes of shared memory. A waiting process polls it every few milliseconds, and less
often the longer nothing changes; without a waiting process there is no polling. The counter does not say what a commit
changed, so each commit counts as every kind of notification.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

LOOK_S: Final = 0.005
LOOK_MAX_S: Final = 0.05
SLOWER: Final = 1.05


class CommitWatcher:
    """Poller of one file while a process waits. `path` is the database file, which must exist."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._callbacks: list[Callable[[], None]] = []
        self._waiting_count = 0
        self._seen: int | None = None
        self._next_poll_s = LOOK_S
        self._connection: sqlite3.Connection | None = None
        self._scheduled: tuple[asyncio.AbstractEventLoop, asyncio.TimerHandle] | None = None
        self.polls_count = 0

    def listen(self, kind: str, notify_local: Callable[[], None]) -> None:  # noqa: ARG002 - a commit is kind of every kind
        """Call `notify_local` when a commit may have been of interest."""
        self._callbacks.append(notify_local)

    def notify(self, kind: str) -> None:
        """Do nothing: SQLite counts the commit itself."""

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Poll while the block lasts. A commit since the last poll notifies at once."""
        self._waiting_count += 1
        try:
            self._poll()
            yield
        finally:
            self._waiting_count -= 1

    def _poll(self) -> None:
        loop = asyncio.get_running_loop()
        if self._scheduled is not None:
            if self._scheduled[0] is not loop:  # that loop ended during a wait
                self._waiting_count = 1
            self._scheduled[1].cancel()
        version = self._version()
        self._next_poll_s = LOOK_S if version != self._seen else min(self._next_poll_s * SLOWER, LOOK_MAX_S)
        self._scheduled = loop, loop.call_later(self._next_poll_s, self._poll_again)
        if version != self._seen:
            self._seen = version
            for notify_local in self._callbacks:
                notify_local()

    def _poll_again(self) -> None:
        if self._waiting_count > 0:
            self._poll()
        else:
            self._scheduled = None

    def _version(self) -> int | None:
        self.polls_count += 1
        try:
            if self._connection is None:
                self._connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=0)
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error:  # the file is locked or gone: the next operation on the store reports it
            return self._seen

    async def close(self) -> None:
        """Close the file."""
        if self._scheduled is not None:
            self._scheduled[1].cancel()
            self._scheduled = None
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
