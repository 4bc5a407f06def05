"""The baseline of unary gRPC calls in Python: it finds frames, and writes one fixed response for each call.

`python -m headrace.benchmarks.baselines.echo SIZE` listens and prints its port. It decodes no header, reads no message,
keeps no flow-control window and has no bounds. The cost of a call above this is what a real server does.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from typing import cast

HEAD = struct.Struct(">HBBBI")
PREFACE_BYTES = 24


def literal(name: bytes, value: bytes) -> bytes:
    """Encode a header field without compression."""
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    """Encode a frame."""
    return HEAD.pack(len(payload) >> 8, len(payload) & 255, kind, flags, stream_id) + payload


class Echo(asyncio.Protocol):
    """Responds to every stream that ends."""

    size = 200

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send SETTINGS and a large window, so that the peer never waits."""
        self.transport = cast("asyncio.Transport", transport)
        self.unparsed = b""
        self.skip = PREFACE_BYTES
        self.head = b"\x88" + literal(b"content-type", b"application/grpc")
        self.message = b"\x00" + struct.pack(">I", self.size) + b"\x12" + varint(self.size - 3) + b"x" * (self.size - 3)
        self.tail = literal(b"grpc-status", b"0")
        self.transport.write(frame(4, 0, 0, b"") + frame(8, 0, 0, struct.pack(">I", 2**30)))

    def data_received(self, data: bytes) -> None:
        """Find frames and respond."""
        data = self.unparsed + data
        if self.skip:
            data, self.skip = data[self.skip :], 0
        target, end, out = 0, len(data), []
        while end - target >= 9:
            high, low, kind, flags, stream_id = HEAD.unpack_from(data, target)
            stop = target + 9 + (high << 8 | low)
            if stop > end:
                break
            target = stop
            if kind == 0 and flags & 1:
                parts = (
                    frame(1, 4, stream_id, self.head),
                    frame(0, 0, stream_id, self.message),
                    frame(1, 5, stream_id, self.tail),
                )
                out.append(b"".join(parts))
            elif kind == 4 and not flags & 1:
                out.append(frame(4, 1, 0, b""))
        self.unparsed = data[target:]
        if out:
            self.transport.write(b"".join(out))


def varint(number: int) -> bytes:
    """Encode a length as a varint of two bytes."""
    return bytes((number & 127 | 128, number >> 7))


async def main() -> None:
    """Listen until stopped."""
    Echo.size = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
