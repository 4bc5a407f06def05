"""Results and claims over the network are bounded by bytes, however many runs a client requests."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from headrace.core.pack import pack
from headrace.core.span import Settlement, encode_uint16s
from headrace.foundation.limits import KIB, MIB
from headrace.grpc.messages import broker_pb2 as wire
from headrace.http.requests.long_poll import RUNS_MAX
from headrace.store.protocol import Claim
from tests.support.grpcio_client import channel
from tests.support.http_server import AUTH, LIMITS, ServerUnderTest, line, running_server

RESULTS = 120
RESULT_BYTES = 400_000
READERS = 4
PAGE_BYTES = 2 * MIB
CLAIM_BYTES = 4 * MIB
SMALL = LIMITS.replaced(results_page_bytes_max=PAGE_BYTES, claim_bytes_max=CLAIM_BYTES)


@pytest.fixture(params=("sqlite", "postgres"))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def completed(server: ServerUnderTest) -> str:
    """Fill a batch and complete its runs with large results, as a worker writes them: in parts of a megabyte."""
    batch_id = await server.filled(RESULTS)
    session = await server.ask("POST", "/v1/sessions", {"host": "far", "pid": 7})
    store, now_us = server.engine.store, server.engine.clock.now_us()
    claim = Claim(
        session_id=session.json["id"],
        claim_no=1,
        environment="default",
        tasks=["task"],
        queues=None,
        runs_max=RUNS_MAX,
        key_id=(await server.engine.maintenance.sessions())[0].key_id,
    )
    for lease in await store.claim(claim, now_us=now_us):
        for part_no, start in enumerate(range(0, len(lease.span_slots), 2)):
            slots = lease.span_slots[start : start + 2]
            settlement = Settlement(
                span_id=lease.span_id,
                token=lease.token,
                part_no=part_no,
                span_slots=encode_uint16s(slots),
                codes=b"c" * len(slots),
                results=pack([b'"%s"' % (b"x" * RESULT_BYTES)] * len(slots)),
            )
            assert await store.settle([settlement], now_us=now_us) == ["settled"]
    return batch_id


async def streamed(server: ServerUnderTest, batch_id: str, started: asyncio.Event) -> int:
    """Read the results of a batch over HTTP, slowly: nothing is read until `started`. Returns how many there are."""
    peer = server.peer()
    await peer.head("GET", f"/v1/batches/{batch_id}/results", AUTH)
    await started.wait()
    assert peer.reader is not None
    await peer.reader.readuntil(b"\r\n\r\n")
    lines_count = 0
    while (piece := await peer.piece()) is not None:
        lines_count += piece.count(b"\n")
    return lines_count


async def test_readers_of_large_results_hold_no_more_than_their_pages(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind, limits=SMALL) as server:
        batch_id = await completed(server)
        started = asyncio.Event()
        tracemalloc.start()
        try:
            readers = [asyncio.create_task(streamed(server, batch_id, started)) for _ in range(READERS)]
            started.set()
            assert await asyncio.gather(*readers) == [RESULTS] * READERS
            _, held_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        total_bytes = RESULTS * RESULT_BYTES * READERS
        assert held_bytes < READERS * 5 * PAGE_BYTES < total_bytes / 4, f"{held_bytes / MIB:.0f} MiB"


async def test_the_library_holds_one_page_of_large_results(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind, limits=SMALL) as server:
        batch_id = await completed(server)
        page = await server.engine.store.outcomes(batch_id, 0, RUNS_MAX)
        assert 0 < sum(len(outcome.result) for outcome in page) <= PAGE_BYTES
        indexes = []
        index = 0
        while page := await server.engine.store.outcomes(batch_id, index, RUNS_MAX):
            assert sum(len(outcome.result) for outcome in page) <= PAGE_BYTES
            indexes += [outcome.index for outcome in page]
            index = indexes[-1] + 1
        assert indexes == list(range(RESULTS))


async def claim_many(client: Any, session: str, claim_no: int, runs_max: int = RUNS_MAX) -> bytes:
    """Call ClaimMany; return the response as it was received."""
    call = client.unary_unary(
        "/headrace.v1.Broker/ClaimMany",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=bytes,
    )
    request = wire.ClaimManyRequest(session=session, claim_no=claim_no, tasks=["task"], runs_max=runs_max)
    return bytes(await call(request, metadata=tuple(AUTH.items())))


async def grpc_session(server: ServerUnderTest) -> str:
    return str((await server.ask("POST", "/v1/sessions", {"host": "far", "pid": 7})).json["id"])


async def test_a_grpc_claim_of_many_runs_stays_under_the_documented_bound(tmp_path: Path, kind: str) -> None:
    runs_count, payload = 15_360, "x" * 4_000
    async with running_server(tmp_path, kind) as server, channel(server.server.address[1]) as client:
        batch_id = await server.create(runs_count)
        await server.stream(batch_id, b"".join(line(index, payload) for index in range(runs_count)))
        session = await grpc_session(server)
        indexes: list[int] = []
        claim_no = 0
        while True:
            claim_no += 1
            response = await claim_many(client, session, claim_no)
            assert len(response) <= server.engine.limits.claim_bytes_max < server.engine.limits.grpc_message_bytes_max
            leases = wire.ClaimManyResponse.FromString(response).leases
            if not leases:
                break
            indexes += [index for lease in leases for index in lease.indexes]
        assert sorted(indexes) == list(range(runs_count)), "what was cut off is claimed next"
        assert claim_no > 4


async def test_a_grpc_claim_never_exceeds_one_message(tmp_path: Path, kind: str) -> None:
    limits = LIMITS.replaced(grpc_message_bytes_max=64 * KIB)
    async with running_server(tmp_path, kind, limits=limits) as server, channel(server.server.address[1]) as client:
        await server.filled(100, payload="x" * 2_000)
        session = await grpc_session(server)
        response = await claim_many(client, session, 1)
        assert 32 * KIB < len(response) <= 64 * KIB
        leases = wire.ClaimManyResponse.FromString(response).leases
        assert await claim_many(client, session, 1) == response, "a claim repeated after a lost answer"
        rest = wire.ClaimManyResponse.FromString(await claim_many(client, session, 2)).leases
        first = [index for lease in leases for index in lease.indexes]
        assert first == list(range(len(first)))
        assert [index for lease in rest for index in lease.indexes][:1] == [len(first)]


async def test_a_claim_counts_inputs_in_the_object_store(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind, limits=SMALL) as server:
        await server.filled(12, payload="x" * MIB)
        session = await grpc_session(server)
        indexes = []
        for claim_no in range(1, 6):
            body = {"session": session, "claim_no": claim_no, "tasks": ["task"], "runs_max": 100}
            answer = await server.ask("POST", "/v1/claims", body)
            assert len(answer.body) <= CLAIM_BYTES
            runs = [run for lease in json.loads(answer.body)["leases"] for run in lease["runs"]]
            indexes += [run["index"] for run in runs]
        assert sorted(indexes) == list(range(12)), "three or less at a time"
