"""Watches for cancellations of leased runs, so that they take effect within a second and not at the next heartbeat.

A process that cancels runs notifies the others after its commit. A session with leases waits for that notification and
then asks the store which of its runs are cancelled. On a SQLite file every commit counts as a notification, so the
question is asked at most every `GAP_S`. A server that keeps the store waits for the notification itself, in one long
request. A session without leases asks nothing and waits for nothing. Heartbeats return the same and are the fallback.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import Any, Final, Protocol, runtime_checkable

import msgspec

from headrace.foundation.errors import HeadraceError
from headrace.foundation.ids import session_name
from headrace.foundation.logs import get_logger
from headrace.runtime.engine import Engine
from headrace.store.protocol import Heartbeat

LOG: Any = get_logger("headrace.cancellations")
GAP_S: Final = 0.2
"""Seconds between two questions of one session."""


@runtime_checkable
class CancellationFeed(Protocol):
    """A store whose server waits for cancellations."""

    async def next_unwanted_runs(self, session_id: str, *, seen: int) -> Heartbeat:
        """Return the same as `unwanted_runs`, once its `digest_of` is not `seen` any more, or after a while."""


def digest_of(reply: Heartbeat) -> int:
    """Return a number that changes with the cancelled runs of an answer."""
    return zlib.crc32(msgspec.msgpack.encode((sorted(reply.stopped), sorted(reply.cancelled))))


class CancelWatch:
    """The watch of one session. Owned by its event loop; `lease_added` starts it, `close` ends it."""

    def __init__(
        self,
        engine: Engine,
        *,
        session_id: Callable[[], str],
        has_leases: Callable[[], bool],
        on_unwanted: Callable[[str, Heartbeat], None],
    ) -> None:
        """`on_unwanted` gets the session's id and the answer of the store."""
        self._engine = engine
        self._session_id = session_id
        self._has_leases = has_leases
        self._on_unwanted = on_unwanted
        self._leased = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._seen_count = 0
        self._seen_digest = 0

    def lease_added(self) -> None:
        """Watch from now on, until the session has no leases."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="headrace-cancellations")
        self._leased.set()

    async def close(self) -> None:
        """End the watch."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        store, clock = self._engine.store, self._engine.clock
        check = self._next_from_server if isinstance(store, CancellationFeed) else self._next_from_store
        self._seen_count, self._seen_digest = self._engine.cancelled.notified_count, 0
        while True:
            if not self._has_leases():
                self._leased.clear()
                await self._leased.wait()
                continue
            session_id = self._session_id()
            try:
                reply = await check(session_id)
            except HeadraceError as error:
                LOG.debug("cancellations.unreadable", session=session_name(session_id), error=error.message)
                await clock.sleep(GAP_S)
                await self._engine.outage.until_over(clock)
                continue
            self._on_unwanted(session_id, reply)
            await clock.sleep(GAP_S)

    async def _next_from_store(self, session_id: str) -> Heartbeat:
        """Wait for a notification, then read which runs are cancelled."""
        cancelled = self._engine.cancelled
        while not await cancelled.wait(self._engine.clock, None, since=self._seen_count):
            pass
        notified_count = cancelled.notified_count
        reply = await self._engine.store.unwanted_runs(session_id)
        self._seen_count = notified_count
        return reply

    async def _next_from_server(self, session_id: str) -> Heartbeat:
        """Ask the server, which waits until other runs are cancelled than at its last answer."""
        store = self._engine.store
        assert isinstance(store, CancellationFeed)
        reply = await store.next_unwanted_runs(session_id, seen=self._seen_digest)
        self._seen_digest = digest_of(reply)
        return reply
