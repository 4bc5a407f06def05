"""Ids of new rows: a process takes a range of 65,536 of them at once, and numbers its rows itself."""

from __future__ import annotations

import threading
from typing import Final

ID_RANGE: Final = 65_536


class IdRange:
    """The free ids of one range. Event loops of several threads may share it."""

    __slots__ = ("_left", "_lock", "_next")

    def __init__(self) -> None:
        self._next = 0
        self._left = 0
        self._lock = threading.Lock()

    def start(self, first: int) -> None:
        """Continue in a new range."""
        with self._lock:
            self._next, self._left = first, ID_RANGE

    def take(self, count: int) -> int | None:
        """Return the first of `count` consecutive ids, or None if the range holds fewer."""
        with self._lock:
            if self._left < count:
                return None
            first = self._next
            self._next += count
            self._left -= count
            return first
