"""Runs that no live worker takes, as commands and the HTTP client show them."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from headrace import Client, Headrace
from headrace.core.serving import STALLED_AFTER_S, Serving
from headrace.foundation.ids import new_session_id
from headrace.http.v1 import batches
from headrace.store.protocol import Session
from tests.cli.conftest import Shell
from tests.support.http_server import KEY, LIMITS, RecordingClock, running_server
from tests.support.logged_events import logged_events


def enqueued(shell: Shell, count: int = 2) -> str:
    """Store a batch of runs of `send` in the queue mail, and return its id."""

    async def main() -> str:
        async with Headrace("producer", store=f"sqlite:///{shell.place}/headrace.db") as app:

            @app.task(queue="mail")
            async def send(n: int) -> int:
                return n

            return (await send.map(range(count))).id

    return asyncio.run(main())


def checks(shell: Shell) -> dict[str, Any]:
    return {check["check"]: check for check in shell("doctor", "--json").json["checks"]}


def test_doctor_and_batch_show_name_a_batch_without_a_live_worker(shell: Shell) -> None:
    batch = enqueued(shell)
    check = checks(shell)["workers"]
    assert (check["ok"], check["detail"]) == (False, "runs of send wait in the queue mail, and no worker is alive")
    assert "headrace worker" in check["hint"]
    assert "runs of send wait in the queue mail, and no worker is alive" in shell("batch", "show", batch).out
    assert shell("batch", "show", batch, "--json").json["stalled"][0]["reason"] == "no_worker"
    assert "and no worker is alive" in shell("batch", "results", batch).err


def test_a_wait_for_a_batch_ends_with_it_or_with_its_timeout(shell: Shell) -> None:
    batch = enqueued(shell)
    timed_out = shell("batch", "wait", batch, "--timeout", "0")
    assert timed_out.code == 2
    assert "2 runs left" in timed_out.err
    shell.items(3)
    done = shell.map("--json", task="picky").json["batches"][0]
    waited = shell("batch", "wait", done)
    assert (waited.code, waited.out) == (0, f"{done} is completed: 3 runs completed, 0 did not\n")
    shell.items(5)
    failed = shell.map("--json", "--fresh", task="picky").json["batches"][0]
    assert shell("batch", "wait", failed).code == 3


def test_doctor_names_workers_whose_slots_are_all_taken_while_runs_wait(shell: Shell) -> None:
    enqueued(shell, 3)
    session_id = "session_full"
    with sqlite3.connect("headrace.db") as db:
        db.execute(
            "INSERT INTO headrace_session VALUES (?, 'worker', 'host', 1, ?, ?, 0, ?, 'default', '')",
            (session_id, 2**61, 2**61, '{"tasks":["send"],"concurrency":3}'),
        )
        db.execute(
            "UPDATE headrace_span SET state = 'leased', session_id = ?, claim_no = 1, leased_us = 1", (session_id,)
        )
    enqueued(shell, 4)
    check = checks(shell)["workers"]
    assert check["ok"], "tasks may take long"
    assert "all 3 slots of 1 worker have been taken for over a minute, and 4 runs wait" in check["detail"]
    assert "a queue with workers of their own" in check["hint"]


class HeldClock(RecordingClock):
    """A clock that a test advances."""

    ahead_us = 0

    def now_us(self) -> int:
        return super().now_us() + self.ahead_us


async def test_the_http_client_logs_that_nothing_takes_the_runs_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "KEEPALIVE_S", 0.01)
    clock = HeldClock()
    limits = LIMITS.replaced(poll_interval_ms=5)
    async with running_server(tmp_path, "sqlite", limits=limits) as server:
        client = Client(server.server.url, KEY, clock=clock)
        sent = await client.send("task", range(2))
        now_us = server.engine.clock.now_us()
        session = Session(
            id=new_session_id(now_us), kind="worker", host="h", pid=1, started_us=now_us, serves=Serving(tasks=("x",))
        )
        await server.engine.store.start_session(session, now_us=now_us)
        assert (await client.batch(sent.id))["stalled"] == [
            {
                "queue": "default",
                "task": "task",
                "reason": "unknown_task",
                "hint": "start a worker of the app that has it, or check the task's name",
            }
        ]
        with logged_events() as logs:
            reading = asyncio.ensure_future(anext(client.results(sent.id)))
            while not [entry for entry in logs if entry["event"] == "wait.stalled"]:
                assert not reading.done()
                clock.ahead_us += STALLED_AFTER_S * 1_000_000
                await asyncio.sleep(0)
            await server.work()
            assert (await reading).index == 0
        (entry,) = [entry for entry in logs if entry["event"] == "wait.stalled"]
        assert (entry["batch"], entry["task"], entry["reason"]) == (sent.id, "task", "unknown_task")
