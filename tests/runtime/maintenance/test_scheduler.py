"""Scheduler: each tick becomes a run once, with any number of workers, crashes and failures."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from headrace.app import Headrace
from headrace.compose import memory_engine
from headrace.core.schedule import CatchUp
from headrace.foundation.errors import HeadraceError, InvalidInput, InvalidSetting, StoreUnavailable
from headrace.foundation.limits import DEFAULT, Limits
from headrace.runtime.clock import ManualClock
from headrace.runtime.engine import Engine
from headrace.runtime.maintenance.scheduler import Scheduler
from headrace.runtime.tasks.bounds import SCHEDULES_MAX
from headrace.runtime.tasks.context import DETACHED, SCHEDULE, SCHEDULED_US, Context
from headrace.runtime.tasks.task_registry import Registry
from tests.support import invariants
from tests.support.engines import Faulty, app_on, opened
from tests.support.store_rig import FACTORIES

SECOND_US = 1_000_000
DAY_S = 86_400
START_US = round(datetime(2024, 3, 30, 12, tzinfo=ZoneInfo("Europe/Berlin")).timestamp()) * SECOND_US


def app_with(*crons: str, every_s: float | None = None, catch_up: CatchUp = "once", tz: str = "UTC") -> Headrace:
    """Return an app whose task has these schedules, each named as it is written."""
    app = Headrace("test")

    @app.task
    async def report(at: datetime) -> str:
        return at.isoformat()

    for cron in crons:
        app.schedule(report, cron, name=cron, tz=tz, catch_up=catch_up)
    if every_s is not None:
        app.schedule(report, every_s=every_s, name=f"every {every_s}", catch_up=catch_up)
    return app


@asynccontextmanager
async def engines(
    kind: str, folder: Path, clock: ManualClock, count: int, limits: Limits = DEFAULT
) -> AsyncGenerator[list[Engine], None]:
    """Open an engine for each process on a store, and check all invariants at the end."""
    async with AsyncExitStack() as stack:
        processes = [await memory_engine(limits, clock)]
        stack.push_async_callback(processes[0].close)
        processes += [dataclasses.replace(processes[0]) for _ in range(count - 1)]
        if kind != "memory":
            stores = [FACTORIES[kind](folder, limits) for _ in range(count)]
            for store in stores:
                await store.open()
                stack.push_async_callback(store.close)
            processes = [
                dataclasses.replace(engine, store=store) for engine, store in zip(processes, stores, strict=True)
            ]
        yield processes
        assert await invariants.faults(processes[0].store, "default") == []


@asynccontextmanager
async def scheduling(clock: ManualClock, *schedulers: Scheduler) -> AsyncGenerator[None, None]:
    """Run schedulers for the duration of the block."""
    tasks = [asyncio.create_task(scheduler.run()) for scheduler in schedulers]
    try:
        await wait_until_asleep(clock, len(tasks))
        yield
        assert not [task for task in tasks if task.done()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def wait_until_asleep(clock: ManualClock, count: int) -> None:
    """Wait until `count` tasks sleep on the clock."""
    while clock.sleepers_count < count:
        await asyncio.sleep(0)


async def ticked(engine: Engine) -> Counter[tuple[str, int]]:
    """Return the number of runs for each schedule and tick time."""
    ticks: Counter[tuple[str, int]] = Counter()
    for batch, _ in await engine.store.batches("default", limit=10_000):
        headers = (await engine.store.run(batch.id, 0)).headers
        ticks[headers[SCHEDULE], int(headers[SCHEDULED_US])] += 1
    return ticks


def every(step_s: int, from_us: int, until_us: int) -> list[int]:
    step_us = step_s * SECOND_US
    return list(range((from_us // step_us + 1) * step_us, until_us + 1, step_us))


# -- each tick once


@pytest.mark.parametrize("kind", ["memory", "sqlite", "postgres"])
async def test_three_workers_enqueue_each_tick_of_a_day_once(kind: str, tmp_path: Path) -> None:
    clock = ManualClock(START_US)
    registry = app_with("*/30 * * * *", "30 2 * * *", every_s=3_600, tz="Europe/Berlin").registry
    async with engines(kind, tmp_path, clock, 3) as processes:
        async with scheduling(clock, *(Scheduler(process, registry) for process in processes)):
            for _ in range(DAY_S // 60):
                clock.advance(60)
                await wait_until_asleep(clock, 3)
        until_us = START_US + DAY_S * SECOND_US
        moved_us = round(datetime(2024, 3, 31, 3, tzinfo=ZoneInfo("Europe/Berlin")).timestamp()) * SECOND_US
        expected = {("*/30 * * * *", tick_us): 1 for tick_us in every(1_800, START_US, until_us)}
        expected |= {("every 3600", tick_us): 1 for tick_us in every(3_600, START_US, until_us)}
        expected[("30 2 * * *", moved_us)] = 1
        assert await ticked(processes[0]) == expected


@pytest.mark.parametrize("kind", ["memory", "sqlite", "postgres"])
async def test_a_late_worker_enqueues_only_the_remaining_ticks(kind: str, tmp_path: Path) -> None:
    clock = ManualClock(START_US)
    registry = app_with(every_s=60, catch_up="all").registry
    async with engines(kind, tmp_path, clock, 2) as processes:
        prompt, late = (Scheduler(process, registry) for process in processes)
        await prompt.round()
        await late.round()
        clock.advance(60)
        await prompt.round()
        clock.advance(60)
        await late.round()
        assert await ticked(processes[0]) == {("every 60", at_us): 1 for at_us in every(60, START_US, clock.now_us())}


async def test_a_tick_whose_response_was_lost_is_enqueued_once(tmp_path: Path) -> None:
    clock = ManualClock(START_US)
    for kind in ("memory", "sqlite"):
        async with engines(kind, tmp_path, clock, 1) as (engine,):
            start_us, faulty = clock.now_us(), Faulty(engine.store)
            faulty.after["tick"] = [StoreUnavailable("the response was lost") for _ in range(3)]
            engine.store = faulty
            async with scheduling(clock, Scheduler(engine, app_with(every_s=60).registry)):
                for _ in range(600):
                    clock.advance(1)
                    await wait_until_asleep(clock, 1)
            assert faulty.after["tick"] == []
            expected = {("every 60", tick_us): 1 for tick_us in every(60, start_us, clock.now_us())}
            assert await ticked(engine) == expected


async def test_a_tick_of_a_crashed_worker_is_enqueued_once(tmp_path: Path) -> None:
    clock = ManualClock(START_US)
    for faults in ("before", "after"):
        async with engines("memory", tmp_path, clock, 2) as (engine, other):
            registry, start_us, faulty = app_with(every_s=60).registry, clock.now_us(), Faulty(engine.store)
            getattr(faulty, faults)["tick"] = [asyncio.CancelledError()]
            engine.store = faulty
            crashing, live = Scheduler(engine, registry), Scheduler(other, registry)
            await asyncio.gather(crashing.round(), live.round())
            clock.advance(60)
            with pytest.raises(asyncio.CancelledError):
                await crashing.round()
            await live.round()
            assert await ticked(other) == {("every 60", start_us + 60 * SECOND_US): 1}


async def test_an_unavailable_store_delays_ticks_and_loses_none(tmp_path: Path) -> None:
    clock = ManualClock(START_US)
    async with engines("memory", tmp_path, clock, 1) as (engine,):
        faulty = Faulty(engine.store)
        faulty.before["keep_schedules"] = [StoreUnavailable("away") for _ in range(3)]
        engine.store = faulty
        async with scheduling(clock, Scheduler(engine, app_with(every_s=10).registry)):
            await clock.advance_async(5)
            assert faulty.before["keep_schedules"] == []
            faulty.before["tick"] = [StoreUnavailable("away") for _ in range(45)]
            await clock.advance_async(45)
            assert not await ticked(engine), "expected no tick while the store is unavailable"
            await clock.advance_async(10)
        assert await ticked(engine) == {("every 10", at_us): 1 for at_us in every(10, START_US, clock.now_us())}


async def test_a_schedule_whose_row_was_deleted_is_recreated(tmp_path: Path) -> None:
    clock = ManualClock(START_US)
    async with engines("memory", tmp_path, clock, 1) as (engine,):
        async with scheduling(clock, Scheduler(engine, app_with(every_s=60).registry)):
            engine.store._tables.schedules.clear()  # type: ignore[attr-defined]  # without notifying the scheduler
            await clock.advance_async(240)
        assert set((await ticked(engine)).values()) == {1}
        assert max(at_us for _, at_us in await ticked(engine)) == START_US + 240 * SECOND_US


# -- missed ticks


@pytest.mark.parametrize(
    ("catch_up", "ticks_max", "count"), [("skip", 100, 1), ("once", 100, 1), ("all", 100, 96), ("all", 10, 10)]
)
async def test_after_a_day_of_suspension_the_policy_decides_on_the_missed_ticks(
    catch_up: CatchUp, ticks_max: int, count: int, tmp_path: Path
) -> None:
    clock = ManualClock(START_US)
    limits = Limits(schedule_ticks_max=ticks_max)
    registry = app_with("*/15 * * * *", catch_up=catch_up).registry
    async with engines("memory", tmp_path, clock, 2, limits) as processes:
        async with scheduling(clock, *(Scheduler(process, registry) for process in processes)):
            clock.advance(DAY_S)  # a machine that was suspended
            await wait_until_asleep(clock, 2)
        expected_us = every(900, START_US, clock.now_us())[-count:]
        assert await ticked(processes[0]) == {("*/15 * * * *", tick_us): 1 for tick_us in expected_us}


@pytest.mark.parametrize(("catch_up", "count"), [("skip", 0), ("once", 1), ("all", 96)])
async def test_a_worker_that_starts_long_after_the_last_tick_catches_up_by_the_policy(
    catch_up: CatchUp, count: int, tmp_path: Path
) -> None:
    clock = ManualClock(START_US)
    registry = app_with("*/15 * * * *", catch_up=catch_up).registry
    async with engines("memory", tmp_path, clock, 1) as (engine,):
        await Scheduler(engine, registry).round()
        clock.advance(DAY_S + 300)
        await Scheduler(engine, registry).round()
        expected_us = every(900, START_US, clock.now_us())[-count:] if count else []
        assert await ticked(engine) == {("*/15 * * * *", tick_us): 1 for tick_us in expected_us}
        clock.advance(600)
        await Scheduler(engine, registry).round()
        assert len(await ticked(engine)) == count + 1, "expected the next tick as usual"


# -- versions of the code


async def test_the_version_started_last_is_in_force_and_a_rollback_restores_the_earlier_version(
    tmp_path: Path,
) -> None:
    clock = ManualClock(START_US)
    old, new = app_with("*/15 * * * *").registry, app_with("*/20 * * * *").registry
    (spec,) = new.schedules.values()
    new.schedules = {"*/15 * * * *": dataclasses.replace(spec, name="*/15 * * * *")}  # the same name with another rule
    async with engines("memory", tmp_path, clock, 2) as (engine, other):
        async with scheduling(clock, Scheduler(engine, old)):
            async with scheduling(clock, Scheduler(other, new)):
                await wait_until_asleep(clock, 2)
                await clock.advance_async(3_600)
            times = sorted(at_us for _, at_us in await ticked(engine))
            assert times == every(1_200, START_US, START_US + 3_600 * SECOND_US)
            await Scheduler(other, old).round()  # the old version is started again in another process
            await clock.advance_async(3_600)
        later = sorted(at_us for _, at_us in await ticked(engine))[len(times) :]
        assert later == every(900, START_US + 3_600 * SECOND_US, START_US + 7_200 * SECOND_US)


async def test_a_schedule_removed_from_the_code_enqueues_nothing_and_is_marked_as_removed(tmp_path: Path) -> None:
    clock = ManualClock(START_US)
    async with engines("memory", tmp_path, clock, 1) as (engine,):
        await Scheduler(engine, app_with("*/15 * * * *", "0 * * * *").registry).round()
        async with scheduling(clock, Scheduler(engine, app_with("0 * * * *").registry)):
            await clock.advance_async(3_600)
        removed_us = {row.name: row.gone_us for row in await engine.store.schedules("default")}
        assert removed_us == {"0 * * * *": 0, "*/15 * * * *": START_US}
        assert {name for name, _ in await ticked(engine)} == {"0 * * * *"}


# -- arguments of a scheduled run


async def test_a_worker_runs_scheduled_tasks_with_the_tick_time_in_its_zone(tmp_path: Path) -> None:
    clock = ManualClock(START_US)
    calls: list[Any] = []
    limits = {"heartbeat_ms": 60_000, "session_timeout_ms": 600_000, "poll_interval_ms": 60_000}
    async with opened("memory", tmp_path, clock=clock, **limits) as engine, app_on(engine) as app:

        @app.schedule("0 13 * * *", tz="Europe/Berlin")
        @app.task
        async def report(at: datetime, context: Context = DETACHED) -> None:
            calls.append((at.isoformat(), context.scheduled_us))

        @app.schedule(every_s=1_800)
        @app.task(queue="slow")
        async def poll(context: Context, most: int = 5) -> None:
            calls.append((most, context.scheduled_us))

        async with app.worker(concurrency=1):
            await clock.advance_async(3_600)
        assert sorted(calls, key=str) == [
            ("2024-03-30T13:00:00+01:00", START_US + 3_600 * SECOND_US),
            (5, START_US + 1_800 * SECOND_US),
            (5, START_US + 3_600 * SECOND_US),
        ]
        async with app.worker(tasks=["report", "poll"]):
            await clock.advance_async(3_600)
        assert len(calls) == 3, "expected no tick from a worker of selected tasks"
        await report.enqueue(datetime.fromisoformat("2024-01-01T00:00:00"))
        async with app.worker():
            await clock.settle()
        assert ("2024-01-01T00:00:00", None) in calls, "expected no tick time for a run that was enqueued by a call"


# -- refused definitions


def refuse_arguments(app: Headrace) -> None:
    @app.schedule("* * * * *")
    @app.task
    async def needs(value: int) -> None: ...


def refuse_order(app: Headrace) -> None:
    async def turned() -> None: ...

    schedule: Any = app.schedule("* * * * *")
    app.task(schedule(turned))  # in the wrong order


def refuse_many(app: Headrace) -> None:
    spec = next(iter(app.registry.schedules.values()))
    for number in range(SCHEDULES_MAX):
        app.registry.add_schedule(dataclasses.replace(spec, name=f"{number}"))


REFUSED: Sequence[tuple[Any, str]] = [
    (lambda app, task: app.schedule(task, "61 * * * *"), "invalid expression '61 \\* \\* \\* \\*': Bad minute"),
    (lambda app, task: app.schedule("0 0 30 2 *")(task), "Bad day-of-month"),
    (lambda app, task: app.schedule(task, "* * * * *", tz="Europe/Atlantis"), "unknown time zone 'Europe/Atlantis'"),
    (lambda app, task: app.schedule(task, "* * * * *", tz="Europe"), "tz: unknown time zone 'Europe'"),
    (lambda app, task: app.schedule(task, "* * * * *", tz="../etc/passwd"), "tz: unknown time zone"),
    (lambda app, task: app.schedule(task, "* * * * *", tz="x" * 10_000), "tz: unknown time zone"),
    (lambda app, task: app.schedule(task, "* * * * *", tz=5), "tz: unknown time zone 5"),
    (lambda app, task: app.schedule(task, every_s=0), "every_s: expected 1 to"),
    (lambda app, task: app.schedule(task, every_s=5, tz="UTC"), "an interval does not depend on a time zone"),
    (lambda app, task: app.schedule(task), "a cron expression or every_s"),
    (lambda app, task: app.schedule(task, "* * * * *", every_s=5), "a cron expression or every_s"),
    (lambda app, task: app.schedule(task, every_s=5, catch_up="twice"), "catch_up: expected one of skip, once, all"),
    (lambda app, task: app.schedule(task, every_s=5), "two schedules have the name 'task'"),
    (lambda app, task: app.schedule(task, every_s=5, name=""), "schedule: expected a name of"),
    (lambda app, task: app.schedule(task, every_s=5, name="x" * 201), "schedule: expected a name of"),
    (lambda app, task: Headrace("other").schedule(task, every_s=5), "a task of this app"),
    (lambda app, task: app.schedule(5), "a task of this app, got 5"),
    (lambda app, task: refuse_arguments(app), "task needs has required parameters that a schedule can't pass: value"),
    (lambda app, task: refuse_order(app), "a task of this app"),
    (lambda app, task: refuse_many(app), f"at most {SCHEDULES_MAX} schedules"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_an_invalid_schedule_is_refused_by_name_where_it_is_defined(number: int) -> None:
    app = Headrace("test")

    @app.schedule(every_s=60)
    @app.task
    async def task(at: datetime | None = None) -> None: ...

    schedule, message = REFUSED[number]
    with pytest.raises((InvalidSetting, InvalidInput), match=message) as raised:
        schedule(app, task)
    assert isinstance(raised.value, HeadraceError)
    assert not raised.value.retryable


def test_invalid_tick_headers_are_ignored() -> None:
    for header in ("", "x", "-5", "٣", "9" * 19, "1.5"):
        context = Context(batch_id="b", index=0, attempt=1, task="t", queue="q", headers={SCHEDULED_US: header})
        assert context.scheduled_us is None
    assert Registry().schedules == {}
