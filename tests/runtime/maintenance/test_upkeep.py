"""Upkeep: periodic duties that no request triggers."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path

import pytest

from headrace.core.block import Coalescer
from headrace.core.span import Key
from headrace.foundation.errors import NotFound, StoreUnavailable
from headrace.foundation.ids import new_batch_id
from headrace.runtime.clock import ManualClock
from headrace.runtime.engine import Engine
from headrace.runtime.maintenance.upkeep import Upkeep
from headrace.store.protocol import Claim, NewBatch, Session
from tests.support.engines import Faulty, app_on, on_each_store, opened

DAY_S = 86_400


async def filled(
    engine: Engine, count: int, *, sealed: bool = True, seal_timeout_ms: int = 0, expires_us: int = 0
) -> str:
    now_us = engine.clock.now_us()
    new = NewBatch(id=new_batch_id(now_us), seal_timeout_ms=seal_timeout_ms)
    batch, _ = await engine.store.create_batch(new, now_us=now_us)
    coalescer = Coalescer(runs_max=256, bytes_max=1 << 20)
    for index in range(count):
        coalescer.add(index, b"0", Key("task", expires_us=expires_us))
    await engine.store.append(batch.id, coalescer.flush(), now_us=now_us)
    if sealed:
        await engine.store.seal(batch.id, count, now_us=now_us)
    return batch.id


@on_each_store
async def test_runs_that_did_not_start_in_time_expire(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened(kind, tmp_path, clock=clock) as engine:
        batch_id = await filled(engine, 10, expires_us=clock.now_us() + 60_000_000)
        upkeep = Upkeep(engine)
        await upkeep.sweep()
        assert (await engine.store.batch(batch_id))[1].waiting == 10
        clock.advance(60)
        notified_count = engine.recorded.notified_count
        await upkeep.sweep()
        batch, ledger = await engine.store.batch(batch_id)
        assert (batch.state, ledger.expired) == ("completed", 10)
        assert engine.recorded.notified_count > notified_count


@on_each_store
async def test_a_batch_that_was_not_sealed_in_time_is_abandoned(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened(kind, tmp_path, clock=clock) as engine:
        batch_id = await filled(engine, 10, sealed=False, seal_timeout_ms=60_000)
        upkeep = Upkeep(engine)
        clock.advance(59)
        await upkeep.sweep()
        assert (await engine.store.batch(batch_id))[0].state == "open"
        clock.advance(1)
        await upkeep.sweep()
        batch, ledger = await engine.store.batch(batch_id)
        assert (batch.state, ledger.cancelled) == ("abandoned", 10)


@on_each_store
async def test_finished_batches_are_deleted_after_their_retention_with_their_objects(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened(kind, tmp_path, clock=clock, inline_bytes_max=100) as engine, app_on(engine) as app:

        @app.task
        async def echo(item: str) -> str:
            return item

        async with app.worker():
            batches = [await echo.map(["x" * 1_000, "y"]) for _ in range(15)]
            for batch in batches:
                await batch.wait()
        unfinished = await echo.map(["z" * 1_000])
        upkeep = Upkeep(engine)
        clock.advance(7 * DAY_S - 1)
        assert await upkeep.prune() == 0
        clock.advance(1)
        assert await upkeep.prune() == 15
        with pytest.raises(NotFound):
            await batches[0].view()
        objects = [stored.key async for stored in engine.payloads.list()]
        assert len(objects) == 1
        assert unfinished.id in objects[0]
        assert await upkeep.prune(finished_before_us=clock.now_us()) == 0


async def test_orphans_are_removed_after_the_grace_and_referenced_objects_stay(tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened("sqlite", tmp_path, clock=clock, inline_bytes_max=100) as engine, app_on(engine) as app:

        @app.task
        async def echo(item: str) -> str:
            return item

        batch = await echo.map(["x" * 1_000])
        (named,) = [stored.key async for stored in engine.payloads.list()]
        _, orphan = await engine.offloaded(batch.id, b"y" * 1_000)
        _, young = await engine.offloaded(batch.id, b"z" * 1_000)
        grace_s = engine.limits.orphan_grace_ms // 1_000
        for key, age_s in ((named, grace_s + 1), (orphan, grace_s + 1), (young, grace_s - 1)):
            moment_s = clock.now_us() / 1_000_000 - age_s
            os.utime(tmp_path / "headrace.db.objects" / key, (moment_s, moment_s))
        upkeep = Upkeep(engine)
        assert await upkeep.remove_orphans() == 1
        assert {stored.key async for stored in engine.payloads.list()} == {named, young}


@on_each_store
async def test_a_lease_whose_session_lapsed_is_released(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened(kind, tmp_path, clock=clock) as engine:
        batch_id = await filled(engine, 10)
        await engine.store.start_session(
            Session(id="session_lapsed", kind="worker", host="far", pid=1, started_us=0), now_us=clock.now_us()
        )
        claim = Claim(
            session_id="session_lapsed", claim_no=1, environment="default", tasks=["task"], queues=None, runs_max=10
        )
        await engine.store.claim(claim, now_us=clock.now_us())
        upkeep = Upkeep(engine)
        await upkeep.round()
        assert (await engine.store.batch(batch_id))[1].leased == 10
        clock.advance(engine.limits.session_timeout_ms / 1_000)
        await upkeep.round()
        assert (await engine.store.batch(batch_id))[1].waiting == 10


async def test_a_failing_duty_does_not_stop_the_other_duties(tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened("sqlite", tmp_path, clock=clock) as engine:
        store = Faulty(engine.store)
        store.before = {"sessions": [StoreUnavailable("away")], "sweep": [RuntimeError("odd")]}
        failing_engine = dataclasses.replace(engine, store=store)
        upkeep = Upkeep(failing_engine)
        await upkeep.round()
        duties = ("sessions", "sweep", "prune")
        assert tuple(call for call in store.calls if call in duties) == duties
        failed = {name: stats.failed_count for name, stats in upkeep.stats.items()}
        assert {name: count for name, count in failed.items() if count} == {"recover_silent": 1, "sweep": 1}
        assert {"recover_here", "prune", "demote", "purge_dead", "remove_orphans"} < failed.keys()


@on_each_store
async def test_a_duty_is_done_by_a_single_process_and_once_an_interval(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened(kind, tmp_path, clock=clock, upkeep_interval_ms=5_000) as engine:
        processes = [Upkeep(dataclasses.replace(engine, duties={})) for _ in range(3)]  # three processes

        def done() -> list[dict[str, int]]:
            return [{name: stats.done_count for name, stats in upkeep.stats.items()} for upkeep in processes]

        await asyncio.gather(*(upkeep.round() for upkeep in processes))
        for name in ("recover_silent", "sweep", "prune", "remove_orphans"):
            assert sorted(counts[name] for counts in done()) == [0, 0, 1], name
        assert [counts["recover_here"] for counts in done()] == [1, 1, 1], (
            "expected each process to recover the ended processes of its machine"
        )
        clock.advance(4.9)
        await processes[0].round()
        assert sum(counts["sweep"] for counts in done()) == 1
        clock.advance(0.1)
        for upkeep in processes:
            await upkeep.round()
        assert sum(counts["sweep"] for counts in done()) == 2
        assert sum(counts["remove_orphans"] for counts in done()) == 1, "expected a longer interval for this duty"


async def test_a_duty_of_a_crashed_process_is_free_at_its_deadline(tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened("sqlite", tmp_path, clock=clock, upkeep_interval_ms=5_000) as engine:
        assert await engine.maintenance.take_duty(
            "sweep", "crashed", free_us=clock.now_us() + 60_000_000, now_us=clock.now_us()
        )
        upkeep = Upkeep(engine)
        clock.advance(59.999)
        await upkeep.round()
        assert upkeep.stats["sweep"].done_count == 0
        clock.advance(0.001)
        await upkeep.round()
        assert upkeep.stats["sweep"].done_count == 1
        await engine.maintenance.end_duty("sweep", "crashed", free_us=0)
        assert (await engine.maintenance.duties())["sweep"] > clock.now_us(), (
            "expected the duty not to be freed by its former holder"
        )


async def test_a_hanging_duty_is_abandoned_at_its_deadline(tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened("memory", tmp_path, clock=clock) as engine:
        never = asyncio.Event()

        async def hang(**_: object) -> None:
            await never.wait()

        store = Faulty(engine.store)
        upkeep = Upkeep(dataclasses.replace(engine, store=store))
        store.sweep = hang  # type: ignore[attr-defined]  # shadows the operation
        round_ = asyncio.create_task(upkeep.round())
        await clock.advance_async(60)
        while not round_.done():  # the next duty lists objects in a thread
            await asyncio.sleep(0)
        assert upkeep.stats["sweep"].failed_count == 1
        assert upkeep.stats["remove_orphans"].done_count == 1, "expected the other duties to be done"


async def test_a_session_that_lapses_between_two_rounds_is_recovered_on_time(tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened("memory", tmp_path, clock=clock, upkeep_interval_ms=5_000) as engine:
        await _without_objects(engine)
        batch_id = await filled(engine, 10)
        far = Session(id="session_far", kind="worker", host="far", pid=1, started_us=0)
        await engine.store.start_session(far, now_us=clock.now_us())
        claim = Claim(session_id=far.id, claim_no=1, environment="default", tasks=["task"], queues=None, runs_max=10)
        await engine.store.claim(claim, now_us=clock.now_us())
        clock.advance(2.5)
        await engine.store.heartbeat(far.id, now_us=clock.now_us())
        running = asyncio.create_task(Upkeep(engine).run())
        assert engine.limits.session_timeout_ms == 15_000
        await clock.advance_async(14.999)
        assert (await engine.store.batch(batch_id))[1].leased == 10
        await clock.advance_async(0.001)
        assert (await engine.store.batch(batch_id))[1].waiting == 10, (
            "expected the recovery when the session lapses, not an interval later"
        )
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_rounds_run_at_their_interval_until_they_are_cancelled(tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened("memory", tmp_path, clock=clock, upkeep_interval_ms=5_000) as engine:
        await _without_objects(engine)
        store = Faulty(engine.store)
        upkeep = Upkeep(dataclasses.replace(engine, store=store))
        running = asyncio.create_task(upkeep.run())
        await clock.advance_async(4.9)
        assert "sweep" not in store.calls
        for rounds_count in (1, 2, 3):
            await clock.advance_async(0.1 if rounds_count == 1 else 5)
            assert store.calls.count("sweep") == rounds_count
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _without_objects(engine: Engine) -> None:
    """Take the duty that lists objects: it runs in a thread, which a manual clock does not wait for."""
    far_us = engine.clock.now_us() + DAY_S * 1_000_000
    assert await engine.maintenance.take_duty("remove_orphans", "another", free_us=far_us, now_us=engine.clock.now_us())
