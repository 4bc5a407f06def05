"""What a store promises to schedules: each tick becomes its runs once, whoever and however many ask."""

from __future__ import annotations

import asyncio

import pytest

from headrace.core.block import Chunk
from headrace.foundation.errors import Conflict
from headrace.foundation.ids import new_batch_id
from headrace.store.protocol import NewBatch, Schedule, Tick
from tests.support.store_rig import SECOND_US, World, chunks_of

HOURLY = Schedule(environment="default", name="report", app="app", task="task", expression="0 * * * *", zone="UTC")


def run(now_us: int, environment: str = "default") -> tuple[NewBatch, Chunk]:
    """One run as a batch of its own."""
    (chunk,) = chunks_of([0])
    new = NewBatch(id=new_batch_id(now_us), environment=environment, kind="single", task="task", expected_count=1)
    return new, chunk


def tick_of(known: Schedule, world: World, *, runs: int = 1, after_us: int = SECOND_US) -> Tick:
    """A tick of a schedule as it stands."""
    return Tick(
        name=known.name,
        expression=known.expression,
        zone=known.zone,
        last_us=known.last_us,
        until_us=known.last_us + after_us,
        runs=[run(world.now_us, known.environment) for _ in range(runs)],
    )


async def kept(world: World, *schedules: Schedule, app: str = "app", environment: str = "default") -> list[Schedule]:
    return await world.store.keep_schedules(environment, app, schedules, now_us=world.now_us)


async def runs_count(world: World) -> int:
    return len(await world.store.runs("default", limit=1_000))


async def test_a_schedule_begins_when_it_is_first_known_and_goes_on_where_it_stands(world: World) -> None:
    (known,) = await kept(world, HOURLY)
    assert (known.last_us, known.ticked_us, known.gone_us) == (world.now_us, 0, 0)
    world.later(3_600)
    assert await kept(world, HOURLY) == [known]
    assert await world.store.schedules("default") == [known]


async def test_a_tick_becomes_its_runs_and_moves_the_schedule_on(world: World) -> None:
    (known,) = await kept(world, HOURLY)
    wanted = tick_of(known, world, runs=2)
    told = await world.store.tick("default", wanted, now_us=world.later(1))
    assert told.is_ours
    assert told.schedule is not None
    assert (told.schedule.last_us, told.schedule.ticked_us) == (wanted.until_us, wanted.until_us)
    assert await world.store.schedules("default") == [told.schedule]
    assert {batch.id for batch, _ in await world.store.batches("default")} == {new.id for new, _ in wanted.runs}
    assert await world.run_all(await world.session()) == [0, 0]
    assert {batch.state for batch, _ in await world.store.batches("default")} == {"completed"}


async def test_a_tick_asked_for_again_enqueues_nothing_and_tells_where_the_schedule_stands(world: World) -> None:
    (known,) = await kept(world, HOURLY)
    wanted = tick_of(known, world)
    first = await world.store.tick("default", wanted, now_us=world.now_us)
    late = tick_of(known, world, runs=2, after_us=2 * SECOND_US)  # looked later, and knows no better where it stood
    for again in (wanted, tick_of(known, world), late):
        told = await world.store.tick("default", again, now_us=world.now_us)
        assert (told.is_ours, told.schedule) == (False, first.schedule)
    assert await runs_count(world) == 1


async def test_of_many_who_ask_for_a_tick_at_once_one_enqueues_it(world: World) -> None:
    (known,) = await kept(world, HOURLY)
    told = await asyncio.gather(
        *(world.store.tick("default", tick_of(known, world), now_us=world.now_us) for _ in range(8))
    )
    assert [one.is_ours for one in told].count(True) == 1
    assert len({one.schedule and one.schedule.last_us for one in told}) == 1
    assert await runs_count(world) == 1


async def test_ticks_that_are_passed_over_enqueue_nothing_and_are_not_the_last_that_ran(world: World) -> None:
    (known,) = await kept(world, HOURLY)
    told = await world.store.tick("default", tick_of(known, world, runs=0), now_us=world.now_us)
    assert told.schedule is not None
    assert (told.is_ours, told.schedule.ticked_us) == (True, 0)
    assert told.schedule.last_us > known.last_us
    assert await runs_count(world) == 0


async def test_a_schedule_never_goes_back(world: World) -> None:
    (known,) = await kept(world, HOURLY)
    for after_us in (0, -SECOND_US):
        told = await world.store.tick("default", tick_of(known, world, after_us=after_us), now_us=world.now_us)
        assert (told.is_ours, told.schedule) == (False, known)
    assert await runs_count(world) == 0


async def test_a_run_that_can_t_be_enqueued_leaves_the_schedule_where_it_was(world: World) -> None:
    (known,) = await kept(world, HOURLY)
    wanted = tick_of(known, world, runs=2)
    taken = wanted.runs[1][0].id
    await world.store.create_batch(NewBatch(id=taken), now_us=world.now_us)
    with pytest.raises(Conflict):
        await world.store.tick("default", wanted, now_us=world.now_us)
    assert await world.store.schedules("default") == [known]
    assert await runs_count(world) == 0


async def test_another_expression_or_zone_begins_anew_and_the_old_one_ticks_no_more(world: World) -> None:
    for changed in ({"expression": "30 * * * *"}, {"zone": "Europe/Berlin"}):
        (known,) = await kept(world, HOURLY)
        await world.store.tick("default", tick_of(known, world), now_us=world.later(60))
        before_count = await runs_count(world)
        values = {name: getattr(HOURLY, name) for name in HOURLY.__struct_fields__}
        (other,) = await kept(world, Schedule(**(values | changed)))
        assert other.last_us == world.now_us
        assert other.ticked_us == known.last_us + SECOND_US
        stale = tick_of(known, world)
        stale.last_us, stale.until_us = other.last_us, other.last_us + SECOND_US
        told = await world.store.tick("default", stale, now_us=world.later(60))
        assert (told.is_ours, told.schedule) == (False, other)
        assert await runs_count(world) == before_count


async def test_a_schedule_that_left_the_code_of_its_app_is_gone_and_begins_anew_when_it_comes_back(
    world: World,
) -> None:
    values = {name: getattr(HOURLY, name) for name in HOURLY.__struct_fields__}
    other = Schedule(**(values | {"name": "other"}))
    await kept(world, HOURLY, other)
    await kept(world, Schedule(**(values | {"name": "of another app"})), app="another")
    left_us = world.later(60)
    assert [one.name for one in await kept(world, other)] == ["other"]
    world.later(60)
    await kept(world, other)
    gone = {one.name: one.gone_us for one in await world.store.schedules("default")}
    assert gone == {"of another app": 0, "other": 0, "report": left_us}
    world.later(60)
    back, _ = sorted(await kept(world, HOURLY, other), key=lambda one: one.name, reverse=True)
    assert (back.name, back.gone_us, back.last_us) == ("report", 0, world.now_us)


async def test_a_schedule_that_ticks_is_not_gone(world: World) -> None:
    (known,) = await kept(world, HOURLY)
    await kept(world)
    told = await world.store.tick("default", tick_of(known, world), now_us=world.now_us)
    assert told.schedule is not None
    assert (told.is_ours, told.schedule.gone_us) == (True, 0)


async def test_schedules_of_environments_do_not_meet(world: World) -> None:
    world.environments.add("other")
    (known,) = await kept(world, HOURLY)
    world.later(60)
    (own,) = await kept(world, HOURLY, environment="other")
    assert (own.environment, own.last_us) == ("other", world.now_us)
    assert (await world.store.tick("other", tick_of(own, world), now_us=world.now_us)).is_ours
    assert await world.store.schedules("default") == [known]
    assert await runs_count(world) == 0


async def test_a_tick_of_a_schedule_nobody_knows_says_so(world: World) -> None:
    told = await world.store.tick("default", tick_of(HOURLY, world), now_us=world.now_us)
    assert (told.is_ours, told.schedule) == (False, None)
