"""Schedules as the command line shows them."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from headrace.app import Headrace
from headrace.runtime.maintenance.scheduler import Scheduler
from tests.cli.conftest import Shell

HOUR_US = 3_600_000_000


def scheduled(*expressions: str) -> Headrace:
    """Make an app with an hourly schedule, and others."""
    app = Headrace("tests")

    @app.schedule(every_s=3_600)
    @app.task
    async def hourly() -> None: ...

    for expression in expressions:
        app.schedule(hourly, expression, name=expression, tz="Europe/Berlin")
    return app


def make_known(app: Headrace) -> None:
    """Register the app's schedules, as a starting worker does."""

    async def register() -> None:
        async with app:
            await Scheduler(await app.open(), app.registry).round()

    asyncio.run(register())


def test_a_store_without_schedules_says_so(shell: Shell) -> None:
    assert shell("migrate").code == 0
    assert shell("schedule", "list").out == "no schedules\n"
    assert shell("schedule", "list", "--json").json == {"schedules": []}


def test_schedules_are_listed_with_their_next_and_last_tick_and_those_that_are_gone(shell: Shell) -> None:
    make_known(scheduled("30 6 * * *"))
    before_us = time.time_ns() // 1_000
    make_known(scheduled())
    gone, hourly = shell("schedule", "list", "--json").json["schedules"]
    assert (gone["name"], gone["state"], gone["next_us"], gone["last_us"]) == ("30 6 * * *", "gone", None, None)
    assert (gone["expression"], gone["zone"], gone["task"], gone["app"]) == (
        "30 6 * * *",
        "Europe/Berlin",
        "hourly",
        "tests",
    )
    assert gone["gone_us"] >= before_us - HOUR_US
    assert (hourly["name"], hourly["expression"], hourly["state"]) == ("hourly", "every 3600 s", "on")
    assert hourly["next_us"] % HOUR_US == 0
    assert hourly["next_us"] > before_us - HOUR_US
    shown = shell("schedule", "list").out
    for word in ("every 3600 s", "Europe/Berlin", "gone", "next (UTC)"):
        assert word in shown


def test_a_schedule_that_no_worker_runs_is_overdue(shell: Shell, tmp_path: Path) -> None:
    make_known(scheduled())
    change_last_us(tmp_path / "headrace.db")
    (hourly,) = shell("schedule", "list", "--json").json["schedules"]
    assert (hourly["state"], hourly["last_us"]) == ("overdue", None)
    make_known(scheduled())  # a worker starts, and catches up
    (hourly,) = shell("schedule", "list", "--json").json["schedules"]
    assert (hourly["state"], hourly["last_us"]) == ("on", hourly["next_us"] - HOUR_US)


def change_last_us(path: Path) -> None:
    """Move the schedule back, as if no worker had run for a day."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE headrace_schedule SET last_us = last_us - 24 * 3600000000")
        connection.commit()


SCHEDULED = """
from headrace import Headrace

app = Headrace("tests")


@app.schedule(every_s=3_600)
@app.task
async def hourly() -> str:
    return "done"
"""


def test_a_schedule_is_run_now_beside_its_ticks(shell: Shell) -> None:
    shell.write("scheduled.py", SCHEDULED)
    make_known(scheduled())
    (before,) = shell("schedule", "list", "--json").json["schedules"]
    ran = shell("schedule", "run", "scheduled.py:app", "hourly", "--json")
    assert (ran.code, ran.json["schedule"]) == (0, "hourly")
    (after,) = shell("schedule", "list", "--json").json["schedules"]
    assert after == before
    shown = shell("run", "show", ran.json["run"], "--json").json
    assert (shown["task"], shown["state"], shown["headers"]["headrace-schedule"]) == ("hourly", "waiting", "hourly")
    assert "is enqueued" in shell("schedule", "run", "scheduled.py:app", "hourly").out


def test_an_unknown_schedule_is_named_with_the_known_ones(shell: Shell) -> None:
    shell.write("scheduled.py", SCHEDULED)
    ran = shell("schedule", "run", "scheduled.py:app", "hourli")
    assert ran.code == 2
    assert "hourly" in ran.err
    assert shell("schedule", "run", "scheduled.py:app", "x" * 1_000).code == 2
    assert shell("schedule", "run", "scheduled.py", "hourly").code == 2
