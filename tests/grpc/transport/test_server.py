"""Peers that are silent, do not read, or send half a call: each is disconnected in time, on a manual clock."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from google.protobuf.message import Message

from headrace.foundation.limits import Limits
from headrace.grpc.messages import taskbroker_pb2 as wire
from headrace.grpc.transport import frames
from headrace.grpc.transport.frames import ErrorCode, frame
from headrace.grpc.transport.headers import encode_block, encode_field
from headrace.grpc.transport.server import PENDING_BYTES_MAX, GrpcServer, ServerProtocol
from headrace.grpc.transport.service_methods import CallContext, Method, Methods, ResponseAfter
from headrace.grpc.transport.status import Code, GrpcError
from tests.support.grpc_server import ECHO, WAIT, Echo, listening
from tests.support.http2_frames import GREETING, framed, parsed

IDLE_S = 60
NO_FIELDS: Mapping[str, str] = {}


class Transport(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__({"peername": ("10.0.0.1", 5)})
        self.written = b""
        self.end = ""

    def write(self, data: Any) -> None:
        """Keep the bytes."""
        self.written += data

    def is_closing(self) -> bool:
        """True after `close` or `abort`."""
        return bool(self.end)

    def close(self) -> None:
        """Close gracefully."""
        self.end = self.end or "closed"

    def abort(self) -> None:
        """Close at once."""
        self.end = "aborted"

    def frames(self) -> list[tuple[int, int, int, bytes]]:
        """Return the frames written since the last call."""
        found, self.written = parsed(self.written), b""
        return found


class Peer:
    """A connection without a socket, on a clock that the test controls."""

    def __init__(self, methods: Methods, **limits: int) -> None:
        loop = asyncio.get_running_loop()
        self.now_s = 1_000.0
        self.transport = Transport()
        self.connection = ServerProtocol(GrpcServer(methods, limits=Limits(http_idle_s=IDLE_S, **limits)))
        self.connection._loop = SimpleNamespace(  # type: ignore[assignment]  # as much of a loop as it uses
            time=lambda: self.now_s,
            call_later=lambda *_: SimpleNamespace(cancel=lambda: None),
            call_soon=loop.call_soon,
            create_task=loop.create_task,
        )
        self.connection._received_s = self.connection._progress_s = self.now_s
        self.connection.connection_made(self.transport)

    async def says(self, *pieces: bytes) -> list[tuple[int, int, int, bytes]]:
        """Send bytes and return the frames of the response."""
        for piece in pieces:
            self.connection.data_received(piece)
            await asyncio.sleep(0)
        return await self.hears()

    async def hears(self) -> list[tuple[int, int, int, bytes]]:
        """Return the frames written so far."""
        for _ in range(5):
            await asyncio.sleep(0)
        return self.transport.frames()

    async def later(self, seconds: float) -> list[tuple[int, int, int, bytes]]:
        """Let time pass in silence and return the frames that were written."""
        self.now_s += seconds
        self.connection._check_idle()
        return await self.hears()


def call(path: str, stream_id: int, text: str = "hello", *, fields: Mapping[str, str] = NO_FIELDS) -> bytes:
    """A call of a path."""
    echo_request = {":method": "POST", ":scheme": "http", ":path": path, "content-type": "application/grpc", **fields}
    message = framed(wire.PushTaskRequest(callback_url=text).SerializeToString())
    data = b"".join(
        frame(
            frames.DATA,
            frames.END_STREAM if start + 16_384 >= len(message) else 0,
            stream_id,
            message[start : start + 16_384],
        )
        for start in range(0, len(message), 16_384)
    )
    return frame(frames.HEADERS, frames.END_HEADERS, stream_id, encode_block(echo_request)) + data


async def test_a_silent_peer_is_pinged_once_and_then_disconnected() -> None:
    peer = Peer(Echo().methods)
    await peer.says(GREETING)
    assert await peer.later(IDLE_S / 2) == []
    assert [found[:2] for found in await peer.later(IDLE_S / 2)] == [(frames.PING, 0)]
    assert await peer.later(IDLE_S / 2) == []
    assert peer.transport.end == ""
    await peer.later(IDLE_S / 2)
    assert peer.transport.end == "aborted"


async def test_a_peer_that_answers_pings_stays_connected() -> None:
    peer = Peer(Echo().methods)
    await peer.says(GREETING)
    for _ in range(10):
        assert [found[0] for found in await peer.later(IDLE_S)] == [frames.PING]
        assert await peer.says(frame(frames.PING, frames.ACK, 0, b"headrace")) == []
    assert peer.transport.end == ""


async def test_a_half_sent_call_is_reset_and_others_continue() -> None:
    echo = Echo()
    peer = Peer(echo.methods)
    half = b"".join(frame(*found) for found in parsed(call(ECHO, 1, "x" * 20_000))[:-1])
    await peer.says(GREETING, half)
    assert await peer.later(IDLE_S / 2) == []
    assert (await peer.says(call(ECHO, 3)))[-1][:3] == (frames.HEADERS, 5, 3)
    reset = (frames.RST_STREAM, 0, 1, frames.WORD.pack(ErrorCode.CANCEL))
    assert reset in await peer.later(IDLE_S / 2 + 1)
    assert len(echo.calls) == 1


async def test_a_peer_that_opens_no_window_for_its_response_is_disconnected() -> None:
    peer = Peer(Echo().methods)
    await peer.says(GREETING, call(ECHO, 1, "x" * 100_000))
    await peer.later(IDLE_S / 2)
    await peer.later(IDLE_S / 2)
    await peer.says(frame(frames.PING, 0, 0, b"I live!!"))
    assert peer.transport.end == ""
    await peer.later(IDLE_S / 2)
    assert peer.transport.end == "aborted"


async def test_a_peer_that_opens_its_window_slowly_is_served() -> None:
    peer = Peer(Echo().methods)
    await peer.says(GREETING, call(ECHO, 1, "x" * 100_000))
    for _ in range(12):
        await peer.later(IDLE_S - 1)
        await peer.says(frames.window_update(0, 4_000), frames.window_update(1, 4_000))
    assert peer.transport.end == ""
    assert peer.connection._http2.streams_count == 0


async def test_no_responses_are_computed_for_a_peer_that_does_not_read() -> None:
    echo = Echo()
    peer = Peer(echo.methods)
    size = 1_000_000
    await peer.says(GREETING, *(call(ECHO, 2 * number + 1, "x" * size) for number in range(20)))
    client = len(echo.calls)
    assert client < 20, "responses for a peer that does not read must be bounded"
    assert PENDING_BYTES_MAX / size <= client <= 2 + PENDING_BYTES_MAX / size + 1
    room = frames.window_update(0, 10**9)
    await peer.says(frames.settings({frames.INITIAL_WINDOW_SIZE: 2**30}), room)
    for _ in range(40):
        await peer.hears()
    assert len(echo.calls) == 20
    assert peer.connection._server.budget.held_bytes == 0


async def test_while_the_socket_is_full_calls_wait() -> None:
    echo = Echo()
    peer = Peer(echo.methods)
    await peer.says(GREETING)
    peer.connection.pause_writing()
    assert await peer.says(call(ECHO, 1), call(ECHO, 3), frame(frames.RST_STREAM, 0, 3, bytes(4))) == []
    assert echo.calls == []
    peer.connection.resume_writing()
    await peer.hears()
    assert len(echo.calls) == 1
    assert peer.connection._http2.streams_count == 0


async def test_a_protocol_violation_is_answered_with_goaway_and_cancels_handlers() -> None:
    echo = Echo()
    peer = Peer(echo.methods)
    await peer.says(GREETING, call(WAIT, 1))
    assert echo.waiting == 1
    said = await peer.says(frame(frames.DATA, 0, 1, b"x"))
    assert [found[0] for found in said] == [frames.GOAWAY]
    assert peer.transport.end == "closed"
    assert echo.cancelled.is_set()


async def test_calls_reset_in_the_same_read_leave_nothing_behind(recwarn: Any) -> None:
    echo = Echo()
    peer = Peer(echo.methods, grpc_calls_max=10)
    given_up = frame(frames.RST_STREAM, 0, 0, frames.WORD.pack(ErrorCode.CANCEL))
    await peer.says(GREETING)
    for number in range(50):
        stream_id = 2 * number + 1
        await peer.says(call(WAIT, stream_id) + given_up[:5] + stream_id.to_bytes(4, "big") + given_up[9:])
    assert echo.waiting == 0
    assert (peer.connection._http2.streams_count, len(peer.connection._running)) == (0, 0)
    said = await peer.says(call(ECHO, 101))
    assert (frames.HEADERS, 101) in [found[:3:2] for found in said]
    gc.collect()
    assert not [str(one.message) for one in recwarn if "never awaited" in str(one.message)]


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

    async def later(number: int) -> bytes:
        await asyncio.sleep(0)
        return at_once(number)

    def refused(number: int) -> bytes:
        client.append(number)
        raise GrpcError(Code.NOT_FOUND, "not found")

    answers: list[Callable[[int], Any]] = [at_once, later, refused, at_once, at_once, at_once]
    peer = Peer({"/e/After": Method(wire.GetTaskRequest, handler)})
    await peer.says(GREETING, *(call("/e/After", 2 * number + 1) for number in range(6)))
    assert (len(futures), client) == (6, [])
    for future in futures[:3]:
        future.set_result(None)
    said = await peer.hears()
    said += await peer.hears()
    ended = {found[2]: found[3] for found in said if found[0] == frames.HEADERS}
    assert client == [0, 2, 1]
    assert encode_field("grpc-status", "5") in ended[5]
    assert encode_field("grpc-status", "0") in ended[1]
    assert encode_field("grpc-status", "0") in ended[3]
    given_up = frame(frames.RST_STREAM, 0, 7, frames.WORD.pack(ErrorCode.CANCEL))
    await peer.says(given_up)
    assert futures[3].cancelled()
    futures[4].set_result(None)  # its caller resets the call before the result is used
    await peer.says(given_up[:5] + (9).to_bytes(4, "big") + given_up[9:])
    futures[5].set_exception(GrpcError(Code.INTERNAL, "handler failed"))
    said = await peer.hears()
    assert encode_field("grpc-status", "13") in said[-1][3]
    assert client == [0, 2, 1]
    assert (peer.connection._http2.streams_count, len(peer.connection._running)) == (0, 0)


async def test_an_invalid_grpc_timeout_is_refused() -> None:
    peer = Peer(Echo().methods)
    for number, text in enumerate(("", "1", "S", "-1S", "123456789S", "1x", "1.5S", "1S ")):
        said = await peer.says(
            GREETING if not number else b"", call(ECHO, 2 * number + 1, fields={"grpc-timeout": text})
        )
        assert encode_field("grpc-status", "3") in said[-1][3], text


async def test_cut_aborts_calls_with_unavailable() -> None:
    echo = Echo()
    peer = Peer(echo.methods)
    await peer.says(GREETING, call(WAIT, 1))
    peer.connection.pause_writing()
    await peer.says(call(WAIT, 3))
    assert echo.waiting == 1
    peer.connection.cut()
    peer.connection.resume_writing()
    said = await peer.hears()
    assert sorted(found[:3:2] for found in said) == [(frames.HEADERS, 1), (frames.HEADERS, 3), (frames.GOAWAY, 0)]
    assert all(encode_field("grpc-status", "14") in found[3] for found in said if found[0] == frames.HEADERS)
    assert peer.transport.end == "closed"


async def test_a_peer_that_is_not_http_2_gets_goaway_and_is_disconnected() -> None:
    """Over a real socket: input that is not HTTP/2 is answered with GOAWAY, and the connection is closed."""
    async with listening(Echo().methods) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        kinds = [found[0] for found in parsed(await reader.read())]
        assert kinds == [frames.SETTINGS, frames.WINDOW_UPDATE, frames.GOAWAY]
        writer.close()
        assert not server.connections
