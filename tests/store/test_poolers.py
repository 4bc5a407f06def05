"""Behind a pooler that gives each transaction another session: the conformance suite runs there too, as `pooled`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from headrace.foundation.errors import InvalidSetting, StoreBroken, StoreUnavailable
from headrace.foundation.limits import DEFAULT
from headrace.store.postgres import PostgresNotifier, PostgresStore
from headrace.store.postgres.dsn import address
from headrace.store.protocol import WORK
from tests.support.connection_pooler import pooled_dsn, pooler
from tests.support.notification_listener import Ear
from tests.support.postgres_observer import beside, schema_of, statements_of, waiting_for_a_lock
from tests.support.postgres_server import server
from tests.support.store_rig import World, fresh_schema, indexes_of, pooled_store, settlement_of


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A world behind the pooler."""
    return World(pooled_store(tmp_path, DEFAULT))


async def test_a_pooler_is_noticed_and_told_nothing_that_it_refuses(world: World, tmp_path: Path) -> None:
    assert (await world.store.check())["pooled"]
    assert pooler(forgets=True).refused == []
    async with World(PostgresStore(fresh_schema(tmp_path), DEFAULT)) as direct:
        assert not (await direct.store.check())["pooled"]


async def test_r7_a_hot_verb_is_one_transaction_behind_a_pooler_too(world: World) -> None:
    await world.filled(256 * 20)
    session = await world.session()
    for lease in await world.claim(session, 256):  # connects, and takes a range of ids
        await world.settle(lease)
    before = pooler(forgets=True).transactions_count
    leases, sent = await statements_of(world, lambda: world.claim(session, 256 * 8))
    assert (len(leases), sent, pooler(forgets=True).transactions_count - before) == (8, ["claim_whole"], 1)
    told = [settlement_of(lease) for lease in leases]
    words, sent = await statements_of(world, lambda: world.store.settle(told, now_us=world.now_us))
    assert (set(words), sent, pooler(forgets=True).transactions_count - before) == ({"settled"}, ["settle_ended"], 2)


async def test_many_at_once_share_the_sessions_and_mix_up_nothing(world: World) -> None:
    batch_ids = [await world.filled(600, runs_max=10) for _ in range(3)]

    async def work() -> list[int]:
        return await world.run_all(await world.session(), runs_max=25)

    orders = await asyncio.gather(*(work() for _ in range(8)))
    assert sum(map(len, orders)) == 600 * len(batch_ids)
    assert pooler(forgets=True).most_shared > 1


async def test_settings_of_a_transaction_are_gone_with_it(world: World) -> None:
    await world.filled(10)
    async with beside(pooled_dsn(forgets=False), statement_cache_size=0) as other:
        store = PostgresStore(f"{pooled_dsn(forgets=False)}?schema={schema_of(world)}", DEFAULT)
        await store.open()
        await World(store).run_all(await World(store).session())
        await store.close()
        for _ in range(8):  # each of the sessions, twice
            assert await other.fetchval("SELECT current_setting('enable_seqscan')") == "on"


async def test_a_pooler_that_was_not_noticed_is_noticed_by_what_it_forgets(world: World) -> None:
    store = PostgresStore(f"{pooled_dsn()}?schema={schema_of(world)}&pooler=none", DEFAULT)
    async with World(store) as mistaken:
        await mistaken.filled(300)
        assert await mistaken.run_all(await mistaken.session()) == list(range(300))
        assert store.address.pooler == "transaction"
        assert (await store.check())["pooled"]


async def test_a_pooler_may_be_named(tmp_path: Path) -> None:
    async with World(PostgresStore(f"{fresh_schema(tmp_path)}&pooler=transaction", DEFAULT)) as world:
        await world.filled(10)
        assert (await world.store.check())["pooled"]
    with pytest.raises(InvalidSetting, match=r"expected pooler=auto.none.transaction"):
        PostgresStore("postgresql://host/db?pooler=session", DEFAULT)


async def test_a_schema_is_made_through_a_pooler_where_there_is_no_other_way(tmp_path: Path) -> None:
    async with World(PostgresStore(fresh_schema(tmp_path, pooled_dsn()), DEFAULT)) as world:
        await world.filled(10)


async def test_a_parameter_that_the_pooler_refuses_is_named(tmp_path: Path) -> None:
    store = PostgresStore(f"{fresh_schema(tmp_path, pooled_dsn(forgets=False))}&work_mem=1", DEFAULT)
    with pytest.raises(StoreBroken, match="unsupported startup parameter: work_mem") as refused:
        await store.open()
    assert "ignore_startup_parameters" in refused.value.hint


async def test_r11_news_is_told_through_a_pooler_and_heard_past_it(tmp_path: Path) -> None:
    schema = address(fresh_schema(tmp_path)).schema
    behind = PostgresNotifier(address(pooled_dsn()), schema)
    ear = Ear(fresh_schema(tmp_path), schema)
    await ear.listening()
    with behind.awaited():
        behind.tell(WORK)
        await ear.until(lambda: ear.heard == [WORK])
        assert not behind.is_listening
    unnoticed = PostgresNotifier(address(f"{pooled_dsn()}?pooler=none"), schema)
    unnoticed.tell(WORK)  # it listens on a session that forgets it, does not hear itself, and only tells from then on
    await ear.until(lambda: ear.heard == [WORK, WORK])
    assert not unnoticed.is_listening
    for notifier in (behind, unnoticed, ear.notifier):
        await notifier.close()


# -- statements that may not take long


@pytest.mark.parametrize("is_pooled", [False, True])
async def test_a_statement_that_the_server_ends_is_told_and_may_be_repeated(tmp_path: Path, is_pooled: bool) -> None:
    schema = address(fresh_schema(tmp_path)).schema
    async with beside() as admin, beside() as watcher:
        await admin.execute(f"CREATE ROLE {schema} LOGIN; CREATE SCHEMA {schema} AUTHORIZATION {schema}")
        await admin.execute(f"ALTER ROLE {schema} SET statement_timeout = '300ms'")
        dsn = server().dsn.replace("postgres@", f"{schema}@")
        pooler_word = "&pooler=transaction" if is_pooled else ""
        async with World(PostgresStore(f"{dsn}?schema={schema}{pooler_word}", DEFAULT)) as world:
            await world.filled(256)
            (lease,) = await world.claim(await world.session())
            held = admin.transaction()
            await held.start()
            await admin.execute(f'SELECT 1 FROM "{schema}".span FOR UPDATE')
            settling = asyncio.create_task(world.settle(lease))
            await waiting_for_a_lock(world, watcher)
            with pytest.raises(StoreUnavailable, match="cancelled a statement") as ended:
                await settling
            assert ended.value.retryable
            assert "statement_timeout" in ended.value.hint
            await held.rollback()
            assert await world.settle(lease) == "settled"
            assert indexes_of([lease]) == list(range(256))
