"""One connection's bounds: how large a head may be, how long it may take, and how long a peer may not read.

A peer that begins with HTTP/2's preface is handed on to whoever speaks that, with all that it said.
uvicorn bounds none of those. Time runs only while the peer owes something: the rest of a head, or room for an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from headrace.foundation.limits import KIB
from headrace.grpc.transport.closing import close_gracefully
from headrace.grpc.transport.frames import PREFACE, ErrorCode, goaway, settings

HEAD_BYTES_MAX: Final = 64 * KIB
_TOO_LARGE: Final = (431, "Request Header Fields Too Large", "the head of a request has at most 65,536 bytes")
_TOO_SLOW: Final = (408, "Request Timeout", "the head of the request did not come in time")
Second = Callable[[set[Any]], asyncio.Protocol]
"""Makes the protocol of a connection that speaks HTTP/2; it is given those that are told when the server stops."""

_INVALID: Final = (400, "Bad Request", "this is not HTTP/1.1")


class HeadTooLarge(Exception):
    """Ends the parsing of a head."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with those bounds. Without a `second` HTTP/2 is a fault like another."""

    def __init__(self, *arguments: Any, second: Second | None = None, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._second = second
        self._opening: bytes | None = None if second is None else b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A new peer owes a head."""
        super().connection_made(cast("asyncio.Transport", transport))
        self._idle_s = float(self.config.timeout_keep_alive)
        self._head_bytes = 0
        self._is_in_head = True
        self._fault = _INVALID
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is owed any more."""
        self._no_timers()
        super().connection_lost(exc)

    def _no_timers(self) -> None:
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Bytes of a head count as they come; those of a body are bounded by whoever reads it."""
        if self._opening is not None:
            data = self._opening + data
            if PREFACE.startswith(data[: len(PREFACE)]):
                self._opening = data
                if len(data) >= len(PREFACE):
                    self._hand_over(data)
                return
            self._opening = None
        if self._is_in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._head_bytes > HEAD_BYTES_MAX and not self.transport.is_closing():
            self._refuse(_TOO_LARGE)

    def _hand_over(self, data: bytes) -> None:
        """The peer speaks HTTP/2: from here on another protocol has its connection."""
        assert self._second is not None
        self._no_timers()
        self.connections.discard(self)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            self.transport.write(settings({}) + goaway(0, ErrorCode.ENHANCE_YOUR_CALM, "too many connections"))
            self.transport.close()
            return
        protocol = self._second(self.connections)
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        protocol.data_received(data)

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._is_in_head = True
        self._fields_bytes = 0
        if self._head_timer is None:
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        """A piece of the request's target."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the head."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._is_in_head, self._head_bytes = False, 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """An answer is out; it may have been the last."""
        super().on_response_complete()
        self._part_if_closing()

    def shutdown(self) -> None:
        """Answer what is under way, and close; uvicorn calls this when the server stops."""
        super().shutdown()
        self._part_if_closing()

    def _part_if_closing(self) -> None:
        if self.transport.is_closing():
            close_gracefully(self.transport)

    def pause_writing(self) -> None:
        """The peer owes room for more of the answer."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._idle_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It made room."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """What the parser refused; uvicorn calls this with its own words."""
        del msg
        self._refuse(self._fault)

    def _count(self, size: int) -> None:
        self._fields_bytes += size
        if self._fields_bytes > HEAD_BYTES_MAX:
            self._fault = _TOO_LARGE
            raise HeadTooLarge

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._idle_s, self._too_slow)

    def _too_slow(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            if self._head_bytes:
                self._refuse(_TOO_SLOW)
            else:
                self.transport.close()

    def _refuse(self, fault: tuple[int, str, str]) -> None:
        status, reason, detail = fault
        body = f'{{"title":"{reason}","status":{status},"detail":"{detail}","error":"{detail}"}}'.encode()
        head = (
            f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/problem+json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def uvicorn_settings(protocol: Any) -> dict[str, Any]:
    """What uvicorn is told beside the app."""
    return {
        "http": protocol,
        "ws": "none",
        "lifespan": "on",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "date_header": True,
        "proxy_headers": False,
    }
