"""Peers that are silent, do not read, or send half a call: each is disconnected in time, on a manual clock."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message

from headrace.grpc.messages import taskbroker_pb2 as wire
from headrace.grpc.transport import frames
from headrace.grpc.transport.frames import ErrorCode, frame
from headrace.grpc.transport.headers import encode_field
from headrace.grpc.transport.server import PENDING_BYTES_MAX
from headrace.grpc.transport.service_methods import CallContext, Method, ResponseAfter
from headrace.grpc.transport.status import Code, GrpcError
from tests.support.grpc_peer import IDLE_S, Peer, call
from tests.support.grpc_server import ECHO, SIGNED, WAIT, Echo, listening
from tests.support.http2_frames import GREETING, parsed


async def test_a_silent_peer_is_pinged_once_and_then_disconnected() -> None:
    peer = Peer(Echo().methods)
    await peer.send(GREETING)
    assert await peer.wait(IDLE_S / 2) == []
    assert [each[:2] for each in await peer.wait(IDLE_S / 2)] == [(frames.PING, 0)]
    assert await peer.wait(IDLE_S / 2) == []
    assert peer.transport.end == ""
    await peer.wait(IDLE_S / 2)
    assert peer.transport.end == "aborted"


async def test_a_peer_that_answers_pings_stays_connected() -> None:
    peer = Peer(Echo().methods)
    await peer.send(GREETING)
    for _ in range(10):
        assert [each[0] for each in await peer.wait(IDLE_S)] == [frames.PING]
        assert await peer.send(frame(frames.PING, frames.ACK, 0, b"headrace")) == []
    assert peer.transport.end == ""


async def test_a_half_sent_call_is_reset_and_others_continue() -> None:
    echo = Echo()
    peer = Peer(echo.methods)
    half = b"".join(frame(*each) for each in parsed(call(ECHO, 1, "x" * 20_000))[:-1])
    await peer.send(GREETING, half)
    assert await peer.wait(IDLE_S / 2) == []
    assert (await peer.send(call(ECHO, 3)))[-1][:3] == (frames.HEADERS, 5, 3)
    reset = (frames.RST_STREAM, 0, 1, frames.WORD.pack(ErrorCode.CANCEL))
    assert reset in await peer.wait(IDLE_S / 2 + 1)
    assert len(echo.calls) == 1


async def test_a_peer_that_opens_no_window_for_its_response_is_disconnected() -> None:
    peer = Peer(Echo().methods)
    await peer.send(GREETING, call(ECHO, 1, "x" * 100_000))
    await peer.wait(IDLE_S / 2)
    await peer.wait(IDLE_S / 2)
    await peer.send(frame(frames.PING, 0, 0, b"I live!!"))
    assert peer.transport.end == ""
    await peer.wait(IDLE_S / 2)
    assert peer.transport.end == "aborted"


async def test_a_peer_that_opens_its_window_slowly_is_served() -> None:
    peer = Peer(Echo().methods)
    await peer.send(GREETING, call(ECHO, 1, "x" * 100_000))
    for _ in range(12):
        await peer.wait(IDLE_S - 1)
        await peer.send(frames.window_update(0, 4_000), frames.window_update(1, 4_000))
    assert peer.transport.end == ""
    assert peer.connection._http2.streams_count == 0


async def test_no_responses_are_computed_for_a_peer_that_does_not_read() -> None:
    echo = Echo()
    peer = Peer(echo.methods)
    size = 1_000_000
    await peer.send(GREETING, *(call(ECHO, 2 * number + 1, "x" * size) for number in range(20)))
    client = len(echo.calls)
    assert client < 20, "responses for a peer that does not read must be bounded"
    assert PENDING_BYTES_MAX / size <= client <= 2 + PENDING_BYTES_MAX / size + 1
    windows = frames.window_update(0, 10**9)
    await peer.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 2**30}), windows)
    for _ in range(40):
        await peer.read()
    assert len(echo.calls) == 20
    assert peer.connection._server.budget.held_bytes == 0


async def test_while_the_socket_is_full_calls_wait() -> None:
    echo = Echo()
    peer = Peer(echo.methods)
    await peer.send(GREETING)
    peer.connection.pause_writing()
    assert await peer.send(call(ECHO, 1), call(ECHO, 3), frame(frames.RST_STREAM, 0, 3, bytes(4))) == []
    assert echo.calls == []
    peer.connection.resume_writing()
    await peer.read()
    assert len(echo.calls) == 1
    assert peer.connection._http2.streams_count == 0


async def test_a_protocol_violation_is_answered_with_goaway_and_cancels_handlers() -> None:
    echo = Echo()
    peer = Peer(echo.methods)
    await peer.send(GREETING, call(WAIT, 1))
    assert echo.waiting == 1
    written = await peer.send(frame(frames.DATA, 0, 1, b"x"))
    assert [each[0] for each in written] == [frames.GOAWAY]
    assert peer.transport.end == "closed"
    assert echo.cancelled.is_set()


async def test_calls_reset_in_the_same_read_leave_nothing_behind(recwarn: Any) -> None:
    echo = Echo()
    peer = Peer(echo.methods, grpc_calls_max=10)
    reset = frame(frames.RST_STREAM, 0, 0, frames.WORD.pack(ErrorCode.CANCEL))
    await peer.send(GREETING)
    for number in range(50):
        stream_id = 2 * number + 1
        await peer.send(call(WAIT, stream_id) + reset[:5] + stream_id.to_bytes(4, "big") + reset[9:])
    assert echo.waiting == 0
    assert (peer.connection._http2.streams_count, len(peer.connection._running)) == (0, 0)
    written = await peer.send(call(ECHO, 101))
    assert (frames.HEADERS, 101) in [each[:3:2] for each in written]
    gc.collect()
    assert not [str(warning.message) for warning in recwarn if "never awaited" in str(warning.message)]


async def test_a_deferred_response_is_made_when_its_future_is_done_unless_the_call_was_cancelled() -> None:
    futures: list[asyncio.Future[None]] = []
    client: list[int] = []

    def handler(_message: Message, _call: CallContext) -> ResponseAfter:
        number = len(futures)
        futures.append(asyncio.get_running_loop().create_future())
        return ResponseAfter(futures[-1], lambda: answers[number](number))

    def at_once(number: int) -> bytes:
        client.append(number)
        return b""

    async def wait(number: int) -> bytes:
        await asyncio.sleep(0)
        return at_once(number)

    def refused(number: int) -> bytes:
        client.append(number)
        raise GrpcError(Code.NOT_FOUND, "not found")

    answers: list[Callable[[int], Any]] = [at_once, wait, refused, at_once, at_once, at_once]
    peer = Peer({"/e/After": Method(wire.GetTaskRequest, handler, SIGNED)})
    await peer.send(GREETING, *(call("/e/After", 2 * number + 1) for number in range(6)))
    assert (len(futures), client) == (6, [])
    for future in futures[:3]:
        future.set_result(None)
    written = await peer.read()
    written += await peer.read()
    ended = {each[2]: each[3] for each in written if each[0] == frames.HEADERS}
    assert client == [0, 2, 1]
    assert encode_field("grpc-status", "5") in ended[5]
    assert encode_field("grpc-status", "0") in ended[1]
    assert encode_field("grpc-status", "0") in ended[3]
    reset = frame(frames.RST_STREAM, 0, 7, frames.WORD.pack(ErrorCode.CANCEL))
    await peer.send(reset)
    assert futures[3].cancelled()
    futures[4].set_result(None)  # its caller resets the call before the result is used
    await peer.send(reset[:5] + (9).to_bytes(4, "big") + reset[9:])
    futures[5].set_exception(GrpcError(Code.INTERNAL, "handler failed"))
    written = await peer.read()
    assert encode_field("grpc-status", "13") in written[-1][3]
    assert client == [0, 2, 1]
    assert (peer.connection._http2.streams_count, len(peer.connection._running)) == (0, 0)


async def test_an_invalid_grpc_timeout_is_refused() -> None:
    peer = Peer(Echo().methods)
    for number, text in enumerate(("", "1", "S", "-1S", "123456789S", "1x", "1.5S")):
        written = await peer.send(
            GREETING if not number else b"", call(ECHO, 2 * number + 1, fields={"grpc-timeout": text})
        )
        assert encode_field("grpc-status", "3") in written[-1][3], text


async def test_cut_aborts_calls_with_unavailable() -> None:
    echo = Echo()
    peer = Peer(echo.methods)
    await peer.send(GREETING, call(WAIT, 1))
    peer.connection.pause_writing()
    await peer.send(call(WAIT, 3))
    assert echo.waiting == 1
    peer.connection.cut()
    peer.connection.resume_writing()
    written = await peer.read()
    assert sorted(each[:3:2] for each in written) == [(frames.HEADERS, 1), (frames.HEADERS, 3), (frames.GOAWAY, 0)]
    assert all(encode_field("grpc-status", "14") in each[3] for each in written if each[0] == frames.HEADERS)
    assert peer.transport.end == "closed"


async def test_a_peer_that_is_not_http_2_gets_goaway_and_is_disconnected() -> None:
    """Over a real socket: input that is not HTTP/2 is answered with GOAWAY, and the connection is closed."""
    async with listening(Echo().methods) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        kinds = [each[0] for each in parsed(await reader.read())]
        assert kinds == [frames.SETTINGS, frames.WINDOW_UPDATE, frames.GOAWAY]
        writer.close()
        assert not server.connections
