"""gRPC client of one endpoint: one connection with many concurrent calls, reopened when it breaks.

A call that can't be sent fails at once with UNAVAILABLE, and so do all calls while the endpoint is in backoff
(`BACKOFF_S`). A call that times out while nothing at all was received closes the connection: the peer is considered
gone.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, Final, NamedTuple, cast

from headrace.foundation.targets import PushTarget
from headrace.foundation.tcp_keepalive import keep_alive
from headrace.grpc.transport.asyncio_protocol import Http2Protocol
from headrace.grpc.transport.bounds import Bounds
from headrace.grpc.transport.budget import Budget
from headrace.grpc.transport.closing import close_gracefully
from headrace.grpc.transport.connection import Http2Connection
from headrace.grpc.transport.events import ConnectionFailed, GoAwayReceived, ResponseReceived, StreamReset
from headrace.grpc.transport.frames import ErrorCode
from headrace.grpc.transport.headers import decode_status_message, encode_block, encode_field
from headrace.grpc.transport.sender import CONTENT_TYPE
from headrace.grpc.transport.signing import HEADER, Secrets
from headrace.grpc.transport.status import Code, GrpcError

CONNECT_S: Final = 5.0
BACKOFF_S: Final = (0.0, 0.1, 0.3, 1.0, 3.0, 5.0)
HEADS_MAX: Final = 64
USER_AGENT: Final = "headrace"
_CODE_OF_HTTP_STATUS: Final = {
    "400": Code.INTERNAL,
    "401": Code.UNAUTHENTICATED,
    "403": Code.PERMISSION_DENIED,
    "404": Code.UNIMPLEMENTED,
    "429": Code.UNAVAILABLE,
    "502": Code.UNAVAILABLE,
    "503": Code.UNAVAILABLE,
    "504": Code.UNAVAILABLE,
}


class CallNotSent(GrpcError):
    """The peer has not processed this call: it may be retried even if it must run at most once."""


class PendingCall(NamedTuple):
    """A call that waits for its response."""

    future: asyncio.Future[bytes]
    timer: asyncio.TimerHandle
    began_s: float
    timeout_s: float


class ClientProtocol(Http2Protocol):
    """One connection. `is_open` is false once it accepts no new calls."""

    def __init__(self, bounds: Bounds, budget: Budget) -> None:
        super().__init__(Http2Connection(bounds, budget, is_client=True))
        self._calls: dict[int, PendingCall] = {}
        self._received_s = self._loop.time()
        self.is_open = False

    @property
    def peer_calls_max(self) -> int:
        """Number of concurrent calls that the peer allows."""
        return self._http2.peer_calls_max

    @property
    def capacity(self) -> int:
        """Number of calls that the peer accepts in addition to the open ones."""
        return self._http2.peer_calls_max - self._http2.streams_count

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the preface and SETTINGS without waiting for the peer's."""
        self._transport = cast("asyncio.Transport", transport)
        self.is_open = True
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail every call that waits."""
        self.is_open = False
        self._http2.close()
        self._fail_all("the connection was lost" if exc is None else f"the connection was lost: {exc}")

    def data_received(self, data: bytes) -> None:
        """Complete calls from received frames."""
        self._received_s = now_s = self._loop.time()
        for event in self._http2.feed(data, now_us=int(now_s * 1e6)):
            if type(event) is ResponseReceived:
                self._finish_call(event.stream_id, *_result_of(event))
            elif type(event) is StreamReset:
                kind = CallNotSent if event.error_code == ErrorCode.REFUSED_STREAM else GrpcError
                self._finish_call(
                    event.stream_id,
                    None,
                    kind(Code.UNAVAILABLE, f"the peer reset the call with HTTP/2 error code {event.error_code}"),
                )
            elif type(event) is GoAwayReceived:
                self.is_open = False
                for stream_id in [number for number in self._calls if number > event.last_id]:
                    self._finish_call(
                        stream_id,
                        None,
                        CallNotSent(
                            Code.UNAVAILABLE, "the peer is closing the connection before it processed this call"
                        ),
                    )
            elif type(event) is ConnectionFailed:
                self.is_open = False
                self._fail_all(f"the peer broke HTTP/2: {event.reason}")
        self._schedule_flush()

    async def call(self, head: bytes, message: bytes, timeout_s: float) -> bytes:
        """Make a call. Raises `GrpcError`."""
        future: asyncio.Future[bytes] = self._loop.create_future()
        stream_id = self._http2.start_call(head, message)
        if self._http2.is_out_of_stream_ids:
            self.close()
        timer = self._loop.call_later(timeout_s, self._expire, stream_id)
        self._calls[stream_id] = PendingCall(future, timer, self._loop.time(), timeout_s)
        self._schedule_flush()
        try:
            return await future
        finally:
            if self._calls.pop(stream_id, None) is not None:  # the caller was cancelled
                timer.cancel()
                self._http2.reset_stream(stream_id, ErrorCode.CANCEL)
                self._schedule_flush()

    def close(self) -> None:
        """Accept no new calls, and close after the last open one."""
        self.is_open = False
        self._http2.go_away()
        self._schedule_flush()

    def _expire(self, stream_id: int) -> None:
        call = self._calls[stream_id]
        self._http2.reset_stream(stream_id, ErrorCode.CANCEL)
        self._finish_call(
            stream_id, None, GrpcError(Code.DEADLINE_EXCEEDED, f"no response from the peer within {call.timeout_s:g} s")
        )
        if self._received_s < call.began_s:
            self._transport.abort()
        self._schedule_flush()

    def _finish_call(self, stream_id: int, message: bytes | None, error: GrpcError | None) -> None:
        call = self._calls.pop(stream_id, None)
        if call is None:
            return
        call.timer.cancel()
        if not call.future.done():
            if error is not None:
                call.future.set_exception(error)
            else:
                call.future.set_result(message or b"")

    def _fail_all(self, reason: str) -> None:
        for stream_id in tuple(self._calls):
            self._finish_call(stream_id, None, GrpcError(Code.UNAVAILABLE, reason))

    def _flush(self) -> None:
        super()._flush()
        if self._http2.is_broken or (not self.is_open and not self._calls):
            close_gracefully(self._transport)


class Channel:
    """gRPC client of an endpoint. Opens a connection when a call needs one."""

    def __init__(
        self,
        target: PushTarget,
        bounds: Bounds,
        budget: Budget,
        *,
        secrets: Secrets | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls`: how to verify the server's certificate; the system's settings by default."""
        self.target = target
        self._bounds, self._budget = bounds, budget
        self._secrets = Secrets() if secrets is None else secrets
        self._tls: ssl.SSLContext | None = None
        if target.is_tls:
            self._tls = ssl.create_default_context() if tls is None else tls
            self._tls.set_alpn_protocols(["h2"])
        self._protocol: ClientProtocol | None = None
        self._opening: asyncio.Task[ClientProtocol] | None = None
        self._failures_count = 0
        self._backoff_until_s = 0.0
        self._heads: dict[tuple[str, float], bytes] = {}

    async def call(self, path: str, message: bytes, *, timeout_s: float) -> bytes:
        """Make a call and return the response message.

        Raises `GrpcError`; its subclass `CallNotSent` if the peer has not processed the call.
        """
        protocol = self._protocol
        if protocol is None or not protocol.is_open:
            protocol = await self._connected()
        if protocol.capacity <= 0:
            raise CallNotSent(
                Code.RESOURCE_EXHAUSTED,
                f"{self.target.authority} allows no more concurrent calls than the {protocol.peer_calls_max} it has",
            )
        head = self._heads.get((path, timeout_s))
        if head is None:
            if len(self._heads) >= HEADS_MAX:
                self._heads.clear()
            head = self._heads[path, timeout_s] = self._head(path, timeout_s)
        if self._secrets:
            head += encode_field(HEADER, self._secrets.sign(path, message), is_secret=True)
        return await protocol.call(head, message, timeout_s)

    def close(self) -> None:
        """Make no new calls; open ones may finish."""
        self._backoff_until_s = float("inf")
        if self._opening is not None:
            self._opening.cancel()
        if self._protocol is not None:
            self._protocol.close()

    def _head(self, path: str, timeout_s: float) -> bytes:
        return encode_block(
            {
                ":method": "POST",
                ":scheme": "https" if self.target.is_tls else "http",
                ":path": path,
                ":authority": self.target.authority,
                "te": "trailers",
                "content-type": CONTENT_TYPE,
                "user-agent": USER_AGENT,
                "grpc-timeout": f"{min(max(1, int(timeout_s * 1_000)), 99_999_999)}m",
            }
        )

    async def _connected(self) -> ClientProtocol:
        """Return the connection. The first caller opens it, and concurrent callers wait for the same attempt."""
        if self._opening is None:
            now_s = asyncio.get_running_loop().time()
            if now_s < self._backoff_until_s:
                raise CallNotSent(
                    Code.UNAVAILABLE,
                    f"{self.target.authority} is in backoff after a failed connection; "
                    f"retry in {self._backoff_until_s - now_s:.1f} s",
                )
            self._opening = asyncio.create_task(self._open(), name="headrace-grpc-connect")
            self._opening.add_done_callback(self._on_opened)
        opening = self._opening
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if opening.cancelled() and task is not None and not task.cancelling():
                raise CallNotSent(Code.UNAVAILABLE, "the channel was closed") from None
            raise

    async def _open(self) -> ClientProtocol:
        target, loop = self.target, asyncio.get_running_loop()
        made: Any = None
        try:
            async with asyncio.timeout(CONNECT_S):
                made, protocol = await loop.create_connection(
                    lambda: ClientProtocol(self._bounds, self._budget), target.host, target.port, ssl=self._tls
                )
        except (OSError, TimeoutError) as error:
            reason = str(error) or "no answer"
            raise CallNotSent(Code.UNAVAILABLE, f"can't connect to {target.authority}: {reason}") from None
        keep_alive(made.get_extra_info("socket"))
        tls = made.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            made.abort()
            raise CallNotSent(
                Code.UNAVAILABLE,
                f"{target.authority} does not support HTTP/2 over TLS: ALPN selected "
                f"{tls.selected_alpn_protocol()!r}, not 'h2'",
            )
        return protocol

    def _on_opened(self, opening: asyncio.Task[ClientProtocol]) -> None:
        self._opening = None
        if opening.cancelled():
            return
        if opening.exception() is None:
            self._protocol, self._failures_count = opening.result(), 0
            return
        self._failures_count += 1
        rest_s = BACKOFF_S[min(self._failures_count, len(BACKOFF_S) - 1)]
        self._backoff_until_s = asyncio.get_running_loop().time() + rest_s


def _result_of(response: ResponseReceived) -> tuple[bytes | None, GrpcError | None]:
    """Convert a response to its message or its error."""
    text = response.trailers.get("grpc-status", response.headers.get("grpc-status", ""))
    if not text:
        status = response.headers.get(":status", "")
        return None, GrpcError(
            _CODE_OF_HTTP_STATUS.get(status, Code.UNKNOWN), f"expected a gRPC response, got HTTP status {status[:10]}"
        )
    try:
        code = Code(int(text[:4]))
    except ValueError:
        code = Code.UNKNOWN
    if code is not Code.OK:
        return None, GrpcError(code, decode_status_message(response.trailers.get("grpc-message", "")))
    if response.message is None or response.is_compressed:
        return None, GrpcError(Code.INTERNAL, "expected an uncompressed message in the response, got none")
    return response.message, None
