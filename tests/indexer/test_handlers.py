"""Handlers: what they may ask, what becomes of it when they misbehave, effects, and loading ahead."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from headrace import Headrace
from headrace.foundation.errors import InvalidInput, NotFound, StoreBroken, StoreUnavailable
from headrace.indexer import (
    Entity,
    HandlerContext,
    HandlerFailed,
    Indexer,
    any_of,
    at_least,
)
from headrace.runtime.clock import ManualClock, SystemClock
from headrace.runtime.indexing.handler_context import ContextEnded
from tests.indexer.bank import (
    EVERY,
    FIVE,
    Account,
    Pay,
    bank,
    found,
    handled,
    pays,
)
from tests.indexer.rig import Listed, rig

# -- handlers that misbehave


async def test_a_handler_that_raises_stops_the_indexer_and_says_where() -> None:
    async def failing(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(Account(event.to))
        if event.to == "bad":
            raise ValueError("no such account")

    indexer = handled(failing)
    with pytest.raises(HandlerFailed, match="event at 3.*no such account") as raised:
        await indexer.simulate([Pay("a"), Pay("b"), Pay("bad"), Pay("c")])
    assert isinstance(raised.value.__cause__, ValueError)
    assert raised.value.ids["position"] == 3


async def test_a_handler_that_hangs_is_ended_by_its_bound() -> None:
    async def hanging(event: Pay, ctx: HandlerContext) -> None:
        await asyncio.Event().wait()

    clock = ManualClock()
    from headrace.indexer_testing import Simulation

    simulation = await Simulation.start(handled(hanging).definition, {"index_handler_timeout_s": 5}, clock)
    simulation.feed(Pay("a"))
    draining = asyncio.ensure_future(simulation.drain())
    await clock.advance_async(11)
    with pytest.raises(HandlerFailed, match="has not ended in 5 s"):
        await draining
    await simulation.close()


async def test_a_handler_that_never_gives_the_loop_back_loses_the_lease_and_is_named(tmp_path: Path) -> None:
    left = threading.Event()

    def blocking(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source=source, entities=[Account])

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: HandlerContext) -> None:
            if event.to == "stuck":
                assert left.wait(60), "the lease is given back while the loop stands still"
            ctx.set(Account(event.to))

        return indexer

    log = [(1, Pay("a")), (2, Pay("stuck")), (3, Pay("b"))]
    async with rig("sqlite", tmp_path, blocking, SystemClock()) as own:
        leave = own.house.entities.leave

        async def leaving(*names: Any) -> None:
            await leave(*names)
            left.set()

        own.tables.leave = leaving
        with pytest.raises(HandlerFailed, match="event at 2 has not ended in 1 s"):
            async with own.running(
                Listed(log), index_batch_events_max=1, index_handler_timeout_s=1, heartbeat_ms=100
            ) as indexing:
                await indexing.run()
        (standing,) = await own.house.entities.standings("default")
        assert (standing.no, standing.holder) == (1, "")


async def test_handlers_that_keep_the_loop_one_after_the_other_are_not_one_that_is_stuck(tmp_path: Path) -> None:
    beats = threading.Semaphore(0)

    def slow(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source=source, entities=[Account])

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: HandlerContext) -> None:
            for _ in range(event.amount):
                assert beats.acquire(timeout=60)
            ctx.set(Account(event.to))

        return indexer

    async with rig("sqlite", tmp_path, slow, SystemClock()) as own:
        beat = own.house.entities.beat

        async def beating(*names: Any) -> bool:
            beats.release()
            return await beat(*names)

        own.tables.beat = beating
        log = [(n, Pay(f"a{n}", 40)) for n in range(1, 4)]  # 40 of 50 beats each
        async with own.running(Listed(log), index_handler_timeout_s=1, heartbeat_ms=20) as indexing:
            await indexing.run()
        (standing,) = await own.house.entities.standings("default")
        assert standing.no == 3


async def test_a_context_refuses_what_comes_after_its_handler_and_the_indexer_stops() -> None:
    late: list[asyncio.Task[None]] = []
    refused: list[BaseException] = []

    async def forgetful(event: Pay, ctx: HandlerContext) -> None:
        async def later() -> None:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            try:
                ctx.set(Account(event.to, 99))
            except ContextEnded as error:
                refused.append(error)

        if event.to == "late":
            late.append(asyncio.ensure_future(later()))
        else:
            for _ in range(5):
                await asyncio.sleep(0)
            ctx.set(Account(event.to, 1))

    async with handled(forgetful).simulation(index_batch_events_max=1) as simulation:
        simulation.feed(Pay("late"), Pay("late2"), Pay("a"))
        with pytest.raises(ContextEnded, match="event at 1"):
            await simulation.drain()
        assert len(refused) == 1
        assert simulation.row(Account, "late") is None


async def test_a_forgotten_await_is_named() -> None:
    async def forgetful(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(ctx.get(Account, event.to))  # type: ignore[arg-type]  # that is the fault

    with pytest.raises(HandlerFailed, match="got a coroutine"):
        await handled(forgetful).simulate([Pay("a")])


async def test_what_a_handler_got_can_t_be_changed_under_the_others() -> None:
    async def changing(event: Pay, ctx: HandlerContext) -> None:
        account = await ctx.get_or_create(Account, event.to)
        account.balance = 5

    with pytest.raises(HandlerFailed, match="immutable"):
        await handled(changing).simulate([Pay("a")])


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (lambda ctx: ctx.set(Account(FIVE)), "expected a string"),
        (lambda ctx: ctx.set(Account("a\0")), "NUL"),
        (lambda ctx: ctx.set("a"), "not an entity of this indexer"),
        (lambda ctx: ctx.delete(Account, 5), "expected a string"),
        (lambda ctx: ctx.get(Account, 5), "expected a string"),
        (lambda ctx: ctx.get(Account, []), "expected a string"),
        (lambda ctx: ctx.get(Pay, "a"), "its entities are: Account"),
        (lambda ctx: ctx.get_many(Account, ["a", None]), "has no id"),
        (lambda ctx: ctx.get_or_create(Account, "a", colour=1), "can't be created from"),
        (lambda ctx: ctx.require(Account, "a", "who is that?"), "who is that?"),
        (lambda ctx: ctx.where(Account, balance=1), "not indexed"),
        (lambda ctx: ctx.effect(len, "a"), "expected an effect of this indexer"),
        (lambda ctx: ctx.enqueue(len, "a"), "expected a task"),
    ],
    ids=[str(number) for number in range(13)],
)
async def test_what_a_handler_asks_wrongly_is_answered_with_how_to_ask(do: Any, words: str) -> None:
    async def asking(event: Pay, ctx: HandlerContext) -> None:
        made = do(ctx)
        if made is not None:
            await made

    with pytest.raises(HandlerFailed, match=words):
        await handled(asking).simulate([Pay("a")])


async def test_require_answers_what_is_there() -> None:
    async def requiring(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(Account(event.to, 3))
        assert (await ctx.require(Account, event.to)).balance == 3

    await handled(requiring).simulate([Pay("a")])
    assert issubclass(NotFound, Exception)


# -- effects


async def test_a_call_is_made_once_for_its_arguments_and_its_answer_outlives_the_process(tmp_path: Path) -> None:
    calls: list[int] = []

    def priced(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source=source, entities=[Account])

        @indexer.effect()
        def price(n: int) -> int:
            calls.append(n)
            return n * 10

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: HandlerContext) -> None:
            ctx.set(Account(event.to, await ctx.effect(price, event.amount % 3)))

        return indexer

    async with rig("sqlite", tmp_path, priced) as own:
        indexing = await own.run(Listed(pays(30)), index_batch_events_max=4)
        assert sorted(calls) == [0, 1, 2]
        assert await found(own, indexing) == {f"a{n % 7}": n % 3 * 10 for n in range(1, 31)}
        await own.run(Listed([*pays(30), (31, Pay("again", 2))]))
        assert sorted(calls) == [0, 1, 2]


async def test_calls_keep_to_their_limit_and_an_error_reaches_only_its_caller() -> None:
    clock = ManualClock()
    asked: list[tuple[int, int]] = []
    started = clock.now_us()
    app = Headrace("tests")
    indexer = app.indexer("bank", source=Listed(), entities=[Account])

    @indexer.effect(calls=2, per_s=1)
    async def rate(n: int) -> int:
        asked.append((n, (clock.now_us() - started) // 1_000_000))
        if n == 3:
            raise ConnectionError("not this one")
        return n

    @indexer.on("pay")
    async def on_pay(event: Pay, ctx: HandlerContext) -> None:
        try:
            ctx.set(Account(event.to, await ctx.effect(rate, event.amount)))
        except ConnectionError:
            ctx.set(Account(event.to, -1))

    from headrace.indexer_testing import Simulation

    simulation = await Simulation.start(indexer.definition, {}, clock)
    simulation.feed(*[Pay(f"a{n}", n) for n in range(1, 7)])
    draining = asyncio.ensure_future(simulation.drain())
    await clock.advance_async(10)
    await draining
    assert [row.balance for row in simulation.rows(Account)] == [1, 2, -1, 4, 5, 6]
    seconds = [second for _, second in sorted(asked)[:6]]
    assert max(seconds.count(second) for second in seconds) <= 2, "two a window, and the others in later ones"
    assert len({n for n, _ in asked}) == 6
    await simulation.close()


async def test_without_cache_a_call_is_made_again_in_each_batch() -> None:
    calls: list[int] = []
    indexer = Headrace("tests").indexer("bank", source=Listed(), entities=[Account])

    @indexer.effect(cache=False)
    async def now(n: int) -> int:
        calls.append(n)
        return len(calls)

    @indexer.on("pay")
    async def on_pay(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(Account(event.to, await ctx.effect(now, 1)))

    await indexer.simulate([Pay(f"a{n}") for n in range(6)], index_batch_events_max=3)
    assert len(calls) == 2


# -- preload and lookups


async def test_a_batch_of_unknown_rows_is_one_query_and_a_known_one_none() -> None:
    asked: list[int] = []
    indexer = bank(Headrace("tests"), Listed(), history=0)
    async with indexer.simulation() as simulation:
        load = simulation._tables.load

        async def counted(entity: Any, ids: Any) -> Any:
            asked.append(len(ids))
            return await load(entity, ids)

        simulation._tables.load = counted  # type: ignore[attr-defined]  # counts the queries
        simulation.feed(*[event for _, event in pays(1_000, accounts=400)])
        await simulation.drain()
        assert asked == [400]
        simulation.feed(*[event for _, event in pays(1_000, accounts=400)])
        await simulation.drain()
        assert asked == [400], "rows that are known, and rows known to be absent, are not asked for again"


async def test_running_ahead_writes_nothing_and_its_errors_are_not_looked_at() -> None:
    ahead: list[Any] = []

    async def handler(event: Pay, ctx: HandlerContext) -> None:
        account = await ctx.get(Account, event.to)
        for _ in range(0 if ctx.is_preload else 3):
            await asyncio.sleep(0)
        if ctx.is_preload:
            ahead.append(ctx.position)
            ctx.set(Account("from ahead"))
            ctx.delete(Account, "a1")
            ctx.log.info("nobody hears this")
            raise ValueError("only ahead")
        ctx.set(Account(event.to, 1 if account is None else account.balance + 1))

    simulation = await handled(handler).simulate([event for _, event in pays(20)])
    assert sorted(ahead) == list(range(2, 21))
    assert {row.id: row.balance for row in simulation.rows(Account)} == {
        f"a{n}": 3 if n and n < 7 else 2 for n in range(7)
    }


async def test_a_row_that_is_only_read_stays_in_memory_and_gets_no_history() -> None:
    async def reading(event: Pay, ctx: HandlerContext) -> None:
        await ctx.get(Account, "kept")
        if event.amount:
            ctx.set(Account(event.to, event.amount))

    async with handled(reading, history="all").simulation(index_batch_events_max=1) as simulation:
        simulation.feed(Pay("kept", 1), Pay("other", 1), Pay("kept", 0), Pay("other", 2))
        await simulation.drain()
        assert simulation.indexing._reads.queries_count == 1, "before it was there, and never again"
        assert [(row_id, no) for row_id, no, _ in await simulation.history(Account)] == [
            ("kept", 1),
            ("other", 2),
            ("other", 4),
        ]


async def test_get_or_create_sets_what_it_makes_and_leaves_what_is_there() -> None:
    async def making(event: Pay, ctx: HandlerContext) -> None:
        first = await ctx.get_or_create(Account, event.to, balance=event.amount, country="NZ")
        assert await ctx.get(Account, event.to) == first

    async with handled(making).simulation() as simulation:
        simulation.feed(Pay("a", 1), Pay("a", 2), Pay("b", 3))
        await simulation.drain()
        assert simulation.rows(Account) == [Account("a", 1, "NZ"), Account("b", 3, "NZ")]


async def test_questions_of_one_field_at_once_are_one_query_and_ranges_each_their_own() -> None:
    asked: list[Any] = []

    async def handler(event: Pay, ctx: HandlerContext) -> None:
        found = await asyncio.gather(
            ctx.where(Account, country="NZ"),
            ctx.where(Account, country=any_of("AU", "NZ")),
            ctx.where(Account, country=any_of("FJ")),
            ctx.where(Account, country=at_least("V")),
            ctx.where(Account, country=at_least("W")),
        )
        assert [[row.id for row in rows] for rows in found] == [["n"], ["a", "n"], ["f"], ["v", "w"], ["w"]]
        assert [row.id for row in await ctx.where(Account, country=any_of("NZ", "FJ"))] == ["f", "n"]
        ctx.set(Account("n", 0, "FJ"))
        ctx.set(Account("late", 0, "NZ"))
        assert [row.id for row in await ctx.where(Account, country="NZ")] == ["late"]

    stored = [
        Account("a", 0, "AU"),
        Account("f", 0, "FJ"),
        Account("n", 0, "NZ"),
        Account("v", 0, "VU"),
        Account("w", 0, "WS"),
    ]

    async with handled(handler, preload=False).simulation() as simulation:

        async def find(entity: Any, conditions: Any) -> Any:
            (condition,) = conditions
            asked.append(sorted(condition.values) if condition.values else condition.range.least)
            return [row for row in stored if condition.holds(row)]

        simulation._tables.find = find  # type: ignore[attr-defined]  # counts the queries
        simulation.feed(Pay("x"))
        await simulation.drain()
    assert sorted(map(str, asked)) == ["V", "W", "['AU', 'FJ', 'NZ']"], "what is known is not asked for again"


async def test_gets_of_one_handler_at_once_are_one_query() -> None:
    asked: list[Any] = []

    async def handler(event: Pay, ctx: HandlerContext) -> None:
        await asyncio.gather(*[ctx.get(Account, f"x{n}") for n in range(5)], ctx.get(Account, "x1"))
        assert await ctx.get_many(Account, ["x0", "y", "x0"]) == [None, None, None]
        assert (await ctx.get(Account, "z1"), await ctx.get(Account, "z2")) == (None, None)
        await asyncio.gather(ctx.get(Account, "now"), later(ctx))

    async def later(ctx: HandlerContext) -> None:
        for _ in range(5):
            await asyncio.sleep(0)
        await ctx.get(Account, "then")

    async with handled(handler, preload=False).simulation() as simulation:

        async def load(entity: Any, ids: Any) -> Any:
            asked.append(sorted(ids))
            return []

        simulation._tables.load = load  # type: ignore[attr-defined]  # counts the queries
        simulation.feed(Pay("a"))
        await simulation.drain()
    assert asked == [["x0", "x1", "x2", "x3", "x4"], ["y"], ["z1"], ["z2"], ["now"], ["then"]]


@EVERY
async def test_where_with_ten_thousand_values_asks_for_them_together(name: str, tmp_path: Path) -> None:
    def spread(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source=source, entities=[Account])

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: HandlerContext) -> None:
            same = await ctx.where(Account, country=event.country)
            ctx.set(Account(event.to, len(same) + 1, event.country))

        return indexer

    count = 3_000
    log = [(n, Pay(f"a{n}", 0, f"c{n % count}")) for n in range(2 * count)]
    async with rig(name, tmp_path, spread) as own:
        await own.run(Listed(log[:count], piece=count), index_batch_events_max=count)
        async with own.running(Listed(log, piece=count), index_batch_events_max=count) as indexing:
            await indexing.run()
            assert indexing._reads.queries_count <= 6, "not one a value"
            rows = await own.house.entities.find(indexing.plan.entities[0], ())
            assert sorted(row.balance for row in rows) == [1] * count + [2] * count


# -- simulate


async def test_simulate_holds_and_fails_commits_and_goes_back() -> None:
    indexer = bank(Headrace("tests"), Listed())
    async with indexer.simulation(index_batch_events_max=2) as simulation:
        simulation.feed(*[event for _, event in pays(6)])
        simulation.hold_commits()
        draining = asyncio.ensure_future(simulation.drain())
        for _ in range(50):
            await asyncio.sleep(0)
        assert simulation.rows(Account) == []
        simulation.release_commits()
        await draining
        assert len(simulation.rows(Account)) == 6
        await simulation.rewind(2)
        simulation.feed(Pay("new", 7))
        await simulation.drain()
        assert {row.id: row.balance for row in simulation.rows(Account)} == {"a1": 1, "a2": 2, "new": 7}
        assert [no for _, no, _ in await simulation.history(Account)] == [1, 2, 3]
        simulation.fail_commits(StoreUnavailable("once"))
        simulation.feed(Pay("new", 1))
        await simulation.drain()
        assert simulation.row(Account, "new") == Account("new", 8, "NZ")
        broken = StoreBroken("for good")
        simulation.fail_commits(broken)
        simulation.feed(Pay("new", 1))
        with pytest.raises(StoreBroken) as raised:
            await simulation.drain()
        assert raised.value is broken
        assert simulation.row(Account, "new") == Account("new", 8, "NZ")
        with pytest.raises(InvalidInput, match="is not an entity"):
            simulation.rows(Entity)


async def test_an_answer_of_none_is_an_answer() -> None:
    calls: list[int] = []
    indexer = Headrace("tests").indexer("bank", source=Listed(), entities=[Account])

    @indexer.effect()
    async def nothing(n: int) -> None:
        calls.append(n)

    @indexer.on("pay")
    async def on_pay(event: Pay, ctx: HandlerContext) -> None:
        assert await ctx.effect(nothing, 1) is None
        ctx.set(Account(event.to))

    await indexer.simulate([Pay(f"a{n}") for n in range(6)], index_batch_events_max=2)
    assert calls == [1]


async def test_an_answer_that_no_longer_fits_is_asked_for_again(tmp_path: Path) -> None:
    def numbered(kind: type[Any]) -> Any:
        def made(app: Headrace, source: Any) -> Indexer:
            indexer = app.indexer("bank", source=source, entities=[Account])

            async def asked(n: int) -> Any:
                return kind(n)

            asked.__annotations__["return"] = kind
            effect = indexer.effect()(asked)

            @indexer.on("pay")
            async def on_pay(event: Pay, ctx: HandlerContext) -> None:
                ctx.set(Account(event.to, len(repr(await ctx.effect(effect, 5)))))

            return indexer

        return made

    async with rig("sqlite", tmp_path, numbered(int)) as own:
        await own.run(Listed([(1, Pay("number"))]))
        own._make = numbered(str)
        indexing = await own.run(Listed([(1, Pay("number")), (2, Pay("text"))]))
        assert await found(own, indexing) == {"number": 1, "text": 3}
