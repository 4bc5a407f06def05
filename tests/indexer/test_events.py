"""Events: invalid, of unknown kinds, out of order, and from several sources; and the runs that handlers enqueue."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace import Headrace
from headrace.core.sequencer import Rewind
from headrace.foundation.errors import InvalidInput, InvalidSetting
from headrace.indexer import (
    HandlerContext,
    HandlerFailed,
    Indexer,
    any_of,
    at_least,
)
from tests.indexer.bank_example import (
    EACH_DATABASE,
    EACH_STORE,
    Account,
    Pay,
    account_indexer,
    bank_indexer,
    payments,
    stored_balances,
)
from tests.indexer.indexer_rig import AFTER, BEFORE, Crash, FailingTables, IndexerRig, ListSource, open_rig

# -- invalid events


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([b'{"type":"pay","to":"a"}', b'{"type":"pay"'], "event at 2 is invalid"),
        ([b'{"type":"pay","to":5}'], "Expected `str`"),
        ([b'{"type":"fly"}'], "of the kind 'fly'"),
        ([b'{"to":"a"}'], "event at 1 is invalid: .*`type`"),
        ([b"\xff"], "event at 1 is invalid"),
        ([b"[" * 100_000], "event at 1 is invalid"),
        ([{"type": "pay", "to": "a"}, {"type": "pay", "to": None}], "event at 2 is invalid"),
        ([{"to": "a"}], "without the field 'type'"),
        ([7], "which no handler takes"),
    ],
    ids=[str(number) for number in range(9)],
)
async def test_an_invalid_event_is_reported_with_its_position(events: list[Any], words: str) -> None:
    async def handler(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(Account(event.to))

    with pytest.raises(InvalidInput, match=words):
        await account_indexer(handler).simulate(events)


async def test_skipped_events_of_unknown_kinds_still_count() -> None:
    async def handler(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(Account(event.to, int(ctx.position)))

    simulation = await account_indexer(handler, unknown="skip").simulate(
        [b'{"type":"fly"}', Pay("a"), {"type": "swim"}, {"x": 1}]
    )
    assert simulation.rows(Account) == [Account("a", 2)]
    assert simulation.indexing.progress.committed_no == 4


@pytest.mark.parametrize(
    ("positions", "words"),
    [([1, 2, 2], "expected a position after 2, got 2"), ([1, 3, 2], "expected a position after 3, got 2"), ([1, "2"], "one type per source"),
     ([1, 2.5], "expected integers or strings"), ([2**63], "64 bits"), (["a" * 501], "1 to 500 characters"), ([""], "1 to 500")],
    ids=str,
)  # fmt: skip
async def test_positions_that_do_not_increase_are_refused(positions: list[Any], words: str) -> None:
    async with open_rig("memory", Path(), bank_indexer) as rig:
        with pytest.raises(InvalidInput, match=words):
            await rig.run(ListSource([(position, Pay("a")) for position in positions]))


async def test_a_failing_source_is_reported_by_name() -> None:
    class Breaking(ListSource):
        async def arrivals(self, after: Any) -> Any:
            yield (await anext(super().arrivals(after)))
            raise OSError("cable cut")

    async with open_rig("memory", Path(), bank_indexer) as rig:
        with pytest.raises(InvalidInput, match="source 'main' failed: OSError: cable cut"):
            await rig.run(Breaking(payments(3)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"times": [1]}, "source 'main': expected 2 times, as many as positions, got 1"),
        ({"times": [1, 2, 3]}, "source 'main': expected 2 times"),
        ({"times": []}, "source 'main': expected 2 times"),
        ({"events": [Pay("a", 1)]}, "source 'main': expected 2 events"),
    ],
)
async def test_a_source_whose_sequences_differ_in_length_is_reported_by_name(
    change: dict[str, Any], words: str
) -> None:
    class Uneven(ListSource):
        async def arrivals(self, after: Any) -> Any:
            arrived: Any
            async for arrived in super().arrivals(after):
                yield arrived._replace(**change)

    async with open_rig("memory", Path(), bank_indexer) as rig:
        with pytest.raises(InvalidInput, match=words):
            async with asyncio.timeout(10):
                await rig.run(Uneven(payments(2)))


def test_an_invalid_indexer_definition_is_refused() -> None:
    app = Headrace("tests")

    async def handler(event: Pay, ctx: HandlerContext) -> None: ...

    def plain(event: Pay, ctx: HandlerContext) -> None: ...

    async def alone(event: Pay) -> None: ...

    for make_wrong, words in (
        (lambda: app.indexer("Bad Name", source=ListSource(), entities=[Account]), "is not a valid name of an indexer"),
        (lambda: app.indexer("x", source=5, entities=[Account]), "expected a source with a valid name"),  # type: ignore[arg-type]  # that is the fault
        (lambda: app.indexer("x", source={}, entities=[Account]), "has no source"),
        (lambda: app.indexer("x", source=ListSource(), entities=[Account], history=-1), "history: expected"),
        (lambda: app.indexer("x", source=ListSource(), entities=[Account], where="now"), "where: expected"),  # type: ignore[arg-type]  # that is the fault
        (
            lambda: app.indexer("x", source=ListSource(), entities=[Account], unknown="hm"),  # type: ignore[arg-type]  # that is the fault
            "expected 'refuse' or 'skip'",
        ),
        (lambda: account_indexer(plain), "must be an async function"),
        (lambda: account_indexer(alone), "expected 2 parameters, got 1"),
        (lambda: account_indexer(handler).on("pay")(handler), "two handlers"),
        (lambda: account_indexer(handler).on("other")(handler), "expected an event type with the tag 'other', got"),
        (lambda: account_indexer(handler).effect(calls=0)(handler), "at least 1 call"),
    ):
        with pytest.raises(InvalidSetting, match=words):
            make_wrong()


# -- deferred indexes, several sources, the origin of an event


async def is_built(rig: IndexerRig) -> bool:
    """Return True if the index over countries exists."""
    entities: Any = rig.stores.entities
    if rig.stores.name == "sqlite":
        return bool(entities._rows("SELECT 1 FROM sqlite_master WHERE name = 'account_by_country'"))
    query = "SELECT 1 FROM pg_indexes WHERE indexname = 'account_by_country' AND schemaname = $1"
    return bool(await entities._rows(query, entities._store.schema))


@EACH_DATABASE
async def test_an_indexer_that_crashes_before_building_its_indexes_builds_them_at_the_next_start(
    name: str, tmp_path: Path
) -> None:
    async with open_rig(name, tmp_path, lambda app, source: bank_indexer(app, source, defer_indexes=True)) as rig:
        entities: Any = rig.stores.entities
        build, crashes = entities.build_index, []

        async def crash_in_build(*_: Any) -> None:
            crashes.append(True)
            raise Crash

        entities.build_index = crash_in_build
        with pytest.raises(Crash):
            async with rig.running(ListSource(payments(5))) as indexing:
                await indexing.run()
        (state,) = await rig.stores.entities.indexer_states("default")
        assert (state.no, state.is_caught_up, await is_built(rig)) == (5, False, False)
        entities.build_index = build
        await rig.run(ListSource(payments(5)))
        (state,) = await rig.stores.entities.indexer_states("default")
        assert (state.no, state.is_caught_up, await is_built(rig)) == (5, True, True)
        assert len(crashes) == 1
        if name == "sqlite":  # an index that was dropped is created again
            entities._within(lambda connection: connection.execute("DROP INDEX account_by_country"))
        else:
            drop = f'DROP INDEX "{entities._store.schema}".account_by_country'
            await entities._store.within(lambda connection, _: connection.raw.execute(drop))
        assert not await is_built(rig)
        await rig.run(ListSource(payments(5)))
        assert await is_built(rig)


@EACH_DATABASE
async def test_deferred_indexes_are_built_at_first_use_or_at_the_end(name: str, tmp_path: Path) -> None:
    def indexer_with_task(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source=source, entities=[Account], defer_indexes=True)

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: HandlerContext) -> None:
            if event.to == "ask":
                ctx.set(Account("ask", len(await ctx.where(Account, country="NZ"))))
            else:
                ctx.set(Account(event.to, 0, event.country))

        return indexer

    async with open_rig(name, tmp_path, indexer_with_task) as rig:
        async with rig.running(ListSource([(1, Pay("a")), (2, Pay("b")), (3, Pay("ask")), (4, Pay("c"))])) as indexing:
            await indexing.run(until=2)
            assert not await is_built(rig)
            await indexing.run(until=3)
            assert await is_built(rig)
            assert (await stored_balances(rig, indexing))["ask"] == 2
        await rig.forget()
        async with rig.running(ListSource(payments(5))) as indexing:
            await indexing.run(until=4)
            (state,) = await rig.stores.entities.indexer_states("default")
            assert (await is_built(rig), state.is_caught_up) == (False, False)
            await indexing.run()
            (state,) = await rig.stores.entities.indexer_states("default")
            assert (await is_built(rig), state.is_caught_up) == (True, True)


@EACH_STORE
async def test_several_sources_merge_by_time_in_any_arrival_order(name: str, tmp_path: Path) -> None:
    class Timed(ListSource):
        def __init__(self, times: list[int], label: str) -> None:
            super().__init__([(n, Pay(label, time)) for n, time in enumerate(times, 1)], piece=2)
            self.times = dict(enumerate(times, 1))

        async def arrivals(self, after: Any) -> Any:
            arrived: Any
            async for arrived in super().arrivals(after):
                for _ in range(random.randrange(4)):
                    await asyncio.sleep(0)
                yield arrived._replace(times=[self.times[position] for position in arrived.positions])

    order: list[Any] = []

    def merging(app: Headrace, source: Any) -> Indexer:
        sources = {"b": Timed([1, 4, 4, 9], "b"), "a": Timed([2, 4, 5, 6, 7], "a")}
        indexer = app.indexer("bank", source=sources, entities=[Account], history="all")

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: HandlerContext) -> None:
            account = await ctx.get_or_create(Account, event.to)
            ctx.set(msgspec.structs.replace(account, balance=account.balance * 10 + event.amount))
            if not ctx.is_preload:
                order.append((ctx.source, ctx.position, ctx.time_us))
                assert ctx.event == (ctx.source, ctx.position, ctx.time_us, "pay")

        return indexer

    expected = [
        ("b", 1, 1),
        ("a", 1, 2),
        ("b", 2, 4),
        ("b", 3, 4),
        ("a", 2, 4),
        ("a", 3, 5),
        ("a", 4, 6),
        ("a", 5, 7),
        ("b", 4, 9),
    ]
    async with open_rig(name, tmp_path, merging) as rig, rig.running(None, index_batch_events_max=2) as indexing:
        await indexing.run()
        assert order == expected
        assert await stored_balances(rig, indexing) == {"a": 24567, "b": 1449}
        state = await indexing.rollback(2, source="b")
        assert (state.no, state.positions) == (3, {"a": 1, "b": 2})
        order.clear()
        await indexing.run()
        assert order == expected[3:]
        assert await stored_balances(rig, indexing) == {"a": 24567, "b": 1449}
        with pytest.raises(InvalidInput, match="expected the name of a source"):
            await indexing.rollback(1)
        with pytest.raises(InvalidInput, match="got 2 sources"):
            await indexing.run(until=3)


async def test_any_of_and_ranges_include_staged_rows() -> None:
    async def handler(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(Account(event.to, event.amount, event.country))
        ctx.delete(Account, "a1")
        listed = await ctx.where(Account, country=any_of("NZ", "AU"))
        later = await ctx.where(Account, country=at_least("B"))
        ctx.set(Account("counts", len(listed) * 100 + len(later), "zz"))

    simulation = await account_indexer(handler).simulate([Pay("a1"), Pay("b", 1, "AU"), Pay("c", 1, "CH")])
    assert simulation.row(Account, "counts") == Account("counts", 102, "zz")


# -- runs


@EACH_STORE
async def test_runs_are_enqueued_with_the_commit_and_a_rewind_enqueues_nothing_twice(name: str, tmp_path: Path) -> None:
    def indexer_with_task(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source=source, entities=[Account], history="all")
        if "notify" not in app.registry:

            @app.task(queue="mail")
            async def notify(to: str, amount: int) -> None: ...

            indexer_with_task.task = notify  # type: ignore[attr-defined]  # for the second start

        task: Any = indexer_with_task.task  # type: ignore[attr-defined]  # set by the first start

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: HandlerContext) -> None:
            ctx.set(Account(event.to, event.amount))
            ctx.enqueue(task, event.to, amount=event.amount)
            if event.amount % 2:
                ctx.enqueue(task.options(priority=3, tags=["odd"]), event.to, amount=-event.amount)

        return indexer

    async with open_rig(name, tmp_path, indexer_with_task) as rig:
        rig.tables = FailingTables(rig.stores.entities, [AFTER, "crash after", BEFORE, "crash before"])
        indexing = await rig.run(
            ListSource([*payments(9), Rewind(4), *[(n, Pay("other", n * 2)) for n in range(5, 8)]]),
            index_batch_events_max=2,
        )
        runs = await rig.runs()
        keys = [msgspec.json.decode(key) for key, _, _ in runs]
        assert keys == [["bank", "main", n, ordinal] for n in range(1, 10) for ordinal in range(1 + n % 2)]
        assert {task for _, task, _ in runs} == {"notify"}
        assert runs[0][2] == {"to": "a1", "amount": 1}
        assert (await rig.contents(indexing)).positions == {"main": 7}


async def test_an_event_that_enqueues_too_many_runs_is_refused() -> None:
    app = Headrace("tests")
    indexer = app.indexer("bank", source=ListSource(), entities=[Account])

    @app.task
    async def notify(to: str) -> None: ...

    @indexer.on("pay")
    async def on_pay(event: Pay, ctx: HandlerContext) -> None:
        for _ in range(event.amount):
            ctx.enqueue(notify, event.to)

    simulation = await indexer.simulate([Pay("a", 3)], index_enqueues_max=3)
    assert [(run.task, run.payload) for run in await simulation.enqueued()] == [("notify", "a")] * 3
    with pytest.raises(HandlerFailed, match="at most 3 runs"):
        await indexer.simulate([Pay("a", 4)], index_enqueues_max=3)
    with pytest.raises(HandlerFailed, match="omit idempotency_key"):
        await _keyed(app, notify).simulate([Pay("a")])


def _keyed(app: Headrace, task: Any) -> Indexer:
    indexer = app.indexer("keyed", source=ListSource(), entities=[Account])

    @indexer.on("pay")
    async def on_pay(event: Pay, ctx: HandlerContext) -> None:
        ctx.enqueue(task.options(idempotency_key="key"), event.to)

    return indexer
