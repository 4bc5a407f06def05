"""Notifications between processes (R11, notifications follow the commit): sent together, on a connection of their own,
and never relied on.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from headrace.compose import open_engine
from headrace.foundation.settings import load
from headrace.runtime.clock import SystemClock
from headrace.runtime.engine import Engine
from headrace.runtime.wakeup import Wakeup
from headrace.store.notifications import RECORDED, WORK
from headrace.store.postgres import PostgresNotifier, notifier
from headrace.store.postgres.dsn import address
from headrace.store.sqlite import CommitWatcher
from headrace.store.sqlite.commit_watcher import LOOK_MAX_S
from tests.support.notification_listener import NotificationListener
from tests.support.postgres_server import server
from tests.support.store_rig import StoreRig, fresh_schema

LONG_S = 60.0
"""Longer than any test: a wait of this length ends by a notification."""


@asynccontextmanager
async def listeners(tmp_path: Path, count: int = 2) -> AsyncIterator[list[NotificationListener]]:
    """Open notifiers of several processes on one schema, which all listen."""
    url = fresh_schema(tmp_path)
    listeners = [NotificationListener(url, address(url).schema) for _ in range(count)]
    try:
        for listener in listeners:
            await listener.listening()
        yield listeners
    finally:
        for listener in listeners:
            await listener.notifier.close()


async def test_r11_a_notification_reaches_the_other_processes_and_not_its_sender(tmp_path: Path) -> None:
    async with listeners(tmp_path, 3) as (teller, *others):
        teller.notifier.notify(WORK)
        for listener in others:
            await listener.until(lambda listener=listener: listener.received == [WORK])  # type: ignore[misc]  # bound to the loop's value
        others[0].notifier.notify(RECORDED)
        await teller.until(lambda: teller.received == [RECORDED])


async def test_r11_notifications_during_a_send_are_sent_together(tmp_path: Path) -> None:
    async with listeners(tmp_path) as (teller, other):
        sent: list[str] = []
        send = teller.notifier._send

        async def counted(connection: Any, words: list[str]) -> None:
            sent.append(" ".join(sorted(words)))
            sending = asyncio.create_task(send(connection, words))
            await asyncio.sleep(0)
            for _ in range(1_000 if len(sent) == 1 else 0):  # until the other notifications are sent
                teller.notifier.notify(WORK)
            await sending

        teller.notifier._send = counted  # type: ignore[method-assign]  # counts what is sent
        for _ in range(1_000):
            teller.notifier.notify(WORK)
            teller.notifier.notify(RECORDED)
        await other.until(lambda: len(other.received) == 3)
        assert sent == [f"{RECORDED} {WORK}", WORK]


async def test_r11_a_lost_connection_is_reopened_and_notifies_of_what_was_missed(tmp_path: Path) -> None:
    async with listeners(tmp_path) as (teller, other):
        connection = await asyncpg.connect(server().dsn)
        pids = await connection.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_notify%' "
            "AND application_name = 'headrace'"
        )
        await connection.close()
        assert len(pids) >= 2
        # both kinds, since it is unknown what was missed
        await other.until(lambda: {WORK, RECORDED} <= set(other.received))
        await teller.until(lambda: {WORK, RECORDED} <= set(teller.received))
        other.received.clear()
        teller.notifier.notify(WORK)
        await other.until(lambda: other.received == [WORK])


class Deafened(PostgresNotifier):
    """A notifier whose connection stays open and delivers nothing, until it is reopened."""

    is_deaf = False
    begun_count = 0

    async def _serve(self, connection: Any) -> None:
        self.is_deaf = False
        self.begun_count += 1
        await super()._serve(connection)

    def _on_notification(self, connection: Any, pid: int, channel: str, words: str) -> None:
        if not self.is_deaf:
            super()._on_notification(connection, pid, channel, words)


async def test_r11_a_notification_just_before_the_end_of_its_connection_is_delivered(tmp_path: Path) -> None:
    async with listeners(tmp_path, 1) as (listener,):
        connection = await asyncpg.connect(server().dsn)
        pid = connection.get_server_pid()
        connection.terminate()  # the driver delivers what it has received with the next turn of the loop
        await asyncio.sleep(0)
        listener.notifier._on_notification(connection, pid, "", WORK)
        assert listener.received == [WORK]


async def test_r11_a_listener_that_receives_nothing_any_more_reconnects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "PROBE_S", 0.01)
    url = fresh_schema(tmp_path)
    deafened = Deafened(address(url), address(url).schema)
    listener = NotificationListener(url, address(url).schema, deafened)
    await listener.listening()
    deafened.is_deaf = True
    await listener.until(lambda: deafened.is_listening and deafened.begun_count == 2)
    await deafened.close()


async def test_r11_a_notification_without_a_server_blocks_no_caller(tmp_path: Path) -> None:
    deaf = PostgresNotifier(address("postgresql://nobody@127.0.0.1:1/none"), "none")
    bell = Wakeup(deaf, WORK)
    for _ in range(100):
        bell.notify()
    assert bell.notified_count == 100
    with deaf.awaited():
        assert not deaf.is_listening
    await deaf.close()


def test_r11_a_notifier_continues_on_the_next_event_loop(tmp_path: Path) -> None:
    url = fresh_schema(tmp_path)
    teller = PostgresNotifier(address(url), address(url).schema)

    async def tell_and_leave() -> None:
        teller.notify(WORK)

    async def tell_and_be_heard() -> None:
        listener = NotificationListener(url, address(url).schema)
        await listener.listening()
        teller.notify(WORK)
        await listener.until(lambda: WORK in listener.received)
        await listener.notifier.close()
        await teller.close()

    asyncio.run(tell_and_leave())
    asyncio.run(tell_and_be_heard())


async def test_r11_pending_notifications_are_sent_when_the_process_ends(tmp_path: Path) -> None:
    async with listeners(tmp_path) as (listener, _):
        brief = PostgresNotifier(listener.notifier._address, address(fresh_schema(tmp_path)).schema)
        brief.notify(WORK)
        await brief.close()
        await listener.until(lambda: listener.received == [WORK])


async def test_r11_schemas_of_one_database_do_not_receive_each_others_notifications(tmp_path: Path) -> None:
    url = fresh_schema(tmp_path)
    async with listeners(tmp_path) as (listener, other):
        stranger = NotificationListener(url, "x" * 63)
        await stranger.listening()
        stranger.notifier.notify(WORK)
        listener.notifier.notify(RECORDED)
        await other.until(lambda: other.received == [RECORDED])
        assert listener.received == stranger.received == []
        await stranger.notifier.close()


# -- engines: a wake-up here reaches the other process


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a store that processes share."""
    return fresh_schema(tmp_path) if request.param == "postgres" else f"sqlite:///{tmp_path}/news.db"


@asynccontextmanager
async def two_engines(url: str, tmp_path: Path) -> AsyncIterator[tuple[Engine, Engine]]:
    """Open the engines of two processes on one store; the second one waits for both kinds of notifications already."""
    settings = load({"store": url}, {}, tmp_path)
    first, second = await open_engine(settings), await open_engine(settings)
    try:
        for bell in (second.wakeup, second.recorded):  # the first notification covers all that was missed before
            await bell.wait(SystemClock(), LONG_S, since=0)
        yield first, second
    finally:
        await first.close()
        await second.close()


@pytest.mark.parametrize("channel", ["wakeup", "recorded"])
async def test_r11_a_waiting_process_is_woken_by_the_commit_of_another(url: str, channel: str, tmp_path: Path) -> None:
    async with two_engines(url, tmp_path) as (first, second):
        bell = getattr(second, channel)
        waiting = asyncio.create_task(bell.wait(SystemClock(), LONG_S))
        await asyncio.sleep(0)
        rig = StoreRig(first.store)
        await rig.filled(3)
        getattr(first, channel).notify()
        assert await waiting


async def test_r11_a_file_is_not_polled_while_no_process_waits(tmp_path: Path) -> None:
    path = tmp_path / "file.db"
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        watcher = CommitWatcher(path)
        bell = Wakeup(watcher, WORK)
        await bell.wait(SystemClock(), LONG_S)  # the first poll notifies, since everything is new
        writer.execute("CREATE TABLE t (x)")
        assert await bell.wait(SystemClock(), LONG_S)  # a commit between two waits notifies the second wait
        waiting = asyncio.create_task(bell.wait(SystemClock(), LONG_S))
        await asyncio.sleep(0)
        polls_count = watcher.polls_count
        writer.execute("INSERT INTO t VALUES (1)")
        writer.commit()
        assert await waiting
        assert watcher.polls_count > polls_count
        while watcher._scheduled is not None:  # the last poll finds that no process waits
            await asyncio.sleep(0)
        polls_count = watcher.polls_count
        await asyncio.sleep(2 * LOOK_MAX_S)
        assert watcher.polls_count == polls_count
        await watcher.close()


def test_r11_a_commit_watcher_continues_on_the_next_event_loop(tmp_path: Path) -> None:
    path = tmp_path / "file.db"
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        watcher = CommitWatcher(path)
        bell = Wakeup(watcher, WORK)

        async def waits_for_ever() -> None:
            await bell.wait(SystemClock(), LONG_S, since=0)
            task = asyncio.create_task(bell.wait(SystemClock(), LONG_S))
            await asyncio.sleep(0)
            del task

        async def is_woken() -> None:
            waiting = asyncio.create_task(bell.wait(SystemClock(), LONG_S))
            await asyncio.sleep(0)
            writer.execute("CREATE TABLE t (x)")
            assert await waiting
            await watcher.close()

        asyncio.run(waits_for_ever())
        asyncio.run(is_woken())
