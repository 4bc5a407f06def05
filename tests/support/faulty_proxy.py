"""A proxy to a PostgreSQL server that cuts or delays the next request."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

BEFORE, AFTER, TRUNCATED, LATE = "before", "after", "truncated", "late"
"""The request never arrives; its answer is lost; half of its answer arrives; its answer is late."""
MODES = (BEFORE, AFTER, TRUNCATED, LATE)
FLUSH = b"H\0\0\0\4"
READY = b"Z\0\0\0\5"
TURNS = 50
_FIELDS = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0"
TERMINATED = b"E" + (4 + len(_FIELDS)).to_bytes(4, "big") + _FIELDS


class FaultyProxy:
    """A proxy on the loopback address. `inject` decides what happens to the next request."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._injected = ""
        self._connections: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._serving: asyncio.Server | None = None
        self.injected_count = 0

    async def __aenter__(self) -> Self:
        self._serving = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._serving is not None
        self._serving.close()
        self.cut()

    @property
    def dsn(self) -> str:
        """The server's DSN by way of the proxy."""
        assert self._serving is not None
        port = self._serving.sockets[0].getsockname()[1]
        return self._dsn.replace(f":{urlsplit(self._dsn).port}", f":{port}")

    def inject(self, mode: str) -> None:
        """Disturb the next request that expects an answer, on any connection."""
        self._injected = mode

    def cut(self) -> None:
        """End every connection now."""
        for connection in list(self._connections):
            self._end(connection)

    async def terminate_backends(self) -> None:
        """Send what a backend sends when an administrator terminates it. The end of the connection is still on its
        way.
        """
        for client, _ in self._connections:
            client.write(TERMINATED)
            await client.drain()
        for _ in range(TURNS):
            await asyncio.sleep(0)

    def _end(self, connection: tuple[asyncio.StreamWriter, asyncio.StreamWriter]) -> None:
        self._connections.discard(connection)
        for writer in connection:
            with suppress(RuntimeError):
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parts = urlsplit(self._dsn)
        try:
            from_server, to_server = await asyncio.open_connection(parts.hostname, parts.port)
        except OSError:
            writer.transport.abort()
            return
        connection = writer, to_server
        self._connections.add(connection)
        answers: list[str] = []
        back = asyncio.create_task(self._answer(connection, from_server, answers))
        try:
            while data := await reader.read(1 << 20):
                if self._injected and not data.endswith(FLUSH):
                    mode, self._injected = self._injected, ""
                    self.injected_count += 1
                    if mode == BEFORE:
                        return
                    answers.append(mode)
                to_server.write(data)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            if not answers:
                self._end(connection)
            await asyncio.wait((back,))
            self._end(connection)

    async def _answer(
        self,
        connection: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
        from_server: asyncio.StreamReader,
        answers: list[str],
    ) -> None:
        held = b""
        with suppress(ConnectionError, asyncio.CancelledError):
            while data := await from_server.read(1 << 20):
                if not answers:
                    connection[0].write(data)
                    continue
                held += data
                if held[-6:-1] != READY:
                    continue
                mode = answers.pop()
                if mode == LATE:
                    for _ in range(TURNS):
                        await asyncio.sleep(0)
                    connection[0].write(held)
                    held = b""
                    continue
                if mode == TRUNCATED:
                    connection[0].write(held[: len(held) // 2])
                    await connection[0].drain()
                break
        with suppress(RuntimeError):
            connection[0].close()  # bytes written before are still sent
            connection[1].transport.abort()
