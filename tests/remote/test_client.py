"""The client over real sockets: it stores each item once, also when the network loses requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import Client
from headrace.foundation.errors import ClientFault, HeadraceError, StoreUnavailable
from headrace.http.requests.auth import new_key
from headrace.remote import client as module
from headrace.remote.client import SendProgress
from headrace.remote.connection import ATTEMPTS
from tests.support.http_server import KEY, RecordingClock, ResponseFaults, ServerUnderTest, running_server

ITEMS = "/items"


def client_of(server: ServerUnderTest, clock: RecordingClock | None = None) -> Client:
    return Client(server.server.url, KEY, clock=clock or RecordingClock())


async def held(server: ServerUnderTest, batch_id: str) -> tuple[str, int, int]:
    batch, ledger = await server.engine.store.batch(batch_id)
    return batch.state, batch.received_count, ledger.missing


async def test_items_of_an_iterator_are_sent_sealed_run_and_read(tmp_path: Path) -> None:
    progress: list[SendProgress] = []

    async def source() -> AsyncIterator[dict[str, int]]:
        for index in range(300):
            yield {"n": index}

    async with running_server(tmp_path, "sqlite") as server, client_of(server) as client:
        sent = await client.send("task", source(), on_progress=progress.append, options={"queue": {"name": "q"}})
        assert sent.count == 300
        assert progress[-1][:2] == (sent.id, 300)
        assert await server.work() == 300
        lines = [line async for line in client.results(sent.id)]
        assert [(line.index, line.ok, line.output) for line in lines] == [(n, True, n) for n in range(300)]
        assert [line.index async for line in client.results(sent.id, from_index=298)] == [298, 299]


async def test_the_source_is_read_while_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PORTION_ITEMS", 10)
    ahead: list[int] = []
    servers: list[ServerUnderTest] = []

    def source() -> Iterator[int]:
        for index in range(100):
            received = list(servers[0].engine.store._tables.batches.values())  # type: ignore[attr-defined]  # memory's own
            ahead.append(index - received[0].received_count)
            yield index

    async with running_server(tmp_path, "memory") as server, client_of(server) as client:
        servers.append(server)
        assert (await client.send("task", source())).count == 100
        assert max(ahead) <= 10 + module.UPLOADS + 1, "one portion, and the items being uploaded for it"


@pytest.mark.parametrize("fault", [408, 429, 500, 502, 503, "lost", "cut"])
async def test_one_failed_request_is_retried_and_nothing_is_doubled(tmp_path: Path, fault: Any) -> None:
    faults, clock = ResponseFaults(ITEMS, fault), RecordingClock()
    async with running_server(tmp_path, "sqlite", faults=faults) as server, client_of(server, clock) as client:
        sent = await client.send("task", range(200))
        assert await held(server, sent.id) == ("sealed", 200, 0)
        assert faults.requests_count == (1 if fault == "lost" else 2), "stored items are not sent again"
        assert len(clock.slept) == 1


async def test_the_client_fails_after_five_attempts_with_growing_waits(tmp_path: Path) -> None:
    faults, clock = ResponseFaults(ITEMS, *[500] * 9), RecordingClock()
    async with running_server(tmp_path, "sqlite", faults=faults) as server, client_of(server, clock) as client:
        with pytest.raises(HeadraceError):
            await client.send("task", range(3))
        assert faults.requests_count == ATTEMPTS == 5
        assert len(clock.slept) == 4
        for number, slept in enumerate(clock.slept):
            assert 2**number <= slept <= 2 * 2**number


async def test_a_missing_response_is_no_error_when_all_items_are_stored(tmp_path: Path) -> None:
    faults = ResponseFaults(ITEMS, *["lost"] * 9)
    async with running_server(tmp_path, "sqlite", faults=faults) as server, client_of(server) as client:
        sent = await client.send("task", range(50))
        assert await held(server, sent.id) == ("sealed", 50, 0)
        assert faults.requests_count == 1
    faults = ResponseFaults("/seal", *["lost"] * 9)
    async with running_server(tmp_path, "sqlite", faults=faults) as server, client_of(server) as client:
        sent = await client.send("task", range(50))
        assert await held(server, sent.id) == ("sealed", 50, 0)


async def test_an_error_that_a_retry_cannot_fix_is_not_retried(tmp_path: Path) -> None:
    faults, clock = ResponseFaults(ITEMS, 422), RecordingClock()
    async with running_server(tmp_path, "sqlite", faults=faults) as server, client_of(server, clock) as client:
        with pytest.raises(ClientFault):
            await client.send("task", range(3))
        assert (faults.requests_count, clock.slept) == (1, [])


async def test_retry_after_is_honoured(tmp_path: Path) -> None:
    faults, clock = ResponseFaults(ITEMS, {"retry-after": "7"}), RecordingClock()
    async with running_server(tmp_path, "sqlite", faults=faults) as server, client_of(server, clock) as client:
        await client.send("task", range(3))
        assert clock.slept == [7.0]


async def test_an_unreachable_server_is_named_in_the_error(tmp_path: Path) -> None:
    clock = RecordingClock()
    async with Client("http://127.0.0.1:9", KEY, clock=clock) as client:
        with pytest.raises(StoreUnavailable):
            await client.send("task", range(3))
    assert len(clock.slept) == 4


async def test_a_send_with_a_batch_key_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PORTION_ITEMS", 10)

    def broken() -> Iterator[int]:
        yield from range(55)
        raise OSError("the source failed")

    faults = ResponseFaults(ITEMS)
    async with running_server(tmp_path, "sqlite", faults=faults) as server, client_of(server) as client:
        with pytest.raises(OSError, match="source failed"):
            await client.send("task", broken(), batch_key="nightly")
        first = faults.requests_count
        sent = await client.send("task", range(100), batch_key="nightly")
        assert await held(server, sent.id) == ("sealed", 100, 0)
        assert faults.requests_count - first <= 6, "stored items were skipped"
        again = await client.send("task", range(100), batch_key="nightly")
        assert (again.id, again.count) == (sent.id, 100)


async def test_large_items_are_uploaded_first(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server, client_of(server) as client:
        sent = await client.send("task", ["small", "x" * 200_000, "small again"])
        runs = [(await client.run(f"run_{sent.id.removeprefix('batch_')}_{index}"))["payload"] for index in range(3)]
        assert runs == ["small", "x" * 200_000, "small again"]


async def test_results_resume_after_a_broken_connection(tmp_path: Path) -> None:
    faults = ResponseFaults("/results", "lost", None, "lost")
    async with running_server(tmp_path, "sqlite", faults=faults) as server, client_of(server) as client:
        sent = await client.send("task", range(20))
        await server.work()
        assert [line.index async for line in client.results(sent.id)] == list(range(20))
        assert faults.requests_count == 2


async def test_single_runs_batches_and_interventions(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server, client_of(server) as client:
        run_id = await client.enqueue("task", {"a": 1}, idempotencyKey="one", tags=["t"])
        assert await client.enqueue("task", {"a": 2}, idempotencyKey="one") == run_id
        assert (await client.run(run_id))["payload"] == {"a": 1}
        sent = await client.send("task", range(3))
        assert await client.missing(sent.id) == []
        await server.work("f")
        assert (await client.batch(sent.id))["failed"] == 3
        assert await client.redrive(sent.id, [0]) == 1
        assert await client.redrive(sent.id) == 2
        assert (await client.cancel(sent.id))["state"] == "cancelled"


async def test_a_key_without_the_scope_gets_an_error_that_names_it(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        secret, stored = new_key("default", ("batches:read",), "", 1)
        await server.engine.administration.add_key(stored, now_us=1)
        async with Client(server.server.url, secret, clock=RecordingClock()) as client:
            with pytest.raises(ClientFault, match="batches:write"):
                await client.send("task", range(3))


async def test_the_same_client_serves_code_that_is_not_async(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:

        def work() -> list[Any]:
            with Client(server.server.url, KEY).sync as client:
                sent = client.send("task", range(5))
                client.enqueue("task", 1)
                asyncio.run_coroutine_threadsafe(server.work(), loop).result()
                return [line.output for line in client.results(sent.id)]

        loop = asyncio.get_running_loop()
        assert await asyncio.to_thread(work) == [0, 1, 2, 3, 4]
