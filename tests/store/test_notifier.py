"""Rule R11: news between processes is told after the commit, together, on its own connection, and never relied on."""

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
from headrace.store.postgres import PostgresNotifier, notifier
from headrace.store.postgres.dsn import address
from headrace.store.protocol import RECORDED, WORK
from headrace.store.sqlite import CommitWatcher
from headrace.store.sqlite.commit_watcher import LOOK_MAX_S
from tests.support.notification_listener import Ear
from tests.support.postgres_server import server
from tests.support.store_rig import World, fresh_schema

LONG_S = 60.0
"""Longer than any test: who waits so long was woken by news."""


@asynccontextmanager
async def ears(tmp_path: Path, count: int = 2) -> AsyncIterator[list[Ear]]:
    """Processes on one schema, which all listen."""
    url = fresh_schema(tmp_path)
    found = [Ear(url, address(url).schema) for _ in range(count)]
    try:
        for ear in found:
            await ear.listening()
        yield found
    finally:
        for ear in found:
            await ear.notifier.close()


async def test_r11_news_reaches_the_others_and_not_its_teller(tmp_path: Path) -> None:
    async with ears(tmp_path, 3) as (teller, *others):
        teller.notifier.tell(WORK)
        for ear in others:
            await ear.until(lambda ear=ear: ear.heard == [WORK])  # type: ignore[misc]  # bound to the loop's value
        others[0].notifier.tell(RECORDED)
        await teller.until(lambda: teller.heard == [RECORDED])


async def test_r11_what_is_told_while_news_is_on_its_way_goes_out_together(tmp_path: Path) -> None:
    async with ears(tmp_path) as (teller, other):
        sent: list[str] = []
        send = teller.notifier._send

        async def counted(connection: Any, words: list[str]) -> None:
            sent.append(" ".join(sorted(words)))
            sending = asyncio.create_task(send(connection, words))
            await asyncio.sleep(0)
            for _ in range(1_000 if len(sent) == 1 else 0):  # while it is on its way
                teller.notifier.tell(WORK)
            await sending

        teller.notifier._send = counted  # type: ignore[method-assign]  # counts what is sent
        for _ in range(1_000):
            teller.notifier.tell(WORK)
            teller.notifier.tell(RECORDED)
        await other.until(lambda: len(other.heard) == 3)
        assert sent == [f"{RECORDED} {WORK}", WORK]


async def test_r11_a_lost_connection_is_made_again_and_what_was_missed_is_news(tmp_path: Path) -> None:
    async with ears(tmp_path) as (teller, other):
        connection = await asyncpg.connect(server().dsn)
        pids = await connection.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_notify%' "
            "AND application_name = 'headrace'"
        )
        await connection.close()
        assert len(pids) >= 2
        await other.until(lambda: {WORK, RECORDED} <= set(other.heard))  # all of it: nobody knows what was missed
        await teller.until(lambda: {WORK, RECORDED} <= set(teller.heard))
        other.heard.clear()
        teller.notifier.tell(WORK)
        await other.until(lambda: other.heard == [WORK])


class Deafened(PostgresNotifier):
    """A notifier whose connection is there and lets nothing through, until it is made anew."""

    is_deaf = False
    begun_count = 0

    async def _serve(self, connection: Any) -> None:
        self.is_deaf = False
        self.begun_count += 1
        await super()._serve(connection)

    def _on_notification(self, connection: Any, pid: int, channel: str, words: str) -> None:
        if not self.is_deaf:
            super()._on_notification(connection, pid, channel, words)


async def test_r11_news_that_came_in_just_before_its_connection_ended_is_news(tmp_path: Path) -> None:
    async with ears(tmp_path, 1) as (ear,):
        connection = await asyncpg.connect(server().dsn)
        pid = connection.get_server_pid()
        connection.terminate()  # the driver hands over what it took in with the next turn of the loop
        await asyncio.sleep(0)
        ear.notifier._on_notification(connection, pid, "", WORK)
        assert ear.heard == [WORK]


async def test_r11_a_quiet_listener_that_hears_nothing_any_more_connects_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "PROBE_S", 0.01)
    url = fresh_schema(tmp_path)
    deafened = Deafened(address(url), address(url).schema)
    ear = Ear(url, address(url).schema, deafened)
    await ear.listening()
    deafened.is_deaf = True
    await ear.until(lambda: deafened.is_listening and deafened.begun_count == 2)
    await deafened.close()


async def test_r11_news_waits_for_nobody_when_there_is_no_server(tmp_path: Path) -> None:
    deaf = PostgresNotifier(address("postgresql://nobody@127.0.0.1:1/none"), "none")
    bell = Wakeup(deaf, WORK)
    for _ in range(100):
        bell.notify()
    assert bell.notified_count == 100
    with deaf.awaited():
        assert not deaf.is_listening
    await deaf.close()


def test_r11_a_loop_that_ended_is_left_for_the_next(tmp_path: Path) -> None:
    url = fresh_schema(tmp_path)
    teller = PostgresNotifier(address(url), address(url).schema)

    async def tell_and_leave() -> None:
        teller.tell(WORK)

    async def tell_and_be_heard() -> None:
        ear = Ear(url, address(url).schema)
        await ear.listening()
        teller.tell(WORK)
        await ear.until(lambda: WORK in ear.heard)
        await ear.notifier.close()
        await teller.close()

    asyncio.run(tell_and_leave())
    asyncio.run(tell_and_be_heard())


async def test_r11_what_was_told_last_still_goes_out_when_the_process_ends(tmp_path: Path) -> None:
    async with ears(tmp_path) as (ear, _):
        brief = PostgresNotifier(ear.notifier._address, address(fresh_schema(tmp_path)).schema)
        brief.tell(WORK)
        await brief.close()
        await ear.until(lambda: ear.heard == [WORK])


async def test_r11_two_schemas_of_one_database_hear_nothing_of_each_other(tmp_path: Path) -> None:
    url = fresh_schema(tmp_path)
    async with ears(tmp_path) as (ear, other):
        stranger = Ear(url, "x" * 63)
        await stranger.listening()
        stranger.notifier.tell(WORK)
        ear.notifier.tell(RECORDED)
        await other.until(lambda: other.heard == [RECORDED])
        assert ear.heard == stranger.heard == []
        await stranger.notifier.close()


# -- engines: what rings here rings in the other process


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store that processes share."""
    return fresh_schema(tmp_path) if request.param == "postgres" else f"sqlite:///{tmp_path}/news.db"


@asynccontextmanager
async def two_engines(url: str, tmp_path: Path) -> AsyncIterator[tuple[Engine, Engine]]:
    """Two processes' engines on one store, the second one waiting for both kinds of news already."""
    settings = load({"store": url, "objects": str(tmp_path / "objects")}, {}, tmp_path)
    first, second = await open_engine(settings), await open_engine(settings)
    try:
        for bell in (second.wakeup, second.recorded):  # the first news is whatever was missed before
            await bell.wait(SystemClock(), LONG_S, since=0)
        yield first, second
    finally:
        await first.close()
        await second.close()


@pytest.mark.parametrize("news", ["wakeup", "recorded"])
async def test_r11_a_waiting_process_is_woken_by_the_commit_of_another(url: str, news: str, tmp_path: Path) -> None:
    async with two_engines(url, tmp_path) as (first, second):
        bell = getattr(second, news)
        waiting = asyncio.create_task(bell.wait(SystemClock(), LONG_S))
        await asyncio.sleep(0)
        world = World(first.store)
        await world.filled(3)
        getattr(first, news).notify()
        assert await waiting


async def test_r11_nobody_looks_at_a_file_while_nobody_waits(tmp_path: Path) -> None:
    path = tmp_path / "file.db"
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        watcher = CommitWatcher(path)
        bell = Wakeup(watcher, WORK)
        await bell.wait(SystemClock(), LONG_S)  # the first look finds everything new
        writer.execute("CREATE TABLE t (x)")
        assert await bell.wait(SystemClock(), LONG_S)  # what came between two waits is news of the second
        waiting = asyncio.create_task(bell.wait(SystemClock(), LONG_S))
        await asyncio.sleep(0)
        polls_count = watcher.polls_count
        writer.execute("INSERT INTO t VALUES (1)")
        writer.commit()
        assert await waiting
        assert watcher.polls_count > polls_count
        while watcher._scheduled is not None:  # the last look finds that nobody waits
            await asyncio.sleep(0)
        polls_count = watcher.polls_count
        await asyncio.sleep(2 * LOOK_MAX_S)
        assert watcher.polls_count == polls_count
        await watcher.close()


def test_r11_a_watcher_outlives_its_loop(tmp_path: Path) -> None:
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
