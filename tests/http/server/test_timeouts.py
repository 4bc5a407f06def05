"""Timeouts: none for a request, one for a client that sends or reads nothing, none for one that the server delays."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from headrace.foundation.errors import StoreUnavailable
from headrace.foundation.limits import MIB
from headrace.http.v1 import batches as v1_batches
from headrace.store.object_store import open_payloads
from headrace.store.payloads import PayloadStore
from headrace.store.protocol import Store
from tests.support.http_server import AUTH, LIMITS, NDJSON, HttpPeer, ServerUnderTest, StoreHook, line, running_server

IDLE = LIMITS.replaced(http_idle_s=2, inline_bytes_max=1_024)
STALL_S = 5.0


class Stalled(PayloadStore):
    """An object store whose first write is slow."""

    def __init__(self, inner: PayloadStore) -> None:
        super().__init__(inner.objects, url=inner.url)
        self.stalls: list[float] = [STALL_S]

    async def put(self, key: str, data: bytes) -> None:
        if self.stalls:
            await asyncio.get_running_loop().create_task(_pause(self.stalls.pop()))
        await super().put(key, data)


async def _pause(seconds: float) -> None:
    done = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(seconds, done.set_result, None)
    await done


@pytest.mark.parametrize("what", ["store", "objects"])
async def test_a_stream_delayed_by_the_server_beyond_the_idle_limit_is_not_aborted(tmp_path: Path, what: str) -> None:
    async def stall(_store: Store, _batch_id: str) -> None:
        await _pause(STALL_S)

    payloads = Stalled(open_payloads("memory://")) if what == "objects" else None
    wrap = (lambda store: StoreHook(store, "append", stall)) if what == "store" else (lambda store: store)
    async with running_server(tmp_path, "sqlite", limits=IDLE, wrap=wrap, payloads=payloads) as server:
        count = 12_000 if what == "store" else 1_000  # more than the server buffers in front of a store
        batch_id = await server.create(count)
        lines = [line(index, "x" * (2_000 if index == 0 else 900)) for index in range(count)]
        began = asyncio.get_running_loop().time()
        answer = await server.stream(batch_id, lines)
        assert (answer.status, answer.json["sealed"]) == (200, True)
        assert asyncio.get_running_loop().time() - began >= STALL_S, "the server delayed it"


async def test_a_stream_waits_for_a_store_that_recovers(tmp_path: Path) -> None:
    left = [4]

    async def away(_store: Store, _batch_id: str) -> None:
        left[0] -= 1
        if left[0]:
            raise StoreUnavailable("away")

    class Away(StoreHook):
        def __getattr__(self, name: str) -> Any:
            operation = super().__getattr__(name)
            self._happens = away if left[0] else None
            return operation

    async with running_server(
        tmp_path, "sqlite", limits=IDLE, wrap=lambda store: Away(store, "append", away)
    ) as server:
        answer = await server.stream(await server.create(2), [line(0), line(1)])
        assert (answer.status, answer.json["sealed"]) == (200, True)


async def test_a_store_that_stays_unavailable_is_answered_with_retry_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.runtime.producing.indexed_feed.WAITS_MAX", 2)

    class ClientGone(StoreHook):
        def __getattr__(self, name: str) -> Any:
            if name in ("append", "check"):

                async def refuse(*_: Any, **__: Any) -> Any:
                    raise StoreUnavailable("away")

                return refuse
            return super().__getattr__(name)

    async with running_server(tmp_path, "sqlite", wrap=lambda store: ClientGone(store, "", None)) as server:
        answer = await server.stream(await server.create(1), [line(0)])
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        ready = await server.ask("GET", "/readyz")
        assert (ready.status, ready.json["code"]) == (503, "STORE_UNAVAILABLE")
        assert (await server.ask("GET", "/healthz")).status == 200


async def test_a_client_that_goes_silent_in_mid_body_gets_408_and_its_items_are_kept(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite", limits=IDLE) as server:
        batch_id = await server.create(3)
        peer = await server.peer().connect()
        path = f"/api/v3/batches/{batch_id}/items"
        await peer.head("POST", path, {**AUTH, **NDJSON, "transfer-encoding": "chunked"})
        await peer.chunk(line(0))
        answer = await peer.answer()
        assert (answer.status, answer.json["code"], answer.headers["connection"]) == (408, "IDLE_TIMEOUT", "close")
        assert await server.engine.store.missing(batch_id, 9) == [(1, 3)]


async def test_a_request_head_that_is_slow_or_missing_times_out(tmp_path: Path) -> None:
    async with running_server(tmp_path, limits=IDLE) as server:
        silent, slow = await server.peer().connect(), await server.peer().connect()

        async def drip() -> None:
            for byte in b"GET /healthz HTTP/1.1\r\nx-slow: " + b"v" * 1_000:
                await slow.send(bytes([byte]))
                await _pause(0.05)

        dripping = asyncio.create_task(drip())
        assert (await slow.answer()).status == 408
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
        assert silent.reader is not None
        assert await silent.reader.read() == b"", "closed without a response: the client had sent nothing"


async def test_a_client_that_never_reads_its_results_is_disconnected(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite", limits=IDLE.replaced(inline_bytes_max=64 * 1024)) as server:
        batch_id = await server.create(256)
        await server.stream(batch_id, [line(index) for index in range(256)])
        await fill(server, batch_id, b'"' + b"r" * 50_000 + b'"')
        host, port = server.server.address
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            deaf.setblocking(False)
            await asyncio.get_running_loop().sock_connect(deaf, (host, port))
            head = f"GET /v1/batches/{batch_id}/results HTTP/1.1\r\nhost: x\r\n"
            head += f"authorization: {AUTH['authorization']}\r\n\r\n"
            await asyncio.get_running_loop().sock_sendall(deaf, head.encode())
            connections = server.server._uvicorn.server_state.connections
            while not connections:
                await asyncio.sleep(0)
            assert (await server.ask("GET", "/healthz")).status == 200, "other clients are served meanwhile"
            while connections:
                await _pause(0.05)


async def fill(server: ServerUnderTest, batch_id: str, result: bytes) -> None:
    """Complete every run of a batch with a large result."""
    from headrace.foundation.ids import new_session_id
    from headrace.store.protocol import Claim, Session
    from tests.support.store_rig import settlement_of

    store, now_us = server.engine.store, server.engine.clock.now_us()
    session = new_session_id(now_us)
    await store.start_session(Session(id=session, kind="w", host="h", pid=1, started_us=now_us), now_us=now_us)
    claim = Claim(session_id=session, claim_no=1, environment="default", tasks=["task"], queues=None, runs_max=9_999)
    for lease in await store.claim(claim, now_us=now_us):
        results = [result] * len(lease.span_slots)
        await store.settle([settlement_of(lease, results=results)], now_us=now_us)


async def test_idle_events_and_results_send_keep_alives_and_end_with_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(v1_batches, "KEEPALIVE_S", 0.05)
    async with running_server(tmp_path, "sqlite") as server:
        batch_id = await server.filled(2)
        events, results = server.peer(), server.peer()
        for peer, what in ((events, "events"), (results, "results")):
            await peer.head("GET", f"/v1/batches/{batch_id}/{what}", AUTH)
            assert (await peer.head_of_answer()).status == 200
        first = await events.piece()
        assert first is not None
        assert first.startswith(b"event: progress\ndata: ")
        assert json.loads(first.partition(b"data: ")[2])["waiting"] == 2
        assert await events.piece() == b": beat\n\n"
        assert await results.piece() == b"\n"
        await server.server.stop()
        assert [piece async for piece in rest(events)][-1] == b"retry: 1000\n\n"
        assert {piece async for piece in rest(results)} <= {b"\n"}


async def rest(peer: HttpPeer) -> Any:
    """Read the rest of a response."""
    while (piece := await peer.piece()) is not None:
        yield piece


async def test_a_shutdown_completes_a_stream_and_accepts_no_new_one(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        batch_id = await server.create(2)
        peer = await server.peer().connect()
        path = f"/api/v3/batches/{batch_id}/items"
        await peer.head("POST", path, {**AUTH, **NDJSON, "transfer-encoding": "chunked"})
        await peer.chunk(line(0))
        while server.service.streams_count == 0:
            await asyncio.sleep(0)
        late = server.peer()
        assert (await late.ask("GET", "/readyz")).status == 200
        stopping = asyncio.create_task(server.server.stop())
        while not server.service.is_draining:
            await asyncio.sleep(0)
        await peer.chunk(line(1))
        await peer.end()
        answer = await peer.answer()
        assert (answer.status, answer.json["sealed"], answer.headers["connection"]) == (200, True, "close")
        await stopping
        with pytest.raises(OSError):  # noqa: PT011 - refused; systems name it differently
            await server.peer().connect()


async def test_a_stream_that_outlasts_the_grace_period_is_flushed_and_answered_with_503(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite", limits=LIMITS.replaced(shutdown_grace_s=0)) as server:
        batch_id = await server.create(2)
        peer = await server.peer().connect()
        path = f"/api/v3/batches/{batch_id}/items"
        await peer.head("POST", path, {**AUTH, **NDJSON, "transfer-encoding": "chunked"})
        await peer.chunk(line(0))
        while server.service.streams_count == 0:
            await asyncio.sleep(0)
        stopping = asyncio.create_task(server.server.stop())
        answer = await peer.answer()
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        await stopping
        assert await server.engine.store.missing(batch_id, 9) in ([(1, 2)], [(0, 2)])


async def test_a_server_at_its_stream_limit_answers_503(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite", limits=LIMITS.replaced(streams_max=1)) as server:
        batch_id = await server.create(2)
        peer = await server.peer().connect()
        path = f"/api/v3/batches/{batch_id}/items"
        await peer.head("POST", path, {**AUTH, **NDJSON, "transfer-encoding": "chunked"})
        await peer.chunk(line(0))
        while server.service.streams_count == 0:
            await asyncio.sleep(0)
        busy = await server.stream(batch_id, [line(1)])
        assert (busy.status, busy.headers["retry-after"], busy.json["code"]) == (503, "5", "BUSY")
        await peer.end()
        assert (await peer.answer()).status == 200


async def test_the_server_does_not_read_ahead_of_a_store_that_is_slow(tmp_path: Path) -> None:
    gate = asyncio.Event()

    class Slow(PayloadStore):
        async def put(self, key: str, data: bytes) -> None:
            await gate.wait()
            await super().put(key, data)

    inner = open_payloads("memory://")
    limits = LIMITS.replaced(inline_bytes_max=1_024, ingest_concurrency=4)
    async with running_server(tmp_path, "sqlite", limits=limits, payloads=Slow(inner.objects, url=inner.url)) as server:
        batch_id = await server.create(200)
        peer = await server.peer().connect()
        path = f"/api/v3/batches/{batch_id}/items"
        await peer.head("POST", path, {**AUTH, **NDJSON, "transfer-encoding": "chunked"})
        sent = [0]

        async def send() -> None:
            for index in range(200):
                await peer.chunk(line(index, "x" * 500_000))
                sent[0] += 1
            await peer.end()

        sending = asyncio.create_task(send())
        sent_before = -1
        while sent_before != sent[0]:
            sent_before = sent[0]
            await _pause(0.3)
        assert sent_before * 500_000 < 32 * MIB, "the socket delays the client"
        gate.set()
        await sending
        assert (await peer.answer()).json["sealed"]
