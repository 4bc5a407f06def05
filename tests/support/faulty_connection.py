"""A wire to a PostgreSQL server that is cut, or slow, at the request that comes next."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

BEFORE, AFTER, TRUNCATED, LATE = "before", "after", "truncated", "late"
"""The request never arrives; it is done and its answer is lost; half of the answer comes; all of it, late."""
MODES = (BEFORE, AFTER, TRUNCATED, LATE)
FLUSH = b"H\0\0\0\4"
READY = b"Z\0\0\0\5"
TURNS = 50


class Wire:
    """Listens on the loopback and leads to a server. `harm` decides what happens to the next request."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._harm = ""
        self._ways: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._serving: asyncio.Server | None = None
        self.harms_count = 0

    async def __aenter__(self) -> Self:
        self._serving = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._serving is not None
        self._serving.close()
        self.cut()

    @property
    def dsn(self) -> str:
        """The server by way of this wire."""
        assert self._serving is not None
        port = self._serving.sockets[0].getsockname()[1]
        return self._dsn.replace(f":{urlsplit(self._dsn).port}", f":{port}")

    def harm(self, mode: str) -> None:
        """Do harm to the next request that wants an answer, whoever sends it."""
        self._harm = mode

    def cut(self) -> None:
        """End every connection now."""
        for way in list(self._ways):
            self._end(way)

    def _end(self, way: tuple[asyncio.StreamWriter, asyncio.StreamWriter]) -> None:
        self._ways.discard(way)
        for writer in way:
            with suppress(RuntimeError):
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parts = urlsplit(self._dsn)
        try:
            from_server, to_server = await asyncio.open_connection(parts.hostname, parts.port)
        except OSError:
            writer.transport.abort()
            return
        way = writer, to_server
        self._ways.add(way)
        answers: list[str] = []
        back = asyncio.create_task(self._answer(way, from_server, answers))
        try:
            while data := await reader.read(1 << 20):
                if self._harm and not data.endswith(FLUSH):
                    mode, self._harm = self._harm, ""
                    self.harms_count += 1
                    if mode == BEFORE:
                        return
                    answers.append(mode)
                to_server.write(data)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            if not answers:
                self._end(way)
            await asyncio.wait((back,))
            self._end(way)

    async def _answer(
        self,
        way: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
        from_server: asyncio.StreamReader,
        answers: list[str],
    ) -> None:
        held = b""
        with suppress(ConnectionError, asyncio.CancelledError):
            while data := await from_server.read(1 << 20):
                if not answers:
                    way[0].write(data)
                    continue
                held += data
                if held[-6:-1] != READY:
                    continue
                mode = answers.pop()
                if mode == LATE:
                    for _ in range(TURNS):
                        await asyncio.sleep(0)
                    way[0].write(held)
                    held = b""
                    continue
                if mode == TRUNCATED:
                    way[0].write(held[: len(held) // 2])
                    await way[0].drain()
                break
        with suppress(RuntimeError):
            way[0].close()  # what was written before still goes out
            way[1].transport.abort()
