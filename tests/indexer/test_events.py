"""Events: malformed, unknown and out of order, from several sources, and the runs that handlers enqueue."""

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
from tests.indexer.bank import (
    DATABASES,
    EVERY,
    Account,
    Pay,
    bank,
    found,
    handled,
    pays,
)
from tests.indexer.rig import AFTER, BEFORE, Crash, Listed, Rig, Unsteady, rig

# -- events that are not as they should be


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
async def test_an_event_that_can_t_be_handled_is_named_by_its_position(events: list[Any], words: str) -> None:
    async def handler(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(Account(event.to))

    with pytest.raises(InvalidInput, match=words):
        await handled(handler).simulate(events)


async def test_unknown_kinds_can_be_passed_over_and_still_count() -> None:
    async def handler(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(Account(event.to, int(ctx.position)))

    simulation = await handled(handler, unknown="skip").simulate(
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
async def test_positions_that_do_not_rise_are_refused_by_name(positions: list[Any], words: str) -> None:
    async with rig("memory", Path(), bank) as own:
        with pytest.raises(InvalidInput, match=words):
            await own.run(Listed([(position, Pay("a")) for position in positions]))


async def test_a_source_that_breaks_says_which_it_was() -> None:
    class Breaking(Listed):
        async def arrivals(self, after: Any) -> Any:
            yield (await anext(super().arrivals(after)))
            raise OSError("cable cut")

    async with rig("memory", Path(), bank) as own:
        with pytest.raises(InvalidInput, match="source 'main' failed: OSError: cable cut"):
            await own.run(Breaking(pays(3)))


def test_an_indexer_that_makes_no_sense_is_refused_when_it_is_made() -> None:
    app = Headrace("tests")

    async def handler(event: Pay, ctx: HandlerContext) -> None: ...

    def plain(event: Pay, ctx: HandlerContext) -> None: ...

    async def alone(event: Pay) -> None: ...

    for make_wrong, words in (
        (lambda: app.indexer("Bad Name", source=Listed(), entities=[Account]), "is not a valid name of an indexer"),
        (lambda: app.indexer("x", source=5, entities=[Account]), "expected a source with a valid name"),  # type: ignore[arg-type]  # that is the fault
        (lambda: app.indexer("x", source={}, entities=[Account]), "has no source"),
        (lambda: app.indexer("x", source=Listed(), entities=[Account], history=-1), "history: expected"),
        (lambda: app.indexer("x", source=Listed(), entities=[Account], where="now"), "where: expected"),  # type: ignore[arg-type]  # that is the fault
        (lambda: app.indexer("x", source=Listed(), entities=[Account], unknown="hm"), "expected 'refuse' or 'skip'"),  # type: ignore[arg-type]  # that is the fault
        (lambda: handled(plain), "must be an async function"),
        (lambda: handled(alone), "expected 2 parameters, got 1"),
        (lambda: handled(handler).on("pay")(handler), "two handlers"),
        (lambda: handled(handler).on("other")(handler), "expected an event type with the tag 'other', got"),
        (lambda: handled(handler).effect(calls=0)(handler), "at least 1 call"),
    ):
        with pytest.raises(InvalidSetting, match=words):
            make_wrong()


# -- deferred indexes, several sources, what context tells


async def is_built(own: Rig) -> bool:
    """Whether the index over countries is there."""
    entities: Any = own.house.entities
    if own.house.name == "sqlite":
        return bool(entities._rows("SELECT 1 FROM sqlite_master WHERE name = 'account_by_country'"))
    asked = "SELECT 1 FROM pg_indexes WHERE indexname = 'account_by_country' AND schemaname = $1"
    return bool(await entities._rows(asked, entities._store.schema))


@DATABASES
async def test_what_died_between_its_last_event_and_its_indexes_builds_them_at_the_next_start(
    name: str, tmp_path: Path
) -> None:
    async with rig(name, tmp_path, lambda app, source: bank(app, source, defer_indexes=True)) as own:
        entities: Any = own.house.entities
        build, died = entities.build_index, []

        async def dying(*_: Any) -> None:
            died.append(True)
            raise Crash

        entities.build_index = dying
        with pytest.raises(Crash):
            async with own.running(Listed(pays(5))) as indexing:
                await indexing.run()
        (standing,) = await own.house.entities.standings("default")
        assert (standing.no, standing.is_caught_up, await is_built(own)) == (5, False, False)
        entities.build_index = build
        await own.run(Listed(pays(5)))
        (standing,) = await own.house.entities.standings("default")
        assert (standing.no, standing.is_caught_up, await is_built(own)) == (5, True, True)
        assert len(died) == 1
        if name == "sqlite":  # and one that somebody dropped is made again
            entities._within(lambda connection: connection.execute("DROP INDEX account_by_country"))
        else:
            drop = f'DROP INDEX "{entities._store.schema}".account_by_country'
            await entities._store.within(lambda connection, _: connection.raw.execute(drop))
        assert not await is_built(own)
        await own.run(Listed(pays(5)))
        assert await is_built(own)


@DATABASES
async def test_deferred_indexes_are_built_when_first_asked_for_or_at_the_end(name: str, tmp_path: Path) -> None:
    def asking(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source=source, entities=[Account], defer_indexes=True)

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: HandlerContext) -> None:
            if event.to == "ask":
                ctx.set(Account("ask", len(await ctx.where(Account, country="NZ"))))
            else:
                ctx.set(Account(event.to, 0, event.country))

        return indexer

    async with rig(name, tmp_path, asking) as own:
        async with own.running(Listed([(1, Pay("a")), (2, Pay("b")), (3, Pay("ask")), (4, Pay("c"))])) as indexing:
            await indexing.run(until=2)
            assert not await is_built(own)
            await indexing.run(until=3)
            assert await is_built(own)
            assert (await found(own, indexing))["ask"] == 2
        await own.forget()
        async with own.running(Listed(pays(5))) as indexing:
            await indexing.run(until=4)
            (standing,) = await own.house.entities.standings("default")
            assert (await is_built(own), standing.is_caught_up) == (False, False)
            await indexing.run()
            (standing,) = await own.house.entities.standings("default")
            assert (await is_built(own), standing.is_caught_up) == (True, True)


@EVERY
async def test_several_sources_merge_by_time_however_they_race(name: str, tmp_path: Path) -> None:
    class Timed(Listed):
        def __init__(self, times: list[int], label: str) -> None:
            super().__init__([(n, Pay(label, time)) for n, time in enumerate(times, 1)], piece=2)
            self.times = dict(enumerate(times, 1))

        async def arrivals(self, after: Any) -> Any:
            arrived: Any
            async for arrived in super().arrivals(after):
                for _ in range(random.randrange(4)):
                    await asyncio.sleep(0)
                yield arrived._replace(times=[self.times[own] for own in arrived.positions])

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

    wanted = [
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
    async with rig(name, tmp_path, merging) as own, own.running(None, index_batch_events_max=2) as indexing:
        await indexing.run()
        assert order == wanted
        assert await found(own, indexing) == {"a": 24567, "b": 1449}
        standing = await indexing.rollback(2, source="b")
        assert (standing.no, standing.positions) == (3, {"a": 1, "b": 2})
        order.clear()
        await indexing.run()
        assert order == wanted[3:]
        assert await found(own, indexing) == {"a": 24567, "b": 1449}
        with pytest.raises(InvalidInput, match="expected the name of a source"):
            await indexing.rollback(1)
        with pytest.raises(InvalidInput, match="got 2 sources"):
            await indexing.run(until=3)


async def test_any_of_and_ranges_overlay_what_is_staged() -> None:
    async def handler(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(Account(event.to, event.amount, event.country))
        ctx.delete(Account, "a1")
        found = await ctx.where(Account, country=any_of("NZ", "AU"))
        later = await ctx.where(Account, country=at_least("B"))
        ctx.set(Account("told", len(found) * 100 + len(later), "zz"))

    simulation = await handled(handler).simulate([Pay("a1"), Pay("b", 1, "AU"), Pay("c", 1, "CH")])
    assert simulation.row(Account, "told") == Account("told", 102, "zz")


# -- runs


@EVERY
async def test_runs_are_enqueued_with_the_commit_and_a_rewind_enqueues_nothing_twice(name: str, tmp_path: Path) -> None:
    def asking(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source=source, entities=[Account], history="all")
        if "notify" not in app.registry:

            @app.task(queue="mail")
            async def notify(to: str, amount: int) -> None: ...

            asking.task = notify  # type: ignore[attr-defined]  # kept for the second start

        task: Any = asking.task  # type: ignore[attr-defined]  # kept by the first start

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: HandlerContext) -> None:
            ctx.set(Account(event.to, event.amount))
            ctx.enqueue(task, event.to, amount=event.amount)
            if event.amount % 2:
                ctx.enqueue(task.options(priority=3, tags=["odd"]), event.to, amount=-event.amount)

        return indexer

    async with rig(name, tmp_path, asking) as own:
        own.tables = Unsteady(own.house.entities, [AFTER, "crash after", BEFORE, "crash before"])
        indexing = await own.run(
            Listed([*pays(9), Rewind(4), *[(n, Pay("other", n * 2)) for n in range(5, 8)]]), index_batch_events_max=2
        )
        runs = await own.runs()
        keys = [msgspec.json.decode(key) for key, _, _ in runs]
        assert keys == [["bank", "main", n, ordinal] for n in range(1, 10) for ordinal in range(1 + n % 2)]
        assert {task for _, task, _ in runs} == {"notify"}
        assert runs[0][2] == {"to": "a1", "amount": 1}
        assert (await own.left(indexing)).positions == {"main": 7}


async def test_more_runs_than_one_event_may_enqueue_are_refused() -> None:
    app = Headrace("tests")
    indexer = app.indexer("bank", source=Listed(), entities=[Account])

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
    indexer = app.indexer("keyed", source=Listed(), entities=[Account])

    @indexer.on("pay")
    async def on_pay(event: Pay, ctx: HandlerContext) -> None:
        ctx.enqueue(task.options(idempotency_key="mine"), event.to)

    return indexer
