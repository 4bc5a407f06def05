"""A network that falls silent: heartbeats find a new connection before their session lapses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace import Headrace
from headrace.foundation.settings import load
from headrace.remote import connection as remote_connection
from headrace.runtime.engine import Engine
from headrace.store.postgres import PostgresNotifier, pool
from tests.support.http_server import KEY, LIMITS, running_server
from tests.support.silent_proxy import SilentProxy
from tests.support.store_rig import fresh_schema

pytestmark = [pytest.mark.timeout(60)]

HEARTBEAT_MS = 200
SESSION_TIMEOUT_MS = 6_000
"""Long for a heartbeat, and short for a statement, which may take a minute."""


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_API_KEY", KEY)
    monkeypatch.setattr(pool, "SILENT_GRACE_S", 0.1)
    monkeypatch.setattr(remote_connection, "SILENT_GRACE_S", 0.1)


@asynccontextmanager
async def proxied(kind: str, folder: Path) -> AsyncGenerator[tuple[SilentProxy, str, Engine | None], None]:
    """Yield a proxy in front of a store, the URL of the store by way of it, and its engine if it is a server."""
    if kind == "postgres":
        async with SilentProxy(fresh_schema(folder)) as proxy:
            yield proxy, proxy.url, None
        return
    limits = LIMITS.replaced(heartbeat_ms=HEARTBEAT_MS, session_timeout_ms=SESSION_TIMEOUT_MS, upkeep_interval_ms=100)
    async with (
        running_server(folder, "sqlite", limits=limits) as server,
        SilentProxy(server.server.url) as proxy,
        server.service.upkeep(),
    ):
        yield proxy, proxy.url, server.engine


async def heartbeats_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait until heartbeats were answered: their connection exists then."""
    send, answered = engine.store.heartbeat, []

    async def counted(*arguments: Any, **more: Any) -> Any:
        reply = await send(*arguments, **more)
        answered.append(reply)
        return reply

    monkeypatch.setattr(engine.store, "heartbeat", counted)
    while len(answered) < 4:
        await asyncio.sleep(0)


@pytest.mark.parametrize("kind", ["postgres", "remote"])
async def test_a_worker_keeps_its_session_and_claims_again_when_its_connections_fall_silent(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with proxied(kind, tmp_path) as (proxy, url, _):
        app = Headrace("silent")
        began, may_end = asyncio.Event(), asyncio.Event()

        @app.task(at_most_once=True)
        async def pay(number: int) -> int:
            began.set()
            await may_end.wait()
            return number

        limits: dict[str, object] = {
            "heartbeat_ms": HEARTBEAT_MS,
            "session_timeout_ms": SESSION_TIMEOUT_MS,
            "poll_interval_ms": 50,
            "upkeep_interval_ms": 100,
            "api_key": KEY,
        }
        app.use(load({"store": url, **limits}, {}, tmp_path))
        async with app, app.worker(concurrency=4) as worker:
            run = await pay.enqueue(1)
            await began.wait()
            session_id = worker.session.session_id
            engine = await app.open()
            reachability = engine.outage.reachability
            await heartbeats_of(engine, monkeypatch)
            before = proxy.accepted_count
            proxy.fall_silent()
            while reachability.silences_count == 0 or not reachability.is_reachable:
                await asyncio.sleep(0)
            assert proxy.accepted_count > before, "a new connection was made"
            may_end.set()
            assert await run.result(timeout_s=40) == 1
            assert await (await pay.enqueue(2)).result(timeout_s=40) == 2, "the worker claims again"
            assert (worker.session.session_id, worker.session.lost_count) == (session_id, 0)
            assert worker.stats.failed == 0
        assert proxy.dropped_bytes > 0


async def test_the_notifier_listens_again_when_its_connection_falls_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with SilentProxy(fresh_schema(tmp_path)) as proxy:
        app = Headrace("silent")
        app.use(load({"store": proxy.url, "heartbeat_ms": HEARTBEAT_MS, "session_timeout_ms": 1_200}, {}, tmp_path))

        @app.task
        async def note(number: int) -> int:
            return number

        async with app, app.worker(concurrency=4):
            assert await (await note.enqueue(1)).result(timeout_s=40) == 1
            engine = await app.open()
            await heartbeats_of(engine, monkeypatch)
            notifier = engine.notifier
            assert isinstance(notifier, PostgresNotifier)
            while not notifier.is_listening:
                await asyncio.sleep(0)
            listening = notifier._connection
            proxy.fall_silent()
            while notifier._connection is listening or not notifier.is_listening:
                await asyncio.sleep(0)
            assert await (await note.enqueue(2)).result(timeout_s=40) == 2
            assert engine.outage.is_over
