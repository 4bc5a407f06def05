"""A wait for runs that no live worker takes: it is logged after half a minute, and shown by views."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import Headrace, WaitTimeout
from headrace.core.serving import STALLED_AFTER_S, Serving
from headrace.foundation.ids import new_session_id
from headrace.runtime.clock import ManualClock
from headrace.runtime.engine import Engine
from headrace.runtime.maintenance.upkeep import Upkeep
from headrace.runtime.worker.worker import Worker
from headrace.store.protocol import Session
from tests.support.engines import app_on, on_each_store, opened
from tests.support.logged_events import logged_events

pytestmark = on_each_store


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    """Collect log events."""
    with logged_events() as events:
        yield events


def warnings(logs: list[Any], event: str = "wait.stalled") -> list[tuple[str, str, str]]:
    return [(entry["queue"], entry["task"], entry["reason"]) for entry in logs if entry["event"] == event]


def with_tasks(app: Headrace) -> Any:
    @app.task(queue="mail")
    async def send(n: int) -> int:
        return n

    return send


async def waited(clock: ManualClock, waiting: Any, *, until: Any) -> None:
    """Continue a wait for a little more than the time after which it is reported."""
    task = asyncio.ensure_future(waiting)
    try:
        for _ in range(STALLED_AFTER_S + 2):
            while clock.sleepers_count == 0 and not task.done():
                await asyncio.sleep(0)  # the store answers in another thread
            await clock.advance_async(1)
        while not until() and not task.done():
            await asyncio.sleep(0)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def first_outcome(batch: Any, timeout_s: float | None = None) -> None:
    async for _ in batch.results(timeout_s=timeout_s):
        return


@pytest.mark.parametrize("wait", ["batch", "results", "run"])
async def test_a_wait_without_a_worker_is_logged_after_half_a_minute(
    kind: str, wait: str, tmp_path: Path, logs: list[Any]
) -> None:
    clock = ManualClock()
    async with opened(kind, tmp_path, clock=clock) as engine, app_on(engine) as app:
        send = with_tasks(app)
        if wait == "run":
            waiting = (await send.enqueue(1)).result()
        else:
            batch = await send.map([1, 2])
            waiting = batch.wait() if wait == "batch" else first_outcome(batch)
        await waited(clock, waiting, until=lambda: warnings(logs))
    assert warnings(logs) == [("mail", "send", "no_worker")]
    assert "headrace worker" in next(entry["hint"] for entry in logs if entry["event"] == "wait.stalled")


async def test_a_wait_for_a_task_that_no_live_worker_has_names_the_task(
    kind: str, tmp_path: Path, logs: list[Any]
) -> None:
    clock = ManualClock()
    async with opened(kind, tmp_path, clock=clock) as engine, app_on(engine) as app:
        session = Session(
            id=new_session_id(clock.now_us()),
            kind="worker",
            host="elsewhere",
            pid=1,
            started_us=clock.now_us(),
            serves=Serving(tasks=("other",)),
        )
        await engine.store.start_session(session, now_us=clock.now_us())
        batch = await with_tasks(app).map([1])
        assert [lane.reason for lane in (await batch.view()).stalled] == ["unknown_task"]
        await engine.store.heartbeat(session.id, now_us=clock.now_us() + STALLED_AFTER_S * 1_000_000)
        await waited(clock, batch.wait(), until=lambda: warnings(logs))
        await engine.store.end_session(session.id, now_us=clock.now_us())
    assert warnings(logs) == [("mail", "send", "unknown_task")]


async def test_a_wait_that_times_out_names_the_runs_that_no_worker_takes(
    kind: str, tmp_path: Path, logs: list[Any]
) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        send = with_tasks(app)
        batch, run = await send.map([1]), await send.enqueue(2)
        for waiting in (batch.wait(timeout_s=0), run.result(timeout_s=0), first_outcome(batch, timeout_s=0)):
            with pytest.raises(WaitTimeout) as caught:
                await waiting
            assert "runs of send wait in the queue mail, and no worker is alive" in caught.value.hint
            assert "headrace worker" in caught.value.hint
    assert warnings(logs) == []


async def test_a_wait_with_a_worker_is_not_logged(kind: str, tmp_path: Path, logs: list[Any]) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        batch = await with_tasks(app).map([1])
        assert [(lane.queue, lane.task, lane.reason) for lane in (await batch.view()).stalled] == [
            ("mail", "send", "no_worker")
        ]
        async with app.worker():
            assert (await batch.wait(timeout_s=30)).stalled == []
    assert warnings(logs) == []


async def test_upkeep_logs_a_stalled_lane_once(kind: str, tmp_path: Path, logs: list[Any]) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        await with_tasks(app).map([1])
        upkeep = Upkeep(engine)
        await upkeep.report_stalled()
        await upkeep.report_stalled()
        assert warnings(logs, "lane.stalled") == [("mail", "send", "no_worker")]
        async with app.worker() as worker:
            await upkeep.report_stalled()
            await _ended(engine, worker)
        await with_tasks_again(app)
        await upkeep.report_stalled()
    assert warnings(logs, "lane.stalled") == [("mail", "send", "no_worker")] * 2


async def _ended(engine: Engine, worker: Worker) -> None:
    while worker.stats.completed == 0:
        await engine.recorded.wait(engine.clock, 0.1)


async def with_tasks_again(app: Headrace) -> None:
    spec = app.registry.get("send")
    await (await app.producer()).enqueue(spec, b"2", _options())


def _options() -> Any:
    from headrace.runtime.tasks.call_options import Options

    return Options()
