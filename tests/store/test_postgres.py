"""What only the PostgreSQL house can get wrong: locks, plans, connections, servers, rights, loops."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import pytest

from headrace.core.span import Key, Settlement
from headrace.foundation.errors import (
    Conflict,
    HeadraceError,
    InvalidSetting,
    SessionEnded,
    StoreBroken,
    StoreUnavailable,
)
from headrace.foundation.limits import DEFAULT
from headrace.store.postgres import PostgresStore
from headrace.store.postgres.hot import PLACES
from headrace.store.postgres.pool import SETTINGS, compiled
from headrace.store.protocol import Lease, Release
from tests.postgres import Server, server
from tests.store.backstage import beside, schema_of, statements_of, waiting_for_a_lock
from tests.store.world import NOBODY, START_US, World, chunks_of, fresh_schema, indexes_of, settlement_of

T = TypeVar("T")
PACKAGE = "headrace.store.postgres"


class Watched(PostgresStore):
    """A store that counts the deadlocks the server had to break."""

    deadlocks_count = 0

    async def _tried(self, work: Callable[[Any], Awaitable[T]]) -> T:
        async def watched(connection: Any) -> T:
            try:
                return await work(connection)
            except asyncpg.DeadlockDetectedError:
                self.deadlocks_count += 1
                raise

        return await super()._tried(watched)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A world on a schema of its own."""
    return World(PostgresStore(fresh_schema(tmp_path), DEFAULT))


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    """A server that a test may stop, and that asks one user for a password."""
    started = Server()
    rules = started.data / "pg_hba.conf"
    rules.write_text(f"host all locked 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
    started.stop("fast")
    started.start()
    yield started
    started.remove()


# -- R3, R4: what is decided is decided on locked rows


async def test_r3_a_session_ends_after_the_claims_that_found_it_alive(world: World) -> None:
    session = await world.session()
    async with beside() as claimer, beside() as watcher:
        claim = claimer.transaction()
        await claim.start()
        await claimer.execute(f'SELECT id FROM "{schema_of(world)}".session WHERE id = $1 FOR KEY SHARE', session)
        recovery = asyncio.create_task(world.recover(session))
        await waiting_for_a_lock(world, watcher)
        assert not recovery.done()
        await world.store.heartbeat(session, now_us=world.now_us)  # a sign of life does not wait
        await claim.rollback()
        assert await recovery == 0
    with pytest.raises(SessionEnded):
        await world.claim(session)


async def test_r4_a_lease_that_was_lost_while_its_settlement_waited_changes_nothing(world: World) -> None:
    batch_id, session = await world.filled(512), await world.session()
    first, second = await world.claim(session)
    async with beside() as other, beside() as watcher:
        change = other.transaction()
        await change.start()
        await other.execute(f'UPDATE "{schema_of(world)}".span SET token = token + 1 WHERE id = $1', second.span_id)
        settling = asyncio.create_task(
            world.store.settle([settlement_of(first), settlement_of(second)], now_us=world.now_us)
        )
        await waiting_for_a_lock(world, watcher)
        await change.commit()
        assert await settling == ["settled", "lost"]
    _, ledger = await world.store.batch(batch_id)
    assert (ledger.completed, ledger.leased) == (256, 256)


async def test_r4_counters_are_those_of_the_locked_row_and_a_batch_completes_once(world: World) -> None:
    batch_id, session = await world.filled(256 * 12), await world.session()
    leases = await world.claim(session)
    async with beside() as other, beside() as watcher:
        held = other.transaction()
        await held.start()
        await other.execute(f'SELECT 1 FROM "{schema_of(world)}".batch WHERE id = $1 FOR UPDATE', batch_id)
        settling = [asyncio.create_task(world.settle(lease)) for lease in leases]
        await waiting_for_a_lock(world, watcher)
        await held.rollback()
        assert set(await asyncio.gather(*settling)) == {"settled"}
    batch, ledger = await world.store.batch(batch_id)
    assert (batch.state, ledger.completed) == ("completed", 256 * 12)


async def test_r4_a_batch_sealed_while_the_sweep_waits_for_it_is_not_abandoned(world: World) -> None:
    batch_id = await world.batch(3, seal_timeout_ms=1_000)
    await world.append(batch_id, range(3))
    world.later(10)
    async with beside() as other, beside() as watcher:
        sealing = other.transaction()
        await sealing.start()
        await other.execute(f"UPDATE \"{schema_of(world)}\".batch SET state = 'sealed' WHERE id = $1", batch_id)
        sweeping = asyncio.create_task(world.store.sweep(now_us=world.now_us, rows_max=100))
        await waiting_for_a_lock(world, watcher)
        await sealing.commit()
        assert (await sweeping).abandoned == []


# -- R7: a hot verb is one statement


async def test_r7_a_claim_and_a_settlement_are_one_statement_each(world: World) -> None:
    await world.filled(256 * 20)
    session = await world.session()
    for lease in await world.claim(session, 256):  # connects, and takes a range of ids
        await world.settle(lease)
    leases, sent = await statements_of(world, lambda: world.claim(session, 256 * 8))
    assert (len(leases), len(sent)) == (8, 1)
    told = [settlement_of(lease, object_keys=[f"default/b/{lease.span_id:064x}"]) for lease in leases]
    words, sent = await statements_of(world, lambda: world.store.settle(told, now_us=world.now_us))
    assert (set(words), len(sent)) == ({"settled"}, 1)


async def test_r7_parts_of_a_span_are_settled_in_one_statement_too(world: World) -> None:
    batch_id, session = await world.filled(256), await world.session()
    (lease,) = await world.claim(session)
    parts = [list(range(100)), list(range(100, 256))]
    for part_no, places in enumerate(parts):
        word, sent = await statements_of(world, partial(world.settle, lease, places=places, part_no=part_no))
        assert (word, len(sent)) == ("settled", 1)
        assert await world.settle(lease, places=places, part_no=part_no) == "recorded"
    assert [outcome.result for outcome in await world.outcomes(batch_id)] == [b"%d" % index for index in range(256)]


async def test_r7_consecutive_runs_of_a_split_span_keep_their_positions(world: World) -> None:
    batch_id, session = await world.filled(100), await world.session()
    first, second, rest = [(await world.claim(session, runs_max))[0] for runs_max in (30, 40, 100)]
    assert await world.settle(second, "cf" * 5, places=range(10), part_no=0) == "settled"
    assert await world.settle(second, "x", places=range(10, 40), part_no=1) == "settled"
    assert await world.settle(rest, "c") == await world.settle(first, "f") == "settled"
    states = await world.states(batch_id)
    assert states[:30] == ["failed"] * 30
    assert states[30:40] == ["completed", "failed"] * 5
    assert states[40:] == ["cancelled"] * 30 + ["completed"] * 30
    assert await world.settle(rest, "c", places=[0, 1], part_no=7) == "lost"


async def test_r7_small_claims_are_one_statement_each_too(world: World) -> None:
    await world.filled(300)
    session = await world.session()
    order = indexes_of(await world.claim(session, 8))
    while leases := (await statements_of(world, lambda: world.claim(session, 8)))[0]:
        order += indexes_of(leases)
    assert order == list(range(300))
    await world.recover(session)
    again = await world.session()
    leases, sent = await statements_of(world, lambda: world.claim(again, 5))
    assert (len(indexes_of(leases)), len(sent)) == (5, 1)


async def test_r7_a_claim_of_single_runs_learns_how_many_rows_it_needs(world: World) -> None:
    batch_id, session = await world.batch(), await world.session()
    for index in range(200):
        await world.append(batch_id, [index])
    assert len(await world.claim(session, 60)) == 60
    leases, sent = await statements_of(world, lambda: world.claim(session, 60))
    assert (indexes_of(leases), len(sent)) == (list(range(60, 120)), 1)


async def test_r7_a_settlement_with_a_stale_one_in_it_is_still_one_transaction(world: World) -> None:
    batch_id, session = await world.filled(256 * 3), await world.session()
    stale, *rest = await world.claim(session)
    assert await world.release(stale) == "settled"
    told = [settlement_of(lease) for lease in (rest[0], stale, rest[1])]
    assert await world.store.settle(told, now_us=world.now_us) == ["settled", "lost", "settled"]
    assert await world.store.settle(told, now_us=world.now_us) == ["recorded", "lost", "recorded"]
    _, ledger = await world.store.batch(batch_id)
    assert (ledger.completed, ledger.waiting) == (512, 256)


# -- R8: one order


class Crowd:
    """Someone who does whatever may lock rows, over and over, to the same few batches."""

    def __init__(self, world: World, batch_ids: list[str], seed: int) -> None:
        self.world, self.batch_ids, self.random = world, batch_ids, random.Random(seed)
        self.session, self.leases = "", list[Lease]()

    async def run(self, rounds: int) -> None:
        self.session = await self.world.session()
        steps = (self.claim, self.settle, self.settle, self.give_back, self.cancel, self.append, self.end, self.sweep)
        for _ in range(rounds):
            with suppress(Conflict):
                await self.random.choice(steps)()

    async def claim(self) -> None:
        self.leases += await self.world.claim(self.session, self.random.choice((3, 40, 200)))

    def some(self) -> list[Lease]:
        self.random.shuffle(self.leases)
        taken, self.leases = self.leases[:6], self.leases[6:]
        return taken

    async def settle(self) -> None:
        told: list[Settlement] = [settlement_of(lease, self.random.choice("cccfr")) for lease in self.some()]
        await self.world.store.settle(told, now_us=self.world.now_us)

    async def give_back(self) -> None:
        releases = [Release(span_id=lease.span_id, token=lease.token) for lease in self.some()]
        await self.world.store.release(releases, crashes_max=3, now_us=self.world.now_us)

    async def cancel(self) -> None:
        indexes = self.random.sample(range(0, 640, 7), 5)
        await self.world.store.cancel_runs(self.random.choice(self.batch_ids), indexes, now_us=self.world.now_us)

    async def append(self) -> None:
        first = self.random.randrange(0, 900, 20)
        await self.world.append(self.random.choice(self.batch_ids), range(first, first + 60), runs_max=20)

    async def end(self) -> None:
        if self.random.random() < 0.3:
            self.leases.clear()
            await self.world.store.recover(
                self.session, NOBODY, silent_since_us=self.world.now_us, crashes_max=3, now_us=self.world.now_us
            )
            self.session = await self.world.session()
        elif self.random.random() < 0.2:
            await self.world.store.redrive(self.random.choice(self.batch_ids), None)
        elif self.random.random() < 0.1:
            await self.world.store.stop_batch(self.batch_ids[-1], "cancelled", now_us=self.world.now_us)

    async def sweep(self) -> None:
        self.world.now_us += 1_000
        await self.world.store.sweep(now_us=self.world.now_us, rows_max=50)


async def test_r8_no_two_transactions_wait_for_each_other(tmp_path: Path) -> None:
    url = fresh_schema(tmp_path)
    stores = [Watched(url, DEFAULT), Watched(url, DEFAULT)]
    async with World(stores[0]) as world:
        beyond = World(stores[1])
        await stores[1].open()
        batch_ids = [await world.batch(seal_timeout_ms=60_000) for _ in range(4)]
        for batch_id in batch_ids:
            await world.append(batch_id, range(640), runs_max=20)
        crowds = [Crowd((world, beyond)[number % 2], batch_ids, number) for number in range(12)]
        beyond._claims_count = 1_000_000
        await asyncio.gather(*(crowd.run(40) for crowd in crowds))
        await stores[1].close()
    assert [store.deadlocks_count for store in stores] == [0, 0]


# -- R9: lanes, and plans over history

HISTORY = """
INSERT INTO {schema}.batch SELECT 'b' || g, 'default', NULL, 'batch', 'task', 'completed', 2560, 2560, 2560, 0, 0, 0,
    '{{}}', '', '{{}}', '', 1, 1, 1, 1, 0, 256, '' FROM generate_series(1, 2000) AS g;
INSERT INTO {schema}.block SELECT g, 'b' || (g / 10 + 1), (g % 10) * 256, (g % 10) * 256 + 255, 256, NULL, NULL, 'x'
    FROM generate_series(1, 20000) AS g;
INSERT INTO {schema}.span SELECT g, g, 'b' || (g / 10 + 1), 'default', 'default', 'task', 0, 0, 0, 0, g, (g % 10) * 256,
    1, 0, 0, NULL, repeat(CASE WHEN g % 100 = 0 THEN 'w' ELSE 'c' END, 256)::bytea,
    CASE WHEN g % 100 = 0 THEN 256 ELSE 0 END,
    CASE WHEN g % 200 = 0 THEN 'waiting' WHEN g % 100 = 0 THEN 'leased' ELSE 'done' END, 's' || (g % 7), g, 1
    FROM generate_series(1, 20000) AS g;
INSERT INTO {schema}.part (block_id, span_id, token, part_no, codes, results, settled_us)
    SELECT g, g, 1, 0, 'c', 'x', 1 FROM generate_series(1, 20000) AS g;
INSERT INTO {schema}.lane VALUES ('default', 'default', 'task');
INSERT INTO {schema}.queue VALUES ('default', 'default', 0, 0);
INSERT INTO {schema}.session SELECT 's' || g, 'worker', '', 1, 0, 0, 0 FROM generate_series(0, 5000) AS g;
ANALYZE {schema}.batch, {schema}.block, {schema}.span, {schema}.part, {schema}.session;
"""
VALUES: dict[str, Any] = {
    "ids": "[4, 5, 6]",
    "rows": "[[1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0]]",
    "names": '["default"]',
    "objects": "[]",
    "tasks": '["task"]',
    "queues": None,
    "blob": b"c",
    "places": PLACES,
    "environment": "default",
    "queue": "default",
    "task": "task",
    "session_id": "s1",
    "batch_id": "b7",
    "id": "b7",
    "key": "key",
}
PLANS = {
    "settle_ranges": ["span_pkey", "batch_"],
    "claim_whole": ["span_claimable", "span_leased", "span_delayed", "block_pkey", "session_pkey"],
    "claim_candidates": ["span_claimable"],
    "claimed_before": ["span_leased"],
    "due_spans": ["span_delayed"],
    "lock_spans": ["span_pkey"],
    "update_spans": ["span_pkey"],
    "lock_spans_of_session": ["span_leased"],
    "leases_of_session": ["span_leased"],
    "recorded_part": ["part_once"],
    "blocks": ["block_pkey"],
    "blocks_from": ["block_by_index"],
    "spans_of_blocks": ["span_of_block"],
    "states_of_blocks": ["span_of_block"],
    "parts_of_blocks": ["part_once"],
    "unsettled_spans_of_batch": ["span_unsettled"],
    "leased_count": ["span_unsettled"],
    "expired_spans": ["span_expiring"],
    "stopping_batches": ["batch_unfinished"],
    "lock_batches": ["batch_"],
    "lock_streams_of_session": ["batch_of_session", "span_leased"],
}


@asynccontextmanager
async def with_history(world: World) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """The plan of a statement over 20,000 chunks, most of them history, as a server without our settings makes it."""
    schema = f'"{schema_of(world)}"'
    world.was_tampered_with = True
    async with beside() as connection:
        await connection.execute(HISTORY.format(schema=schema))
        yield lambda name: plan_of(connection, schema_of(world), name)


async def plan_of(connection: Any, schema: str, name: str) -> str:
    sql, words, _ = compiled(schema)[name]
    ids = '["b4", "b5"]' if name == "lock_batches" else VALUES["ids"]
    values = [(VALUES | {"ids": ids}).get(word, 1) for word in words]
    return "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN {sql}", *values))


async def test_r9_hot_statements_are_answered_from_indexes_whatever_lies_behind_them(world: World) -> None:
    async with with_history(world) as plan:
        for name, indexes in PLANS.items():
            text = await plan(name)
            for index in indexes:
                assert index in text, f"{name}\n{text}"
            for table in ("span", "part", "block", "batch"):
                assert f"Seq Scan on {table}" not in text, f"{name}\n{text}"


async def test_r9_a_plan_made_for_empty_tables_is_the_same(world: World) -> None:
    async with beside(server_settings=SETTINGS) as connection:
        for name in ("claim_whole", "settle_ranges"):
            assert "Seq Scan" not in await plan_of(connection, schema_of(world), name)


async def test_r9_a_claim_merges_lanes_by_priority_and_order(world: World) -> None:
    session = await world.session()
    first, second = await world.batch(), await world.batch()
    await world.append(first, range(40), runs_max=10, key=Key("task", queue="a"))
    await world.append(second, range(40), runs_max=10, key=Key("other", queue="b"))
    await world.append(second, [40, 41], key=Key("task", queue="b", priority=5))
    (leases, sent) = await statements_of(world, lambda: world.claim(session, 40, tasks=("task", "other")))
    assert [(lease.batch_id == second, lease.indexes[0]) for lease in leases] == [
        (True, 40), (False, 0), (True, 0), (False, 10), (True, 10)
    ]  # fmt: skip
    assert len(indexes_of(leases)) == 40
    assert sent[-1] == "claim_whole"


# -- rights


async def test_an_ordinary_user_keeps_to_its_own_schema(tmp_path: Path) -> None:
    name = fresh_schema(tmp_path).rpartition("=")[2]
    async with beside() as connection:
        await connection.execute(f"CREATE ROLE {name} LOGIN; CREATE SCHEMA {name} AUTHORIZATION {name}")
        url = f"{server().dsn.replace('postgres@', f'{name}@')}?schema={name}"
        async with World(PostgresStore(url, DEFAULT)) as world:
            await world.filled(300)
            assert await world.run_all(await world.session()) == list(range(300))


# -- errors that say what to do


async def error_of(url: str) -> HeadraceError:
    """What opening a store at this URL comes to."""
    try:
        await PostgresStore(url, DEFAULT).open()
    except HeadraceError as error:
        return error
    pytest.fail(f"{url} was opened")


@pytest.mark.parametrize("url", ["postgresql://host:port/x", "postgresql://[::1/x", "postgresql://h/x?schema=A;B"])
async def test_an_url_that_is_none_is_a_wrong_setting(url: str) -> None:
    assert isinstance(await error_of(url), InvalidSetting)


async def test_whoever_is_not_let_in_is_told_why(own: Server) -> None:
    async with beside(own.dsn) as connection:
        await connection.execute("CREATE ROLE locked LOGIN PASSWORD 'right'; CREATE ROLE poor LOGIN")
        await connection.execute("CREATE ROLE reader LOGIN; ALTER ROLE reader SET default_transaction_read_only = on")
        await connection.execute("GRANT CREATE ON DATABASE postgres TO reader, locked")
    at = f"127.0.0.1:{own.port}"
    expected = [
        (f"postgresql://locked:wrong@{at}/postgres", StoreBroken, "let this user in", "password"),
        (f"postgresql://nobody_knows@{at}/postgres", StoreBroken, "let this user in", "user"),
        (f"postgresql://postgres@{at}/nowhere", StoreBroken, "no such database", "create it"),
        (f"postgresql://poor@{at}/postgres", StoreBroken, "may not do this", "grant it"),
        (f"postgresql://reader@{at}/postgres", StoreUnavailable, "only answers reads", "primary"),
        ("postgresql://postgres@127.0.0.1:1/postgres", StoreUnavailable, "did not answer", "is the server up"),
    ]
    for url, kind, said, hint in expected:
        error = await error_of(url)
        assert type(error) is kind, (url, error)
        assert said in str(error), (url, error)
        assert hint in error.hint, (url, error.hint)
    async with World(PostgresStore(f"{own.dsn.replace('postgres@', 'locked:right@')}?schema=mine", DEFAULT)) as _:
        pass


async def test_a_server_without_a_free_connection_says_so(own: Server) -> None:
    async with beside(own.dsn) as connection:
        await connection.execute(
            "CREATE ROLE single LOGIN CONNECTION LIMIT 0; GRANT CREATE ON DATABASE postgres TO single"
        )
    error = await error_of(own.dsn.replace("postgres@", "single@"))
    assert isinstance(error, StoreUnavailable)
    assert "max_connections" in error.hint


# -- connections that end


async def test_a_connection_killed_in_a_verb_is_an_error_and_the_next_verb_works(world: World) -> None:
    batch_id = await world.filled(256)
    session = await world.session()
    (lease,) = await world.claim(session)
    async with beside() as other, beside() as watcher:
        held = other.transaction()
        await held.start()
        await other.execute(f'SELECT 1 FROM "{schema_of(world)}".batch WHERE id = $1 FOR UPDATE', batch_id)
        settling = asyncio.create_task(world.settle(lease))
        await watcher.execute("SELECT pg_terminate_backend($1)", await waiting_for_a_lock(world, watcher))
        with pytest.raises(StoreUnavailable):
            await settling
        await held.rollback()
    assert await world.settle(lease) == "settled"


async def test_a_server_that_ends_under_load_is_used_again_when_it_is_back(own: Server, tmp_path: Path) -> None:
    url = fresh_schema(tmp_path).replace(server().dsn, own.dsn)
    async with World(PostgresStore(url, DEFAULT)) as world:
        batch_id = await world.filled(20_000, runs_max=32)
        failures: list[HeadraceError] = []
        halfway, failed = asyncio.Event(), asyncio.Event()

        async def until_it_works(verb: Callable[[], Awaitable[T]]) -> T:
            while True:
                try:
                    return await verb()
                except StoreUnavailable as error:
                    failures.append(error)
                    failed.set()
                    await back.wait()

        async def work() -> list[str]:
            session, claim_no, words = await until_it_works(world.session), 0, list[str]()
            while True:
                claim_no += 1
                leases = await until_it_works(partial(world.claim, session, 100, claim_no=claim_no))
                if not leases:
                    return words
                told = [settlement_of(lease) for lease in leases]
                words += await until_it_works(partial(world.store.settle, told, now_us=world.now_us))
                if len(words) > 40:
                    halfway.set()

        back = asyncio.Event()
        workers = [asyncio.create_task(work()) for _ in range(4)]
        await halfway.wait()
        await asyncio.to_thread(own.stop, "immediate")
        await failed.wait()
        await asyncio.to_thread(own.start)
        back.set()
        words = [word for done in await asyncio.gather(*workers) for word in done]
        assert set(words) <= {"settled", "recorded"}
        assert failures
        _, ledger = await world.store.batch(batch_id)
        assert (ledger.completed, ledger.waiting + ledger.leased) == (20_000, 0)


# -- loops and closing


async def test_a_second_loop_has_connections_of_its_own(world: World) -> None:
    session = await world.session()
    answers: list[object] = []

    def beat() -> None:
        async def beats() -> None:
            for _ in range(20):
                answers.append(await world.store.heartbeat(session, now_us=START_US))

        asyncio.run(beats())

    thread = threading.Thread(target=beat)
    thread.start()
    batch_id = await world.batch()
    for number in range(20):
        await world.append(batch_id, [number])
    await asyncio.to_thread(thread.join)
    assert len(answers) == 20
    await world.store.close()
    await world.store.open()


async def test_a_store_may_be_closed_twice_and_before_it_was_opened(world: World) -> None:
    unopened = PostgresStore(f"{server().dsn}?schema=never", DEFAULT)
    await unopened.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await unopened.sessions()
    batch_id = await world.batch()
    await world.store.close()
    await world.store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await world.store.append(batch_id, chunks_of(range(3)), now_us=world.now_us)
    await world.store.open()
