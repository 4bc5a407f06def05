"""grpcio clients call the server: plain and over TLS, from threads and from asyncio."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest

import grpc
from headrace.grpc.messages import taskbroker_pb2 as wire
from tests.support.grpc_server import COUNT, ECHO, FAIL, WAIT, Echo, listening
from tests.support.grpcio_client import channel, credentials, echo_request, unary

MIB = 1024 * 1024


@pytest.mark.parametrize("is_tls", [False, True])
async def test_an_asyncio_client_gets_responses(is_tls: bool) -> None:
    echo = Echo()
    async with listening(echo.methods, is_tls=is_tls) as (_, port), channel(port, is_tls=is_tls) as client:
        answers = await asyncio.gather(
            *(unary(client, ECHO)(echo_request(str(n)), metadata=(("x-n", str(n)),)) for n in range(300))
        )
    assert [answer.task.id for answer in answers] == [str(n) for n in range(300)]
    assert sorted(int(call.metadata["x-n"]) for call in echo.calls) == list(range(300))
    assert all(call.deadline_us is None and call.peer.startswith("127.0.0.1:") for call in echo.calls)


@pytest.mark.parametrize("is_tls", [False, True])
async def test_a_threaded_client_gets_responses(is_tls: bool) -> None:
    def call(port: int) -> list[str]:
        if is_tls:
            client = grpc.secure_channel(f"localhost:{port}", credentials())
        else:
            client = grpc.insecure_channel(f"127.0.0.1:{port}")
        with client:
            futures = [unary(client, ECHO).future(echo_request(str(n)), timeout=60) for n in range(100)]
            return [future.result().task.id for future in futures]

    echo = Echo()
    async with listening(echo.methods, is_tls=is_tls) as (_, port):
        assert await asyncio.to_thread(call, port) == [str(n) for n in range(100)]
    assert all(call.deadline_us is not None for call in echo.calls)


async def test_messages_larger_than_every_window_go_both_ways_concurrently() -> None:
    async with listening(Echo().methods) as (server, port), channel(port) as client:
        texts = [letter * (3 * MIB) for letter in "abcd"]
        answers = await asyncio.gather(*(unary(client, ECHO)(echo_request(text)) for text in texts))
        assert [answer.task.id for answer in answers] == texts
        assert server.budget.held_bytes == 0


async def test_a_message_over_its_bound_is_refused_and_the_next_call_works() -> None:
    async with listening(Echo().methods, grpc_message_bytes_max=MIB) as (server, port), channel(port) as client:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await unary(client, ECHO)(echo_request("x" * MIB))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "at most 1048576" in str(refused.value.details())
        size = MIB - len(echo_request("x" * MIB).SerializeToString()) + MIB
        assert len((await unary(client, ECHO)(echo_request("x" * size))).SerializeToString()) == MIB
        assert server.budget.held_bytes == 0


async def test_the_bytes_held_by_the_calls_of_a_connection_are_bounded() -> None:
    echo = Echo()
    limits: dict[str, Any] = {"grpc_message_bytes_max": MIB, "grpc_buffer_bytes_max": 8 * MIB}
    async with (
        listening(echo.methods, **limits) as (server, port),
        channel(port) as client,
    ):
        first = asyncio.create_task(_call(client, WAIT))
        await echo.arrived.wait()
        echo.arrived.clear()
        second = asyncio.create_task(_call(client, WAIT))
        await echo.arrived.wait()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await unary(client, WAIT)(echo_request("x" * (MIB - 100)))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "this connection" in str(refused.value.details())
        echo.released.set()
        await asyncio.gather(first, second)
        assert server.budget.held_bytes == 0


async def _call(client: Any, path: str) -> Any:
    return await unary(client, path)(echo_request("x" * (MIB - 100)))


async def test_an_error_keeps_its_code_and_message() -> None:
    async with listening(Echo().methods) as (_, port), channel(port) as client:
        words = "50 % of “grüße”\n\tare gone"
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await unary(client, FAIL)(wire.PushTaskRequest(callback_url=words))
        assert (error.value.code(), error.value.details()) == (grpc.StatusCode.NOT_FOUND, words)


async def test_a_long_error_message_arrives_cut() -> None:
    async with listening(Echo().methods) as (_, port), channel(port) as client:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await unary(client, FAIL)(wire.PushTaskRequest(callback_url="😀" * 10_000))
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        assert error.value.details() == "😀" * 250


async def test_an_exception_in_a_handler_is_internal_and_leaks_nothing() -> None:
    async with listening(Echo().methods) as (_, port), channel(port) as client:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await unary(client, FAIL)(wire.PushTaskRequest(callback_url="crash"))
        assert error.value.code() is grpc.StatusCode.INTERNAL
        assert "ZeroDivision" not in str(error.value.details())


async def test_an_unknown_method_is_unimplemented() -> None:
    async with listening(Echo().methods) as (_, port), channel(port) as client:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await unary(client, "/no/Such")(echo_request())
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_bytes_that_cannot_be_decoded_are_refused() -> None:
    async with listening(Echo().methods) as (_, port), channel(port) as client:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.unary_unary(ECHO)(b"\xff\xff\xff")
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_deadline_ends_the_call_and_its_handler() -> None:
    echo = Echo()
    async with listening(echo.methods) as (server, port), channel(port) as client:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await unary(client, WAIT)(echo_request(), timeout=0.05)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await echo.cancelled.wait()
        assert (await unary(client, ECHO)(echo_request())).task.id == "hello"
        assert server.budget.held_bytes == 0


async def test_cancelling_the_client_cancels_the_handler() -> None:
    echo = Echo()
    async with listening(echo.methods) as (_, port), channel(port) as client:
        call = unary(client, WAIT)(echo_request())
        waiting = asyncio.ensure_future(call)
        await echo.arrived.wait()
        call.cancel()
        await echo.cancelled.wait()
        assert echo.waiting == 0
        await asyncio.gather(waiting, return_exceptions=True)


async def test_a_broken_connection_cancels_its_handlers() -> None:
    echo = Echo()
    async with listening(echo.methods) as (_, port):
        async with channel(port) as client:
            waiting = asyncio.ensure_future(unary(client, WAIT)(echo_request()))
            await echo.arrived.wait()
        await echo.cancelled.wait()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_gzip_messages_are_decompressed() -> None:
    async with listening(Echo().methods) as (server, port), channel(port) as client:
        text = "abc" * 10_000
        answer = await unary(client, ECHO)(echo_request(text), compression=grpc.Compression.Gzip)
        assert answer.task.id == text
        assert server.budget.held_bytes == 0


async def test_a_message_that_expands_too_much_is_refused() -> None:
    async with listening(Echo().methods, grpc_message_bytes_max=MIB) as (server, port), channel(port) as client:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await unary(client, ECHO)(echo_request("x" * (4 * MIB)), compression=grpc.Compression.Gzip)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert server.budget.held_bytes == 0


async def test_another_compression_is_unimplemented() -> None:
    async with listening(Echo().methods) as (_, port), channel(port) as client:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await unary(client, ECHO)(echo_request("x" * 1_000), compression=grpc.Compression.Deflate)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_response_may_be_a_stream() -> None:
    async with listening(Echo().methods) as (_, port), channel(port) as client:
        count = client.unary_stream(
            COUNT,
            request_serializer=wire.PushTaskRequest.SerializeToString,
            response_deserializer=wire.PushTaskRequest.FromString,
        )
        assert [response.callback_url async for response in count(wire.PushTaskRequest(callback_url="abc"))] == [
            "a",
            "b",
            "c",
        ]


async def test_calls_beyond_the_stream_limit_wait_for_their_turn() -> None:
    async with listening(Echo().methods, grpc_calls_max=4) as (_, port), channel(port) as client:
        answers = await asyncio.gather(*(unary(client, ECHO)(echo_request(str(n))) for n in range(200)))
        assert [answer.task.id for answer in answers] == [str(n) for n in range(200)]


async def test_a_shutdown_completes_open_calls_and_accepts_no_new_ones() -> None:
    echo = Echo()
    async with listening(echo.methods) as (server, port), channel(port) as client:
        waiting = asyncio.ensure_future(unary(client, WAIT)(echo_request()))
        await echo.arrived.wait()
        (connection,) = server.connections
        connection.shutdown()
        assert server.connections
        echo.released.set()
        assert (await waiting).task.id == "hello"
        while connection in server.connections:
            await asyncio.sleep(0)


async def test_each_call_is_observed_once() -> None:
    observed: list[tuple[str, str]] = []
    async with (
        listening(Echo().methods, observe=lambda path, code, _seconds: observed.append((path, code.name))) as (_, port),
        channel(port) as client,
    ):
        await unary(client, ECHO)(echo_request())
        for path, text in ((FAIL, "x"), ("/no/Such", "")):
            with pytest.raises(grpc.aio.AioRpcError):
                await unary(client, path)(wire.PushTaskRequest(callback_url=text))
    assert observed == [(ECHO, "OK"), (FAIL, "NOT_FOUND"), ("none", "UNIMPLEMENTED")]
