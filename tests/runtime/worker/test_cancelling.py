"""Cancellations reach the runs that a worker has by a notification. No test here waits for a heartbeat."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from headrace.app import Headrace
from headrace.core.batch import CANCELLED
from headrace.foundation.settings import load
from headrace.runtime.clock import ManualClock
from headrace.runtime.sessions.cancel_watch import CancelWatch
from headrace.runtime.sessions.session import StoreSession
from headrace.runtime.tasks.context import Context
from headrace.store.protocol import Heartbeat
from headrace.store.sqlite import CommitWatcher
from tests.support.engines import Faulty, app_on, engine_of
from tests.support.http_server import AUTH, KEY, running_server
from tests.support.store_rig import fresh_schema

RARELY = {"heartbeat_ms": 3_600_000, "session_timeout_ms": 86_400_000, "poll_interval_ms": 60_000}
KINDS = ("sqlite", "postgres")


class Tasks:
    """An app of one process, whose tasks note what becomes of them."""

    def __init__(self, url: str, folder: Path, **settings: str) -> None:
        self.app = Headrace("cancelling")
        self.app.use(load({"store": url, **RARELY, **settings}, {}, folder))
        self.begun: list[int] = []
        self.cancelled: list[int] = []
        self.changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.waits = self.app.task(name="waits")(self._waits)
        self.loops = self.app.task(name="loops")(self._loops)

    async def _waits(self, item: int) -> None:
        self._note(self.begun, item)
        try:
            await asyncio.Event().wait()
        finally:
            self._note(self.cancelled, item)

    def _loops(self, item: int, context: Context) -> None:
        self._loop.call_soon_threadsafe(self._note, self.begun, item)
        never = threading.Event()
        while not context.cancelled:
            never.wait(0.001)
        self._loop.call_soon_threadsafe(self._note, self.cancelled, item)

    def _note(self, items: list[int], item: int) -> None:
        items.append(item)
        self.changed.set()

    async def until(self, items: list[int], count: int) -> None:
        """Wait until this many runs are noted."""
        while len(items) < count:
            self.changed.clear()
            await self.changed.wait()


@asynccontextmanager
async def worker_and_other(kind: str, folder: Path) -> AsyncGenerator[tuple[Tasks, Tasks, str]]:
    """Start a worker, and return its tasks and those of another process on the same store, with its URL."""
    url = fresh_schema(folder) if kind == "postgres" else f"sqlite:///{folder}/headrace.db"
    worker, other = Tasks(url, folder), Tasks(url, folder)
    async with worker.app, other.app, worker.app.worker(concurrency=2):
        yield worker, other, url


@pytest.mark.parametrize("kind", KINDS)
async def test_a_batch_cancelled_elsewhere_stops_its_runs_and_starts_none_of_the_leased_ones(
    kind: str, tmp_path: Path
) -> None:
    async with worker_and_other(kind, tmp_path) as (worker, other, _):
        batch = await other.waits.map(range(20))
        await worker.until(worker.begun, 2)
        view = await batch.cancel()
        assert view.state == CANCELLED
        await worker.until(worker.cancelled, 2)
        summary = await batch.wait()
        assert (summary.ledger.cancelled, len(worker.begun)) == (20, 2)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_single_run_cancelled_elsewhere_stops_and_the_others_continue(kind: str, tmp_path: Path) -> None:
    async with worker_and_other(kind, tmp_path) as (worker, other, _):
        runs = [await other.waits.enqueue(item) for item in range(2)]
        await worker.until(worker.begun, 2)
        for number, run in enumerate(runs, 1):
            await run.cancel()
            await worker.until(worker.cancelled, number)
        assert worker.cancelled == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_plain_function_sees_that_its_run_was_cancelled_elsewhere(kind: str, tmp_path: Path) -> None:
    async with worker_and_other(kind, tmp_path) as (worker, other, _):
        run = await other.loops.enqueue(1)  # type: ignore[call-arg]  # the worker passes the context
        await worker.until(worker.begun, 1)
        await run.cancel()
        await worker.until(worker.cancelled, 1)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_command_line_cancels_the_runs_of_another_process(kind: str, tmp_path: Path) -> None:
    async with worker_and_other(kind, tmp_path) as (worker, other, url):
        batch = await other.waits.map(range(2))
        await worker.until(worker.begun, 2)
        command = [sys.executable, "-m", "headrace", "batch", "cancel", batch.id, "--store", url]
        await asyncio.to_thread(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
        await worker.until(worker.cancelled, 2)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_worker_of_a_server_learns_of_a_cancellation_by_a_long_request(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_API_KEY", KEY)
    async with running_server(tmp_path, kind) as server:
        worker = Tasks(server.server.url, tmp_path, api_key=KEY)
        async with worker.app, worker.app.worker(concurrency=2):
            batch = await worker.waits.map(range(2))
            await worker.until(worker.begun, 2)
            answer = await server.ask("POST", f"/v1/batches/{batch.id}/cancel", headers=AUTH)
            assert answer.status == 200
            await worker.until(worker.cancelled, 2)
            run = await worker.loops.enqueue(3)  # type: ignore[call-arg]  # the worker passes the context
            await worker.until(worker.begun, 3)
            await run.cancel()
            await worker.until(worker.cancelled, 3)


async def test_a_run_cancelled_before_the_answer_of_its_claim_arrives_does_not_start(tmp_path: Path) -> None:
    engine = await engine_of("memory", tmp_path, heartbeat_ms=3_600_000, session_timeout_ms=86_400_000)
    async with app_on(engine) as app:
        begun: list[int] = []
        claimed, answered = asyncio.Event(), asyncio.Event()

        @app.task
        async def note(item: int) -> None:
            begun.append(item)

        batch = await note.map(range(5))
        claim = engine.store.claim

        async def slow(*arguments: object, **more: object) -> object:
            leases = await claim(*arguments, **more)  # type: ignore[arg-type]  # passed on
            claimed.set()
            await answered.wait()
            return leases

        engine.store.claim = slow  # type: ignore[method-assign,assignment]  # an answer that is late
        async with app.worker() as worker:
            await claimed.wait()
            await engine.stop_batch(batch.id, CANCELLED)
            worker.session._on_unwanted(
                worker.session.session_id, await engine.store.unwanted_runs(worker.session.session_id)
            )
            answered.set()
            assert (await batch.wait()).ledger.cancelled == 5
        assert begun == []
    await engine.close()


async def test_a_session_without_leases_asks_and_waits_for_nothing(tmp_path: Path) -> None:
    engine = await engine_of("sqlite", tmp_path)
    store = engine.store = Faulty(engine.store)
    assert isinstance(engine.notifier, CommitWatcher)
    session = StoreSession(engine, kind="worker")
    await session.start()
    polls_count = engine.notifier.polls_count
    for _ in range(100):
        engine.cancelled.notify()
        await asyncio.sleep(0)
    assert engine.notifier.polls_count == polls_count
    assert "unwanted_runs" not in store.calls
    await session.stop()
    await engine.close()


async def test_notifications_of_one_moment_cost_one_question(tmp_path: Path) -> None:
    engine = await engine_of("memory", tmp_path, clock=ManualClock())
    clock = engine.clock
    assert isinstance(clock, ManualClock)
    engine.store = Faulty(engine.store)
    replies: list[Heartbeat] = []
    watch = CancelWatch(
        engine,
        session_id=lambda: "session",
        has_leases=lambda: True,
        on_unwanted=lambda _, reply: replies.append(reply),
    )
    watch.lease_added()
    await clock.settle()
    for _ in range(1_000):
        engine.cancelled.notify()
    await clock.advance_async(0.1)
    engine.cancelled.notify()
    await clock.advance_async(60)
    assert len(replies) == 2
    await watch.close()
    await engine.close()
