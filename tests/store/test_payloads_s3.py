"""Payloads in a real S3 server, and the errors of a server that fails."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import obstore
import pytest

from headrace.app import Headrace
from headrace.foundation.errors import InvalidSetting, ObjectMissing, StoreUnavailable
from headrace.store.object_store import ObjectStoreBackend, open_payloads
from headrace.store.payloads import PayloadStore, payload_key
from tests.support import invariants
from tests.support.s3_server import CREDENTIALS, ObjectStoreProxy, object_store_proxy, s3

BATCH = "batch_0000000000000000000000000a"
QUICK: dict[str, Any] = {"retries": 2, "retry_s": 5, "timeout_s": 1}


def key_of(data: bytes) -> str:
    return payload_key("default", BATCH, hashlib.sha256(data).hexdigest())


@pytest.fixture
def prefix() -> str:
    return f"test-{secrets.token_hex(8)}"


@pytest.fixture
def payloads(prefix: str) -> PayloadStore:
    return open_payloads(s3().url(prefix))


@asynccontextmanager
async def behind_weather(prefix: str, **bounds: int) -> AsyncIterator[tuple[PayloadStore, ObjectStoreProxy]]:
    async with object_store_proxy() as before:
        yield open_payloads(s3().url(prefix, endpoint=before.endpoint, **(QUICK | bounds))), before


async def test_a_stored_payload_is_read_listed_and_deleted(payloads: PayloadStore) -> None:
    bodies = [b"", b"x", bytes(range(256)) * 8_192]
    for data in bodies:
        await payloads.put(key_of(data), data)
        await payloads.put(key_of(data), data)
        assert await payloads.get(key_of(data)) == data
    assert {listed.key async for listed in payloads.list()} == {key_of(data) for data in bodies}
    await payloads.delete([key_of(b"x"), key_of(b"x")])
    assert await payloads.delete_batch("default", BATCH) == 2
    assert [listed async for listed in payloads.list()] == []
    await payloads.check()


async def test_a_changed_object_is_not_returned_as_the_payload(payloads: PayloadStore) -> None:
    data = b"as it was written"
    await payloads.put(key_of(data), data)
    assert isinstance(payloads.objects, ObjectStoreBackend)
    await obstore.put_async(payloads.objects.store, key_of(data), b"as another program left it")
    with pytest.raises(ObjectMissing, match="has other bytes"):
        await payloads.get(key_of(data))


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut"])
async def test_a_request_that_fails_is_tried_again(fault: str, prefix: str) -> None:
    data = b"in any weather"
    async with behind_weather(prefix) as (payloads, before):
        before.faults = [fault, fault]
        await payloads.put(key_of(data), data)
        before.faults = [fault, fault]
        assert await payloads.get(key_of(data)) == data
        assert [request.split()[0] for request in before.requests] == ["PUT"] * 3 + ["GET"] * 3


async def test_a_server_that_does_not_answer_is_reported_and_no_partial_object_is_left(prefix: str) -> None:
    data = b"in bad weather"
    async with behind_weather(prefix) as (payloads, before):
        before.faults = ["503"] * 100
        with pytest.raises(StoreUnavailable, match="could not be written") as caught:
            await payloads.put(key_of(data), data)
        assert caught.value.retryable
        with pytest.raises(StoreUnavailable, match="could not be read"):
            await payloads.get(key_of(data))
        with pytest.raises(StoreUnavailable, match="could not be listed"):
            [listed async for listed in payloads.list()]
        before.faults.clear()
        with pytest.raises(ObjectMissing):
            await payloads.get(key_of(data))


async def test_a_request_to_a_hanging_server_ends_at_its_time_limit(prefix: str) -> None:
    async with behind_weather(prefix, retries=0) as (payloads, before):
        before.faults = ["hang"]
        with pytest.raises(StoreUnavailable, match="could not be read"):
            await payloads.get(key_of(b"x"))
        assert len(before.requests) == 1


async def test_a_truncated_response_is_not_returned_as_the_payload(prefix: str) -> None:
    data = bytes(100_000)
    async with behind_weather(prefix, retries=0) as (payloads, before):
        await payloads.put(key_of(data), data)
        before.faults = ["truncate", "truncate"]
        with pytest.raises(StoreUnavailable, match="could not be read"):
            await payloads.get(key_of(data))
        before.faults.clear()
        assert await payloads.get(key_of(data)) == data


async def test_a_missing_bucket_is_not_reported_as_a_missing_payload(prefix: str) -> None:
    payloads = open_payloads(s3().url(prefix, bucket=f"none-{secrets.token_hex(6)}", **QUICK))
    with pytest.raises(StoreUnavailable, match="the server answered NoSuchBucket") as caught:
        await payloads.get(key_of(b"x"))
    assert "create it" in caught.value.hint


async def test_unknown_credentials_are_reported(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = s3().url(prefix)
    for name in CREDENTIALS:
        monkeypatch.setenv(name, "us-east-1" if name == "AWS_REGION" else "wrong")
    payloads = open_payloads(url)
    with pytest.raises(StoreUnavailable) as caught:
        await payloads.put(key_of(b"x"), b"x")
    assert "credentials" in caught.value.hint
    assert "wrong" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3:///prefix", "name a bucket"),
        ("s3://bucket/prefix?endpont=x", "unknown option endpont"),
        ("s3://bucket/prefix?retries=101", "retries: expected an integer from 0 to 100"),
        ("s3://bucket/prefix?retries=many", "retries: expected an integer"),
        ("s3://bucket/prefix?timeout_s=0", "timeout_s: expected an integer from 1"),
        ("gs://bucket/prefix?endpoint=http://x", "expected the URL of an object store"),
        ("ftp://bucket/prefix", "payloads are stored in"),
    ],
)
def test_a_url_with_a_mistake_is_refused_by_name(url: str, message: str) -> None:
    with pytest.raises(InvalidSetting, match="(?s)" + message):
        open_payloads(url)


async def test_a_run_without_its_payload_fails_with_the_reason_and_the_others_run(prefix: str, tmp_path: Path) -> None:
    app = Headrace("s3", store=f"sqlite:///{tmp_path}/a.db", objects=s3().url(prefix), inline_bytes_max=64)

    @app.task
    async def size(item: str) -> int:
        return len(item)

    async with app:
        batch = await size.map(["x" * 100, "y" * 200, "z"])
        engine = await app.open()
        stored = {listed.bytes_count: listed.key async for listed in engine.payloads.list()}
        assert sorted(stored) == [102, 202], "small results stay in the row"
        await engine.payloads.delete([stored[102]])
        async with app.worker():
            outcomes = [outcome async for outcome in batch.results()]
        assert outcomes[0].failure is not None
        assert "not in the object store" in outcomes[0].failure.message
        assert [outcome.output for outcome in outcomes[1:]] == [200, 1]
        assert await invariants.faults(engine.store, "default") == []


async def test_a_batch_goes_on_through_an_outage_of_the_object_store(prefix: str, tmp_path: Path) -> None:
    async with object_store_proxy() as before:
        url = s3().url(prefix, endpoint=before.endpoint, retries=0, timeout_s=5)
        app = Headrace("s3", store=f"sqlite:///{tmp_path}/a.db", objects=url, inline_bytes_max=64)

        @app.task
        async def size(item: str) -> str:
            return item * 2

        async with app:
            batch = await size.map(["x" * 100, "y" * 200])
            before.faults = ["503", "cut", "500"]
            async with app.worker():
                outcomes = [outcome.output async for outcome in batch.results()]
            assert outcomes == ["x" * 200, "y" * 400]
            assert not before.faults


async def test_requests_are_bounded(prefix: str) -> None:
    async with object_store_proxy() as before:
        payloads = open_payloads(s3().url(prefix, endpoint=before.endpoint, **QUICK), concurrency=3)
        before.faults = ["hang"] * 10
        waiting = [asyncio.create_task(payloads.get(key_of(b"%d" % n))) for n in range(10)]
        while len(before.requests) < 3:
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(before.requests) == 3
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
