"""A gRPC peer of a server connection, without a socket and on a clock that the test controls."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from headrace.foundation.limits import Limits
from headrace.grpc.messages import taskbroker_pb2 as wire
from headrace.grpc.transport import frames
from headrace.grpc.transport.frames import frame
from headrace.grpc.transport.headers import encode_block
from headrace.grpc.transport.server import GrpcServer, ServerProtocol
from headrace.grpc.transport.service_methods import Methods
from tests.support.http2_frames import framed, parsed

IDLE_S = 60
NO_FIELDS: Mapping[str, str] = {}


class Transport(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self, address: str) -> None:
        super().__init__({"peername": (address, 5)})
        self.written = b""
        self.end = ""
        self.is_read = True

    def pause_reading(self) -> None:
        """Stop reading."""
        self.is_read = False

    def resume_reading(self) -> None:
        """Read again."""
        self.is_read = True

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
        each, self.written = parsed(self.written), b""
        return each


class Peer:
    """A connection without a socket, on a clock that the test controls."""

    def __init__(
        self, methods: Methods, *, server: GrpcServer | None = None, address: str = "10.0.0.1", **limits: int
    ) -> None:
        """`server`: the server of other peers, instead of one for this peer alone."""
        loop = asyncio.get_running_loop()
        self.now_s = 1_000.0
        self.transport = Transport(address)
        self.server = server or GrpcServer(methods, limits=Limits(http_idle_s=IDLE_S, **limits))
        self.connection = ServerProtocol(self.server)
        self.connection._loop = SimpleNamespace(  # type: ignore[assignment]  # as much of a loop as it uses
            time=lambda: self.now_s,
            call_later=lambda *_: SimpleNamespace(cancel=lambda: None),
            call_soon=loop.call_soon,
            create_task=loop.create_task,
        )
        self.connection._received_s = self.connection._progress_s = self.now_s
        self.connection.connection_made(self.transport)

    async def send(self, *pieces: bytes) -> list[tuple[int, int, int, bytes]]:
        """Send bytes and return the frames of the response."""
        for piece in pieces:
            self.connection.data_received(piece)
            await asyncio.sleep(0)
        return await self.read()

    async def read(self) -> list[tuple[int, int, int, bytes]]:
        """Return the frames written so far."""
        for _ in range(5):
            await asyncio.sleep(0)
        return self.transport.frames()

    async def wait(self, seconds: float) -> list[tuple[int, int, int, bytes]]:
        """Advance the clock in silence and return the frames that were written."""
        self.now_s += seconds
        self.connection._check_idle()
        return await self.read()


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
