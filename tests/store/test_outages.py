"""Outages of a PostgreSQL server: no free connection, a full disk, a crash."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg
import pytest

from headrace.app import Headrace
from headrace.cli.administration.checks import CheckFailed
from headrace.cli.administration.doctor import durability
from headrace.compose import open_engine
from headrace.foundation.errors import HeadraceError, StoreUnavailable, StoreUnreachable
from headrace.foundation.limits import DEFAULT
from headrace.foundation.settings import load
from headrace.store.postgres import PostgresStore
from headrace.store.postgres.dsn import address
from headrace.store.postgres.errors import store_error
from tests.support import invariants
from tests.support.faulty_proxy import FaultyProxy
from tests.support.postgres_observer import other_connection
from tests.support.postgres_server import Server, server
from tests.support.store_rig import StoreRig, fresh_schema

DISK_MIB = 96
FILL = b"x" * 200_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a small disk, which is soon full."""
    place = Path("/var/tmp") / f"headrace-disk-{tmp_path.name}-{os.getpid()}"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=755", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        place.rmdir()
        print(f"skipped: a small disk can't be mounted here: {mounted.stderr.strip()}")
        pytest.skip(f"a small disk can't be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
    place.rmdir()


async def test_a_full_disk_is_reported_and_no_acknowledged_write_is_lost(small_disk: Path, tmp_path: Path) -> None:
    busy_server = Server(place=small_disk)
    busy_server.stop("fast")
    busy_server.start(max_wal_size="32MB", min_wal_size="32MB", wal_recycle="off")
    try:
        async with StoreRig(PostgresStore(fresh_schema(tmp_path, busy_server.dsn), DEFAULT)) as rig:
            batch_id = await rig.batch()
            acknowledged_count, failure = 0, None
            while failure is None:
                assert acknowledged_count < 10 * DISK_MIB, "the disk is never full"
                try:
                    await rig.append(batch_id, [acknowledged_count], payload=lambda index: FILL)
                    acknowledged_count += 1
                except StoreUnavailable as error:
                    failure = error
            assert failure.retryable
            assert "disk" in str(failure) or "the server is running" in str(failure), failure
            # Without space for its log the server ends; with more space it recovers.
            subprocess.run(["mount", "-o", f"remount,size={3 * DISK_MIB}m", str(small_disk)], check=True)
            await running(busy_server)
            batch, ledger = await rig.store.batch(batch_id)
            assert ledger.waiting == batch.received_count >= acknowledged_count
            # the last append may be stored without an acknowledgement
            assert batch.received_count <= acknowledged_count + 1
            await rig.append(batch_id, range(acknowledged_count, acknowledged_count + 5))
            await rig.store.seal(batch_id, None, now_us=rig.now_us)
            assert len(await rig.run_all(await rig.session())) == acknowledged_count + 5
            await rig.check()
    finally:
        busy_server.remove()


async def running(stopped_server: Server) -> None:
    """Return when the server answers; start it if it has ended."""
    try:
        async with other_connection(stopped_server.dsn) as connection:
            await connection.fetchval("SELECT 1")
    except Exception:  # noqa: BLE001 - any error means that it is not up
        await asyncio.to_thread(stopped_server.stop_if_running)
        await asyncio.to_thread(stopped_server.start)


async def test_backends_terminated_in_a_stream_lose_and_double_nothing(tmp_path: Path) -> None:
    url = fresh_schema(tmp_path)
    schema = address(url).schema
    app = Headrace("stream")
    ran: list[int] = []

    @app.task
    async def note(number: int) -> int:
        ran.append(number)
        return number

    app.use(load({"store": url}, {}, tmp_path))
    killed_count = 0

    async def items() -> AsyncIterator[int]:
        nonlocal killed_count
        async with other_connection() as killer:
            for number in range(20_000):
                if number % 1_000 == 999:
                    killed_count += await killer.fetchval(
                        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query LIKE $1 "
                        "AND pid <> pg_backend_pid()",
                        f'%"{schema}"%',
                    )
                yield number

    async with app, app.worker():
        batch = await note.map(items())
        summary = await batch.wait(timeout_s=60)
        assert summary.ledger.completed == 20_000
        assert [outcome.output async for outcome in batch.results()] == list(range(20_000))
        engine = await app.open()
        assert await invariants.faults(engine.store) == []
    assert killed_count >= 3
    assert set(ran) == set(range(20_000))


async def test_a_store_without_a_free_connection_reports_it_and_recovers(tmp_path: Path) -> None:
    full_server = Server()
    full_server.stop("fast")
    full_server.start(superuser_reserved_connections=0, autovacuum="off", max_connections=6)
    try:
        async with StoreRig(PostgresStore(fresh_schema(tmp_path, full_server.dsn), DEFAULT)) as rig:
            batch_id = await rig.batch()
            async with AsyncExitStack() as others:
                for _ in range(5):
                    await others.enter_async_context(other_connection(full_server.dsn))
                # The one connection serves one operation at a time; two at once need a second connection.
                results = await asyncio.gather(
                    *(rig.append(batch_id, [index]) for index in range(4)), return_exceptions=True
                )
                failures = [error for error in results if isinstance(error, HeadraceError)]
                assert failures
                assert len(failures) < 4
                assert all(isinstance(error, StoreUnavailable) and error.retryable for error in failures)
                assert all("max_connections" in error.hint for error in failures)
            for index in range(4):
                await rig.append(batch_id, [index])
            _, ledger = await rig.store.batch(batch_id)
            assert ledger.waiting == 4
    finally:
        full_server.remove()


async def test_doctor_reports_the_settings_that_durability_depends_on(tmp_path: Path) -> None:
    url = fresh_schema(tmp_path)
    for word, is_well in (("", True), ("&synchronous_commit=off", False)):
        engine = await open_engine(load({"store": url + word}, {}, tmp_path))
        try:
            if is_well:
                assert await durability(engine) == "fsync on, synchronous_commit on"
            else:
                with pytest.raises(CheckFailed, match="synchronous_commit is off") as unwell:
                    await durability(engine)
                assert "turn both on" in unwell.value.hint
        finally:
            await engine.close()


async def test_an_idle_connection_whose_backend_was_terminated_is_replaced_without_an_error(tmp_path: Path) -> None:
    async with (
        FaultyProxy(server().dsn) as proxy,
        StoreRig(PostgresStore(fresh_schema(tmp_path, proxy.dsn), DEFAULT)) as rig,
    ):
        batch_id = await rig.batch()
        for index in range(3):
            await proxy.terminate_backends()
            await rig.append(batch_id, [index])
            await proxy.terminate_backends()
            await rig.store.batch(batch_id)
        assert (await rig.store.batch(batch_id))[1].waiting == 3


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress"),
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        ConnectionResetError(104, "Connection reset by peer"),
    ],
)
def test_a_lost_connection_is_reported_as_a_lost_connection(error: Exception) -> None:
    reported = store_error(error, "PostgreSQL at host:5432/jobs")
    assert isinstance(reported, StoreUnreachable)
    assert reported.message == "PostgreSQL at host:5432/jobs did not answer: the connection was lost"
    assert reported.__cause__ is error
    assert "tried again" not in str(reported)
