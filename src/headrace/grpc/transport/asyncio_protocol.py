"""HTTP/2 on an asyncio transport, for both ends: output is written at most once per iteration of the event loop."""

from __future__ import annotations

import asyncio

from headrace.grpc.transport.connection import Http2Connection


class Http2Protocol(asyncio.Protocol):
    """An HTTP/2 connection on an asyncio transport. While the transport is paused, no output is taken from the
    connection.
    """

    _transport: asyncio.Transport

    def __init__(self, http2: Http2Connection) -> None:
        self._http2 = http2
        self._loop = asyncio.get_running_loop()
        self._is_paused = False
        self._is_flush_scheduled = False

    def pause_writing(self) -> None:
        """Stop writing: the transport's buffer is above its high-water mark."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """Write again: the transport's buffer has drained."""
        self._is_paused = False
        self._flush()

    def _schedule_flush(self) -> None:
        """Write at the end of this iteration of the event loop, together with all output produced until then."""
        if not self._is_flush_scheduled:
            self._is_flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_scheduled = False
        while not self._is_paused and not self._transport.is_closing():
            data = self._http2.take_output()
            if not data:
                break
            self._transport.write(data)
