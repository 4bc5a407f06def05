"""Reachability of a store, as the operations of this process find it.

Rule 1: only results count. An operation that returned shows that the store is reachable; a `StoreUnreachable` shows
that it is not. A refused request (a conflict, an invalid argument, a full disk) shows neither. Rule 2: each change is
reported once to every listener, from the thread that noticed it. Rule 3: when a request gets no answer at all, the
connections of that moment are suspects: their owners open new ones, and an error of a suspect shows nothing more.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any

from headrace.foundation.logs import get_logger

LOG: Any = get_logger("headrace.store")


class Reachability:
    """State of the way to one store, shared by all threads of a process.

    `probe` makes the cheapest round trip that needs the store; it returns if the store takes operations, and raises a
    `HeadraceError` otherwise. Without a probe the store is always reachable, as one in memory is.
    """

    def __init__(self, probe: Callable[[], Awaitable[object]] | None = None, *, has_connections: bool = False) -> None:
        """`has_connections`: the store is reached over a network, which may fall silent."""
        self.probe = probe
        self.has_connections = has_connections
        self.silences_count = 0
        self.outages_count = 0
        self._answers = threading.Event()
        self._answers.set()
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    @property
    def is_reachable(self) -> bool:
        """True unless the last result showed that the store is not reachable."""
        return self._answers.is_set()

    def listen(self, on_return: Callable[[], None]) -> None:
        """Call `on_return` each time the store is reachable again, in the thread that noticed it."""
        with self._lock:
            self._listeners.append(on_return)

    def succeeded(self) -> None:
        """Note that an operation returned."""
        if self._answers.is_set():
            return
        with self._lock:
            if self._answers.is_set():
                return
            self._answers.set()
            listeners = list(self._listeners)
        LOG.warning("store.reachable")
        for on_return in listeners:
            on_return()

    def fell_silent(self, error: BaseException, *, since: int) -> None:
        """Note that a request got no answer. `since`: `silences_count` when its connection was opened.

        Of many requests without an answer on connections of the same time, only the first counts.
        """
        with self._lock:
            if self.silences_count != since:
                return
            self.silences_count += 1
        LOG.warning("store.silent", error=getattr(error, "message", str(error)))
        self.failed(error)

    def failed(self, error: BaseException) -> None:
        """Note that an operation did not reach the store, or got no answer."""
        if self.probe is None or not self._answers.is_set():
            return
        with self._lock:
            if not self._answers.is_set():
                return
            self._answers.clear()
            self.outages_count += 1
        LOG.warning("store.unreachable", error=getattr(error, "message", str(error)))
