"""A store behind a pooler that gives each transaction another session. The conformance tests run there too, as
`pooled`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from headrace.foundation.errors import InvalidSetting, StoreBroken, StoreUnavailable
from headrace.foundation.limits import DEFAULT
from headrace.store.notifications import WORK
from headrace.store.postgres import PostgresNotifier, PostgresStore
from headrace.store.postgres.dsn import address
from tests.support.connection_pooler import pooled_dsn, pooler
from tests.support.notification_listener import NotificationListener
from tests.support.postgres_observer import other_connection, pid_waiting_for_a_lock, schema_of, sent_statements
from tests.support.postgres_server import server
from tests.support.store_rig import StoreRig, fresh_schema, indexes_of, pooled_store, settlement_of


@pytest.fixture
def rig(tmp_path: Path) -> StoreRig:
    """Return a rig behind the pooler."""
    return StoreRig(pooled_store(tmp_path, DEFAULT))


async def test_a_pooler_is_detected_and_gets_no_parameter_that_it_refuses(rig: StoreRig, tmp_path: Path) -> None:
    assert (await rig.store.check())["pooled"]
    assert pooler(forgets=True).refused == []
    async with StoreRig(PostgresStore(fresh_schema(tmp_path), DEFAULT)) as direct:
        assert not (await direct.store.check())["pooled"]


async def test_r7_a_hot_verb_is_one_transaction_behind_a_pooler_too(rig: StoreRig) -> None:
    await rig.filled(256 * 20)
    session = await rig.session()
    for lease in await rig.claim(session, 256):  # this connects, and takes a range of ids
        await rig.settle(lease)
    before = pooler(forgets=True).transactions_count
    leases, sent = await sent_statements(rig, lambda: rig.claim(session, 256 * 8))
    assert (len(leases), sent, pooler(forgets=True).transactions_count - before) == (8, ["claim_whole"], 1)
    settlements = [settlement_of(lease) for lease in leases]
    words, sent = await sent_statements(rig, lambda: rig.store.settle(settlements, now_us=rig.now_us))
    assert (set(words), sent, pooler(forgets=True).transactions_count - before) == ({"settled"}, ["settle_ended"], 2)


async def test_many_at_once_share_the_sessions_and_mix_up_nothing(rig: StoreRig) -> None:
    batch_ids = [await rig.filled(600, runs_max=10) for _ in range(3)]

    async def work() -> list[int]:
        return await rig.run_all(await rig.session(), runs_max=25)

    orders = await asyncio.gather(*(work() for _ in range(8)))
    assert sum(map(len, orders)) == 600 * len(batch_ids)
    assert pooler(forgets=True).most_shared > 1


async def test_settings_of_a_transaction_end_with_it(rig: StoreRig) -> None:
    await rig.filled(10)
    async with other_connection(pooled_dsn(forgets=False), statement_cache_size=0) as other:
        store = PostgresStore(f"{pooled_dsn(forgets=False)}?schema={schema_of(rig)}", DEFAULT)
        await store.open()
        await StoreRig(store).run_all(await StoreRig(store).session())
        await store.close()
        for _ in range(8):  # each of the sessions, twice
            assert await other.fetchval("SELECT current_setting('enable_seqscan')") == "on"


async def test_an_undetected_pooler_is_detected_by_missing_prepared_statements(rig: StoreRig) -> None:
    store = PostgresStore(f"{pooled_dsn()}?schema={schema_of(rig)}&pooler=none", DEFAULT)
    async with StoreRig(store) as mistaken:
        await mistaken.filled(300)
        assert await mistaken.run_all(await mistaken.session()) == list(range(300))
        assert store.address.pooler == "transaction"
        assert (await store.check())["pooled"]


async def test_the_pooler_option_of_the_url_is_checked(tmp_path: Path) -> None:
    async with StoreRig(PostgresStore(f"{fresh_schema(tmp_path)}&pooler=transaction", DEFAULT)) as rig:
        await rig.filled(10)
        assert (await rig.store.check())["pooled"]
    with pytest.raises(InvalidSetting, match=r"expected pooler=auto.none.transaction"):
        PostgresStore("postgresql://host/db?pooler=session", DEFAULT)


async def test_a_schema_is_migrated_through_a_pooler_without_a_direct_url(tmp_path: Path) -> None:
    async with StoreRig(PostgresStore(fresh_schema(tmp_path, pooled_dsn()), DEFAULT)) as rig:
        await rig.filled(10)


async def test_a_parameter_that_the_pooler_refuses_is_named(tmp_path: Path) -> None:
    store = PostgresStore(f"{fresh_schema(tmp_path, pooled_dsn(forgets=False))}&work_mem=1", DEFAULT)
    with pytest.raises(StoreBroken, match="unsupported startup parameter: work_mem") as refused:
        await store.open()
    assert "ignore_startup_parameters" in refused.value.hint


async def test_r11_notifications_are_sent_through_a_pooler_and_received_on_a_direct_connection(tmp_path: Path) -> None:
    schema = address(fresh_schema(tmp_path)).schema
    behind = PostgresNotifier(address(pooled_dsn()), schema)
    listener = NotificationListener(fresh_schema(tmp_path), schema)
    await listener.listening()
    with behind.awaited():
        behind.notify(WORK)
        await listener.until(lambda: listener.received == [WORK])
        assert not behind.is_listening
    unnoticed = PostgresNotifier(address(f"{pooled_dsn()}?pooler=none"), schema)
    unnoticed.notify(WORK)  # its session is reset, it receives nothing from itself, and it only sends from then on
    await listener.until(lambda: listener.received == [WORK, WORK])
    assert not unnoticed.is_listening
    for notifier in (behind, unnoticed, listener.notifier):
        await notifier.close()


# -- statements with a time limit


@pytest.mark.parametrize("is_pooled", [False, True])
async def test_a_statement_that_the_server_cancels_is_reported_and_may_be_repeated(
    tmp_path: Path, is_pooled: bool
) -> None:
    schema = address(fresh_schema(tmp_path)).schema
    async with other_connection() as admin, other_connection() as watcher:
        await admin.execute(f"CREATE ROLE {schema} LOGIN; CREATE SCHEMA {schema} AUTHORIZATION {schema}")
        await admin.execute(f"ALTER ROLE {schema} SET statement_timeout = '300ms'")
        dsn = server().dsn.replace("postgres@", f"{schema}@")
        pooler_word = "&pooler=transaction" if is_pooled else ""
        async with StoreRig(PostgresStore(f"{dsn}?schema={schema}{pooler_word}", DEFAULT)) as rig:
            await rig.filled(256)
            (lease,) = await rig.claim(await rig.session())
            held = admin.transaction()
            await held.start()
            await admin.execute(f'SELECT 1 FROM "{schema}".span FOR UPDATE')
            settling = asyncio.create_task(rig.settle(lease))
            await pid_waiting_for_a_lock(rig, watcher)
            with pytest.raises(StoreUnavailable, match="cancelled a statement") as ended:
                await settling
            assert ended.value.retryable
            assert "statement_timeout" in ended.value.hint
            await held.rollback()
            assert await rig.settle(lease) == "settled"
            assert indexes_of([lease]) == list(range(256))
