"""Payloads in the database itself: pieces, bounds, crashed writers, and the engine that uses them by default."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from headrace import RunFailed
from headrace.app import Headrace
from headrace.compose import open_engine
from headrace.foundation.errors import InvalidInput, InvalidSetting, ObjectMissing, StoreUnavailable
from headrace.foundation.limits import DEFAULT, MIB
from headrace.foundation.settings import load
from headrace.http.trigger_api import uploads
from headrace.runtime.maintenance.upkeep import Upkeep
from headrace.store.payloads import PayloadStore, payload_key
from headrace.store.postgres import PostgresStore
from headrace.store.postgres.objects import PIECE_BYTES, DatabaseObjects
from tests.support import invariants
from tests.support.http_server import AUTH, LIMITS, line, running_server
from tests.support.store_rig import fresh_schema

BATCH = "batch_0000000000000000000000000a"
BYTES_MAX = 8 * MIB


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[tuple[PostgresStore, PayloadStore]]:
    """Open an empty store, with its payloads in the database."""
    store = PostgresStore(fresh_schema(folder), DEFAULT)
    await store.open()
    try:
        yield store, PayloadStore(DatabaseObjects(store, bytes_max=BYTES_MAX), url="postgresql:")
    finally:
        await store.close()


def key_of(data: bytes) -> str:
    return payload_key("default", BATCH, hashlib.sha256(data).hexdigest())


async def count(store: PostgresStore, table: str) -> int:
    async with (await store._pool()).borrowed() as connection:
        return int(await connection.raw.fetchval(f"SELECT count(*) FROM {store.schema}.{table}"))


@pytest.mark.parametrize("bytes_count", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 5 * PIECE_BYTES + 7, BYTES_MAX])
async def test_a_payload_of_any_size_is_read_as_it_was_written(tmp_path: Path, bytes_count: int) -> None:
    async with opened(tmp_path) as (store, payloads):
        data = os.urandom(bytes_count)
        await payloads.put(key_of(data), data)
        assert await payloads.get(key_of(data)) == data
        assert await count(store, "stored_piece") == -(-bytes_count // PIECE_BYTES)
        await payloads.check()


async def test_a_payload_of_one_byte_over_the_bound_is_refused_with_a_hint(tmp_path: Path) -> None:
    async with opened(tmp_path) as (store, payloads):
        data = bytes(BYTES_MAX + 1)
        with pytest.raises(
            InvalidInput, match=f"expected at most {BYTES_MAX} bytes of a payload in the database"
        ) as refused:
            await payloads.put(key_of(data), data)
        assert "database_object_bytes_max" in refused.value.hint
        assert await count(store, "stored_object") == 0


async def test_the_same_payload_is_stored_once_by_writers_at_the_same_time(tmp_path: Path) -> None:
    async with opened(tmp_path) as (store, payloads):
        data = os.urandom(2 * PIECE_BYTES)
        await asyncio.gather(*(payloads.put(key_of(data), data) for _ in range(8)))
        assert [stored.key async for stored in payloads.list()] == [key_of(data)]
        assert (await count(store, "stored_object"), await count(store, "stored_piece")) == (1, 2)
        (before,) = [stored.modified_us async for stored in payloads.list()]
        await payloads.put(key_of(data), data)
        assert [stored.modified_us > before async for stored in payloads.list()] == [True]


async def test_objects_are_listed_by_pages_and_deleted_with_their_batch(tmp_path: Path) -> None:
    async with opened(tmp_path) as (store, payloads):
        bodies = [b"x" * number for number in range(25)]
        for body in bodies:
            await payloads.put(key_of(body), body)
        listed = {stored.key: stored.bytes_count async for stored in payloads.list(f"default/{BATCH}", page_objects=10)}
        assert listed == {key_of(body): len(body) for body in bodies}
        assert [stored async for stored in payloads.list("def")] == []
        assert [stored async for stored in payloads.list("default/batch")] == []
        await payloads.delete([key_of(b""), key_of(b"x"), key_of(b"x"), key_of(b"never written")])
        assert await payloads.delete_batch("default", BATCH) == 23
        assert (await count(store, "stored_object"), await count(store, "stored_piece")) == (0, 0)
        with pytest.raises(ObjectMissing, match="not in the object store"):
            await payloads.get(key_of(b"xx"))


async def test_a_stream_that_fails_leaves_nothing_and_one_that_ends_replaces_what_was_there(tmp_path: Path) -> None:
    async with opened(tmp_path) as (store, payloads):

        async def pieces(*sizes: int, error: Exception | None = None) -> AsyncIterator[bytes]:
            for size in sizes:
                yield bytes(size)
            if error is not None:
                raise error

        await payloads.objects.write_stream("packets/default/a", pieces(10, PIECE_BYTES, 5))
        with pytest.raises(ConnectionResetError):
            await payloads.objects.write_stream(
                "packets/default/a", pieces(2 * PIECE_BYTES, error=ConnectionResetError("the client left"))
            )
        stored = await payloads.objects.read("packets/default/a", BYTES_MAX)
        assert stored is not None
        assert len(stored.data) == PIECE_BYTES + 15
        with pytest.raises(InvalidInput, match="expected at most"):
            await payloads.objects.write_stream("packets/default/a", pieces(*[PIECE_BYTES] * 9))
        await payloads.objects.write_stream("packets/default/a", pieces(3))
        assert (await count(store, "stored_object"), await count(store, "stored_piece")) == (1, 1)


async def test_an_object_of_a_crashed_writer_is_never_read_and_is_deleted_when_it_is_old(tmp_path: Path) -> None:
    async with opened(tmp_path) as (store, payloads):
        data = os.urandom(PIECE_BYTES)
        ((object_id,),) = await store.alone("begin_object", key=key_of(data))
        await store.alone("add_piece", object_id=object_id, piece_no=0, data=data)
        with pytest.raises(ObjectMissing):
            await payloads.get(key_of(data))
        assert [stored async for stored in payloads.list()] == []
        assert await payloads.delete_older("packets", 1) == 0, "it may still be written"
        assert await payloads.delete_older("packets", 2**62) == 1
        assert await count(store, "stored_piece") == 0


async def test_a_writer_whose_pieces_were_deleted_as_old_gets_an_error_that_can_be_repeated(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, payloads):

        async def pieces() -> AsyncIterator[bytes]:
            yield bytes(PIECE_BYTES)
            await payloads.delete_older("packets", 2**62)

        with pytest.raises(StoreUnavailable, match="took too long to write"):
            await payloads.objects.write_stream("packets/default/a", pieces())

        async def more() -> AsyncIterator[bytes]:
            async for piece in pieces():
                yield piece
            yield bytes(PIECE_BYTES)

        with pytest.raises(StoreUnavailable, match="took too long to write"):
            await payloads.objects.write_stream("packets/default/a", more())


async def test_without_an_object_store_large_payloads_and_results_are_in_the_database_and_pruned_with_their_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = Headrace("large", store=fresh_schema(tmp_path), item_bytes_max=32 * MIB)

    @app.task
    async def shout(text: str) -> str:
        return text.upper()

    async with app:
        async with app.worker():
            sizes = (1_000, 600_000, 20_000_000)
            batch = await shout.map(["a" * size for size in sizes])
            assert [outcome.output async for outcome in batch.results(timeout_s=60)] == ["A" * size for size in sizes]
        engine = await app.open()
        assert len([stored async for stored in engine.payloads.list()]) == 4
        await Upkeep(engine, lambda: "test").prune(2**62)
        assert [stored async for stored in engine.payloads.list()] == []
        assert await invariants.faults(engine.store, "default") == []
    assert list(tmp_path.iterdir()) == [], "nothing is written beside the process"


async def test_a_result_over_the_bound_fails_its_run_with_the_reason(tmp_path: Path) -> None:
    app = Headrace("large", store=fresh_schema(tmp_path), database_object_bytes_max=3 * MIB)

    @app.task
    async def grow(size: int) -> str:
        return "x" * size

    async with app, app.worker():
        run = await grow.enqueue(3 * MIB)
        with pytest.raises(RunFailed, match="expected at most 3145728 bytes of a payload in the database") as failed:
            await run.result(timeout_s=60)
        assert "configure an object store" in str(failed.value)


async def test_packets_are_uploaded_into_the_database(tmp_path: Path) -> None:
    async with (
        opened(tmp_path) as (_, payloads),
        running_server(tmp_path, "memory", payloads=payloads, limits=LIMITS) as server,
    ):
        signed = (await server.ask("PUT", "/api/v2/packets/a%2Fb.json")).json
        path = signed["presignedUrl"].partition(uploads.UPLOAD)[2]
        body = b'"' + b"p" * (2 * MIB) + b'"'
        answer = await server.ask(
            "PUT", uploads.UPLOAD + path, body, headers=AUTH | {"content-type": "application/json"}
        )
        assert answer.status == 200
        batch_id = await server.create(1)
        item = line(0, signed["storagePath"], payloadType="application/store")
        assert (await server.stream(batch_id, [item])).json["sealed"]
        run = (await server.ask("GET", f"/api/v3/runs/run_{batch_id.removeprefix('batch_')}_0")).json
        assert run["payload"] == "p" * (2 * MIB)


@pytest.mark.parametrize("objects", ["headrace.objects", "file:///srv/objects", "memory://"])
async def test_an_object_store_of_one_machine_is_refused_for_a_postgresql_store(tmp_path: Path, objects: str) -> None:
    flags = {"store": fresh_schema(tmp_path), "objects": objects}
    with pytest.raises(InvalidSetting, match="expected an object store that all machines") as refused:
        await open_engine(load(flags, {}, tmp_path))
    assert "objects_shared=true" in refused.value.hint


async def test_a_directory_that_is_shared_by_all_machines_is_taken(tmp_path: Path) -> None:
    flags = {"store": fresh_schema(tmp_path), "objects": str(tmp_path / "share"), "objects_shared": True}
    engine = await open_engine(load(flags, {}, tmp_path))
    await engine.payloads.check()
    await engine.close()
    assert (tmp_path / "share").is_dir()


async def test_items_larger_than_the_database_takes_are_refused_at_the_start(tmp_path: Path) -> None:
    flags = {"store": fresh_schema(tmp_path), "item_bytes_max": 65 * MIB}
    with pytest.raises(InvalidSetting, match="is more than the database takes") as refused:
        await open_engine(load(flags, {}, tmp_path))
    assert "object store" in refused.value.hint
