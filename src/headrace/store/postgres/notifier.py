"""News between the processes on one database, by `LISTEN` and `NOTIFY` (rule R11).

It goes out after the commit it is about, from a connection of its own: inside the transaction it would make commits
wait for each other. What is told while a notification is on its way, or within its gap, goes out together. Behind a
pooler nobody can listen: what a session heard it tells itself on connecting, and where it does not hear that, news is
only told, for those who have a direct way. The connection is made when somebody first waits or tells.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import structlog

from headrace.store.postgres.dsn import DatabaseAddress
from headrace.store.postgres.errors import DRIVER, store_error
from headrace.store.postgres.pool import PostgresConnection, compiled, connect
from headrace.store.protocol import WORK

LOG: Any = structlog.get_logger("headrace.notifier")
GAPS_S: Final = {WORK: 0.002}
GAP_S: Final = 0.02
"""Between two notifications of one kind of a process: workers are woken at once, watchers of a batch now and then."""
AGAIN_S: Final = (0.1, 0.5, 1.0, 5.0, 15.0)
"""Between two tries to connect; the last one from then on."""
STEADY_S: Final = 5.0
"""A connection that lasted longer is no reason to wait before the next."""
PROBE_S: Final = 30.0
"""A quiet listener asks itself so often whether it still hears: a connection can be gone and nobody told it."""
CLOSE_S: Final = 0.5
CHANNEL_MAX: Final = 63
PROBE: Final = "probe"


class PostgresNotifier:
    """One process's ear and voice on a schema. `address` should lead past any pooler."""

    def __init__(self, address: DatabaseAddress, schema: str) -> None:
        self._address = address
        self._channel = channel_of(schema)
        self._notify = compiled(schema)["notify"]
        self._hears: dict[str, Callable[[], None]] = {}
        self._told: set[str] = set()
        self._sent_s: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._is_sent = asyncio.Event()
        self._has_heard_itself = False
        self._own_pid = 0
        self.is_listening = False

    def listen(self, news: str, notify_local: Callable[[], None]) -> None:
        """Call `notify_local` when another process told `news`, or may have."""
        self._hears[news] = notify_local

    def tell(self, news: str) -> None:
        """Let the others know with the next notification."""
        if news not in self._told or not self._is_at_work:
            self._told.add(news)
            self._attend()

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Somebody waits: have a connection that listens."""
        if not self._is_at_work:
            self._attend()
        yield

    @property
    def _is_at_work(self) -> bool:
        task = self._task
        return task is not None and not task.done() and self._loop is asyncio.get_running_loop()

    def _attend(self) -> None:
        if not self._is_at_work:
            loop = asyncio.get_running_loop()
            self._wake, self._is_sent, self._loop = asyncio.Event(), asyncio.Event(), loop
            self.is_listening = False
            self._task = loop.create_task(self._run(), name="headrace-notifier")
        self._wake.set()

    async def close(self) -> None:
        """Send what is still to be told, if that is quick, and let go."""
        is_at_work = self._is_at_work
        task, self._task = self._task, None
        if task is None or not is_at_work:
            return
        if self._told:
            self._sent_s.clear()
            self._wake.set()
            self._is_sent.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_sent.wait(), CLOSE_S)
        task.cancel()
        await asyncio.wait((task,))

    # -- the one task

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        tries_count = 0
        while True:
            began_s = loop.time()
            try:
                connection = await connect(self._address)
                try:
                    await self._serve(connection)
                finally:
                    self.is_listening = False
                    connection.raw.terminate()
            except DRIVER as error:
                LOG.debug(
                    "no connection for news; polling goes on", error=store_error(error, self._address.database).message
                )
            tries_count = 0 if loop.time() > began_s + STEADY_S else min(tries_count + 1, len(AGAIN_S) - 1)
            await asyncio.sleep(AGAIN_S[tries_count])

    async def _serve(self, connection: PostgresConnection) -> None:
        """Listen and tell until the connection ends."""
        connection.raw.add_termination_listener(lambda _: self._wake.set())
        if not connection.is_pooled:
            self._own_pid = connection.raw.get_server_pid()
            await connection.raw.add_listener(self._channel, self._heard)
            self.is_listening = await self._hears_itself(connection)
            if not self.is_listening:
                LOG.info("news can't be heard through a pooler; polling goes on", hint="set HEADRACE_DIRECT_DSN")
                self._address = self._address._replace(pooler="transaction")
                return
            for notify_local in self._hears.values():  # what was missed until now is news
                notify_local()
        while not connection.raw.is_closed():
            self._wake.clear()
            words, wait_s = self._ready()
            if words:
                await self._send(connection, words)
                continue
            try:
                await asyncio.wait_for(self._wake.wait(), wait_s)
            except TimeoutError:
                if self.is_listening and not self._told and not await self._hears_itself(connection):
                    return

    async def _hears_itself(self, connection: PostgresConnection) -> bool:
        self._has_heard_itself = False
        await connection.fetch(self._notify, {"channel": self._channel, "words": PROBE})
        return self._has_heard_itself  # a session hands over what it heard before it says that it is done

    def _ready(self) -> tuple[list[str], float]:
        """The words whose gap is over, and how long to wait for the next."""
        now_s = asyncio.get_running_loop().time()
        waits_s = {word: self._sent_s.get(word, 0.0) + GAPS_S.get(word, GAP_S) - now_s for word in self._told}
        return [word for word, wait_s in waits_s.items() if wait_s <= 0], min(waits_s.values(), default=PROBE_S)

    async def _send(self, connection: PostgresConnection, words: list[str]) -> None:
        now_s = asyncio.get_running_loop().time()
        self._told.difference_update(words)
        self._sent_s.update(dict.fromkeys(words, now_s))
        try:
            await connection.fetch(self._notify, {"channel": self._channel, "words": " ".join(words)})
        except BaseException:
            self._told.update(words)  # again, on the next connection: twice is better than not at all
            raise
        if not self._told:
            self._is_sent.set()

    def _heard(self, _connection: Any, pid: int, _channel: str, words: str) -> None:
        if pid == self._own_pid:  # the connection may have ended since the driver took it in
            self._has_heard_itself = True
            return
        for word in words.split():
            if word in self._hears:
                self._hears[word]()


def channel_of(schema: str) -> str:
    """The channel of a schema; a name too long for one is cut, and told from others by its hash."""
    name = f"headrace_{schema}"
    if len(name) <= CHANNEL_MAX:
        return name
    return f"{name[:46]}_{hashlib.sha256(schema.encode()).hexdigest()[:16]}"
