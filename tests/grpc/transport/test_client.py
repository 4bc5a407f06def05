"""The gRPC client against grpcio's server, against Headrace's, and against peers that are no gRPC servers."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

import grpc
from headrace.foundation.targets import PushTarget
from headrace.grpc.transport import client as channels
from headrace.grpc.transport.bounds import Bounds
from headrace.grpc.transport.budget import Budget
from headrace.grpc.transport.client import CallNotSent, Channel
from headrace.grpc.transport.frames import PREFACE, ErrorCode, goaway, settings
from headrace.grpc.transport.signing import HEADER, Secrets
from headrace.grpc.transport.status import Code, GrpcError
from tests.support.grpc_server import AUTHORITY, ECHO, FAIL, WAIT, Echo, certificate, listening
from tests.support.grpcio_client import echo_request

BOUNDS = Bounds(5_000_000, 100)
SECRETS = ("a secret of many bytes",)
PATH = "/a.Service/Method"
Handler = Callable[[bytes, Any], Awaitable[bytes]]


@asynccontextmanager
async def grpcio_server(handler: Handler, *, is_tls: bool = False, **options: int) -> AsyncGenerator[int, None]:
    """A grpcio server with one method that handles bytes."""
    server = grpc.aio.server(options=[(name.replace("__", "."), value) for name, value in options.items()])
    method = grpc.unary_unary_rpc_method_handler(handler)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.Service", {"Method": method}),))
    if is_tls:
        pair = (certificate().private_key_pem.bytes(), certificate().cert_chain_pems[0].bytes())
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


def client_tls() -> ssl.SSLContext:
    """A TLS context that trusts the test certificate."""
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    return context


@asynccontextmanager
async def channel(port: int, *, is_tls: bool = False, **more: Any) -> AsyncGenerator[Channel, None]:
    """A channel to a local port."""
    budget = Budget(10**8)
    target = PushTarget("app", "localhost" if is_tls else "127.0.0.1", port, is_tls)
    client = Channel(target, BOUNDS, budget, tls=client_tls() if is_tls else None, **more)
    try:
        yield client
    finally:
        client.close()
        protocol = client._protocol
        while protocol is not None and not protocol._transport.is_closing():
            await asyncio.sleep(0)
        assert budget.held_bytes == 0


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the backoff, so that failed endpoints are called again at once."""
    monkeypatch.setattr(channels, "BACKOFF_S", (0.0,))


async def echo_bytes(message: bytes, _context: Any) -> bytes:
    return message


@pytest.mark.parametrize("is_tls", [False, True])
async def test_many_calls_share_a_connection_and_get_their_own_responses(is_tls: bool) -> None:
    async with grpcio_server(echo_bytes, is_tls=is_tls) as port, channel(port, is_tls=is_tls) as client:
        await client.call(PATH, b"first", timeout_s=30)
        protocol = client._protocol
        answers = await asyncio.gather(*(client.call(PATH, b"%d" % number, timeout_s=30) for number in range(90)))
        assert answers == [b"%d" % number for number in range(90)]
        assert client._protocol is protocol


async def test_messages_larger_than_every_window_go_both_ways() -> None:
    options: dict[str, Any] = {"grpc__max_receive_message_length": -1, "grpc__max_send_message_length": -1}
    async with grpcio_server(echo_bytes, **options) as port, channel(port) as client:
        messages = [bytes([number]) * 2_000_000 for number in range(4)]
        assert await asyncio.gather(*(client.call(PATH, message, timeout_s=30) for message in messages)) == messages
        with pytest.raises(GrpcError) as large:
            await client.call(PATH, b"x" * (BOUNDS.message_bytes_max + 1), timeout_s=30)
        assert large.value.code is Code.RESOURCE_EXHAUSTED


async def test_signature_user_agent_and_timeout_of_a_call_arrive() -> None:
    metadata: list[dict[str, Any]] = []
    left: list[float] = []

    async def noted(message: bytes, context: Any) -> bytes:
        metadata.append(dict(context.invocation_metadata()))
        left.append(context.time_remaining())
        return message

    async with grpcio_server(noted) as port, channel(port, secrets=Secrets(SECRETS)) as client:
        await client.call(PATH, b"hello", timeout_s=100)
    assert metadata[0][HEADER] == Secrets(SECRETS).sign(PATH, b"hello")
    assert metadata[0]["user-agent"] == "headrace"
    assert 0 < left[0] <= 100


async def test_an_error_keeps_its_code_and_message() -> None:
    async def refused(_message: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "50 % of “grüße”\nworker busy")
        return b""

    async with grpcio_server(refused) as port, channel(port) as client:
        with pytest.raises(GrpcError) as error:
            await client.call(PATH, b"", timeout_s=30)
        assert (error.value.code, error.value.message) == (Code.RESOURCE_EXHAUSTED, "50 % of “grüße”\nworker busy")
        assert not isinstance(error.value, CallNotSent)
        with pytest.raises(GrpcError) as unknown:
            await client.call("/no/Such", b"", timeout_s=30)
        assert unknown.value.code is Code.UNIMPLEMENTED


async def test_a_timed_out_call_is_cancelled_on_both_sides() -> None:
    echo = Echo()
    async with listening(echo.methods) as (_, port), channel(port) as client:
        with pytest.raises(GrpcError) as late:
            await client.call(WAIT, b"", timeout_s=0.05)
        assert late.value.code is Code.DEADLINE_EXCEEDED
        await echo.cancelled.wait()
        message = echo_request().SerializeToString()
        assert await client.call(ECHO, message, timeout_s=30) == message


async def test_cancelling_the_caller_cancels_the_call() -> None:
    echo = Echo()
    async with listening(echo.methods) as (_, port), channel(port) as client:
        task = asyncio.create_task(client.call(WAIT, b"", timeout_s=30))
        await echo.arrived.wait()
        task.cancel()
        await echo.cancelled.wait()
        assert client._protocol is not None
        assert client._protocol._calls == {}


async def test_calls_beyond_the_peer_s_limit_are_not_sent() -> None:
    echo = Echo()
    async with listening(echo.methods, grpc_calls_max=2) as (_, port), channel(port) as client:
        await client.call(ECHO, b"", timeout_s=30)
        waiting = [asyncio.create_task(client.call(WAIT, b"", timeout_s=30)) for _ in range(2)]
        while echo.waiting < 2:
            await asyncio.sleep(0)
        with pytest.raises(CallNotSent) as full:
            await client.call(ECHO, b"", timeout_s=30)
        assert full.value.code is Code.RESOURCE_EXHAUSTED
        echo.released.set()
        await asyncio.gather(*waiting)
        await client.call(ECHO, b"", timeout_s=30)


async def test_after_goaway_a_new_connection_is_opened_and_old_calls_complete() -> None:
    echo = Echo()
    async with listening(echo.methods) as (server, port), channel(port) as client:
        waiting = asyncio.create_task(client.call(WAIT, b"", timeout_s=30))
        await echo.arrived.wait()
        (connection,) = server.connections
        connection.shutdown()
        first = client._protocol
        while first is None or first.is_open:
            await asyncio.sleep(0)
        assert await client.call(ECHO, b"", timeout_s=30) == b""
        assert client._protocol is not first
        echo.released.set()
        assert await waiting == b""


async def test_a_broken_connection_fails_its_calls_and_the_next_call_reconnects() -> None:
    echo = Echo()
    async with listening(echo.methods) as (server, port), channel(port) as client:
        waiting = asyncio.create_task(client.call(WAIT, b"", timeout_s=30))
        await echo.arrived.wait()
        (connection,) = server.connections
        connection._transport.abort()
        with pytest.raises(GrpcError) as broken:
            await waiting
        assert broken.value.code is Code.UNAVAILABLE
        assert not isinstance(broken.value, CallNotSent), "the call may have been processed"
        assert await client.call(ECHO, b"", timeout_s=30) == b""


async def test_an_unreachable_endpoint_fails_calls_as_not_sent_and_backs_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "BACKOFF_S", (0.0, 1_000.0))
    async with listening(Echo().methods) as (_, port):
        pass
    async with channel(port) as client:
        for text in ("can.t connect to", "is in backoff"):
            with pytest.raises(CallNotSent, match=text) as gone:
                await client.call(ECHO, b"", timeout_s=30)
            assert gone.value.code is Code.UNAVAILABLE


@asynccontextmanager
async def peer(*output: bytes, ends: bool = False, **more: Any) -> AsyncGenerator[tuple[int, list[bytes]], None]:
    """A socket that sends some bytes to every client, and the first bytes that it received."""
    received: list[bytes] = []
    tasks: list[Any] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        received.append(await reader.read(24))
        writer.writelines(output)
        if not ends:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, **more)
    try:
        yield server.sockets[0].getsockname()[1], received
    finally:
        server.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


@pytest.mark.parametrize(
    "output",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\0" * 100,
        settings({}) + b"\xff" * 100,
        settings({}) + goaway(0, ErrorCode.ENHANCE_YOUR_CALM),
        b"",
    ],
)
async def test_a_call_to_a_server_without_grpc_fails(output: bytes) -> None:
    async with peer(output, ends=not output) as (port, received), channel(port) as client:
        with pytest.raises(GrpcError) as failed:
            await client.call(PATH, b"hello", timeout_s=30)
        assert failed.value.code is Code.UNAVAILABLE
        assert received[0] == PREFACE


async def test_a_silent_peer_is_disconnected_after_a_call_timed_out() -> None:
    async with peer() as (port, received), channel(port) as client:
        for number in (1, 2):
            with pytest.raises(GrpcError) as late:
                await client.call(PATH, b"hello", timeout_s=0.01)
            assert late.value.code is Code.DEADLINE_EXCEEDED
            while len(received) < number:
                await asyncio.sleep(0)
            protocol = client._protocol
            while protocol is not None and protocol.is_open:
                await asyncio.sleep(0)


async def test_a_server_that_does_not_negotiate_http_2_is_refused() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate().configure_cert(context)
    context.set_alpn_protocols(["http/1.1"])
    async with peer(ssl=context) as (port, _), channel(port, is_tls=True) as client:
        with pytest.raises(CallNotSent, match=r"HTTP/2|not there"):
            await client.call(PATH, b"hello", timeout_s=30)


async def test_an_untrusted_certificate_is_refused() -> None:
    async with grpcio_server(echo_bytes, is_tls=True) as port:
        client = Channel(PushTarget("app", "localhost", port, is_tls=True), BOUNDS, Budget(10**6))
        with pytest.raises(CallNotSent, match=r"(?i)certificate"):
            await client.call(PATH, b"hello", timeout_s=30)
        client.close()


async def test_a_closed_channel_makes_no_calls() -> None:
    async with listening(Echo().methods) as (_, port), channel(port) as client:
        client.close()
        with pytest.raises(CallNotSent):
            await client.call(ECHO, b"", timeout_s=30)


async def test_an_http_error_is_converted_to_a_grpc_code() -> None:
    echo = Echo()
    async with listening(echo.methods) as (_, port), channel(port) as client:
        with pytest.raises(GrpcError) as error:
            await client.call(FAIL, echo_request().SerializeToString(), timeout_s=30)
        assert error.value.code is Code.NOT_FOUND
        client._heads[ECHO, 30] = client._head(ECHO, 30).replace(b"application/grpc", b"application/json")
        with pytest.raises(GrpcError) as odd:
            await client.call(ECHO, b"", timeout_s=30)
        assert odd.value.code is Code.UNIMPLEMENTED
