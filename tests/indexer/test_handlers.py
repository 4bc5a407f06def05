"""Handlers: their calls of the context, their failures and timeouts, effects, and preloading."""

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
from tests.indexer.bank_example import (
    EACH_STORE,
    NOT_A_STRING,
    Account,
    Pay,
    account_indexer,
    bank_indexer,
    payments,
    stored_balances,
)
from tests.indexer.indexer_rig import ListSource, open_rig

# -- handlers that fail


async def test_a_handler_that_raises_stops_the_indexer_and_reports_its_position() -> None:
    async def failing(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(Account(event.to))
        if event.to == "bad":
            raise ValueError("no such account")

    indexer = account_indexer(failing)
    with pytest.raises(HandlerFailed, match="event at 3.*no such account") as raised:
        await indexer.simulate([Pay("a"), Pay("b"), Pay("bad"), Pay("c")])
    assert isinstance(raised.value.__cause__, ValueError)
    assert raised.value.ids["position"] == 3


async def test_a_handler_that_hangs_is_ended_by_its_timeout() -> None:
    async def hanging(event: Pay, ctx: HandlerContext) -> None:
        await asyncio.Event().wait()

    clock = ManualClock()
    from headrace.indexer_testing import Simulation

    simulation = await Simulation.start(account_indexer(hanging).definition, {"index_handler_timeout_s": 5}, clock)
    simulation.feed(Pay("a"))
    draining = asyncio.ensure_future(simulation.drain())
    await clock.advance_async(11)
    with pytest.raises(HandlerFailed, match="has not ended in 5 s"):
        await draining
    await simulation.close()


async def test_a_handler_that_blocks_the_loop_loses_the_lease_and_is_reported(tmp_path: Path) -> None:
    released = threading.Event()

    def blocking(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source=source, entities=[Account])

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: HandlerContext) -> None:
            if event.to == "stuck":
                assert released.wait(60), "expected the lease to be released while the loop is blocked"
            ctx.set(Account(event.to))

        return indexer

    log = [(1, Pay("a")), (2, Pay("stuck")), (3, Pay("b"))]
    async with open_rig("sqlite", tmp_path, blocking, SystemClock()) as rig:
        leave = rig.stores.entities.leave

        async def leaving(*names: Any) -> None:
            await leave(*names)
            released.set()

        rig.tables.leave = leaving
        with pytest.raises(HandlerFailed, match="event at 2 has not ended in 1 s"):
            async with rig.running(
                ListSource(log), index_batch_events_max=1, index_handler_timeout_s=1, heartbeat_ms=100
            ) as indexing:
                await indexing.run()
        (state,) = await rig.stores.entities.indexer_states("default")
        assert (state.no, state.holder) == (1, "")


async def test_a_series_of_slow_handlers_is_not_taken_for_a_stuck_handler(tmp_path: Path) -> None:
    beats = threading.Semaphore(0)

    def slow(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source=source, entities=[Account])

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: HandlerContext) -> None:
            for _ in range(event.amount):
                assert beats.acquire(timeout=60)
            ctx.set(Account(event.to))

        return indexer

    async with open_rig("sqlite", tmp_path, slow, SystemClock()) as rig:
        beat = rig.stores.entities.beat

        async def beating(*names: Any) -> bool:
            beats.release()
            return await beat(*names)

        rig.tables.beat = beating
        log = [(n, Pay(f"a{n}", 40)) for n in range(1, 4)]  # 40 of the 50 heartbeats that the timeout allows
        async with rig.running(ListSource(log), index_handler_timeout_s=1, heartbeat_ms=20) as indexing:
            await indexing.run()
        (state,) = await rig.stores.entities.indexer_states("default")
        assert state.no == 3


async def test_a_context_refuses_calls_after_its_handler_ended_and_the_indexer_stops() -> None:
    late: list[asyncio.Task[None]] = []
    refused: list[BaseException] = []

    async def faulty(event: Pay, ctx: HandlerContext) -> None:
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

    async with account_indexer(faulty).simulation(index_batch_events_max=1) as simulation:
        simulation.feed(Pay("late"), Pay("late2"), Pay("a"))
        with pytest.raises(ContextEnded, match="event at 1"):
            await simulation.drain()
        assert len(refused) == 1
        assert simulation.row(Account, "late") is None


async def test_a_missing_await_is_reported() -> None:
    async def faulty(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(ctx.get(Account, event.to))  # type: ignore[arg-type]  # that is the fault

    with pytest.raises(HandlerFailed, match="got a coroutine"):
        await account_indexer(faulty).simulate([Pay("a")])


async def test_an_entity_passed_to_a_handler_is_immutable() -> None:
    async def changing(event: Pay, ctx: HandlerContext) -> None:
        account = await ctx.get_or_create(Account, event.to)
        account.balance = 5

    with pytest.raises(HandlerFailed, match="immutable"):
        await account_indexer(changing).simulate([Pay("a")])


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (lambda ctx: ctx.set(Account(NOT_A_STRING)), "expected a string"),
        (lambda ctx: ctx.set(Account("a\0")), "NUL"),
        (lambda ctx: ctx.set("a"), "not an entity of this indexer"),
        (lambda ctx: ctx.delete(Account, 5), "expected a string"),
        (lambda ctx: ctx.get(Account, 5), "expected a string"),
        (lambda ctx: ctx.get(Account, []), "expected a string"),
        (lambda ctx: ctx.get(Pay, "a"), "its entities are: Account"),
        (lambda ctx: ctx.get_many(Account, ["a", None]), "has no id"),
        (lambda ctx: ctx.get_or_create(Account, "a", colour=1), "can't be created from"),
        (lambda ctx: ctx.require(Account, "a", "no such account"), "no such account"),
        (lambda ctx: ctx.where(Account, balance=1), "not indexed"),
        (lambda ctx: ctx.effect(len, "a"), "expected an effect of this indexer"),
        (lambda ctx: ctx.enqueue(len, "a"), "expected a task"),
    ],
    ids=[str(number) for number in range(13)],
)
async def test_an_invalid_call_of_a_handler_is_refused_with_a_hint(do: Any, words: str) -> None:
    async def invalid_call(event: Pay, ctx: HandlerContext) -> None:
        awaitable = do(ctx)
        if awaitable is not None:
            await awaitable

    with pytest.raises(HandlerFailed, match=words):
        await account_indexer(invalid_call).simulate([Pay("a")])


app_of_tasks = Headrace("tasks")


@app_of_tasks.task
async def notify(task: str, amount: int) -> None: ...


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (lambda ctx: ctx.enqueue(notify, "a"), "missing a required argument: 'amount'"),
        (lambda ctx: ctx.enqueue(notify, "a", ammount=1), "unexpected keyword argument 'ammount'|missing a required"),
        (lambda ctx: ctx.enqueue(notify, "a", "many"), "the arguments don't fit task notify: .*amount"),
        (lambda ctx: ctx.enqueue(notify.options(priority=1), "a", 1, 2), "too many positional arguments"),
    ],
)
async def test_a_run_is_enqueued_only_with_arguments_that_fit_its_task(do: Any, words: str) -> None:
    async def enqueueing(event: Pay, ctx: HandlerContext) -> None:
        do(ctx)

    with pytest.raises(HandlerFailed, match=words):
        await account_indexer(enqueueing).simulate([Pay("a")])


async def test_a_task_with_a_parameter_called_task_is_enqueued_by_name() -> None:
    async def enqueueing(event: Pay, ctx: HandlerContext) -> None:
        ctx.enqueue(notify, task=event.to, amount=1)

    await account_indexer(enqueueing).simulate([Pay("a")])


async def test_require_returns_an_existing_row() -> None:
    async def requiring(event: Pay, ctx: HandlerContext) -> None:
        ctx.set(Account(event.to, 3))
        assert (await ctx.require(Account, event.to)).balance == 3

    await account_indexer(requiring).simulate([Pay("a")])
    assert issubclass(NotFound, Exception)


# -- effects


async def test_an_effect_is_called_once_per_arguments_and_its_result_survives_a_restart(tmp_path: Path) -> None:
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

    async with open_rig("sqlite", tmp_path, priced) as rig:
        indexing = await rig.run(ListSource(payments(30)), index_batch_events_max=4)
        assert sorted(calls) == [0, 1, 2]
        assert await stored_balances(rig, indexing) == {f"a{n % 7}": n % 3 * 10 for n in range(1, 31)}
        await rig.run(ListSource([*payments(30), (31, Pay("again", 2))]))
        assert sorted(calls) == [0, 1, 2]


async def test_effect_calls_respect_their_limit_and_an_error_reaches_only_its_caller() -> None:
    clock = ManualClock()
    calls: list[tuple[int, int]] = []
    started = clock.now_us()
    app = Headrace("tests")
    indexer = app.indexer("bank", source=ListSource(), entities=[Account])

    @indexer.effect(calls=2, per_s=1)
    async def rate(n: int) -> int:
        calls.append((n, (clock.now_us() - started) // 1_000_000))
        if n == 3:
            raise ConnectionError("refused call")
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
    seconds = [second for _, second in sorted(calls)[:6]]
    assert max(seconds.count(second) for second in seconds) <= 2, "expected two calls a window"
    assert len({n for n, _ in calls}) == 6
    await simulation.close()


async def test_an_uncached_effect_is_called_again_in_each_batch() -> None:
    calls: list[int] = []
    indexer = Headrace("tests").indexer("bank", source=ListSource(), entities=[Account])

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


async def test_a_batch_of_uncached_rows_takes_a_single_query_and_a_cached_batch_takes_none() -> None:
    queries: list[int] = []
    indexer = bank_indexer(Headrace("tests"), ListSource(), history=0)
    async with indexer.simulation() as simulation:
        load = simulation._tables.load

        async def counted(entity: Any, ids: Any) -> Any:
            queries.append(len(ids))
            return await load(entity, ids)

        simulation._tables.load = counted  # type: ignore[attr-defined]  # counts the queries
        simulation.feed(*[event for _, event in payments(1_000, accounts=400)])
        await simulation.drain()
        assert queries == [400]
        simulation.feed(*[event for _, event in payments(1_000, accounts=400)])
        await simulation.drain()
        assert queries == [400], "expected no query for rows cached as present or absent"


async def test_preloading_writes_nothing_and_its_errors_are_ignored() -> None:
    preloaded: list[Any] = []

    async def handler(event: Pay, ctx: HandlerContext) -> None:
        account = await ctx.get(Account, event.to)
        for _ in range(0 if ctx.is_preload else 3):
            await asyncio.sleep(0)
        if ctx.is_preload:
            preloaded.append(ctx.position)
            ctx.set(Account("preloaded"))
            ctx.delete(Account, "a1")
            ctx.log.info("log line of a preload")
            raise ValueError("only in the preload")
        ctx.set(Account(event.to, 1 if account is None else account.balance + 1))

    simulation = await account_indexer(handler).simulate([event for _, event in payments(20)])
    assert sorted(preloaded) == list(range(2, 21))
    assert {row.id: row.balance for row in simulation.rows(Account)} == {
        f"a{n}": 3 if n and n < 7 else 2 for n in range(7)
    }


async def test_a_row_that_is_only_read_stays_in_memory_and_gets_no_history() -> None:
    async def reading(event: Pay, ctx: HandlerContext) -> None:
        await ctx.get(Account, "cached")
        if event.amount:
            ctx.set(Account(event.to, event.amount))

    async with account_indexer(reading, history="all").simulation(index_batch_events_max=1) as simulation:
        simulation.feed(Pay("cached", 1), Pay("other", 1), Pay("cached", 0), Pay("other", 2))
        await simulation.drain()
        assert simulation.indexing._reads.queries_count == 1, "expected a single query, before the row existed"
        assert [(row_id, no) for row_id, no, _ in await simulation.history(Account)] == [
            ("cached", 1),
            ("other", 2),
            ("other", 4),
        ]


async def test_get_or_create_stores_a_new_row_and_leaves_an_existing_row_unchanged() -> None:
    async def making(event: Pay, ctx: HandlerContext) -> None:
        first = await ctx.get_or_create(Account, event.to, balance=event.amount, country="NZ")
        assert await ctx.get(Account, event.to) == first

    async with account_indexer(making).simulation() as simulation:
        simulation.feed(Pay("a", 1), Pay("a", 2), Pay("b", 3))
        await simulation.drain()
        assert simulation.rows(Account) == [Account("a", 1, "NZ"), Account("b", 3, "NZ")]


async def test_concurrent_equality_conditions_share_a_query_and_ranges_do_not() -> None:
    queries: list[Any] = []

    async def handler(event: Pay, ctx: HandlerContext) -> None:
        results = await asyncio.gather(
            ctx.where(Account, country="NZ"),
            ctx.where(Account, country=any_of("AU", "NZ")),
            ctx.where(Account, country=any_of("FJ")),
            ctx.where(Account, country=at_least("V")),
            ctx.where(Account, country=at_least("W")),
        )
        assert [[row.id for row in rows] for rows in results] == [["n"], ["a", "n"], ["f"], ["v", "w"], ["w"]]
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

    async with account_indexer(handler, preload=False).simulation() as simulation:

        async def find(entity: Any, conditions: Any) -> Any:
            (condition,) = conditions
            queries.append(sorted(condition.values) if condition.values else condition.range.least)
            return [row for row in stored if condition.holds(row)]

        simulation._tables.find = find  # type: ignore[attr-defined]  # counts the queries
        simulation.feed(Pay("x"))
        await simulation.drain()
    assert sorted(map(str, queries)) == ["V", "W", "['AU', 'FJ', 'NZ']"], "expected no query for values in memory"


async def test_concurrent_gets_of_a_handler_share_a_query() -> None:
    queries: list[Any] = []

    async def handler(event: Pay, ctx: HandlerContext) -> None:
        await asyncio.gather(*[ctx.get(Account, f"x{n}") for n in range(5)], ctx.get(Account, "x1"))
        assert await ctx.get_many(Account, ["x0", "y", "x0"]) == [None, None, None]
        assert (await ctx.get(Account, "z1"), await ctx.get(Account, "z2")) == (None, None)
        await asyncio.gather(ctx.get(Account, "now"), later(ctx))

    async def later(ctx: HandlerContext) -> None:
        for _ in range(5):
            await asyncio.sleep(0)
        await ctx.get(Account, "then")

    async with account_indexer(handler, preload=False).simulation() as simulation:

        async def load(entity: Any, ids: Any) -> Any:
            queries.append(sorted(ids))
            return []

        simulation._tables.load = load  # type: ignore[attr-defined]  # counts the queries
        simulation.feed(Pay("a"))
        await simulation.drain()
    assert queries == [["x0", "x1", "x2", "x3", "x4"], ["y"], ["z1"], ["z2"], ["now"], ["then"]]


@EACH_STORE
async def test_where_with_thousands_of_values_queries_them_together(name: str, tmp_path: Path) -> None:
    def spread(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source=source, entities=[Account])

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: HandlerContext) -> None:
            same = await ctx.where(Account, country=event.country)
            ctx.set(Account(event.to, len(same) + 1, event.country))

        return indexer

    count = 3_000
    log = [(n, Pay(f"a{n}", 0, f"c{n % count}")) for n in range(2 * count)]
    async with open_rig(name, tmp_path, spread) as rig:
        await rig.run(ListSource(log[:count], piece=count), index_batch_events_max=count)
        async with rig.running(ListSource(log, piece=count), index_batch_events_max=count) as indexing:
            await indexing.run()
            assert indexing._reads.queries_count <= 6, "expected no query per value"
            rows = await rig.stores.entities.find(indexing.plan.entities[0], ())
            assert sorted(row.balance for row in rows) == [1] * count + [2] * count


# -- simulate


async def test_a_simulation_can_hold_and_fail_commits_and_roll_back() -> None:
    indexer = bank_indexer(Headrace("tests"), ListSource())
    async with indexer.simulation(index_batch_events_max=2) as simulation:
        simulation.feed(*[event for _, event in payments(6)])
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


async def test_an_effect_result_of_none_is_cached() -> None:
    calls: list[int] = []
    indexer = Headrace("tests").indexer("bank", source=ListSource(), entities=[Account])

    @indexer.effect()
    async def nothing(n: int) -> None:
        calls.append(n)

    @indexer.on("pay")
    async def on_pay(event: Pay, ctx: HandlerContext) -> None:
        assert await ctx.effect(nothing, 1) is None
        ctx.set(Account(event.to))

    await indexer.simulate([Pay(f"a{n}") for n in range(6)], index_batch_events_max=2)
    assert calls == [1]


async def test_an_effect_whose_return_type_changed_is_called_again(tmp_path: Path) -> None:
    def numbered(kind: type[Any]) -> Any:
        def awaitable(app: Headrace, source: Any) -> Indexer:
            indexer = app.indexer("bank", source=source, entities=[Account])

            async def convert(n: int) -> Any:
                return kind(n)

            convert.__annotations__["return"] = kind
            effect = indexer.effect()(convert)

            @indexer.on("pay")
            async def on_pay(event: Pay, ctx: HandlerContext) -> None:
                ctx.set(Account(event.to, len(repr(await ctx.effect(effect, 5)))))

            return indexer

        return awaitable

    async with open_rig("sqlite", tmp_path, numbered(int)) as rig:
        await rig.run(ListSource([(1, Pay("number"))]))
        rig._make = numbered(str)
        indexing = await rig.run(ListSource([(1, Pay("number")), (2, Pay("text"))]))
        assert await stored_balances(rig, indexing) == {"number": 1, "text": 3}
