"""Notifications between the processes on one database, by `LISTEN` and `NOTIFY` (R11, notifications follow the commit).

A notification is sent after the commit that it is about, on its own connection: inside the transaction it would make
commits wait for each other. Notifications that are requested while one is being sent, or within its gap, are sent
together.

Behind a pooler a process can't listen. It finds out by sending itself a notification when it connects. If that does not
arrive, it only sends, for processes with a direct connection. The connection is opened at the first wait or send.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from headrace.foundation.logs import get_logger
from headrace.store.notifications import WORK
from headrace.store.postgres.dsn import DatabaseAddress
from headrace.store.postgres.errors import DRIVER, store_error
from headrace.store.postgres.pool import PostgresConnection, compiled, connect
from headrace.store.reachability import Reachability

LOG: Any = get_logger("headrace.notifier")
GAPS_S: Final = {WORK: 0.002}
GAP_S: Final = 0.02
"""Seconds between two notifications of one kind from one process: workers are woken at once, watchers less often."""
AGAIN_S: Final = (0.1, 0.5, 1.0, 5.0, 15.0)
"""Seconds between attempts to connect; the last one is repeated."""
STEADY_S: Final = 5.0
"""After a connection that lasted longer, the next attempt is immediate."""
ANSWER_S: Final = 5.0
"""Seconds in which the server must answer a statement of the notifier."""
PROBE_S: Final = 30.0
"""Seconds after which a quiet listener sends itself a notification: a connection can be lost without any error."""
CLOSE_S: Final = 0.5
CHANNEL_MAX: Final = 63
PROBE: Final = "probe"


class PostgresNotifier:
    """Sender and receiver of one process's notifications on a schema. `address` should bypass any pooler."""

    def __init__(self, address: DatabaseAddress, schema: str, reachability: Reachability | None = None) -> None:
        """`reachability` of the store on the same database: the notifier connects again when the store is back."""
        self._reachability = reachability or Reachability()
        self._retry: asyncio.Event | None = None
        self._reachability.listen(self._retry_now)
        self._address = address
        self._channel = channel_of(schema)
        self._notify = compiled(schema)["notify"]
        self._callbacks: dict[str, Callable[[], None]] = {}
        self._pending: set[str] = set()
        self._sent_s: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._is_sent = asyncio.Event()
        self._received_own = False
        self._own_pid = 0
        self.is_listening = False
        self._must_probe = False
        self._connection: PostgresConnection | None = None

    def listen(self, kind: str, notify_local: Callable[[], None]) -> None:
        """Call `notify_local` when another process sent the notification `kind`, or may have."""
        self._callbacks[kind] = notify_local

    def notify(self, kind: str) -> None:
        """Send a notification with the next group."""
        if kind not in self._pending or not self._is_at_work:
            self._pending.add(kind)
            self._ensure_task()

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Keep a connection that listens."""
        if not self._is_at_work:
            self._ensure_task()
        yield

    @property
    def _is_at_work(self) -> bool:
        task = self._task
        return task is not None and not task.done() and self._loop is asyncio.get_running_loop()

    def _ensure_task(self) -> None:
        if not self._is_at_work:
            loop = asyncio.get_running_loop()
            self._wake, self._is_sent, self._loop = asyncio.Event(), asyncio.Event(), loop
            self.is_listening = False
            self._task = loop.create_task(self._run(), name="headrace-notifier")
        self._wake.set()

    async def close(self) -> None:
        """Send pending notifications if that is quick, then disconnect."""
        is_at_work = self._is_at_work
        task, self._task = self._task, None
        if task is None or not is_at_work:
            return
        if self._pending:
            self._sent_s.clear()
            self._wake.set()
            self._is_sent.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_sent.wait(), CLOSE_S)
        task.cancel()
        await asyncio.wait((task,))

    # -- the task of the connection

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        tries_count = 0
        while True:
            began_s = loop.time()
            try:
                connection = self._connection = await connect(self._address)
                try:
                    await self._serve(connection)
                finally:
                    self.is_listening = False
                    connection.raw.terminate()
            except DRIVER as error:
                LOG.debug("notifier.unavailable", error=store_error(error, self._address.database).message)
            tries_count = 0 if loop.time() > began_s + STEADY_S else min(tries_count + 1, len(AGAIN_S) - 1)
            await self._wait_to_retry(AGAIN_S[tries_count])

    async def _wait_to_retry(self, wait_s: float) -> None:
        """Wait for the return of the store, or for a time if the store is reachable and only this address is not."""
        retry = self._retry = asyncio.Event()
        try:
            await asyncio.wait_for(retry.wait(), wait_s if self._reachability.is_reachable else AGAIN_S[-1])
        except TimeoutError:
            return
        finally:
            self._retry = None

    def _retry_now(self) -> None:
        """Connect again at once, or probe the connection: it may be as silent as others were. Called from any
        thread.
        """
        retry, loop = self._retry, self._loop
        self._must_probe = True
        if loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe((self._wake if retry is None else retry).set)

    async def _serve(self, connection: PostgresConnection) -> None:
        """Listen and send until the connection ends."""
        connection.raw.add_termination_listener(lambda _: self._wake.set())
        if not connection.is_pooled:
            self._own_pid = connection.raw.get_server_pid()
            await connection.raw.add_listener(self._channel, self._on_notification)
            self.is_listening = await self._receives_own(connection)
            if not self.is_listening:
                LOG.info(
                    "notifier.cannot_listen",
                    hint="a pooler is between this process and the server, so it polls; set HEADRACE_DIRECT_DSN",
                )
                self._address = self._address._replace(pooler="transaction")
                return
            for notify_local in self._callbacks.values():  # notifications may have been missed until now
                notify_local()
        while not connection.raw.is_closed():
            self._wake.clear()
            if self._must_probe and self.is_listening:
                self._must_probe = False
                if not await self._receives_own(connection):
                    return
            words, wait_s = self._ready()
            if words:
                await self._send(connection, words)
                continue
            try:
                await asyncio.wait_for(self._wake.wait(), wait_s)
            except TimeoutError:
                if self.is_listening and not self._pending and not await self._receives_own(connection):
                    return

    async def _receives_own(self, connection: PostgresConnection) -> bool:
        self._received_own = False
        words = {"channel": self._channel, "words": PROBE}
        await connection.fetch(self._notify, words, timeout_s=ANSWER_S)
        # a server session delivers pending notifications before it reports that a statement is done
        return self._received_own

    def _ready(self) -> tuple[list[str], float]:
        """Return the notifications whose gap is over, and the seconds until the next one."""
        now_s = asyncio.get_running_loop().time()
        waits_s = {word: self._sent_s.get(word, 0.0) + GAPS_S.get(word, GAP_S) - now_s for word in self._pending}
        return [word for word, wait_s in waits_s.items() if wait_s <= 0], min(waits_s.values(), default=PROBE_S)

    async def _send(self, connection: PostgresConnection, words: list[str]) -> None:
        now_s = asyncio.get_running_loop().time()
        self._pending.difference_update(words)
        self._sent_s.update(dict.fromkeys(words, now_s))
        try:
            values = {"channel": self._channel, "words": " ".join(words)}
            await connection.fetch(self._notify, values, timeout_s=ANSWER_S)
        except BaseException:
            # send them again on the next connection: a doubled notification is better than a lost one
            self._pending.update(words)
            raise
        if not self._pending:
            self._is_sent.set()

    def _on_notification(self, _connection: Any, pid: int, _channel: str, words: str) -> None:
        if pid == self._own_pid:  # the driver may deliver a notification of a connection that has ended
            self._received_own = True
            return
        for word in words.split():
            if word in self._callbacks:
                self._callbacks[word]()


def channel_of(schema: str) -> str:
    """Return the channel of a schema. A name that is too long is cut and made unique by a hash."""
    name = f"headrace_{schema}"
    if len(name) <= CHANNEL_MAX:
        return name
    return f"{name[:46]}_{hashlib.sha256(schema.encode()).hexdigest()[:16]}"
