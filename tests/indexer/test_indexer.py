"""A running indexer: commits that stall and fail, limited memory, and competing holders of its lease."""

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
from tests.indexer.bank_example import (
    EACH_DATABASE,
    EACH_STORE,
    Account,
    Pay,
    account_indexer,
    balances,
    bank_indexer,
    open_gate,
    payments,
    stored_balances,
)
from tests.indexer.indexer_rig import AFTER, BEFORE, Crash, FailingTables, ListSource, open_rig

# -- commits during processing


@EACH_STORE
async def test_handlers_continue_during_a_stalled_commit_until_the_depth_is_reached(name: str, tmp_path: Path) -> None:
    async with open_rig(name, tmp_path, bank_indexer) as rig:
        rig.tables.gate = gate = asyncio.Event()
        async with rig.running(ListSource(payments(100)), index_depth_max=8, index_batch_events_max=10) as indexing:
            running = asyncio.ensure_future(indexing.run())
            while indexing.staging.pending_count < 8:
                await asyncio.sleep(0)
            for _ in range(50):
                await asyncio.sleep(0)
            assert indexing.progress.events_count == 80, "expected eight batches to wait, and no further batch to begin"
            assert await stored_balances(rig, indexing) == {}, "expected no row before the commit"
            open_gate(indexing, gate)
            progress = await running
            assert (progress.events_count, progress.committed_no) == (100, 100)
            assert await stored_balances(rig, indexing) == balances(100)
        sizes = [commit.no - commit.old_no for commit in rig.tables.commits]
        assert len(sizes) < 10, "expected waiting batches to share commits"
        assert max(sizes) == 40, (
            "expected commits of at most half of the batches that may wait, so that handlers continue"
        )


@EACH_STORE
async def test_depth_zero_awaits_each_commit_before_the_next_batch(name: str, tmp_path: Path) -> None:
    async with open_rig(name, tmp_path, bank_indexer) as rig:
        indexing = await rig.run(ListSource(payments(50)), index_depth_max=0, index_batch_events_max=10)
        assert [commit.no for commit in rig.tables.commits[:5]] == [10, 20, 30, 40, 50]
        assert indexing.progress.commit_wait_s > 0


@EACH_STORE
async def test_a_lost_commit_and_a_lost_acknowledgement_are_applied_once(name: str, tmp_path: Path) -> None:
    async with open_rig(name, tmp_path, bank_indexer) as rig:
        rig.tables = FailingTables(rig.stores.entities, [BEFORE, AFTER, BEFORE, AFTER, AFTER, BEFORE])
        indexing = await rig.run(ListSource(payments(60)), index_batch_events_max=10, index_depth_max=1)
        assert await stored_balances(rig, indexing) == balances(60)
        assert rig.tables.faults == []


@EACH_STORE
async def test_a_failed_commit_ends_the_indexer_at_once_and_nothing_after_it_is_written(
    name: str, tmp_path: Path
) -> None:
    broken = StoreBroken("the disk is on fire")

    class Failing(FailingTables):
        async def commit(self, commit: Any, *, now_us: int) -> None:
            if commit.no > 20:
                raise broken
            await super().commit(commit, now_us=now_us)

    async with open_rig(name, tmp_path, bank_indexer) as rig:
        rig.tables = Failing(rig.stores.entities)
        async with rig.running(ListSource(payments(100)), index_batch_events_max=10, index_depth_max=1) as indexing:
            with pytest.raises(StoreBroken) as raised:
                await indexing.run()
            assert raised.value is broken
            for call in (indexing.run, indexing.flush):
                with pytest.raises(StoreBroken):
                    await call()
        rig.tables = FailingTables(rig.stores.entities)
        state = await rig.stores.entities.prepare(indexing.plan)
        assert state.no in (10, 20)
        assert await stored_balances(rig, indexing) == balances(state.no)
        assert await stored_balances(rig, await rig.run(ListSource(payments(100)))) == balances(100), (
            "expected the next run to continue from there"
        )


async def test_a_failed_commit_is_raised_while_the_source_is_idle() -> None:
    class Idle(ListSource):
        async def arrivals(self, after: Any) -> Any:
            async for arrived in super().arrivals(after):
                yield arrived
            await asyncio.Event().wait()

    async with open_rig("memory", Path(), bank_indexer) as rig:
        rig.tables = FailingTables(rig.stores.entities)
        rig.tables.gate = asyncio.Event()
        async with rig.running(Idle(payments(5))) as indexing:
            running = asyncio.ensure_future(indexing.run())
            await rig.tables.frozen.wait()
            for _ in range(20):
                await asyncio.sleep(0)
            assert not running.done()
            rig.tables.faults = ["-"]
            rig.tables.commit = None
            rig.tables.tables = None  # the next commit fails with an unexpected error
            rig.tables.gate.set()
            with pytest.raises(AttributeError):
                await running


async def test_waiting_reads_raise_the_error_of_a_failed_commit() -> None:
    errors: list[BaseException] = []

    async def reading(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(Account(event.to))
        if event.to == "reader":
            try:
                await ctx.get(Account, "another account")
            except StoreBroken as error:
                errors.append(error)
                raise

    indexer = account_indexer(reading)
    async with indexer.simulation(index_batch_events_max=1) as simulation:
        held = asyncio.Event()

        async def load(*_: Any) -> Any:
            await held.wait()

        simulation._tables.load = load  # type: ignore[attr-defined]  # the stores answers no read
        broken = StoreBroken("gone")
        simulation.fail_commits(broken)
        simulation.feed(Pay("writer"), Pay("reader"))
        with pytest.raises(StoreBroken):
            await simulation.drain()
        with pytest.raises(StoreBroken):
            await simulation.flush()
        assert errors in ([broken], [])
        assert simulation.rows(Account) == []


@EACH_STORE
async def test_stop_commits_the_handled_events_and_the_next_run_continues(name: str, tmp_path: Path) -> None:
    async with open_rig(name, tmp_path, bank_indexer) as rig:
        source = ListSource(payments(100), piece=10)
        async with rig.running(source, index_batch_events_max=10) as indexing:
            running = asyncio.ensure_future(indexing.run())
            while indexing.progress.events_count < 20:
                await asyncio.sleep(0)
            indexing.stop()
            progress = await running
            assert progress.committed_no == progress.no >= 20
            assert await stored_balances(rig, indexing) == balances(progress.no)
            await indexing.run()
            assert await stored_balances(rig, indexing) == balances(100)


@EACH_STORE
async def test_until_stops_after_the_event_at_that_position(name: str, tmp_path: Path) -> None:
    async with open_rig(name, tmp_path, bank_indexer) as rig:
        async with rig.running(ListSource(payments(100)), index_batch_events_max=8) as indexing:
            assert (await indexing.run(until=37)).committed_no == 37
            assert await stored_balances(rig, indexing) == balances(37)
            assert (await indexing.run(until=37)).committed_no == 37
            assert (await indexing.run()).committed_no == 100


# -- memory

LARGE = 1_500
"""Characters of a field: few rows exceed the memory limit."""


def large(count: int, *, accounts: int) -> list[tuple[int, Any]]:
    return [(n, msgspec.structs.replace(event, country="x" * LARGE)) for n, event in payments(count, accounts=accounts)]


@EACH_STORE
async def test_a_batch_larger_than_memory_is_split_without_a_deadlock(name: str, tmp_path: Path) -> None:
    async with open_rig(name, tmp_path, bank_indexer) as rig:
        indexing = await rig.run(ListSource(large(3_000, accounts=900)), index_memory_mib=1, index_depth_max=2)
        assert await stored_balances(rig, indexing) == balances(3_000, accounts=900)
        assert len(rig.tables.commits) > 3
        assert indexing.staging.bytes < 2 * 2**20


@EACH_STORE
async def test_a_rollback_larger_than_memory_restores_every_row(name: str, tmp_path: Path) -> None:
    async with open_rig(name, tmp_path, bank_indexer) as rig:
        async with rig.running(ListSource(large(2_000, accounts=600)), index_memory_mib=1) as indexing:
            await indexing.run()
            assert 600 * LARGE > 2**20 // 2, "expected rows that exceed the memory limit, each counted twice"
            state = await indexing.rollback(900)
            assert (state.no, await stored_balances(rig, indexing)) == (900, balances(900, accounts=600))
            await indexing.run()
            assert await stored_balances(rig, indexing) == balances(2_000, accounts=600)


async def test_rows_of_write_only_types_leave_memory_with_their_commit() -> None:
    async def writing(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(Account(f"{event.to}{ctx.position}"))

    async with account_indexer(writing).simulation(index_batch_events_max=10) as simulation:
        simulation.feed(*[Pay("x") for _ in range(100)])
        await simulation.drain()
        assert len(simulation.rows(Account)) == 100
        assert simulation.indexing.staging.tables[0].rows == {}


# -- a single process for an indexer


@EACH_STORE
async def test_a_second_process_learns_the_lease_holder_or_waits(name: str, tmp_path: Path) -> None:
    async with open_rig(name, tmp_path, bank_indexer) as rig:
        async with rig.running(ListSource(payments(5))):
            second = rig.indexing(ListSource(payments(5)))
            with pytest.raises(IndexerBusy, match=f"process {LeaseHolder.here().pid}"):
                await second.start(wait=False)
            await second.close()
            holders: list[str] = []
            waiting = rig.indexing(ListSource(payments(5)))
            started = asyncio.ensure_future(waiting.start(on_waiting=holders.append))
            while not holders:
                await asyncio.sleep(0)
        assert (await started).no == 0
        await waiting.run()
        await waiting.close()
        assert await stored_balances(rig, waiting) == balances(5)


@EACH_STORE
async def test_a_lease_lapses_without_heartbeats_and_its_late_holder_writes_nothing(name: str, tmp_path: Path) -> None:
    async with open_rig(name, tmp_path, bank_indexer) as rig:
        old = rig.indexing(ListSource(payments(20)), heartbeat_ms=3_600_000, session_timeout_ms=7_200_000)
        await old.start()
        new = rig.indexing(ListSource(payments(20)), session_timeout_ms=30, heartbeat_ms=10)
        await new.start()
        with pytest.raises(LeaseLost):
            await old.run()
        await old.close()
        await new.run()
        await new.close()
        assert await stored_balances(rig, new) == balances(20)


@EACH_DATABASE
async def test_a_lease_of_an_ended_process_is_taken_over_at_once(name: str, tmp_path: Path) -> None:
    async with open_rig(name, tmp_path, bank_indexer) as rig:
        first = rig.indexing(ListSource(payments(5)))
        state = await rig.stores.entities.prepare(first.plan)
        ended = await asyncio.create_subprocess_exec("true")
        await ended.wait()
        ended_holder = LeaseHolder(host=LeaseHolder.here().host, pid=ended.pid)
        await rig.stores.entities.take(state, msgspec.json.encode(ended_holder).decode())
        await first.start(wait=False)
        await first.close()


# -- simulate


@EACH_STORE
async def test_a_run_that_crashes_at_every_commit_ends_with_the_same_rows(name: str, tmp_path: Path) -> None:
    async with open_rig(name, tmp_path, bank_indexer) as rig:
        rig.tables = FailingTables(rig.stores.entities, ["crash before", "crash after"] * 6)
        indexing = await rig.run(ListSource(payments(40)), index_batch_events_max=5, index_depth_max=2)
        assert await stored_balances(rig, indexing) == balances(40)
        assert issubclass(Crash, Exception)


async def test_a_second_concurrent_run_is_refused(tmp_path: Path) -> None:
    async with open_rig("memory", tmp_path, bank_indexer) as rig, rig.running(ListSource(payments(5))) as indexing:
        running = asyncio.ensure_future(indexing.run())
        await asyncio.sleep(0)
        with pytest.raises(InvalidInput, match="is already running"):
            await indexing.run()
        assert (await running).committed_no == 5


@EACH_STORE
async def test_a_source_without_events_is_caught_up_at_once(name: str, tmp_path: Path) -> None:
    async with open_rig(name, tmp_path, bank_indexer) as rig:
        await rig.run(ListSource())
        (state,) = await rig.stores.entities.indexer_states("default")
        assert (state.no, state.positions, state.is_caught_up) == (0, {}, True)


@EACH_STORE
async def test_a_caught_up_indexer_continues_with_new_events(name: str, tmp_path: Path) -> None:
    async with open_rig(name, tmp_path, bank_indexer) as rig:
        await rig.run(ListSource(payments(5)))
        indexing = await rig.run(ListSource(payments(9)))
        (state,) = await rig.stores.entities.indexer_states("default")
        assert (state.no, state.is_caught_up) == (9, True)
        assert await stored_balances(rig, indexing) == balances(9)
