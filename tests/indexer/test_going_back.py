"""Going back: rollbacks, sources that change their mind, history and how far it reaches."""

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
from tests.indexer.bank import (
    EVERY,
    Account,
    Pay,
    balances,
    bank,
    found,
    pays,
    release,
)
from tests.indexer.programs import Op, Ops, make
from tests.indexer.rig import Left, Listed, rig

# -- going back


@EVERY
async def test_rollback_to_any_event_equals_a_run_up_to_it(name: str, tmp_path: Path) -> None:
    random.seed(7)
    do = ("add", "paint", "move", "delete", "recreate", "note", "where", "enqueue", "effect")
    log = [
        Ops([Op(random.choice(do), *(random.randrange(6) for _ in range(3))) for _ in range(random.randrange(1, 4))])
        for _ in range(120)
    ]
    wanted: dict[int, Left] = {}
    async with rig("memory", tmp_path, make) as serial:
        async with serial.running(Listed(enumerate(log, 1)), index_depth_max=0, index_batch_events_max=1) as indexing:
            for no in range(len(log) + 1):
                if no:
                    await indexing.run(until=no)
                wanted[no] = await serial.left(indexing)
    async with rig(name, tmp_path, make) as own:
        async with own.running(Listed(enumerate(log, 1)), index_batch_events_max=16) as indexing:
            await indexing.run()
            targets = random.sample(range(len(log)), 50)
            for number, to in enumerate(targets):
                standing = await indexing.rollback(to or None)
                assert standing.no == to
                left = await own.left(indexing)
                rest = [key for key in left.rows if not key.endswith("_effect")]
                assert {key: left.rows[key] for key in rest} == {key: wanted[to].rows[key] for key in rest}
                assert (left.history, left.checkpoints) == (wanted[to].history, wanted[to].checkpoints)
                assert left.positions == wanted[to].positions
                if number % 2:  # and twice in a row
                    await indexing.rollback(to // 2 or None)
                    assert (await own.left(indexing)).history == wanted[to // 2].history
                await indexing.run()
            assert await own.left(indexing) == wanted[len(log)], (
                "runs were enqueued once, however often they were asked for"
            )


@EVERY
async def test_a_rollback_waits_for_the_commit_that_is_frozen_half_way(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        async with own.running(Listed(pays(30)), index_batch_events_max=10, index_depth_max=4) as indexing:
            await indexing.run(until=10)
            own.tables.gate = gate = asyncio.Event()
            running = asyncio.ensure_future(indexing.run())
            while indexing.progress.events_count < 30:
                await asyncio.sleep(0)
            rollback = asyncio.ensure_future(indexing.rollback(20))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not rollback.done(), "the victim would be the commit in flight"
            own.tables.gate = None
            release(indexing, gate)
            assert (await rollback).no == 20
            await running
            assert await found(own, indexing) in (balances(20), balances(30))


@EVERY
@pytest.mark.parametrize("waits", [True, False], ids=["handled", "perhaps not handled"])
async def test_a_source_that_goes_back_takes_the_tables_with_it(name: str, waits: bool, tmp_path: Path) -> None:
    again = [(n, Pay("other", n)) for n in range(16, 26)]
    entries: list[Any] = [*pays(40), Rewind(15), *again, Rewind(20), *[(n, Pay("third", n)) for n in range(21, 31)]]
    async with rig(name, tmp_path, bank) as own:
        indexing = await own.run(Listed(entries, piece=7, waits=waits), index_batch_events_max=6)
        third = {"third": sum(range(21, 31)), "other": sum(range(16, 21))}
        assert await found(own, indexing) == balances(15) | third
        async with rig("memory", tmp_path, bank) as plain:
            plainly = [*pays(15), *again[:5], *entries[-10:]]
            assert (await own.left(indexing))[:3] == (await plain.left(await plain.run(Listed(plainly))))[:3]


@EVERY
async def test_a_rewind_to_before_the_first_event_begins_anew(name: str, tmp_path: Path) -> None:
    entries: list[Any] = [*pays(12), Rewind(None), (3, Pay("new", 5))]
    async with rig(name, tmp_path, bank) as own:
        indexing = await own.run(Listed(entries))
        assert await found(own, indexing) == {"new": 5}
        assert (await own.left(indexing)).positions == {"main": 3}


@EVERY
async def test_history_is_pruned_as_events_come_and_goes_back_as_far_as_was_asked(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, lambda app, source: bank(app, source, history=50)) as own:
        async with own.running(Listed(pays(400)), index_batch_events_max=20) as indexing:
            await indexing.run()
            (standing,) = await own.house.entities.standings("default")
            assert 400 - 50 - 50 // 2 - 20 <= standing.floor_no <= 350
            assert len(await own.house.entities.checkpoints("default", "bank")) == 400 - standing.floor_no
            await indexing.rollback(350)
            assert await found(own, indexing) == balances(350)
            with pytest.raises(HistoryGone):
                await indexing.rollback(100)
            assert await found(own, indexing) == balances(350)
            await indexing.run()
            assert await found(own, indexing) == balances(400)


@EVERY
async def test_a_rewind_without_history_stops_with_a_hint(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, lambda app, source: bank(app, source, history=0)) as own:
        with pytest.raises(HistoryGone, match="history="):
            await own.run(Listed([*pays(10), Rewind(5), *pays(3, first=6)]))
        async with own.running(Listed(pays(10))) as indexing:
            assert await found(own, indexing) == balances(10)


async def test_a_rate_limit_survives_going_back() -> None:
    clock = ManualClock()
    indexer = Headrace("tests").indexer("bank", source=Listed(), entities=[Account], history="all")
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
    assert len(calls) == 1, "the window that the first call opened is still open"
    await clock.advance_async(2)
    await draining
    assert calls[1] - calls[0] >= 10_000_000
    await simulation.close()


async def test_a_rewind_waits_for_the_batch_under_way(tmp_path: Path) -> None:
    going, gate = asyncio.Event(), asyncio.Event()

    def waiting(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source=source, entities=[Account], history="all")

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: HandlerContext) -> None:
            if event.to == "slow":
                going.set()
                await gate.wait()
            ctx.set(Account(event.to))

        return indexer

    class Turning(Listed):
        async def arrivals(self, after: Any) -> Any:
            yield Arrived([1, 2, 3], [Pay("a"), Pay("slow"), Pay("b")])
            await going.wait()
            yield Rewind(1)
            yield Arrived([2], [Pay("c")])

    async with rig("memory", tmp_path, waiting) as own, own.running(Turning()) as indexing:
        running = asyncio.ensure_future(indexing.run())
        await going.wait()
        while indexing._source_reader.rewind is None:
            await asyncio.sleep(0)
        assert indexing.progress.events_count == 0, "the batch goes on, the turn waits"
        gate.set()
        await running
        assert set(await found(own, indexing)) == {"a", "c"}


@EVERY
async def test_a_rewind_to_where_it_stands_changes_nothing(name: str, tmp_path: Path) -> None:
    entries: list[Any] = [*pays(5), Rewind(5), Rewind(5), *pays(5, first=6)]
    async with rig(name, tmp_path, bank) as own:
        indexing = await own.run(Listed(entries))
        assert await found(own, indexing) == balances(10)


async def test_after_a_rewind_the_other_sources_are_read_on_from_where_they_stood(tmp_path: Path) -> None:
    class Timed(Listed):
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

    async with rig("memory", tmp_path, both) as own:
        indexing = await own.run(None, index_batch_events_max=2)
        assert await found(own, indexing) == {"s": 28, "t": 6, "again": 9}
        assert steady.opened[0] is None
        assert all(after is not None for after in steady.opened[1:])


@EVERY
async def test_a_row_deleted_in_flight_and_made_again_has_each_change_once(name: str, tmp_path: Path) -> None:
    def making(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source=source, entities=[Account], history="all")

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: HandlerContext) -> None:
            if event.amount:
                ctx.set(Account(event.to, event.amount))
            else:
                ctx.delete(Account, event.to)

        return indexer

    async with rig(name, tmp_path, making) as own:
        async with own.running(
            Listed([(1, Pay("x", 1)), (2, Pay("x", 0)), (3, Pay("x", 3))]), index_batch_events_max=1
        ) as indexing:
            await indexing.run(until=1)
            own.tables.gate = gate = asyncio.Event()
            running = asyncio.ensure_future(indexing.run())
            while indexing.progress.events_count < 3:
                await asyncio.sleep(0)
            own.tables.gate = None
            release(indexing, gate)
            await running
            history = await own.house.entities.history(indexing.plan.entities[0])
            assert history == [("x", 1, Account("x", 1)), ("x", 2, None), ("x", 3, Account("x", 3))]
