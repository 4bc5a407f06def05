"""A running indexer: what it promises when commits stall and fail, handlers misbehave, sources go back, and time passes."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace import Headrace
from headrace.core.sequencer import Arrived, Rewind
from headrace.foundation.errors import InvalidInput, InvalidSetting, NotFound, StoreBroken, StoreUnavailable
from headrace.indexer import (
    Context,
    Entity,
    HandlerFailed,
    HistoryGone,
    Indexed,
    Indexer,
    IndexerHeld,
    LeaseLost,
    any_of,
    at_least,
)
from headrace.runtime.clock import ManualClock
from headrace.runtime.handling import LateUse
from headrace.runtime.leasing import Holder
from tests.indexer.houses import HOUSES
from tests.indexer.programs import Op, Ops, make
from tests.indexer.rig import AFTER, BEFORE, Crash, Left, Listed, Rig, Unsteady, rig

EVERY = pytest.mark.parametrize("name", list(HOUSES))
DATABASES = pytest.mark.parametrize("name", ["sqlite", "postgres"])


class Account(Entity):
    id: str
    balance: int = 0
    country: Indexed[str] = ""


FIVE: Any = 5


class Pay(msgspec.Struct, tag_field="type", tag="pay"):
    to: str
    amount: int = 1
    country: str = "NZ"


def bank(app: Headrace, source: Any, **options: Any) -> Indexer:
    """Each payment adds to an account."""
    indexer = app.indexer("bank", source=source, entities=[Account], **({"history": "all"} | options))

    @indexer.on("pay")
    async def on_pay(event: Pay, ctx: Context) -> None:
        account = await ctx.get_or_create(Account, event.to, country=event.country)
        ctx.set(msgspec.structs.replace(account, balance=account.balance + event.amount))

    return indexer


def handled(handler: Any, **options: Any) -> Indexer:
    """An indexer of one handler over accounts, for `simulate`."""
    indexer = Headrace("tests").indexer("bank", source=Listed(), entities=[Account], **options)
    indexer.on("pay")(handler)
    return indexer


def pays(count: int, *, accounts: int = 7, first: int = 1) -> list[tuple[int, Any]]:
    return [(n, Pay(f"a{n % accounts}", n)) for n in range(first, first + count)]


def balances(count: int, *, accounts: int = 7) -> dict[str, int]:
    found: dict[str, int] = {}
    for n, event in pays(count, accounts=accounts):
        found[event.to] = found.get(event.to, 0) + n
    return found


async def found(own: Rig, indexing: Any) -> dict[str, int]:
    rows = await own.house.entities.find(indexing.plan.entities[0], ())
    return {row.id: row.balance for row in rows}


# -- commits beside compute


@EVERY
async def test_handlers_go_on_while_a_commit_is_frozen_and_stop_at_the_depth(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        own.tables.gate = gate = asyncio.Event()
        async with own.running(Listed(pays(100)), index_depth_max=3, index_batch_events_max=10) as indexing:
            running = asyncio.ensure_future(indexing.run())
            while indexing.staging.pending_count < 3:
                await asyncio.sleep(0)
            for _ in range(50):
                await asyncio.sleep(0)
            assert indexing.progress.events_count == 30, "three batches wait, and no more are begun"
            assert await found(own, indexing) == {}, "nothing of them is in SQL"
            _release(indexing, gate)
            told = await running
            assert (told.events_count, told.committed_no) == (100, 100)
            assert await found(own, indexing) == balances(100)
        assert len(own.tables.commits) < 10, "what waited went into one commit"


def _release(indexing: Any, gate: asyncio.Event) -> None:
    indexing._committer._call(gate.set)


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

    async def reading(event: Pay, ctx: Context) -> None:
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


@EVERY
async def test_a_batch_larger_than_memory_is_cut_and_nothing_deadlocks(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        indexing = await own.run(Listed(pays(20_000, accounts=5_000)), index_memory_mib=1, index_depth_max=2)
        assert await found(own, indexing) == balances(20_000, accounts=5_000)
        assert len(own.tables.commits) > 3
        assert indexing.staging.bytes < 2 * 2**20


@EVERY
async def test_a_rollback_larger_than_memory_restores_everything(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        async with own.running(Listed(pays(12_000, accounts=4_000)), index_memory_mib=1) as indexing:
            await indexing.run()
            standing = await indexing.rollback(5_000)
            assert (standing.no, await found(own, indexing)) == (5_000, balances(5_000, accounts=4_000))
            await indexing.run()
            assert await found(own, indexing) == balances(12_000, accounts=4_000)


async def test_types_that_are_only_written_leave_memory_with_their_commit() -> None:
    async def writing(event: Pay, ctx: Context) -> None:
        ctx.set(Account(f"{event.to}{ctx.position}"))

    async with handled(writing).simulation(index_batch_events_max=10) as simulation:
        simulation.feed(*[Pay("x") for _ in range(100)])
        await simulation.drain()
        assert len(simulation.rows(Account)) == 100
        assert simulation.indexing.staging.tables[0].rows == {}


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
            _release(indexing, gate)
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


# -- one process an indexer


@EVERY
async def test_a_second_process_hears_who_holds_the_indexer_or_waits(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        async with own.running(Listed(pays(5))):
            second = own.indexing(Listed(pays(5)))
            with pytest.raises(IndexerHeld, match=f"process {Holder.here().pid}"):
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
        gone = Holder(host=Holder.here().host, pid=ended.pid)
        await own.house.entities.take(standing, msgspec.json.encode(gone).decode())
        await first.start(wait=False)
        await first.close()


# -- handlers that misbehave


async def test_a_handler_that_raises_stops_the_indexer_and_says_where() -> None:
    async def failing(event: Pay, ctx: Context) -> None:
        ctx.set(Account(event.to))
        if event.to == "bad":
            raise ValueError("no such account")

    indexer = handled(failing)
    with pytest.raises(HandlerFailed, match="event at 3.*no such account") as raised:
        await indexer.simulate([Pay("a"), Pay("b"), Pay("bad"), Pay("c")])
    assert isinstance(raised.value.__cause__, ValueError)
    assert raised.value.ids["position"] == 3


async def test_a_handler_that_hangs_is_ended_by_its_bound() -> None:
    async def hanging(event: Pay, ctx: Context) -> None:
        await asyncio.Event().wait()

    clock = ManualClock()
    from headrace.simulating import Simulation

    simulation = await Simulation.made(handled(hanging).definition, {"index_handler_timeout_s": 5}, clock)
    simulation.feed(Pay("a"))
    draining = asyncio.ensure_future(simulation.drain())
    await clock.advance_async(11)
    with pytest.raises(HandlerFailed, match="has not ended in 5 s"):
        await draining
    await simulation.close()


async def test_a_context_refuses_what_comes_after_its_handler_and_the_indexer_stops() -> None:
    late: list[asyncio.Task[None]] = []
    refused: list[BaseException] = []

    async def forgetful(event: Pay, ctx: Context) -> None:
        async def later() -> None:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            try:
                ctx.set(Account(event.to, 99))
            except LateUse as error:
                refused.append(error)

        if event.to == "late":
            late.append(asyncio.ensure_future(later()))
        else:
            for _ in range(5):
                await asyncio.sleep(0)
            ctx.set(Account(event.to, 1))

    async with handled(forgetful).simulation(index_batch_events_max=1) as simulation:
        simulation.feed(Pay("late"), Pay("late2"), Pay("a"))
        with pytest.raises(LateUse, match="event at 1"):
            await simulation.drain()
        assert len(refused) == 1
        assert simulation.row(Account, "late") is None


async def test_a_forgotten_await_is_named() -> None:
    async def forgetful(event: Pay, ctx: Context) -> None:
        ctx.set(ctx.get(Account, event.to))  # type: ignore[arg-type]  # that is the fault

    with pytest.raises(HandlerFailed, match="still to be awaited"):
        await handled(forgetful).simulate([Pay("a")])


async def test_what_a_handler_got_can_t_be_changed_under_the_others() -> None:
    async def changing(event: Pay, ctx: Context) -> None:
        account = await ctx.get_or_create(Account, event.to)
        account.balance = 5

    with pytest.raises(HandlerFailed, match="immutable"):
        await handled(changing).simulate([Pay("a")])


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (lambda ctx: ctx.set(Account(FIVE)), "a text is wanted"),
        (lambda ctx: ctx.set(Account("a\0")), "NUL"),
        (lambda ctx: ctx.set("a"), "no entity of this indexer"),
        (lambda ctx: ctx.delete(Account, 5), "a text is wanted"),
        (lambda ctx: ctx.get(Account, 5), "a text is wanted"),
        (lambda ctx: ctx.get(Account, []), "a text is wanted"),
        (lambda ctx: ctx.get(Pay, "a"), "its entities are: Account"),
        (lambda ctx: ctx.get_many(Account, ["a", None]), "has no id"),
        (lambda ctx: ctx.get_or_create(Account, "a", colour=1), "can't be made of"),
        (lambda ctx: ctx.require(Account, "a", "who is that?"), "who is that?"),
        (lambda ctx: ctx.where(Account, balance=1), "not indexed"),
        (lambda ctx: ctx.effect(len, "a"), "is no effect of this indexer"),
        (lambda ctx: ctx.enqueue(len, "a"), "is no task"),
    ],
    ids=[str(number) for number in range(13)],
)
async def test_what_a_handler_asks_wrongly_is_answered_with_how_to_ask(do: Any, words: str) -> None:
    async def asking(event: Pay, ctx: Context) -> None:
        made = do(ctx)
        if made is not None:
            await made

    with pytest.raises(HandlerFailed, match=words):
        await handled(asking).simulate([Pay("a")])


async def test_require_answers_what_is_there() -> None:
    async def requiring(event: Pay, ctx: Context) -> None:
        ctx.set(Account(event.to, 3))
        assert (await ctx.require(Account, event.to)).balance == 3

    await handled(requiring).simulate([Pay("a")])
    assert issubclass(NotFound, Exception)


# -- events that are not as they should be


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([b'{"type":"pay","to":"a"}', b'{"type":"pay"'], "event at 2 can't be read"),
        ([b'{"type":"pay","to":5}'], "Expected `str`"),
        ([b'{"type":"fly"}'], "of the kind 'fly'"),
        ([b'{"to":"a"}'], "event at 1 can't be read: .*`type`"),
        ([b"\xff"], "event at 1 can't be read"),
        ([b"[" * 100_000], "event at 1 can't be read"),
        ([{"type": "pay", "to": "a"}, {"type": "pay", "to": None}], "event at 2 can't be read"),
        ([{"to": "a"}], "without a 'type'"),
        ([7], "which no handler takes"),
    ],
    ids=[str(number) for number in range(9)],
)
async def test_an_event_that_can_t_be_handled_is_named_by_its_position(events: list[Any], words: str) -> None:
    async def handler(event: Pay, ctx: Context) -> None:
        ctx.set(Account(event.to))

    with pytest.raises(InvalidInput, match=words):
        await handled(handler).simulate(events)


async def test_unknown_kinds_can_be_passed_over_and_still_count() -> None:
    async def handler(event: Pay, ctx: Context) -> None:
        ctx.set(Account(event.to, int(ctx.position)))

    simulation = await handled(handler, unknown="skip").simulate(
        [b'{"type":"fly"}', Pay("a"), {"type": "swim"}, {"x": 1}]
    )
    assert simulation.rows(Account) == [Account("a", 2)]
    assert simulation.indexing.progress.committed_no == 4


@pytest.mark.parametrize(
    ("positions", "words"),
    [([1, 2, 2], "comes twice"), ([1, 3, 2], "comes after the one at 3"), ([1, "2"], "one of them in one source"),
     ([1, 2.5], "whole number or a text"), ([2**63], "64 bits"), (["a" * 501], "1 to 500 characters"), ([""], "1 to 500")],
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

    async def handler(event: Pay, ctx: Context) -> None: ...

    def plain(event: Pay, ctx: Context) -> None: ...

    async def alone(event: Pay) -> None: ...

    for make_wrong, words in (
        (lambda: app.indexer("Bad Name", source=Listed(), entities=[Account]), "can't name an indexer"),
        (lambda: app.indexer("x", source=5, entities=[Account]), "no source of events"),  # type: ignore[arg-type]  # that is the fault
        (lambda: app.indexer("x", source={}, entities=[Account]), "has no source"),
        (lambda: app.indexer("x", source=Listed(), entities=[Account], history=-1), "history is"),
        (lambda: app.indexer("x", source=Listed(), entities=[Account], where="now"), "where is"),  # type: ignore[arg-type]  # that is the fault
        (lambda: app.indexer("x", source=Listed(), entities=[Account], unknown="hm"), "refused or skipped"),  # type: ignore[arg-type]  # that is the fault
        (lambda: handled(plain), "no async function"),
        (lambda: handled(alone), "takes 1 parameters"),
        (lambda: handled(handler).on("pay")(handler), "two handlers"),
        (lambda: handled(handler).on("other")(handler), "whose tag is 'pay'"),
        (lambda: handled(handler).effect(calls=0)(handler), "at least one"),
    ):
        with pytest.raises(InvalidSetting, match=words):
            make_wrong()


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
        async def on_pay(event: Pay, ctx: Context) -> None:
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
    async def on_pay(event: Pay, ctx: Context) -> None:
        try:
            ctx.set(Account(event.to, await ctx.effect(rate, event.amount)))
        except ConnectionError:
            ctx.set(Account(event.to, -1))

    from headrace.simulating import Simulation

    simulation = await Simulation.made(indexer.definition, {}, clock)
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
    async def on_pay(event: Pay, ctx: Context) -> None:
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

    async def handler(event: Pay, ctx: Context) -> None:
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


async def test_gets_of_one_handler_at_once_are_one_query() -> None:
    asked: list[Any] = []

    async def handler(event: Pay, ctx: Context) -> None:
        await asyncio.gather(*[ctx.get(Account, f"x{n}") for n in range(5)], ctx.get(Account, "x1"))
        assert await ctx.get_many(Account, ["x0", "y", "x0"]) == [None, None, None]

    async with handled(handler, preload=False).simulation() as simulation:

        async def load(entity: Any, ids: Any) -> Any:
            asked.append(sorted(ids))
            return []

        simulation._tables.load = load  # type: ignore[attr-defined]  # counts the queries
        simulation.feed(Pay("a"))
        await simulation.drain()
    assert asked == [["x0", "x1", "x2", "x3", "x4"], ["y"]]


@EVERY
async def test_where_with_ten_thousand_values_asks_for_them_together(name: str, tmp_path: Path) -> None:
    def spread(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source=source, entities=[Account])

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: Context) -> None:
            same = await ctx.where(Account, country=event.country)
            ctx.set(Account(event.to, len(same) + 1, event.country))

        return indexer

    count = 3_000
    log = [(n, Pay(f"a{n}", 0, f"c{n % count}")) for n in range(2 * count)]
    async with rig(name, tmp_path, spread) as own:
        await own.run(Listed(log[:count], piece=count), index_batch_events_max=count)
        async with own.running(Listed(log, piece=count), index_batch_events_max=count) as indexing:
            await indexing.run()
            assert indexing._lookups.queries_count <= 6, "not one a value"
            rows = await own.house.entities.find(indexing.plan.entities[0], ())
            assert sorted(row.balance for row in rows) == [1] * count + [2] * count


# -- deferred indexes, several sources, what context tells


@DATABASES
async def test_deferred_indexes_are_built_when_first_asked_for_or_at_the_end(name: str, tmp_path: Path) -> None:
    def asking(app: Headrace, source: Any) -> Indexer:
        indexer = app.indexer("bank", source=source, entities=[Account], defer_indexes=True)

        @indexer.on("pay")
        async def on_pay(event: Pay, ctx: Context) -> None:
            if event.to == "ask":
                ctx.set(Account("ask", len(await ctx.where(Account, country="NZ"))))
            else:
                ctx.set(Account(event.to, 0, event.country))

        return indexer

    async def is_built(own: Rig) -> bool:
        entities: Any = own.house.entities
        if name == "sqlite":
            return bool(entities._rows("SELECT 1 FROM sqlite_master WHERE name = 'account_by_country'"))
        schema = entities._store.schema
        asked = "SELECT 1 FROM pg_indexes WHERE indexname = 'account_by_country' AND schemaname = $1"
        return bool(await entities._rows(asked, schema))

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
        async def on_pay(event: Pay, ctx: Context) -> None:
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
        with pytest.raises(InvalidInput, match="which source"):
            await indexing.rollback(1)
        with pytest.raises(InvalidInput, match="several"):
            await indexing.run(until=3)


async def test_any_of_and_ranges_overlay_what_is_staged() -> None:
    async def handler(event: Pay, ctx: Context) -> None:
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
        async def on_pay(event: Pay, ctx: Context) -> None:
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
    async def on_pay(event: Pay, ctx: Context) -> None:
        for _ in range(event.amount):
            ctx.enqueue(notify, event.to)

    simulation = await indexer.simulate([Pay("a", 3)], index_enqueues_max=3)
    assert [(run.task, run.payload) for run in await simulation.enqueued()] == [("notify", "a")] * 3
    with pytest.raises(HandlerFailed, match="at most 3 runs"):
        await indexer.simulate([Pay("a", 4)], index_enqueues_max=3)
    with pytest.raises(HandlerFailed, match="leave the idempotency key out"):
        await _keyed(app, notify).simulate([Pay("a")])


def _keyed(app: Headrace, task: Any) -> Indexer:
    indexer = app.indexer("keyed", source=Listed(), entities=[Account])

    @indexer.on("pay")
    async def on_pay(event: Pay, ctx: Context) -> None:
        ctx.enqueue(task.options(idempotency_key="mine"), event.to)

    return indexer


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
        with pytest.raises(InvalidInput, match="is no entity"):
            simulation.rows(Entity)


@EVERY
async def test_a_run_that_crashes_at_every_commit_ends_where_a_quiet_one_does(name: str, tmp_path: Path) -> None:
    async with rig(name, tmp_path, bank) as own:
        own.tables = Unsteady(own.house.entities, ["crash before", "crash after"] * 6)
        indexing = await own.run(Listed(pays(40)), index_batch_events_max=5, index_depth_max=2)
        assert await found(own, indexing) == balances(40)
        assert issubclass(Crash, Exception)


# -- what the reference met on its way, and is not shown above


async def test_an_answer_of_none_is_an_answer() -> None:
    calls: list[int] = []
    indexer = Headrace("tests").indexer("bank", source=Listed(), entities=[Account])

    @indexer.effect()
    async def nothing(n: int) -> None:
        calls.append(n)

    @indexer.on("pay")
    async def on_pay(event: Pay, ctx: Context) -> None:
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
            async def on_pay(event: Pay, ctx: Context) -> None:
                ctx.set(Account(event.to, len(repr(await ctx.effect(effect, 5)))))

            return indexer

        return made

    async with rig("sqlite", tmp_path, numbered(int)) as own:
        await own.run(Listed([(1, Pay("number"))]))
        own._make = numbered(str)
        indexing = await own.run(Listed([(1, Pay("number")), (2, Pay("text"))]))
        assert await found(own, indexing) == {"number": 1, "text": 3}


async def test_a_rate_limit_survives_going_back() -> None:
    clock = ManualClock()
    indexer = Headrace("tests").indexer("bank", source=Listed(), entities=[Account], history="all")
    calls: list[int] = []

    @indexer.effect(calls=1, per_s=10, cache=False)
    async def rate(n: int) -> int:
        calls.append(clock.now_us())
        return n

    @indexer.on("pay")
    async def on_pay(event: Pay, ctx: Context) -> None:
        ctx.set(Account(event.to, await ctx.effect(rate, event.amount)))

    from headrace.simulating import Simulation

    simulation = await Simulation.made(indexer.definition, {}, clock)
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
        async def on_pay(event: Pay, ctx: Context) -> None:
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
        while indexing._fetching.turn is None:
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
        async def on_pay(event: Pay, ctx: Context) -> None:
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
        async def on_pay(event: Pay, ctx: Context) -> None:
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
            _release(indexing, gate)
            await running
            history = await own.house.entities.history(indexing.plan.entities[0])
            assert history == [("x", 1, Account("x", 1)), ("x", 2, None), ("x", 3, Account("x", 3))]


async def test_a_second_run_beside_the_first_is_refused(tmp_path: Path) -> None:
    async with rig("memory", tmp_path, bank) as own, own.running(Listed(pays(5))) as indexing:
        running = asyncio.ensure_future(indexing.run())
        await asyncio.sleep(0)
        with pytest.raises(InvalidInput, match="is running already"):
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
