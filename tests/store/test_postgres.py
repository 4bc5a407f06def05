"""Tests of the PostgreSQL store alone: locks, plans, connections, servers, rights, event loops."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import asyncpg
import pytest

from headrace.core.span import Settlement
from headrace.foundation.errors import (
    Conflict,
    HeadraceError,
    InvalidSetting,
    SessionEnded,
    StoreBroken,
    StoreUnavailable,
    StoreUnreachable,
)
from headrace.foundation.limits import DEFAULT
from headrace.store.postgres import PostgresStore
from headrace.store.protocol import Lease, Release
from tests.support.postgres_observer import other_connection, pid_waiting_for_a_lock, schema_of
from tests.support.postgres_server import Server, server
from tests.support.store_rig import NO_SUSPECTS, START_US, StoreRig, chunks_of, fresh_schema, settlement_of

T = TypeVar("T")
PACKAGE = "headrace.store.postgres"


class Watched(PostgresStore):
    """A store that counts the deadlocks that the server resolved."""

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
def rig(tmp_path: Path) -> StoreRig:
    """Return a rig on a schema of its own."""
    return StoreRig(PostgresStore(fresh_schema(tmp_path), DEFAULT))


@pytest.fixture(scope="module")
def private_server() -> Iterator[Server]:
    """Start a server that a test may stop, and that requires a password of one user."""
    started = Server()
    rules = started.data / "pg_hba.conf"
    rules.write_text(f"host all locked 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
    started.stop("fast")
    started.start()
    yield started
    started.remove()


# -- R3 (a lapsed session is ended before it is recovered) and R4 (other tables are read after the lock)


async def test_r3_a_session_ends_after_the_claims_that_found_it_alive(rig: StoreRig) -> None:
    session = await rig.session()
    async with other_connection() as claimer, other_connection() as watcher:
        claim = claimer.transaction()
        await claim.start()
        await claimer.execute(f'SELECT id FROM "{schema_of(rig)}".session WHERE id = $1 FOR KEY SHARE', session)
        recovery = asyncio.create_task(rig.recover(session))
        await pid_waiting_for_a_lock(rig, watcher)
        assert not recovery.done()
        await rig.store.heartbeat(session, now_us=rig.now_us)  # a heartbeat does not wait
        await claim.rollback()
        assert await recovery == 0
    with pytest.raises(SessionEnded):
        await rig.claim(session)


async def test_r4_a_lease_that_was_lost_while_its_settlement_waited_changes_nothing(rig: StoreRig) -> None:
    batch_id, session = await rig.filled(512), await rig.session()
    first, second = await rig.claim(session)
    async with other_connection() as other, other_connection() as watcher:
        change = other.transaction()
        await change.start()
        await other.execute(f'UPDATE "{schema_of(rig)}".span SET token = token + 1 WHERE id = $1', second.span_id)
        settling = asyncio.create_task(
            rig.store.settle([settlement_of(first), settlement_of(second)], now_us=rig.now_us)
        )
        await pid_waiting_for_a_lock(rig, watcher)
        await change.commit()
        assert await settling == ["settled", "lost"]
    _, ledger = await rig.store.batch(batch_id)
    assert (ledger.completed, ledger.leased) == (256, 256)


async def test_r4_counters_are_those_of_the_locked_row_and_a_batch_completes_once(rig: StoreRig) -> None:
    batch_id, session = await rig.filled(256 * 12), await rig.session()
    leases = await rig.claim(session)
    async with other_connection() as other, other_connection() as watcher:
        held = other.transaction()
        await held.start()
        await other.execute(f'SELECT 1 FROM "{schema_of(rig)}".batch WHERE id = $1 FOR UPDATE', batch_id)
        settling = [asyncio.create_task(rig.settle(lease)) for lease in leases]
        await pid_waiting_for_a_lock(rig, watcher)
        await held.rollback()
        assert set(await asyncio.gather(*settling)) == {"settled"}
    batch, ledger = await rig.store.batch(batch_id)
    assert (batch.state, ledger.completed) == ("completed", 256 * 12)


async def test_r4_a_batch_sealed_while_the_sweep_waits_for_it_is_not_abandoned(rig: StoreRig) -> None:
    batch_id = await rig.batch(3, seal_timeout_ms=1_000)
    await rig.append(batch_id, range(3))
    rig.later(10)
    async with other_connection() as other, other_connection() as watcher:
        sealing = other.transaction()
        await sealing.start()
        await other.execute(f"UPDATE \"{schema_of(rig)}\".batch SET state = 'sealed' WHERE id = $1", batch_id)
        sweeping = asyncio.create_task(rig.store.sweep(now_us=rig.now_us, rows_max=100))
        await pid_waiting_for_a_lock(rig, watcher)
        await sealing.commit()
        assert (await sweeping).abandoned == []


# -- R8: rows are locked in id order


class Crowd:
    """A client that runs every operation that locks rows, again and again, on the same few batches."""

    def __init__(self, rig: StoreRig, batch_ids: list[str], seed: int) -> None:
        self.rig, self.batch_ids, self.random = rig, batch_ids, random.Random(seed)
        self.session, self.leases = "", list[Lease]()

    async def run(self, rounds: int) -> None:
        self.session = await self.rig.session()
        steps = (self.claim, self.settle, self.settle, self.give_back, self.cancel, self.append, self.end, self.sweep)
        for _ in range(rounds):
            with suppress(Conflict):
                await self.random.choice(steps)()

    async def claim(self) -> None:
        self.leases += await self.rig.claim(self.session, self.random.choice((3, 40, 200)))

    def some(self) -> list[Lease]:
        self.random.shuffle(self.leases)
        taken, self.leases = self.leases[:6], self.leases[6:]
        return taken

    async def settle(self) -> None:
        settlements: list[Settlement] = [settlement_of(lease, self.random.choice("cccfr")) for lease in self.some()]
        await self.rig.store.settle(settlements, now_us=self.rig.now_us)

    async def give_back(self) -> None:
        releases = [Release(span_id=lease.span_id, token=lease.token) for lease in self.some()]
        await self.rig.store.release(releases, crashes_max=3, now_us=self.rig.now_us)

    async def cancel(self) -> None:
        indexes = self.random.sample(range(0, 640, 7), 5)
        await self.rig.store.cancel_runs(self.random.choice(self.batch_ids), indexes, now_us=self.rig.now_us)

    async def append(self) -> None:
        first = self.random.randrange(0, 900, 20)
        await self.rig.append(self.random.choice(self.batch_ids), range(first, first + 60), runs_max=20)

    async def end(self) -> None:
        if self.random.random() < 0.3:
            self.leases.clear()
            await self.rig.store.recover(
                self.session, NO_SUSPECTS, silent_since_us=self.rig.now_us, crashes_max=3, now_us=self.rig.now_us
            )
            self.session = await self.rig.session()
        elif self.random.random() < 0.2:
            await self.rig.store.redrive(self.random.choice(self.batch_ids), None)
        elif self.random.random() < 0.1:
            await self.rig.store.stop_batch(self.batch_ids[-1], "cancelled", now_us=self.rig.now_us)

    async def sweep(self) -> None:
        self.rig.now_us += 1_000
        await self.rig.store.sweep(now_us=self.rig.now_us, rows_max=50)


async def test_r8_transactions_never_deadlock(tmp_path: Path) -> None:
    url = fresh_schema(tmp_path)
    stores = [Watched(url, DEFAULT), Watched(url, DEFAULT)]
    async with StoreRig(stores[0]) as rig:
        beyond = StoreRig(stores[1])
        await stores[1].open()
        batch_ids = [await rig.batch(seal_timeout_ms=60_000) for _ in range(4)]
        for batch_id in batch_ids:
            await rig.append(batch_id, range(640), runs_max=20)
        crowds = [Crowd((rig, beyond)[number % 2], batch_ids, number) for number in range(12)]
        beyond._claims_count = 1_000_000
        await asyncio.gather(*(crowd.run(40) for crowd in crowds))
        await stores[1].close()
    assert [store.deadlocks_count for store in stores] == [0, 0]


# -- rights


async def test_a_role_without_other_rights_works_in_its_own_schema(tmp_path: Path) -> None:
    name = fresh_schema(tmp_path).rpartition("=")[2]
    async with other_connection() as connection:
        await connection.execute(f"CREATE ROLE {name} LOGIN; CREATE SCHEMA {name} AUTHORIZATION {name}")
        url = f"{server().dsn.replace('postgres@', f'{name}@')}?schema={name}"
        async with StoreRig(PostgresStore(url, DEFAULT)) as rig:
            await rig.filled(300)
            assert await rig.run_all(await rig.session()) == list(range(300))


# -- errors and their hints


async def error_of(url: str) -> HeadraceError:
    """Return the error of opening a store at this URL."""
    try:
        await PostgresStore(url, DEFAULT).open()
    except HeadraceError as error:
        return error
    pytest.fail(f"{url} was opened")


@pytest.mark.parametrize("url", ["postgresql://host:port/x", "postgresql://[::1/x", "postgresql://h/x?schema=A;B"])
async def test_an_invalid_url_is_an_invalid_setting(url: str) -> None:
    assert isinstance(await error_of(url), InvalidSetting)


async def test_a_failed_connection_names_the_database_and_the_cause(private_server: Server) -> None:
    async with other_connection(private_server.dsn) as connection:
        await connection.execute("CREATE ROLE locked LOGIN PASSWORD 'right'; CREATE ROLE poor LOGIN")
        await connection.execute("CREATE ROLE reader LOGIN; ALTER ROLE reader SET default_transaction_read_only = on")
        await connection.execute("GRANT CREATE ON DATABASE postgres TO reader, locked")
    at = f"127.0.0.1:{private_server.port}"
    expected = [
        (f"postgresql://locked:wrong@{at}/postgres", StoreBroken, f"at {at}/postgres refused the login", "password"),
        (f"postgresql://nobody_knows@{at}/postgres", StoreBroken, "refused the login", "user"),
        (f"postgresql://postgres@{at}/nowhere", StoreBroken, f"at {at}/nowhere does not exist", "create the database"),
        (f"postgresql://poor@{at}/postgres", StoreBroken, "refused a statement: permission denied", "headrace migrate"),
        (f"postgresql://reader@{at}/postgres", StoreUnavailable, "it is read-only", "primary"),
        (
            "postgresql://postgres:secret@127.0.0.1:1/postgres",
            StoreUnreachable,
            "PostgreSQL at 127.0.0.1:1/postgres did not answer",
            "check that the server is running",
        ),
        (
            "postgresql://postgres:secret@no.such.host.invalid/postgres",
            StoreUnreachable,
            "PostgreSQL at no.such.host.invalid:5432/postgres did not answer",
            "reachable at that host",
        ),
    ]
    for url, kind, message, hint in expected:
        error = await error_of(url)
        assert type(error) is kind, (url, error)
        assert message in str(error), (url, error)
        assert hint in error.hint, (url, error.hint)
        assert "secret" not in str(error)
        assert "CREATE" not in error.hint
    async with StoreRig(
        PostgresStore(f"{private_server.dsn.replace('postgres@', 'locked:right@')}?schema=mine", DEFAULT)
    ) as _:
        pass


GRANTS: Final = (
    'GRANT USAGE ON SCHEMA "{schema}" TO worker; '
    'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA "{schema}" TO worker; '
    'GRANT USAGE ON ALL SEQUENCES IN SCHEMA "{schema}" TO worker'
)


@pytest.mark.parametrize(
    ("taken", "lacks"),
    [
        ('REVOKE USAGE ON SCHEMA "{schema}" FROM worker', "USAGE on schema {schema}"),
        ('REVOKE INSERT ON "{schema}".batch FROM worker', "lacks INSERT on table batch (schema"),
        ('REVOKE UPDATE, DELETE ON "{schema}".session FROM worker', "DELETE on table session, UPDATE on table session"),
        ('REVOKE USAGE ON SEQUENCE "{schema}".span_ids FROM worker', "USAGE on sequence span_ids"),
        (
            'REVOKE ALL ON ALL TABLES IN SCHEMA "{schema}" FROM worker',
            "SELECT on table api_key, UPDATE on table api_key",
        ),
    ],
)
async def test_a_right_that_a_role_lacks_is_named_and_the_hint_grants_no_more_than_a_worker_needs(
    private_server: Server, tmp_path: Path, taken: str, lacks: str
) -> None:
    url = fresh_schema(tmp_path, private_server.dsn)
    async with StoreRig(PostgresStore(url, DEFAULT)) as rig:
        schema = schema_of(rig)
        async with other_connection(private_server.dsn) as connection:
            await connection.execute(
                "DO $$ BEGIN CREATE ROLE worker LOGIN; EXCEPTION WHEN duplicate_object THEN END $$"
            )
            await connection.execute(GRANTS.format(schema=schema))
            worker_url = url.replace("postgres@", "worker@")

            async def works() -> None:
                async with StoreRig(PostgresStore(worker_url, DEFAULT)) as other:
                    batch_id = await other.filled(3)
                    assert set(await other.run_all(await other.session())) == {0, 1, 2}
                    await other.store.end_session(await other.session(), now_us=other.now_us)
                    assert (await other.store.batch(batch_id))[0].state == "completed"

            await works()
            await connection.execute(taken.format(schema=schema))
            with pytest.raises(StoreBroken) as refused:
                await works()
            assert "the role 'worker' lacks " in refused.value.message
            assert lacks.format(schema=schema) in refused.value.message
            assert "CREATE" not in refused.value.hint
            for statement in refused.value.hint.rstrip(";").split(";"):
                await connection.execute(statement)
            await works()


async def test_a_server_without_a_free_connection_is_reported(private_server: Server) -> None:
    async with other_connection(private_server.dsn) as connection:
        await connection.execute(
            "CREATE ROLE single LOGIN CONNECTION LIMIT 0; GRANT CREATE ON DATABASE postgres TO single"
        )
    error = await error_of(private_server.dsn.replace("postgres@", "single@"))
    assert isinstance(error, StoreUnavailable)
    assert "max_connections" in error.hint


# -- connections that end


async def test_a_connection_that_is_killed_fails_its_operation_and_the_next_one_works(rig: StoreRig) -> None:
    batch_id = await rig.filled(256)
    session = await rig.session()
    (lease,) = await rig.claim(session)
    async with other_connection() as other, other_connection() as watcher:
        held = other.transaction()
        await held.start()
        await other.execute(f'SELECT 1 FROM "{schema_of(rig)}".batch WHERE id = $1 FOR UPDATE', batch_id)
        settling = asyncio.create_task(rig.settle(lease))
        await watcher.execute("SELECT pg_terminate_backend($1)", await pid_waiting_for_a_lock(rig, watcher))
        with pytest.raises(StoreUnavailable):
            await settling
        await held.rollback()
    assert await rig.settle(lease) == "settled"


async def test_a_cancelled_operation_leaves_no_open_transaction(rig: StoreRig) -> None:
    batch_id, session = await rig.filled(2_000, runs_max=10), await rig.session()
    for turns in range(60):
        verb = asyncio.create_task(rig.store.stop_batch(await rig.batch(), "cancelled", now_us=rig.now_us))
        for _ in range(turns):
            await asyncio.sleep(0)
        verb.cancel()
        await asyncio.gather(verb, return_exceptions=True)
        for lease in await rig.claim(session, 20):
            assert await rig.settle(lease) == "settled"
    async with other_connection() as other:
        completed_count = await other.fetchval(
            f'SELECT completed_count FROM "{schema_of(rig)}".batch WHERE id = $1', batch_id
        )
    assert completed_count == 60 * 20


async def test_a_server_that_ends_under_load_is_used_again_when_it_is_back(
    private_server: Server, tmp_path: Path
) -> None:
    url = fresh_schema(tmp_path).replace(server().dsn, private_server.dsn)
    async with StoreRig(PostgresStore(url, DEFAULT)) as rig:
        batch_id = await rig.filled(20_000, runs_max=32)
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
            session, claim_no, words = await until_it_works(rig.session), 0, list[str]()
            while True:
                claim_no += 1
                leases = await until_it_works(partial(rig.claim, session, 100, claim_no=claim_no))
                if not leases:
                    return words
                settlements = [settlement_of(lease) for lease in leases]
                words += await until_it_works(partial(rig.store.settle, settlements, now_us=rig.now_us))
                if len(words) > 40:
                    halfway.set()

        back = asyncio.Event()
        workers = [asyncio.create_task(work()) for _ in range(4)]
        await halfway.wait()
        await asyncio.to_thread(private_server.stop, "immediate")
        await failed.wait()
        await asyncio.to_thread(private_server.start)
        back.set()
        words = [word for done in await asyncio.gather(*workers) for word in done]
        assert set(words) <= {"settled", "recorded"}
        assert failures
        _, ledger = await rig.store.batch(batch_id)
        assert (ledger.completed, ledger.waiting + ledger.leased) == (20_000, 0)


# -- event loops and closing


async def test_a_second_loop_has_connections_of_its_own(rig: StoreRig) -> None:
    session = await rig.session()
    answers: list[object] = []

    def beat() -> None:
        async def beats() -> None:
            for _ in range(20):
                answers.append(await rig.store.heartbeat(session, now_us=START_US))

        asyncio.run(beats())

    thread = threading.Thread(target=beat)
    thread.start()
    batch_id = await rig.batch()
    for number in range(20):
        await rig.append(batch_id, [number])
    await asyncio.to_thread(thread.join)
    assert len(answers) == 20
    await rig.store.close()
    await rig.store.open()


async def test_a_store_may_be_closed_twice_and_before_it_was_opened(rig: StoreRig) -> None:
    unopened = PostgresStore(f"{server().dsn}?schema=never", DEFAULT)
    await unopened.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await unopened.sessions()
    batch_id = await rig.batch()
    await rig.store.close()
    await rig.store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await rig.store.append(batch_id, chunks_of(range(3)), now_us=rig.now_us)
    await rig.store.open()
