"""The least that a unary call costs in Python: frames are found, and one answer of fixed bytes is written for each.

`python -m bench.floors.echo_floor SIZE` listens and says its port. It imports nothing of Headrace, decodes no header,
looks at no message, keeps no window and has no bound: what a call costs above it is what a real server does.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from typing import cast

HEAD = struct.Struct(">HBBBI")
PREFACE_BYTES = 24


def literal(name: bytes, value: bytes) -> bytes:
    """A header field as it is."""
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    """A whole frame."""
    return HEAD.pack(len(payload) >> 8, len(payload) & 255, kind, flags, stream_id) + payload


class Echo(asyncio.Protocol):
    """Answers every stream that ends."""

    size = 200

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say that a peer may send what it likes."""
        self.transport = cast("asyncio.Transport", transport)
        self.left = b""
        self.skip = PREFACE_BYTES
        self.head = b"\x88" + literal(b"content-type", b"application/grpc")
        self.message = b"\x00" + struct.pack(">I", self.size) + b"\x12" + varint(self.size - 3) + b"x" * (self.size - 3)
        self.tail = literal(b"grpc-status", b"0")
        self.transport.write(frame(4, 0, 0, b"") + frame(8, 0, 0, struct.pack(">I", 2**30)))

    def data_received(self, data: bytes) -> None:
        """Frames."""
        data = self.left + data
        if self.skip:
            data, self.skip = data[self.skip :], 0
        place, end, out = 0, len(data), []
        while end - place >= 9:
            high, low, kind, flags, stream_id = HEAD.unpack_from(data, place)
            stop = place + 9 + (high << 8 | low)
            if stop > end:
                break
            place = stop
            if kind == 0 and flags & 1:
                parts = (
                    frame(1, 4, stream_id, self.head),
                    frame(0, 0, stream_id, self.message),
                    frame(1, 5, stream_id, self.tail),
                )
                out.append(b"".join(parts))
            elif kind == 4 and not flags & 1:
                out.append(frame(4, 1, 0, b""))
        self.left = data[place:]
        if out:
            self.transport.write(b"".join(out))


def varint(number: int) -> bytes:
    """A length of two bytes."""
    return bytes((number & 127 | 128, number >> 7))


async def main() -> None:
    """Listen until stopped."""
    Echo.size = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
