"""A running indexer: what it promises when commits stall and fail, memory is small, and others want its lease."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.foundation.errors import InvalidInput, StoreBroken
from headrace.indexer import (
    HandlerContext,
    IndexerBusy,
    LeaseLost,
)
from headrace.runtime.indexing.indexer_lease import LeaseHolder
from tests.indexer.bank import (
    DATABASES,
    EVERY,
    Account,
    Pay,
    balances,
    bank,
    found,
    handled,
    pays,
    release,
)
from tests.indexer.rig import AFTER, BEFORE, Crash, Listed, Unsteady, rig

# -- commits beside compute


@EVERY
async def test_handlers_go_on_while_a_commit_is_frozen_and_stop_at_the_depth(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        own.tables.gate = gate = asyncio.Event()
        async with own.running(Listed(pays(100)), index_depth_max=8, index_batch_events_max=10) as indexing:
            running = asyncio.ensure_future(indexing.run())
            while indexing.staging.pending_count < 8:
                await asyncio.sleep(0)
            for _ in range(50):
                await asyncio.sleep(0)
            assert indexing.progress.events_count == 80, "eight batches wait, and no more are begun"
            assert await found(own, indexing) == {}, "nothing of them is in SQL"
            release(indexing, gate)
            told = await running
            assert (told.events_count, told.committed_no) == (100, 100)
            assert await found(own, indexing) == balances(100)
        sizes = [commit.no - commit.old_no for commit in own.tables.commits]
        assert len(sizes) < 10, "what waited went into commits together"
        assert max(sizes) == 40, "but no more than half of what may wait: handlers go on under them"


@EVERY
async def test_depth_zero_awaits_each_commit_before_the_next_batch(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        indexing = await own.run(Listed(pays(50)), index_depth_max=0, index_batch_events_max=10)
        assert [commit.no for commit in own.tables.commits[:5]] == [10, 20, 30, 40, 50]
        assert indexing.progress.commit_wait_s > 0


@EVERY
async def test_a_commit_that_was_lost_and_one_whose_answer_was_lost_land_once(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        own.tables = Unsteady(own.house.entities, [BEFORE, AFTER, BEFORE, AFTER, AFTER, BEFORE])
        indexing = await own.run(Listed(pays(60)), index_batch_events_max=10, index_depth_max=1)
        assert await found(own, indexing) == balances(60)
        assert own.tables.faults == []


@EVERY
async def test_a_failed_commit_ends_the_indexer_at_once_and_nothing_after_it_is_written(
    name: str, tmp_path: Path
) -> None:
    broken = StoreBroken("the disk is on fire")

    class Failing(Unsteady):
        async def commit(self, commit: Any, *, now_us: int) -> None:
            if commit.no > 20:
                raise broken
            await super().commit(commit, now_us=now_us)

    async with rig(name, tmp_path, bank) as own:
        own.tables = Failing(own.house.entities)
        async with own.running(Listed(pays(100)), index_batch_events_max=10, index_depth_max=1) as indexing:
            with pytest.raises(StoreBroken) as raised:
                await indexing.run()
            assert raised.value is broken
            for call in (indexing.run, indexing.flush):
                with pytest.raises(StoreBroken):
                    await call()
        own.tables = Unsteady(own.house.entities)
        standing = await own.house.entities.prepare(indexing.plan)
        assert standing.no in (10, 20)
        assert await found(own, indexing) == balances(standing.no)
        assert await found(own, await own.run(Listed(pays(100)))) == balances(100), "the next start goes on from there"


async def test_a_failed_commit_is_raised_while_the_source_is_idle() -> None:
    class Idle(Listed):
        async def arrivals(self, after: Any) -> Any:
            async for arrived in super().arrivals(after):
                yield arrived
            await asyncio.Event().wait()

    async with rig("memory", Path(), bank) as own:
        own.tables = Unsteady(own.house.entities)
        own.tables.gate = asyncio.Event()
        async with own.running(Idle(pays(5))) as indexing:
            running = asyncio.ensure_future(indexing.run())
            await own.tables.frozen.wait()
            for _ in range(20):
                await asyncio.sleep(0)
            assert not running.done()
            own.tables.faults = ["-"]
            own.tables.commit = None
            own.tables.tables = None  # whatever it does now fails, in a way nobody expects
            own.tables.gate.set()
            with pytest.raises(AttributeError):
                await running


async def test_reads_that_wait_hear_of_a_failed_commit() -> None:
    heard: list[BaseException] = []

    async def reading(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(Account(event.to))
        if event.to == "reader":
            try:
                await ctx.get(Account, "somebody else")
            except StoreBroken as error:
                heard.append(error)
                raise

    indexer = handled(reading)
    async with indexer.simulation(index_batch_events_max=1) as simulation:
        held = asyncio.Event()

        async def load(*_: Any) -> Any:
            await held.wait()

        simulation._tables.load = load  # type: ignore[attr-defined]  # the house answers no read
        broken = StoreBroken("gone")
        simulation.fail_commits(broken)
        simulation.feed(Pay("writer"), Pay("reader"))
        with pytest.raises(StoreBroken):
            await simulation.drain()
        with pytest.raises(StoreBroken):
            await simulation.flush()
        assert heard in ([broken], [])
        assert simulation.rows(Account) == []


@EVERY
async def test_stop_commits_what_was_handled_and_the_next_run_goes_on(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        source = Listed(pays(100), piece=10)
        async with own.running(source, index_batch_events_max=10) as indexing:
            running = asyncio.ensure_future(indexing.run())
            while indexing.progress.events_count < 20:
                await asyncio.sleep(0)
            indexing.stop()
            told = await running
            assert told.committed_no == told.no >= 20
            assert await found(own, indexing) == balances(told.no)
            await indexing.run()
            assert await found(own, indexing) == balances(100)


@EVERY
async def test_until_stops_after_the_event_at_that_position(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        async with own.running(Listed(pays(100)), index_batch_events_max=8) as indexing:
            assert (await indexing.run(until=37)).committed_no == 37
            assert await found(own, indexing) == balances(37)
            assert (await indexing.run(until=37)).committed_no == 37
            assert (await indexing.run()).committed_no == 100


# -- memory

LARGE = 1_500
"""Characters of a field, so that few rows are more than memory may hold."""


def large(count: int, *, accounts: int) -> list[tuple[int, Any]]:
    return [(n, msgspec.structs.replace(event, country="x" * LARGE)) for n, event in pays(count, accounts=accounts)]


@EVERY
async def test_a_batch_larger_than_memory_is_cut_and_nothing_deadlocks(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        indexing = await own.run(Listed(large(3_000, accounts=900)), index_memory_mib=1, index_depth_max=2)
        assert await found(own, indexing) == balances(3_000, accounts=900)
        assert len(own.tables.commits) > 3
        assert indexing.staging.bytes < 2 * 2**20


@EVERY
async def test_a_rollback_larger_than_memory_restores_everything(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        async with own.running(Listed(large(2_000, accounts=600)), index_memory_mib=1) as indexing:
            await indexing.run()
            assert 600 * LARGE > 2**20 // 2, "the rows of one state are more than memory, each counted twice"
            standing = await indexing.rollback(900)
            assert (standing.no, await found(own, indexing)) == (900, balances(900, accounts=600))
            await indexing.run()
            assert await found(own, indexing) == balances(2_000, accounts=600)


async def test_types_that_are_only_written_leave_memory_with_their_commit() -> None:
    async def writing(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(Account(f"{event.to}{ctx.position}"))

    async with handled(writing).simulation(index_batch_events_max=10) as simulation:
        simulation.feed(*[Pay("x") for _ in range(100)])
        await simulation.drain()
        assert len(simulation.rows(Account)) == 100
        assert simulation.indexing.staging.tables[0].rows == {}


# -- one process an indexer


@EVERY
async def test_a_second_process_hears_who_holds_the_indexer_or_waits(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        async with own.running(Listed(pays(5))):
            second = own.indexing(Listed(pays(5)))
            with pytest.raises(IndexerBusy, match=f"process {LeaseHolder.here().pid}"):
                await second.start(wait=False)
            await second.close()
            told: list[str] = []
            waiting = own.indexing(Listed(pays(5)))
            started = asyncio.ensure_future(waiting.start(on_waiting=told.append))
            while not told:
                await asyncio.sleep(0)
        assert (await started).no == 0
        await waiting.run()
        await waiting.close()
        assert await found(own, waiting) == balances(5)


@EVERY
async def test_a_lease_lapses_when_its_holder_is_silent_and_the_late_one_writes_nothing(
    name: str, tmp_path: Path
) -> None:
    async with rig(name, tmp_path, bank) as own:
        old = own.indexing(Listed(pays(20)), heartbeat_ms=3_600_000, session_timeout_ms=7_200_000)
        await old.start()
        new = own.indexing(Listed(pays(20)), session_timeout_ms=30, heartbeat_ms=10)
        await new.start()
        with pytest.raises(LeaseLost):
            await old.run()
        await old.close()
        await new.run()
        await new.close()
        assert await found(own, new) == balances(20)


@DATABASES
async def test_a_holder_whose_process_is_gone_is_not_waited_for(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        first = own.indexing(Listed(pays(5)))
        standing = await own.house.entities.prepare(first.plan)
        ended = await asyncio.create_subprocess_exec("true")
        await ended.wait()
        gone = LeaseHolder(host=LeaseHolder.here().host, pid=ended.pid)
        await own.house.entities.take(standing, msgspec.json.encode(gone).decode())
        await first.start(wait=False)
        await first.close()


# -- simulate


@EVERY
async def test_a_run_that_crashes_at_every_commit_ends_where_a_quiet_one_does(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        own.tables = Unsteady(own.house.entities, ["crash before", "crash after"] * 6)
        indexing = await own.run(Listed(pays(40)), index_batch_events_max=5, index_depth_max=2)
        assert await found(own, indexing) == balances(40)
        assert issubclass(Crash, Exception)


async def test_a_second_run_beside_the_first_is_refused(tmp_path: Path) -> None:
    async with rig("memory", tmp_path, bank) as own, own.running(Listed(pays(5))) as indexing:
        running = asyncio.ensure_future(indexing.run())
        await asyncio.sleep(0)
        with pytest.raises(InvalidInput, match="is already running"):
            await indexing.run()
        assert (await running).committed_no == 5


@EVERY
async def test_a_source_without_events_is_caught_up_at_once(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        await own.run(Listed())
        (standing,) = await own.house.entities.standings("default")
        assert (standing.no, standing.positions, standing.is_caught_up) == (0, {}, True)


@EVERY
async def test_an_indexer_that_had_caught_up_goes_on_when_there_is_more(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        await own.run(Listed(pays(5)))
        indexing = await own.run(Listed(pays(9)))
        (standing,) = await own.house.entities.standings("default")
        assert (standing.no, standing.is_caught_up) == (9, True)
        assert await found(own, indexing) == balances(9)
