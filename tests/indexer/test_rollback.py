"""Rollbacks: by call and by a rewind of the source, the history they need and how far it reaches."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace import Headrace
from headrace.core.sequencer import Arrived, Rewind
from headrace.indexer import (
    HandlerContext,
    HistoryGone,
    Indexer,
)
from headrace.runtime.clock import ManualClock
from tests.indexer.bank_example import (
    EACH_STORE,
    Account,
    Pay,
    balances,
    bank_indexer,
    open_gate,
    payments,
    stored_balances,
)
from tests.indexer.indexer_rig import IndexerContents, ListSource, open_rig
from tests.indexer.scripted_handlers import Op, Ops, scripted_indexer

# -- rollbacks and rewinds


@EACH_STORE
async def test_rollback_to_any_event_equals_a_run_up_to_it(name: str, tmp_path: Path) -> None:
    random.seed(7)
    do = ("add", "paint", "move", "delete", "recreate", "note", "where", "enqueue", "effect")
    log = [
        Ops([Op(random.choice(do), *(random.randrange(6) for _ in range(3))) for _ in range(random.randrange(1, 4))])
        for _ in range(120)
    ]
    expected: dict[int, IndexerContents] = {}
    async with open_rig("memory", tmp_path, scripted_indexer) as serial:
        async with serial.running(
            ListSource(enumerate(log, 1)), index_depth_max=0, index_batch_events_max=1
        ) as indexing:
            for no in range(len(log) + 1):
                if no:
                    await indexing.run(until=no)
                expected[no] = await serial.contents(indexing)
    async with open_rig(name, tmp_path, scripted_indexer) as rig:
        async with rig.running(ListSource(enumerate(log, 1)), index_batch_events_max=16) as indexing:
            await indexing.run()
            targets = random.sample(range(len(log)), 50)
            for number, to in enumerate(targets):
                state = await indexing.rollback(to or None)
                assert state.no == to
                contents = await rig.contents(indexing)
                rest = [key for key in contents.rows if not key.endswith("_effect")]
                assert {key: contents.rows[key] for key in rest} == {key: expected[to].rows[key] for key in rest}
                assert (contents.history, contents.checkpoints) == (expected[to].history, expected[to].checkpoints)
                assert contents.positions == expected[to].positions
                if number % 2:  # and two rollbacks in a row
                    await indexing.rollback(to // 2 or None)
                    assert (await rig.contents(indexing)).history == expected[to // 2].history
                await indexing.run()
            assert await rig.contents(indexing) == expected[len(log)], (
                "expected each run to be enqueued once, although handlers requested it repeatedly"
            )


@EACH_STORE
async def test_a_rollback_waits_for_the_commit_in_flight(name: str, tmp_path: Path) -> None:
    async with open_rig(name, tmp_path, bank_indexer) as rig:
        async with rig.running(ListSource(payments(30)), index_batch_events_max=10, index_depth_max=4) as indexing:
            await indexing.run(until=10)
            rig.tables.gate = gate = asyncio.Event()
            running = asyncio.ensure_future(indexing.run())
            while indexing.progress.events_count < 30:
                await asyncio.sleep(0)
            rollback = asyncio.ensure_future(indexing.rollback(20))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not rollback.done(), "expected the rollback to wait for the commit in flight"
            rig.tables.gate = None
            open_gate(indexing, gate)
            assert (await rollback).no == 20
            await running
            assert await stored_balances(rig, indexing) in (balances(20), balances(30))


@EACH_STORE
@pytest.mark.parametrize("waits", [True, False], ids=["handled", "perhaps not handled"])
async def test_a_rewind_of_the_source_rolls_the_tables_back(name: str, waits: bool, tmp_path: Path) -> None:
    again = [(n, Pay("other", n)) for n in range(16, 26)]
    entries: list[Any] = [*payments(40), Rewind(15), *again, Rewind(20), *[(n, Pay("third", n)) for n in range(21, 31)]]
    async with open_rig(name, tmp_path, bank_indexer) as rig:
        indexing = await rig.run(ListSource(entries, piece=7, waits=waits), index_batch_events_max=6)
        third = {"third": sum(range(21, 31)), "other": sum(range(16, 21))}
        assert await stored_balances(rig, indexing) == balances(15) | third
        async with open_rig("memory", tmp_path, bank_indexer) as plain:
            plainly = [*payments(15), *again[:5], *entries[-10:]]
            assert (await rig.contents(indexing))[:3] == (await plain.contents(await plain.run(ListSource(plainly))))[
                :3
            ]


@EACH_STORE
async def test_a_rewind_before_the_first_event_starts_over(name: str, tmp_path: Path) -> None:
    entries: list[Any] = [*payments(12), Rewind(None), (3, Pay("new", 5))]
    async with open_rig(name, tmp_path, bank_indexer) as rig:
        indexing = await rig.run(ListSource(entries))
        assert await stored_balances(rig, indexing) == {"new": 5}
        assert (await rig.contents(indexing)).positions == {"main": 3}


@EACH_STORE
async def test_history_is_pruned_continuously_and_covers_the_configured_range(name: str, tmp_path: Path) -> None:
    async with open_rig(name, tmp_path, lambda app, source: bank_indexer(app, source, history=50)) as rig:
        async with rig.running(ListSource(payments(400)), index_batch_events_max=20) as indexing:
            await indexing.run()
            (state,) = await rig.stores.entities.indexer_states("default")
            assert 400 - 50 - 50 // 2 - 20 <= state.floor_no <= 350
            assert len(await rig.stores.entities.checkpoints("default", "bank")) == 400 - state.floor_no
            await indexing.rollback(350)
            assert await stored_balances(rig, indexing) == balances(350)
            with pytest.raises(HistoryGone):
                await indexing.rollback(100)
            assert await stored_balances(rig, indexing) == balances(350)
            await indexing.run()
            assert await stored_balances(rig, indexing) == balances(400)


@EACH_STORE
async def test_a_rewind_without_history_stops_with_a_hint(name: str, tmp_path: Path) -> None:
    async with open_rig(name, tmp_path, lambda app, source: bank_indexer(app, source, history=0)) as rig:
        with pytest.raises(HistoryGone, match="history="):
            await rig.run(ListSource([*payments(10), Rewind(5), *payments(3, first=6)]))
        async with rig.running(ListSource(payments(10))) as indexing:
            assert await stored_balances(rig, indexing) == balances(10)


async def test_a_rate_limit_survives_a_rollback() -> None:
    clock = ManualClock()
    indexer = Headrace("tests").indexer("bank", source=ListSource(), entities=[Account], history="all")
    calls: list[int] = []

    @indexer.effect(calls=1, per_s=10, cache=False)
    async def rate(n: int) -> int:
        calls.append(clock.now_us())
        return n

    @indexer.on("pay")
    async def on_pay(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(Account(event.to, await ctx.effect(rate, event.amount)))

    from headrace.indexer_testing import Simulation

    simulation = await Simulation.start(indexer.definition, {}, clock)
    simulation.feed(Pay("a", 1))
    await simulation.drain()
    await simulation.rewind(None)
    simulation.feed(Pay("a", 2))
    draining = asyncio.ensure_future(simulation.drain())
    await clock.advance_async(9)
    assert len(calls) == 1, "expected the window of the first call to be open"
    await clock.advance_async(2)
    await draining
    assert calls[1] - calls[0] >= 10_000_000
    await simulation.close()


async def test_a_rewind_waits_for_the_running_batch(tmp_path: Path) -> None:
    started, gate = asyncio.Event(), asyncio.Event()

    def waiting(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source=source, entities=[Account], history="all")

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: HandlerContext) -> None:
            if event.to == "slow":
                started.set()
                await gate.wait()
            ctx.set(Account(event.to))

        return indexer

    class RewindingSource(ListSource):
        async def arrivals(self, after: Any) -> Any:
            yield Arrived([1, 2, 3], [Pay("a"), Pay("slow"), Pay("b")])
            await started.wait()
            yield Rewind(1)
            yield Arrived([2], [Pay("c")])

    async with open_rig("memory", tmp_path, waiting) as rig, rig.running(RewindingSource()) as indexing:
        running = asyncio.ensure_future(indexing.run())
        await started.wait()
        while indexing._source_reader.rewind is None:
            await asyncio.sleep(0)
        assert indexing.progress.events_count == 0, "expected the rewind to wait for the running batch"
        gate.set()
        await running
        assert set(await stored_balances(rig, indexing)) == {"a", "c"}


@EACH_STORE
async def test_a_rewind_to_the_current_position_changes_nothing(name: str, tmp_path: Path) -> None:
    entries: list[Any] = [*payments(5), Rewind(5), Rewind(5), *payments(5, first=6)]
    async with open_rig(name, tmp_path, bank_indexer) as rig:
        indexing = await rig.run(ListSource(entries))
        assert await stored_balances(rig, indexing) == balances(10)


async def test_after_a_rewind_the_other_sources_resume_from_their_positions(tmp_path: Path) -> None:
    class Timed(ListSource):
        async def arrivals(self, after: Any) -> Any:
            arrived: Any
            async for arrived in super().arrivals(after):
                yield (
                    arrived
                    if isinstance(arrived, Rewind)
                    else arrived._replace(times=[n * 10 for n in arrived.positions])
                )

    turning = Timed(
        [*[(n, Pay("t", n)) for n in range(1, 6)], Rewind(3), *[(n, Pay("again", n)) for n in range(4, 6)]], waits=False
    )
    steady = Timed([(n, Pay("s", n)) for n in range(1, 8)])

    def both(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source={"steady": steady, "turning": turning}, entities=[Account], history="all")

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: HandlerContext) -> None:
            account = await ctx.get_or_create(Account, event.to)
            ctx.set(msgspec.structs.replace(account, balance=account.balance + event.amount))

        return indexer

    async with open_rig("memory", tmp_path, both) as rig:
        indexing = await rig.run(None, index_batch_events_max=2)
        assert await stored_balances(rig, indexing) == {"s": 28, "t": 6, "again": 9}
        assert steady.opened[0] is None
        assert all(after is not None for after in steady.opened[1:])


@EACH_STORE
async def test_a_row_deleted_in_flight_and_recreated_has_each_change_once(name: str, tmp_path: Path) -> None:
    def indexer_that_deletes(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source=source, entities=[Account], history="all")

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: HandlerContext) -> None:
            if event.amount:
                ctx.set(Account(event.to, event.amount))
            else:
                ctx.delete(Account, event.to)

        return indexer

    async with open_rig(name, tmp_path, indexer_that_deletes) as rig:
        async with rig.running(
            ListSource([(1, Pay("x", 1)), (2, Pay("x", 0)), (3, Pay("x", 3))]), index_batch_events_max=1
        ) as indexing:
            await indexing.run(until=1)
            rig.tables.gate = gate = asyncio.Event()
            running = asyncio.ensure_future(indexing.run())
            while indexing.progress.events_count < 3:
                await asyncio.sleep(0)
            rig.tables.gate = None
            open_gate(indexing, gate)
            await running
            history = await rig.stores.entities.history(indexing.plan.entities[0])
            assert history == [("x", 1, Account("x", 1)), ("x", 2, None), ("x", 3, Account("x", 3))]
