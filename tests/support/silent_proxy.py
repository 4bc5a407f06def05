"""A TCP proxy that stops forwarding without closing anything, as a network that changed its routes."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit


class SilentProxy:
    """A proxy on the loopback address, in front of the server that a URL names."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._port = urlsplit(url).port
        self._host = urlsplit(url).hostname
        self._serving: asyncio.Server | None = None
        self._silent: asyncio.Event = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.accepted_count = 0
        self.dropped_bytes = 0

    async def __aenter__(self) -> Self:
        self._serving = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._serving is not None
        self._serving.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """The server's URL by way of the proxy."""
        assert self._serving is not None
        return self._url.replace(f":{self._port}", f":{self._serving.sockets[0].getsockname()[1]}")

    def fall_silent(self) -> None:
        """Forward nothing more on the connections that exist. Later ones are forwarded."""
        self._silent.set()
        self._silent = asyncio.Event()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        silent = self._silent
        self.accepted_count += 1
        from_server, to_server = await asyncio.open_connection(self._host, self._port)
        try:
            await asyncio.gather(self._forward(reader, to_server, silent), self._forward(from_server, writer, silent))
        finally:
            for end in (writer, to_server):
                end.transport.abort()
            self._tasks.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, silent: asyncio.Event) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 20):
                if silent.is_set():
                    self.dropped_bytes += len(data)
                else:
                    writer.write(data)
            if not silent.is_set():
                writer.close()
