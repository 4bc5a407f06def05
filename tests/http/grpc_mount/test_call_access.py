"""Access to gRPC methods over real sockets: no key, a foreign key, a narrow key, a signature, a large message."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import grpc
from headrace.core.pack import ACTIVATION
from headrace.grpc.taskbroker.activation_codec import decode_entry
from headrace.grpc.taskbroker.broker import dispatching
from headrace.grpc.transport.server import GrpcServer
from headrace.grpc.transport.signing import HEADER, Secrets
from headrace.http.grpc_mount.mounting import grpc_server
from headrace.http.requests import auth
from headrace.http.requests.auth import SCOPES, new_key
from headrace.http.requests.service import Service
from headrace.http.server.server import serving
from headrace.runtime.engine import Engine
from headrace.runtime.producing.producer import Producer
from tests.support.broker import activation
from tests.support.engines import opened
from tests.support.grpcio_client import channel

CONSUMER = "/sentry_protos.taskbroker.v1.ConsumerService"
SECRETS = ("a secret of many bytes",)
REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
Metadata = tuple[tuple[str, str], ...]


class Rig(NamedTuple):
    """A server under test with a real task broker, and a client."""

    engine: Engine
    server: GrpcServer
    client: Any

    async def key(self, *scopes: str, environment: str = "default") -> Metadata:
        """Create a key, and return the metadata that carries it."""
        secret, stored = new_key(environment, scopes, "", self.engine.clock.now_us())
        await self.engine.administration.add_key(stored, now_us=1)
        return (("authorization", f"Bearer {secret}"),)

    async def call(self, path: str, message: bytes = b"", metadata: Metadata = ()) -> Any:
        """Call a unary or streaming method. Returns its status code."""
        method = self.server.methods[path]
        try:
            if method.is_stream:
                async for _ in self.client.unary_stream(path)(message, metadata=metadata):
                    return grpc.StatusCode.OK
            await self.client.unary_unary(path)(message, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    async def add(self, count: int) -> None:
        """Store activations."""
        producer = Producer(self.engine)
        for number in range(count):
            data = activation(number).SerializeToString()
            entry = decode_entry(data, self.engine.limits, self.engine.clock.now_us())
            await producer.put_new(entry.key, data, ACTIVATION, entry.extra)
        await producer.close()


@asynccontextmanager
async def rig(
    folder: Path, *, api_key: str | None = None, is_open: bool = False, secrets: Sequence[str] = ()
) -> AsyncGenerator[Rig, None]:
    """Run a server on an engine of its own."""
    async with opened("sqlite", folder) as engine, dispatching(engine) as broker:
        service = Service(engine, api_key=api_key, is_open=is_open)
        async with (
            grpc_server(service, secrets=secrets, consumer=broker.consumer.methods) as server,
            serving(service, "127.0.0.1", 0, grpc=server) as listening,
            channel(listening.address[1]) as client,
        ):
            yield Rig(engine, server, client)


async def test_without_any_key_the_task_broker_is_open_on_loopback(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        await made.add(1)
        assert await made.call(f"{CONSUMER}/GetTask") is grpc.StatusCode.OK


@pytest.mark.parametrize("environment", ["default", "elsewhere"])
async def test_once_a_key_exists_the_task_broker_returns_no_payload_without_one(
    environment: str, tmp_path: Path
) -> None:
    async with rig(tmp_path) as made:
        await made.add(1)
        await made.key("batches:read", environment=environment)
        code = await made.call(f"{CONSUMER}/GetTask")
        assert code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_key_that_is_created_while_the_server_runs_closes_the_task_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "KEY_CACHE_S", 0)
    async with rig(tmp_path) as made:
        await made.add(2)
        assert await made.call(f"{CONSUMER}/GetTask") is grpc.StatusCode.OK
        headers = await made.key("work")
        assert await made.call(f"{CONSUMER}/GetTask") is grpc.StatusCode.UNAUTHENTICATED
        assert await made.call(f"{CONSUMER}/GetTask", metadata=headers) is grpc.StatusCode.OK
        (key,) = await made.engine.administration.keys("default")
        await made.engine.administration.revoke_key("default", key.id, now_us=2)
        assert await made.call(f"{CONSUMER}/GetTask", metadata=headers) is grpc.StatusCode.UNAUTHENTICATED
        assert await made.call(f"{CONSUMER}/GetTask") is grpc.StatusCode.UNAUTHENTICATED


async def test_the_task_broker_accepts_a_key_of_its_environment_with_the_scope_work(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        await made.add(3)
        foreign = await made.key("work", environment="elsewhere")
        narrow = await made.key(*(scope for scope in SCOPES if scope not in ("*", "work")))
        work = await made.key("work")
        codes = [await made.call(f"{CONSUMER}/GetTask", metadata=each) for each in (foreign, narrow, work, work)]
        denied = grpc.StatusCode.PERMISSION_DENIED
        assert codes == [denied, denied, grpc.StatusCode.OK, grpc.StatusCode.OK]
        unknown = (("authorization", "Bearer tr_headrace_unknown"),)
        assert await made.call(f"{CONSUMER}/GetTask", metadata=unknown) is grpc.StatusCode.UNAUTHENTICATED


async def test_a_signature_is_enough_where_keys_exist(tmp_path: Path) -> None:
    path = f"{CONSUMER}/GetTask"
    async with rig(tmp_path, secrets=SECRETS) as made:
        await made.add(2)
        assert await made.call(path) is grpc.StatusCode.UNAUTHENTICATED
        key = await made.key("work")
        assert await made.call(path, metadata=((HEADER, Secrets(SECRETS).sign(path, b"")),)) is grpc.StatusCode.OK
        assert await made.call(path, metadata=((HEADER, "0" * 64),)) is grpc.StatusCode.UNAUTHENTICATED
        assert await made.call(path, metadata=key) is grpc.StatusCode.OK


async def test_without_authentication_the_task_broker_is_open_whatever_keys_exist(tmp_path: Path) -> None:
    async with rig(tmp_path, is_open=True, api_key="a key of the server") as made:
        await made.add(1)
        assert await made.call(f"{CONSUMER}/GetTask") is grpc.StatusCode.OK


async def test_every_method_declares_its_access_and_refuses_clients_without_it(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        foreign = await made.key("*", environment="elsewhere")
        for path, method in made.server.methods.items():
            access = method.access
            assert set(access.scopes) <= set(SCOPES), path
            if access.is_open:
                assert await made.call(path) is grpc.StatusCode.OK, path
                continue
            narrow = await made.key(*(scope for scope in SCOPES if scope not in ("*", *access.scopes)))
            unknown = (("authorization", "Bearer tr_headrace_unknown"),)
            assert await made.call(path) is grpc.StatusCode.UNAUTHENTICATED, path
            assert await made.call(path, metadata=unknown) is grpc.StatusCode.UNAUTHENTICATED, path
            assert await made.call(path, metadata=narrow) is grpc.StatusCode.PERMISSION_DENIED, path
            if access.is_of_server:
                assert await made.call(path, metadata=foreign) is grpc.StatusCode.PERMISSION_DENIED, path
            else:
                assert await made.call(path, metadata=foreign) not in REFUSED, path


async def test_every_method_bounds_its_message_before_and_after_authentication(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        key = await made.key("*")
        for path, method in made.server.methods.items():
            access, budget = method.access, made.server.budget
            over = bytes(access.unauthenticated_bytes_max + 1)
            assert await made.call(path, over) is grpc.StatusCode.RESOURCE_EXHAUSTED, path
            assert budget.held_bytes == 0, path
            if access.body_bytes_max is not None:
                over = bytes(access.body_bytes_max + 1)
                assert await made.call(path, over, key) is grpc.StatusCode.RESOURCE_EXHAUSTED, path
                assert budget.held_bytes == 0, path
