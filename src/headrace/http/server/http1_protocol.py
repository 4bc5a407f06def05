"""Bounds of one HTTP/1.1 connection: the size of a request head, the time it may take, and how long a client may not
read.

uvicorn has none of these bounds. A connection is admitted by the table of the server's connections. Timers run only
while the client must act: while it owes the rest of a head, or does not read a response. A connection that begins with
the HTTP/2 preface is passed to the gRPC server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, NoReturn, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from headrace.foundation.connection_table import Admission, ConnectionTable
from headrace.foundation.limits import KIB
from headrace.grpc.transport.closing import close_gracefully
from headrace.grpc.transport.frames import PREFACE, ErrorCode, goaway, settings

HEAD_BYTES_MAX: Final = 64 * KIB
_TOO_LARGE: Final = (431, "Request Header Fields Too Large", "expected a request head of at most 65,536 bytes")
_TOO_SLOW: Final = (408, "Request Timeout", "the request head was not complete in time")
_TOO_MANY: Final = (503, "Service Unavailable", "the server has no connection left; retry in a moment")
REFUSED_S: Final = 1.0
"""Seconds that a refused connection may take to send a request, which is answered."""
Second = Callable[[set[Any], ConnectionTable | None], Any]
"""Creates the protocol of an HTTP/2 connection. Its arguments are the set of connections to shut down with the server,
and the table that admitted it.
"""

_INVALID: Final = (400, "Bad Request", "expected an HTTP/1.1 request")
_OLD_VERSION: Final = (400, "Bad Request", "expected HTTP/1.0 or HTTP/1.1")
_NOT_ONE_HOST: Final = (400, "Bad Request", "expected exactly one Host header")


class HeadRefused(Exception):
    """Aborts the parsing of a request head."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with bounds. Without `second` an HTTP/2 connection is an invalid request."""

    def __init__(
        self, *arguments: Any, second: Second | None = None, table: ConnectionTable | None = None, **more: Any
    ) -> None:
        """`table`: admits the connection; None admits every one."""
        super().__init__(*arguments, **more)
        self._table = table
        self._admission = Admission.ADMITTED
        self._second = second
        self._preface: bytes | None = None if second is None else b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the timer for the first request head."""
        super().connection_made(cast("asyncio.Transport", transport))
        self._idle_s = float(self.config.timeout_keep_alive)
        self._head_bytes = 0
        self._is_in_head = True
        self._rejection = _INVALID
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._idle_since_s = self.loop.time()
        if self._table is not None:
            address = "" if self.client is None else self.client[0]
            self._admission = self._table.admit(self, address, now_s=self._idle_since_s)
        if self._admission is Admission.DROPPED:
            self.transport.abort()
        elif self._admission is Admission.REFUSED:
            self._head_timer = self.loop.call_later(REFUSED_S, self.transport.abort)
        else:
            self._expect_head()

    @property
    def idle_since_s(self) -> float | None:
        """Time since which no request is being answered; None while one is."""
        cycle: Any = self.cycle  # None before the first request
        return None if cycle is not None and not cycle.response_complete else self._idle_since_s

    def close_idle(self) -> None:
        """Close the connection for another one."""
        close_gracefully(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        if self._table is not None:
            self._table.remove(self)
        self._cancel_timers()
        super().connection_lost(exc)

    def _cancel_timers(self) -> None:
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a request head. Those of a body are bounded by its reader."""
        if self._preface is not None:
            data = self._preface + data
            if PREFACE.startswith(data[: len(PREFACE)]):
                self._preface = data
                if len(data) >= len(PREFACE):
                    self._pass_to_second(data)
                return
            self._preface = None
        if self._admission is not Admission.ADMITTED:
            self._refuse(_TOO_MANY)
            return
        if self._is_in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._head_bytes > HEAD_BYTES_MAX and not self.transport.is_closing():
            self._refuse(_TOO_LARGE)

    def _pass_to_second(self, data: bytes) -> None:
        """Pass an HTTP/2 connection to the gRPC protocol."""
        assert self._second is not None
        self._cancel_timers()
        self.connections.discard(self)
        table = self._table
        if self._admission is not Admission.ADMITTED:
            self.transport.write(settings({}) + goaway(0, ErrorCode.ENHANCE_YOUR_CALM, "too many connections"))
            close_gracefully(self.transport)
            return
        protocol = self._second(self.connections, table)
        if table is not None:
            table.replace(self, protocol)
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        protocol.data_received(data)

    def on_message_begin(self) -> None:
        """Start the timer for a request head, unless it runs already."""
        super().on_message_begin()
        self._is_in_head = True
        self._fields_bytes = 0
        self._hosts_count = 0
        if self._head_timer is None:
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        """Count the bytes of the request target."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count the bytes of a header field."""
        self._count(len(name) + len(value))
        if name.lower() == b"host":
            self._hosts_count += 1
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Check the version and the Host header (RFC 9112, 2.3 and 3.2), and stop the timer: the head is complete."""
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._reject(_OLD_VERSION)
        if self._hosts_count > 1 or (not self._hosts_count and version == "1.1"):
            self._reject(_NOT_ONE_HOST)
        self._is_in_head, self._head_bytes = False, 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Close the connection if this was its last response."""
        self._idle_since_s = self.loop.time()
        super().on_response_complete()
        self._close_if_closing()

    def shutdown(self) -> None:
        """Finish open responses and close. uvicorn calls this when the server stops."""
        super().shutdown()
        self._close_if_closing()

    def _close_if_closing(self) -> None:
        if self.transport.is_closing():
            close_gracefully(self.transport)

    def pause_writing(self) -> None:
        """Start a timer: the client does not read its response."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._idle_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer: the client reads again."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer an invalid request. uvicorn calls this with a text of its own, which is replaced."""
        del msg
        self._refuse(self._rejection)

    def _count(self, size: int) -> None:
        self._fields_bytes += size
        if self._fields_bytes > HEAD_BYTES_MAX:
            self._reject(_TOO_LARGE)

    def _reject(self, rejection: tuple[int, str, str]) -> NoReturn:
        """Abort the parser, which then calls `send_400_response`."""
        self._rejection = rejection
        raise HeadRefused

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._idle_s, self._too_slow)

    def _too_slow(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            if self._head_bytes:
                self._refuse(_TOO_SLOW)
            else:
                self.transport.close()

    def _refuse(self, rejection: tuple[int, str, str]) -> None:
        status, reason, detail = rejection
        body = f'{{"title":"{reason}","status":{status},"detail":"{detail}","error":"{detail}"}}'.encode()
        head = (
            f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/problem+json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n"
        )
        head += "retry-after: 5\r\n\r\n" if status == _TOO_MANY[0] else "\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


def uvicorn_settings(protocol: Any) -> dict[str, Any]:
    """Settings of uvicorn, other than the app."""
    return {
        "http": protocol,
        "ws": "none",
        "lifespan": "on",
        "log_config": None,
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "date_header": True,
        "proxy_headers": False,
    }
