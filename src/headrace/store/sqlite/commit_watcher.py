"""News between the processes on one file: SQLite counts the commits of others, and a look at the count is cheap.

`PRAGMA data_version` reads a few bytes of shared memory, so whoever waits for news looks every few milliseconds, and
less and less often the longer there is none; while nobody waits, nobody looks. A commit says nothing of what it
changed: it is news of every kind.
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
    """Looks at one file while somebody waits. `path` is the database file, which must exist."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hears: list[Callable[[], None]] = []
        self._waiting_count = 0
        self._seen: int | None = None
        self._next_look_s = LOOK_S
        self._connection: sqlite3.Connection | None = None
        self._looking: tuple[asyncio.AbstractEventLoop, asyncio.TimerHandle] | None = None
        self.looks_count = 0

    def listen(self, news: str, notify_local: Callable[[], None]) -> None:  # noqa: ARG002 - a commit is news of every kind
        """Call `notify_local` when a commit may have been news."""
        self._hears.append(notify_local)

    def tell(self, news: str) -> None:
        """Nothing: the commit it is about was told by SQLite."""

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Look while the block lasts. What was committed since the last look is news at once."""
        self._waiting_count += 1
        try:
            self._look()
            yield
        finally:
            self._waiting_count -= 1

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        if self._looking is not None:
            if self._looking[0] is not loop:  # that loop ended while somebody waited on it
                self._waiting_count = 1
            self._looking[1].cancel()
        version = self._version()
        self._next_look_s = LOOK_S if version != self._seen else min(self._next_look_s * SLOWER, LOOK_MAX_S)
        self._looking = loop, loop.call_later(self._next_look_s, self._look_again)
        if version != self._seen:
            self._seen = version
            for notify_local in self._hears:
                notify_local()

    def _look_again(self) -> None:
        if self._waiting_count > 0:
            self._look()
        else:
            self._looking = None

    def _version(self) -> int | None:
        self.looks_count += 1
        try:
            if self._connection is None:
                self._connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=0)
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error:  # locked this moment, or gone: whoever uses the store will say so
            return self._seen

    async def close(self) -> None:
        """Let go of the file."""
        if self._looking is not None:
            self._looking[1].cancel()
            self._looking = None
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
