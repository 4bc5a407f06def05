"""Conformance of every store: schedules. Each tick becomes its runs once, however many processes enqueue it."""

from __future__ import annotations

import asyncio

import pytest

from headrace.core.block import Chunk
from headrace.foundation.errors import Conflict
from headrace.foundation.ids import new_batch_id
from headrace.store.protocol import NewBatch, Schedule, Tick
from tests.support.store_rig import SECOND_US, StoreRig, chunks_of

HOURLY = Schedule(environment="default", name="report", app="app", task="task", expression="0 * * * *", zone="UTC")


def run(now_us: int, environment: str = "default") -> tuple[NewBatch, Chunk]:
    """Return one run as a batch of its own."""
    (chunk,) = chunks_of([0])
    new = NewBatch(id=new_batch_id(now_us), environment=environment, kind="single", task="task", expected_count=1)
    return new, chunk


def tick_of(schedule: Schedule, rig: StoreRig, *, runs: int = 1, after_us: int = SECOND_US) -> Tick:
    """Return a tick of a schedule from its current state."""
    return Tick(
        name=schedule.name,
        expression=schedule.expression,
        zone=schedule.zone,
        last_us=schedule.last_us,
        until_us=schedule.last_us + after_us,
        runs=[run(rig.now_us, schedule.environment) for _ in range(runs)],
    )


async def kept(rig: StoreRig, *schedules: Schedule, app: str = "app", environment: str = "default") -> list[Schedule]:
    return await rig.store.keep_schedules(environment, app, schedules, now_us=rig.now_us)


async def runs_count(rig: StoreRig) -> int:
    return len(await rig.store.runs("default", limit=1_000))


async def test_a_schedule_begins_when_it_is_first_stored_and_continues_at_its_last_tick(rig: StoreRig) -> None:
    (schedule,) = await kept(rig, HOURLY)
    assert (schedule.last_us, schedule.ticked_us, schedule.gone_us) == (rig.now_us, 0, 0)
    rig.later(3_600)
    assert await kept(rig, HOURLY) == [schedule]
    assert await rig.store.schedules("default") == [schedule]


async def test_a_tick_enqueues_its_runs_and_advances_the_schedule(rig: StoreRig) -> None:
    (schedule,) = await kept(rig, HOURLY)
    wanted = tick_of(schedule, rig, runs=2)
    ticked = await rig.store.tick("default", wanted, now_us=rig.later(1))
    assert ticked.is_ours
    assert ticked.schedule is not None
    assert (ticked.schedule.last_us, ticked.schedule.ticked_us) == (wanted.until_us, wanted.until_us)
    assert await rig.store.schedules("default") == [ticked.schedule]
    assert {batch.id for batch, _ in await rig.store.batches("default")} == {new.id for new, _ in wanted.runs}
    assert await rig.run_all(await rig.session()) == [0, 0]
    assert {batch.state for batch, _ in await rig.store.batches("default")} == {"completed"}


async def test_a_repeated_tick_enqueues_nothing_and_returns_the_schedule(rig: StoreRig) -> None:
    (schedule,) = await kept(rig, HOURLY)
    wanted = tick_of(schedule, rig)
    first = await rig.store.tick("default", wanted, now_us=rig.now_us)
    late = tick_of(schedule, rig, runs=2, after_us=2 * SECOND_US)  # a process that read the schedule before
    for again in (wanted, tick_of(schedule, rig), late):
        ticked = await rig.store.tick("default", again, now_us=rig.now_us)
        assert (ticked.is_ours, ticked.schedule) == (False, first.schedule)
    assert await runs_count(rig) == 1


async def test_of_concurrent_ticks_one_enqueues_the_run(rig: StoreRig) -> None:
    (schedule,) = await kept(rig, HOURLY)
    ticks = await asyncio.gather(
        *(rig.store.tick("default", tick_of(schedule, rig), now_us=rig.now_us) for _ in range(8))
    )
    assert [tick.is_ours for tick in ticks].count(True) == 1
    assert len({tick.schedule and tick.schedule.last_us for tick in ticks}) == 1
    assert await runs_count(rig) == 1


async def test_skipped_ticks_enqueue_nothing_and_do_not_count_as_the_last_tick(rig: StoreRig) -> None:
    (schedule,) = await kept(rig, HOURLY)
    ticked = await rig.store.tick("default", tick_of(schedule, rig, runs=0), now_us=rig.now_us)
    assert ticked.schedule is not None
    assert (ticked.is_ours, ticked.schedule.ticked_us) == (True, 0)
    assert ticked.schedule.last_us > schedule.last_us
    assert await runs_count(rig) == 0


async def test_a_schedule_never_goes_back(rig: StoreRig) -> None:
    (schedule,) = await kept(rig, HOURLY)
    for after_us in (0, -SECOND_US):
        ticked = await rig.store.tick("default", tick_of(schedule, rig, after_us=after_us), now_us=rig.now_us)
        assert (ticked.is_ours, ticked.schedule) == (False, schedule)
    assert await runs_count(rig) == 0


async def test_a_run_that_can_t_be_enqueued_does_not_advance_the_schedule(rig: StoreRig) -> None:
    (schedule,) = await kept(rig, HOURLY)
    wanted = tick_of(schedule, rig, runs=2)
    taken = wanted.runs[1][0].id
    await rig.store.create_batch(NewBatch(id=taken), now_us=rig.now_us)
    with pytest.raises(Conflict):
        await rig.store.tick("default", wanted, now_us=rig.now_us)
    assert await rig.store.schedules("default") == [schedule]
    assert await runs_count(rig) == 0


async def test_another_expression_or_zone_begins_now_and_the_old_one_stops(rig: StoreRig) -> None:
    for changed in ({"expression": "30 * * * *"}, {"zone": "Europe/Berlin"}):
        (schedule,) = await kept(rig, HOURLY)
        await rig.store.tick("default", tick_of(schedule, rig), now_us=rig.later(60))
        before_count = await runs_count(rig)
        values = {name: getattr(HOURLY, name) for name in HOURLY.__struct_fields__}
        (other,) = await kept(rig, Schedule(**(values | changed)))
        assert other.last_us == rig.now_us
        assert other.ticked_us == schedule.last_us + SECOND_US
        stale = tick_of(schedule, rig)
        stale.last_us, stale.until_us = other.last_us, other.last_us + SECOND_US
        ticked = await rig.store.tick("default", stale, now_us=rig.later(60))
        assert (ticked.is_ours, ticked.schedule) == (False, other)
        assert await runs_count(rig) == before_count


async def test_a_schedule_that_its_app_stops_declaring_is_gone_and_begins_now_when_declared_again(
    rig: StoreRig,
) -> None:
    values = {name: getattr(HOURLY, name) for name in HOURLY.__struct_fields__}
    other = Schedule(**(values | {"name": "other"}))
    await kept(rig, HOURLY, other)
    await kept(rig, Schedule(**(values | {"name": "of another app"})), app="another")
    left_us = rig.later(60)
    assert [schedule.name for schedule in await kept(rig, other)] == ["other"]
    rig.later(60)
    await kept(rig, other)
    gone = {schedule.name: schedule.gone_us for schedule in await rig.store.schedules("default")}
    assert gone == {"of another app": 0, "other": 0, "report": left_us}
    rig.later(60)
    back, _ = sorted(await kept(rig, HOURLY, other), key=lambda schedule: schedule.name, reverse=True)
    assert (back.name, back.gone_us, back.last_us) == ("report", 0, rig.now_us)


async def test_a_schedule_that_ticks_is_not_gone(rig: StoreRig) -> None:
    (schedule,) = await kept(rig, HOURLY)
    await kept(rig)
    ticked = await rig.store.tick("default", tick_of(schedule, rig), now_us=rig.now_us)
    assert ticked.schedule is not None
    assert (ticked.is_ours, ticked.schedule.gone_us) == (True, 0)


async def test_schedules_of_environments_are_separate(rig: StoreRig) -> None:
    rig.environments.add("other")
    (schedule,) = await kept(rig, HOURLY)
    rig.later(60)
    (other_schedule,) = await kept(rig, HOURLY, environment="other")
    assert (other_schedule.environment, other_schedule.last_us) == ("other", rig.now_us)
    assert (await rig.store.tick("other", tick_of(other_schedule, rig), now_us=rig.now_us)).is_ours
    assert await rig.store.schedules("default") == [schedule]
    assert await runs_count(rig) == 0


async def test_a_tick_of_an_unknown_schedule_is_reported(rig: StoreRig) -> None:
    ticked = await rig.store.tick("default", tick_of(HOURLY, rig), now_us=rig.now_us)
    assert (ticked.is_ours, ticked.schedule) == (False, None)
