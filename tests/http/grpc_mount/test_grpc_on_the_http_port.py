"""gRPC on the HTTP port of a real server: both protocols at once, health, Headrace's broker, TLS, and shutdown."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import grpc
from headrace.core import pack
from headrace.core.block import Extra
from headrace.core.span import Key
from headrace.foundation.errors import InvalidSetting
from headrace.grpc.messages import broker_pb2 as wire
from headrace.grpc.messages import health_pb2 as health
from headrace.grpc.messages import taskbroker_pb2 as taskbroker
from headrace.grpc.taskbroker.consumer_service import ACCESS
from headrace.grpc.taskbroker.consumer_service import SERVICE as CONSUMER
from headrace.grpc.transport import frames
from headrace.grpc.transport.service_methods import methods_of
from headrace.grpc.transport.signing import HEADER, Secrets
from headrace.http.server.http1_protocol import BoundedProtocol
from headrace.http.server.server import Tls
from headrace.runtime.producing.producer import Producer
from tests.support.grpc_server import AUTHORITY, certificate
from tests.support.grpcio_client import channel
from tests.support.http2_frames import GREETING, parsed
from tests.support.http_server import AUTH, LIMITS, ServerUnderTest, running_server

METADATA = tuple(AUTH.items())
BROKER = wire.DESCRIPTOR.services_by_name["Broker"]
SECRETS = ("a secret of many bytes",)


class Stub:
    """Headrace's broker, called through grpcio."""

    def __init__(self, client: Any, metadata: Any = METADATA) -> None:
        self._made, self._metadata = client, metadata

    async def __call__(self, method: str, request: Any) -> Any:
        """Call a method."""
        answer = getattr(wire, f"{method}Response")
        call = self._made.unary_unary(
            f"/headrace.v1.Broker/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        return await call(request, metadata=self._metadata)

    async def session(self) -> str:
        """Start a session."""
        return str((await self("StartSession", wire.StartSessionRequest(host="far", pid=7))).session)

    async def claim(self, session: str, number: int = 1, **more: Any) -> list[wire.Lease]:
        """Claim the runs of the task."""
        claim: dict[str, Any] = {"tasks": ["task"], "runs_max": 100} | more
        answer = await self("ClaimMany", wire.ClaimManyRequest(session=session, claim_no=number, **claim))
        return list(answer.leases)

    async def settle(self, *settlements: wire.Settlement) -> list[int]:
        """Record outcomes."""
        return list((await self("SettleMany", wire.SettleManyRequest(settlements=settlements))).words)


@asynccontextmanager
async def far(folder: Path, kind: str = "memory", **more: Any) -> AsyncGenerator[tuple[ServerUnderTest, Stub], None]:
    """Run a server and a client of its broker."""
    async with running_server(folder, kind, **more) as rig, channel(rig.server.address[1]) as client:
        yield rig, Stub(client)


def checking(client: Any) -> Any:
    """The Check method of the health service."""
    return client.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health.HealthCheckRequest.SerializeToString,
        response_deserializer=health.HealthCheckResponse.FromString,
    )


def watching(client: Any) -> Any:
    """The Watch method of the health service."""
    return client.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=health.HealthCheckRequest.SerializeToString,
        response_deserializer=health.HealthCheckResponse.FromString,
    )


@pytest.fixture(params=("sqlite", "postgres"))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_a_worker_claims_settles_and_releases_hundreds_of_runs_a_call(tmp_path: Path, kind: str) -> None:
    async with far(tmp_path, kind) as (rig, stub):
        batch_id = await rig.filled(300)
        session = await stub.session()
        leases = await stub.claim(session, runs_max=290)
        assert sum(len(lease.places) for lease in leases) == 290
        assert [index for lease in leases for index in lease.indexes] == list(range(290))
        assert [json.loads(payload)["i"] for lease in leases for payload in lease.payloads] == list(range(290))
        assert all(lease.task == "task" and lease.attempt == 1 and not lease.kinds for lease in leases)
        assert await stub.claim(session, runs_max=290) == leases, "a claim repeated after a lost answer"
        beat = await stub("Heartbeat", wire.HeartbeatRequest(session=session))
        assert sorted(beat.leases) == sorted(lease.lease for lease in leases)
        assert list(beat.claim_nos) == [1] * len(leases)

        first, second = leases
        states = [wire.STATE_COMPLETED] * len(first.places)
        states[1:4] = [wire.STATE_FAILED, wire.STATE_RETRY, wire.STATE_CANCELLED]
        outputs = [json.dumps({"ok": index}).encode() for index in first.indexes if not 1 <= index < 4]
        settlement = wire.Settlement(
            lease=first.lease,
            places=first.places,
            states=states,
            outputs=outputs,
            failures=[wire.Failure(type="Boom", message="it broke"), wire.Failure(type="Later")],
            retry_after_ms=[3_600_000],
        )
        assert await stub.settle(settlement) == [wire.WORD_SETTLED]
        assert await stub.settle(settlement) == [wire.WORD_RECORDED]
        words = (await stub("ReleaseMany", wire.ReleaseManyRequest(leases=[second.lease, "lease_1_1_00"]))).words
        assert list(words) == [wire.WORD_SETTLED, wire.WORD_LOST]
        late = wire.Settlement(lease=second.lease, places=second.places)
        assert await stub.settle(late, wire.Settlement(lease="no lease")) == [wire.WORD_LOST, wire.WORD_LOST]
        batch = (await rig.ask("GET", f"/v1/batches/{batch_id}")).json
        assert (batch["completed"], batch["failed"], batch["cancelled"], batch["waiting"]) == (253, 1, 1, 45)
        await stub("EndSession", wire.EndSessionRequest(session=session))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await stub.claim(session, 2)
        assert ended.value.code() is grpc.StatusCode.ABORTED


async def test_a_worker_is_known_by_the_tasks_that_it_claims(tmp_path: Path, kind: str) -> None:
    async with far(tmp_path, kind) as (rig, stub):
        path = f"/v1/batches/{await rig.filled(1)}"
        session = await stub.session()
        assert await stub.claim(session, 1, tasks=["other"]) == []
        assert [lane["reason"] for lane in (await rig.ask("GET", path)).json["stalled"]] == ["unknown_task"]
        (lease,) = await stub.claim(session, 2)
        await stub("ReleaseMany", wire.ReleaseManyRequest(leases=[lease.lease]))
        assert (await rig.ask("GET", path)).json["stalled"] == []


async def test_all_runs_of_a_lease_may_complete_in_a_few_bytes(tmp_path: Path) -> None:
    async with far(tmp_path) as (rig, stub):
        batch_id = await rig.filled(5)
        (lease,) = await stub.claim(await stub.session())
        assert await stub.settle(wire.Settlement(lease=lease.lease, places=lease.places)) == [wire.WORD_SETTLED]
        batch = (await rig.ask("GET", f"/v1/batches/{batch_id}")).json
        assert (batch["state"], batch["completed"]) == ("completed", 5)


async def test_leases_carry_payloads_from_the_object_store_and_headers(tmp_path: Path) -> None:
    limits = LIMITS.replaced(inline_bytes_max=64)
    async with far(tmp_path, limits=limits) as (rig, stub):
        large = {"text": "x" * 200}
        producer = Producer(rig.engine)
        await producer.put(Key("task"), json.dumps(large).encode(), pack.JSON, Extra(headers={"a": "b"}))
        await producer.close()
        (lease,) = await stub.claim(await stub.session())
        assert json.loads(lease.payloads[0]) == large
        assert {place: dict(error.values) for place, error in lease.headers.items()} == {lease.places[0]: {"a": "b"}}


async def test_a_claim_waits_for_work_up_to_wait_ms(tmp_path: Path) -> None:
    async with far(tmp_path) as (rig, stub):
        session = await stub.session()
        waiting = asyncio.create_task(stub.claim(session, wait_ms=30_000))
        while not rig.server._grpc or not any(connection._running for connection in rig.server._grpc.connections):
            await asyncio.sleep(0)
        await rig.filled(3)
        rig.engine.wakeup.notify()
        assert sum(len(lease.places) for lease in await waiting) == 3
        assert await stub.claim(session, 2, wait_ms=1) == []


BAD_SETTLEMENTS: list[dict[str, Any]] = [
    {"places": []},
    {"places": [1, 0]},
    {"places": [0, 0]},
    {"places": [65_536]},
    {"places": [0], "states": [9]},
    {"places": [0], "states": [-1]},
    {"places": [0], "states": [300]},
    {"places": [0], "states": [0, 0]},
    {"places": [0], "outputs": [b"1", b"2"]},
    {"places": [0], "outputs": [b"{"]},
    {"places": [0], "outputs": [b"\xff"]},
    {"places": [0], "outputs": [b"[" * 100_000]},
    {"places": [0], "outputs": [b'"' + b"x" * LIMITS.inline_bytes_max + b'"']},
    {"places": [0], "states": [wire.STATE_FAILED]},
    {"places": [0], "failures": [wire.Failure()]},
    {"places": [0], "states": [wire.STATE_RETRY], "failures": [wire.Failure()]},
    {"places": [0], "states": [wire.STATE_RETRY], "failures": [wire.Failure()], "retry_after_ms": [2**63]},
    {"places": [0, 200]},
]


async def test_an_invalid_settlement_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async with far(tmp_path) as (rig, stub):
        batch_id = await rig.filled(3)
        (lease,) = await stub.claim(await stub.session())
        good = wire.Settlement(lease=lease.lease, places=[2], part_no=7)
        for fields in BAD_SETTLEMENTS:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.settle(good, wire.Settlement(lease=lease.lease, **fields))
            codes = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
            assert refused.value.code() in codes, fields
            assert (await rig.ask("GET", f"/v1/batches/{batch_id}")).json["completed"] == 0, fields


BAD_CLAIMS: list[dict[str, Any]] = [
    {"tasks": []},
    {"tasks": [""]},
    {"tasks": ["a\0b"]},
    {"runs_max": 0},
    {"runs_max": 65_537},
    {"wait_ms": 30_001},
    {"number": 2**63},
    {"session": "x"},
    {"tasks": ["t"] * 10_001},
]


async def test_an_invalid_claim_is_refused(tmp_path: Path) -> None:
    async with far(tmp_path) as (_, stub):
        session = await stub.session()
        for claim in BAD_CLAIMS:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.claim(**({"session": session} | claim))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, claim


async def test_a_nul_character_in_a_host_is_an_invalid_argument(tmp_path: Path) -> None:
    request = wire.StartSessionRequest(host="a\0b", pid=7)
    async with running_server(tmp_path, "postgres") as rig, channel(rig.server.address[1]) as client:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await Stub(client)("StartSession", request)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "host: expected printable characters" in str(refused.value.details())


async def test_a_call_without_a_key_is_unauthenticated(tmp_path: Path) -> None:
    async with running_server(tmp_path) as rig, channel(rig.server.address[1]) as client:
        for metadata in ((), (("authorization", "Bearer no_such_key"),), ((HEADER, "0" * 64),)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await Stub(client, metadata).session()
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_signed_call_needs_no_key(tmp_path: Path) -> None:
    request = wire.StartSessionRequest(host="far", pid=7)
    path = "/headrace.v1.Broker/StartSession"
    async with running_server(tmp_path, secrets=SECRETS) as rig, channel(rig.server.address[1]) as client:
        signature = Secrets(SECRETS).sign(path, request.SerializeToString())
        assert await Stub(client, ((HEADER, signature),)).session()
        assert await Stub(client).session()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await Stub(client, ((HEADER, signature[::-1]),)).session()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_health_follows_the_store_and_the_server_s_shutdown(tmp_path: Path) -> None:
    def wrap(store: Any) -> Any:
        return Flaky(store)

    limits = LIMITS.replaced(upkeep_interval_ms=10)
    async with running_server(tmp_path, wrap=wrap, limits=limits) as rig, channel(rig.server.address[1]) as client:
        store: Any = rig.engine.store
        watch = watching(client)(health.HealthCheckRequest(service="headrace.v1.Broker"))
        statuses = aiter(watch)
        while (await anext(statuses)).status != health.HealthCheckResponse.SERVING:
            pass
        assert (await checking(client)(health.HealthCheckRequest())).status == health.HealthCheckResponse.SERVING
        store.is_away = True
        assert (await anext(statuses)).status == health.HealthCheckResponse.NOT_SERVING
        store.is_away = False
        assert (await anext(statuses)).status == health.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await checking(client)(health.HealthCheckRequest(service="no.such"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        strange = aiter(watching(client)(health.HealthCheckRequest(service="no.such")))
        assert (await anext(strange)).status == health.HealthCheckResponse.SERVICE_UNKNOWN
        stopping = asyncio.create_task(rig.server.stop())
        assert [response.status async for response in statuses] == [health.HealthCheckResponse.NOT_SERVING]
        await stopping


class Flaky:
    """A store that can be made unavailable."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.is_away = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def check(self) -> Any:
        """Check the store."""
        if self.is_away:
            raise TimeoutError
        return await self._store.check()


async def test_without_a_consumer_its_service_is_unimplemented(tmp_path: Path) -> None:
    async with running_server(tmp_path) as rig, channel(rig.server.address[1]) as client:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.unary_unary("/sentry_protos.taskbroker.v1.ConsumerService/GetTask")(b"")
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


class Consumer:
    """A consumer with one task for every worker."""

    async def get_task(self, _request: Any, _call: Any) -> taskbroker.GetTaskResponse:
        """Return the task."""
        return taskbroker.GetTaskResponse(task=taskbroker.TaskActivation(id="one"))

    set_task_status = set_batch_activation_status = get_task


async def test_a_consumer_answers_signed_calls(tmp_path: Path) -> None:
    path = "/sentry_protos.taskbroker.v1.ConsumerService/GetTask"
    async with (
        running_server(tmp_path, consumer=methods_of(CONSUMER, Consumer(), access=ACCESS), secrets=SECRETS) as rig,
        channel(rig.server.address[1]) as client,
    ):
        call = client.unary_unary(path, response_deserializer=taskbroker.GetTaskResponse.FromString)
        assert (await call(b"", metadata=((HEADER, Secrets(SECRETS).sign(path, b"")),))).task.id == "one"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"")
        assert refused.value.details() == "Authentication failed"
        text = (await rig.ask("GET", "/metrics")).body.decode()
        assert f'headrace_grpc_calls_total{{path="{path}",status="OK"}} 1.0' in text
        assert f'headrace_grpc_calls_total{{path="{path}",status="UNAUTHENTICATED"}} 1.0' in text


@pytest.mark.parametrize("cuts", [(0,), (1,), (10,), (23,), (24,), (3, 17)])
async def test_the_http_2_preface_is_recognised_however_it_is_split(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    async with running_server(tmp_path) as rig:
        reader, writer = await asyncio.open_connection(*rig.server.address)
        start = 0
        for cut in (*cuts, len(GREETING)):
            writer.write(GREETING[start:cut])
            await writer.drain()
            assert (await rig.ask("GET", "/healthz")).status == 200
            start = cut
        assert (await reader.readexactly(9))[3] == frames.SETTINGS
        writer.close()


async def test_a_connection_passed_to_grpc_does_not_time_out_waiting_for_a_request_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[Any] = []
    hand_over = BoundedProtocol._pass_to_second

    def noted(self: BoundedProtocol, data: bytes) -> None:
        handed.append(self)
        hand_over(self, data)

    monkeypatch.setattr(BoundedProtocol, "_pass_to_second", noted)
    async with far(tmp_path) as (_, stub):
        await stub.session()
        assert handed[0]._head_timer.cancelled()


async def test_bytes_that_only_begin_like_the_preface_are_an_http_1_request(tmp_path: Path) -> None:
    async with running_server(tmp_path) as rig:
        reader, writer = await asyncio.open_connection(*rig.server.address)
        writer.write(b"PRI")
        await writer.drain()
        assert (await rig.ask("GET", "/healthz")).status == 200
        writer.write(b"NT / HTTP/1.1\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 400")
        writer.close()


def parsed_rest(data: bytes) -> list[int]:
    """Return the kinds of the frames after a SETTINGS frame whose head was read already."""
    start = data.index(frames.frame_header(4, frames.WINDOW_UPDATE, 0, 0))
    return [kind for kind, _, _, _ in parsed(data[start:])]


async def test_a_grpc_connection_without_calls_is_closed_for_another_one(tmp_path: Path) -> None:
    async with running_server(tmp_path, limits=LIMITS.replaced(connections_max=2, peer_connections_percent=100)) as rig:
        opened = []
        for _ in range(3):
            reader, writer = await asyncio.open_connection(*rig.server.address)
            writer.write(GREETING)
            assert (await reader.readexactly(9))[3] == frames.SETTINGS
            opened.append((reader, writer))
        assert parsed_rest(await opened[0][0].read())[-1] == frames.GOAWAY
        assert len(rig.server.connections) == 2
        for _, writer in opened:
            writer.close()


async def test_a_connection_beyond_the_limit_gets_goaway_while_calls_run_on_all_others(tmp_path: Path) -> None:
    waiting = asyncio.Event()

    class Slow(Consumer):
        """A consumer that answers after a signal."""

        async def get_task(self, _request: Any, _call: Any) -> taskbroker.GetTaskResponse:
            """Wait, and return nothing."""
            await waiting.wait()
            return taskbroker.GetTaskResponse()

    path = "/sentry_protos.taskbroker.v1.ConsumerService/GetTask"
    limits = LIMITS.replaced(connections_max=1)
    async with (
        running_server(
            tmp_path, limits=limits, consumer=methods_of(CONSUMER, Slow(), access=ACCESS), secrets=SECRETS
        ) as rig,
        channel(rig.server.address[1]) as client,
    ):
        call = client.unary_unary(path)(b"", metadata=((HEADER, Secrets(SECRETS).sign(path, b"")),))
        while not any(connection.idle_since_s is None for connection in rig.server.connections):
            await asyncio.sleep(0)
        reader, writer = await asyncio.open_connection(*rig.server.address)
        writer.write(GREETING)
        kinds = [kind for kind, _, _, _ in parsed(await reader.read())]
        assert kinds == [frames.SETTINGS, frames.GOAWAY]
        writer.close()
        waiting.set()
        await call


async def test_one_certificate_serves_both_protocols(tmp_path: Path) -> None:
    made_tls = tls_of(tmp_path)
    async with running_server(tmp_path, tls=made_tls.context()) as rig:
        port = rig.server.address[1]
        assert rig.server.url == f"https://127.0.0.1:{port}"
        async with channel(port, is_tls=True) as client:
            while (await checking(client)(health.HealthCheckRequest())).status != health.HealthCheckResponse.SERVING:
                pass
            assert await Stub(client).session()
        context = ssl.create_default_context()
        AUTHORITY.configure_trust(context)
        context.set_alpn_protocols(["h2", "http/1.1"])
        reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        writer.close()


@pytest.mark.timeout(20)
async def test_a_shutdown_does_not_wait_for_peers_that_never_complete_the_tls_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TLS shutdown needs both sides, and asyncio would wait 30 seconds for a peer that does not answer."""
    monkeypatch.setattr("headrace.grpc.transport.closing.CLOSE_TIMEOUT_S", 0.01)
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)

    def connect_without_closing(port: int, protocol: str, data: bytes) -> ssl.SSLSocket:
        context.set_alpn_protocols([protocol])
        client = context.wrap_socket(socket.create_connection(("localhost", port)), server_hostname="localhost")
        client.sendall(data)
        assert client.recv(9)
        return client

    async with running_server(tmp_path, tls=tls_of(tmp_path).context()) as rig:
        port = rig.server.address[1]
        peers = [
            await asyncio.to_thread(connect_without_closing, port, "h2", GREETING),
            await asyncio.to_thread(
                connect_without_closing, port, "http/1.1", b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
            ),
        ]
        await rig.server.stop()
        for peer in peers:
            peer.close()


def tls_of(folder: Path) -> Tls:
    """Write the certificate files."""
    client = Tls(str(folder / "cert.pem"), str(folder / "key.pem"))
    for piece in certificate().cert_chain_pems:
        piece.write_to_path(client.certificate, append=True)
    certificate().private_key_pem.write_to_path(client.key)
    return client


async def test_invalid_certificate_files_are_refused_by_name(tmp_path: Path) -> None:
    good = tls_of(tmp_path)
    for bad in (good._replace(key=str(tmp_path / "none")), good._replace(key=good.certificate)):
        with pytest.raises(InvalidSetting, match=r"tls_cert .* with tls_key"):
            bad.context()


async def test_a_shutdown_completes_a_call_that_started_before(tmp_path: Path) -> None:
    async with far(tmp_path) as (rig, stub):
        session = await stub.session()
        waiting = asyncio.create_task(stub.claim(session, wait_ms=30_000))
        while not rig.server._grpc or not any(connection._running for connection in rig.server._grpc.connections):
            await asyncio.sleep(0)
        await asyncio.gather(rig.server.stop(), waiting)
        assert waiting.result() == []
