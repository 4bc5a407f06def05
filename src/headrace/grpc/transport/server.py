"""gRPC server on sockets: runs a handler for each call and sends its response.

A call whose handler answers at once is finished as soon as its bytes were read. Any other is an asyncio task or a
future until then. Responses of one event loop iteration are one write.

A peer that doesn't read gets no more responses computed for it: its calls wait, up to the number it may have open.
After `http_idle_s` without progress the connection is closed.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from collections import deque
from collections.abc import Callable, Coroutine
from functools import lru_cache, partial
from time import perf_counter
from typing import Any, Final, cast

from google.protobuf.message import DecodeError, Message

from headrace.foundation.access import SMALL_BYTES_MAX
from headrace.foundation.connection_table import ConnectionTable, network_of
from headrace.foundation.errors import HeadraceError
from headrace.foundation.limits import Limits
from headrace.foundation.logs import get_logger
from headrace.grpc.transport.asyncio_protocol import Http2Protocol
from headrace.grpc.transport.bounds import Bounds
from headrace.grpc.transport.budget import Budget
from headrace.grpc.transport.closing import close_gracefully
from headrace.grpc.transport.connection import Http2Connection
from headrace.grpc.transport.events import ConnectionFailed, Event, RequestReceived, StreamReset
from headrace.grpc.transport.frames import ErrorCode
from headrace.grpc.transport.gate import Gate, SignatureGate, message_bytes_max
from headrace.grpc.transport.headers import Headers
from headrace.grpc.transport.service_methods import (
    CallContext,
    Method,
    Methods,
    Response,
    ResponseAfter,
    ResponseCoroutine,
)
from headrace.grpc.transport.signing import HEADER, Secrets
from headrace.grpc.transport.status import Code, GrpcError, to_grpc_error

LOG: Any = get_logger("headrace.grpc")
PENDING_BYTES_MAX: Final = 4 * 1024 * 1024
"""Bytes of responses that wait for the peer. Above it, further calls of the connection wait before their handlers."""

OUT_BYTES_MAX: Final = 256 * 1024
"""Bytes of answers and control frames for a peer that does not read. Above it, the connection is not read."""
PROGRESS_BYTES_PER_S: Final = 1_024
"""Rate at which an incomplete message must arrive."""

STOPPING: Final = "the server is stopping; retry, on another server or in a moment"
_TIMEOUT: Final = re.compile(r"([0-9]{1,8})([HMSmun])")
_UNIT_US: Final = {"H": 3_600e6, "M": 60e6, "S": 1e6, "m": 1e3, "u": 1.0, "n": 1e-3}
_EXPANSION_BYTES_MIN: Final = 64 * 1024
_GZIP: Final = 31
Observe = Callable[[str, Code, float], None]


class GrpcServer:
    """State shared by all connections of a process. `observe` is called after each call: path, status, seconds."""

    def __init__(
        self,
        methods: Methods,
        *,
        limits: Limits,
        secrets: Secrets | None = None,
        gate: Gate | None = None,
        observe: Observe | None = None,
    ) -> None:
        """`gate` admits calls; the default one demands a signature if there are secrets."""
        self.methods = methods
        self.limits = limits
        self.secrets = Secrets() if secrets is None else secrets
        self.gate: Gate = SignatureGate(has_secrets=bool(self.secrets)) if gate is None else gate
        self.budget = Budget(limits.grpc_buffer_bytes_max)
        self.bounds = Bounds(
            limits.grpc_message_bytes_max, limits.grpc_calls_max, self.message_bytes_max, self._free_bytes()
        )
        self.observe: Observe = observe or _unobserved
        self.connections: set[ServerProtocol] = set()
        self._is_turn_timed = False

    def use_time(self, peer: str, seconds: float, loop: asyncio.AbstractEventLoop) -> None:
        """Count processor time of a peer until the next turn of the event loop."""
        self.budget.use_time(peer, seconds)
        if not self._is_turn_timed:
            self._is_turn_timed = True
            loop.call_soon(self._begin_turn)

    def _begin_turn(self) -> None:
        self._is_turn_timed = False
        self.budget.begin_turn()

    def _free_bytes(self) -> int:
        """Return the size of message that every caller may send to every method."""
        declared = [
            bytes_max
            for method in self.methods.values()
            for bytes_max in (method.access.body_bytes_max, method.access.unauthenticated_bytes_max)
            if bytes_max is not None
        ]
        return min([SMALL_BYTES_MAX, self.limits.grpc_message_bytes_max, *declared])

    def message_bytes_max(self, headers: Headers) -> int:
        """Return the bound of a message, before it is read."""
        method, bytes_max = self.methods.get(headers[":path"]), self.limits.grpc_message_bytes_max
        if method is None:
            return min(SMALL_BYTES_MAX, bytes_max)
        return message_bytes_max(method.access, headers, self.gate, bytes_max)

    def cut(self) -> None:
        """Abort the running calls with UNAVAILABLE, so that their callers retry."""
        for connection in tuple(self.connections):
            connection.cut()


def _unobserved(_path: str, _code: Code, _seconds: float) -> None:
    return None


class RunningCall:
    """One call whose handler is running."""

    __slots__ = ("began_s", "code", "future", "held_bytes", "is_cancelled", "path", "result", "timer")

    def __init__(self, path: str) -> None:
        self.path = path
        self.held_bytes = 0
        self.is_cancelled = False
        self.began_s = perf_counter()
        self.code: Code | None = None
        self.result: Any = None
        self.future: asyncio.Future[Any] | None = None
        self.timer: asyncio.TimerHandle | None = None


class ServerProtocol(Http2Protocol):
    """One connection. `siblings`: the set of connections, of any protocol, that are shut down with the server.

    `table`: the table that admitted the connection.
    """

    def __init__(
        self, server: GrpcServer, siblings: set[Any] | None = None, table: ConnectionTable | None = None
    ) -> None:
        super().__init__(Http2Connection(server.bounds, server.budget))
        self._server = server
        self._siblings: set[Any] = set() if siblings is None else siblings
        self._table = table
        self._idle_s = float(server.limits.http_idle_s)
        self._running: dict[int, RunningCall] = {}
        self._waiting_calls: deque[tuple[RequestReceived, float]] = deque()
        self._peer = ""
        self._is_ping_sent = False
        self._received_s = self._progress_s = self._called_s = self._loop.time()
        self._sent_bytes = 0
        self._has_stepped = False
        self._is_reading_paused = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_connected(self) -> bool:
        """True until the connection is closed or lost."""
        return self in self._server.connections and not self._transport.is_closing()

    @property
    def idle_since_s(self) -> float | None:
        """Time of the last call; None while a handler runs or its response is being sent."""
        is_busy = self._running or self._waiting_calls or self._http2.pending_bytes
        return None if is_busy else self._called_s

    def close_idle(self) -> None:
        """Close the connection for another one."""
        self._http2.go_away()
        self._flush()
        close_gracefully(self._transport)

    # -- asyncio callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start serving an HTTP/2 connection."""
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self._peer = f"{peer[0]}:{peer[1]}"
            address = network_of(peer[0])
            self._http2.allotment.join(address)
            if self._server.budget.is_distrusted(address, self._loop.time()):
                self._http2.distrust(now_us=int(self._loop.time() * 1e6))
        self._server.connections.add(self)
        self._siblings.add(self)
        self._timer = self._loop.call_later(self._idle_s / 2, self._check_idle)
        self._schedule_flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel all calls: their callers are gone."""
        del exc
        self._server.connections.discard(self)
        self._siblings.discard(self)
        if self._table is not None:
            self._table.remove(self)
        if self._timer is not None:
            self._timer.cancel()
        self._http2.close()
        self._waiting_calls.clear()
        self._cancel_all()
        self._http2.allotment.leave()

    def data_received(self, data: bytes) -> None:
        """Process received frames, until the turn of this connection is over."""
        self._received_s, self._is_ping_sent = self._loop.time(), False
        self._http2.receive(data)
        self._process()

    def _process(self) -> None:
        """Process received frames: one step, and more while its address has time in this turn of the event loop.

        What is left then, or while the peer does not read, is processed later, and nothing more is read until then.
        """
        http2, server, now_s, began_s = self._http2, self._server, self._loop.time(), perf_counter()
        now_us, peer = int(now_s * 1e6), http2.allotment.peer
        while http2.has_more and not self._is_blocked and (not self._has_stepped or server.budget.has_time(peer)):
            self._has_stepped = True
            for event in http2.step(now_us=now_us):
                if type(event) is RequestReceived and not (self._is_paused or http2.pending_bytes > PENDING_BYTES_MAX):
                    self._start_call(event, now_s)
                else:
                    self._on_event(event, now_s)
            ended_s = perf_counter()
            server.use_time(peer, ended_s - began_s, self._loop)
            began_s = ended_s
        if http2.has_more and not self._is_reading_paused:
            self._is_reading_paused = True
            self._transport.pause_reading()
        self._schedule_flush()

    def _on_event(self, event: Event, now_s: float) -> None:
        """Process an event of a step: a call that must wait, or the end of one."""
        if type(event) is RequestReceived:
            self._waiting_calls.append((event, now_s))
        elif type(event) is StreamReset:
            self._cancel_reset_call(event.stream_id)
        elif type(event) is ConnectionFailed:
            LOG.info("grpc.protocol_error", peer=self._peer, error_code=event.error_code.name, reason=event.reason)
            if event.error_code == ErrorCode.ENHANCE_YOUR_CALM:
                self._server.budget.distrust(self._http2.allotment.peer, now_s)
            self._waiting_calls.clear()
            self._cancel_all()

    def eof_received(self) -> None:
        """Close the transport: a peer that half-closes reads no responses either."""

    # -- calls

    @property
    def _is_full(self) -> bool:
        return self._is_paused or self._http2.pending_bytes > PENDING_BYTES_MAX

    @property
    def _is_blocked(self) -> bool:
        """True while the peer does not read what was written for it."""
        return self._is_paused and self._http2.out_bytes > OUT_BYTES_MAX

    def _start_call(self, request: RequestReceived, arrived_s: float) -> None:
        self._called_s = arrived_s
        path = request.headers[":path"]
        method = self._server.methods.get(path)
        running = RunningCall("none" if method is None else path)
        stream_id = request.stream_id
        try:
            method, request_message, call, deadline_s = self._read_call(method, request, running, arrived_s)
            admission = self._server.gate.admit(method.access, call)
        except Exception as error:  # noqa: BLE001 - each is an answer
            self._refuse_call(stream_id, running, method, error)
            return
        if admission is not None:
            self._arm(stream_id, running, deadline_s)
            running.result = admission
            running.future = self._loop.create_task(
                self._run_admitted(stream_id, running, method, request_message, call)
            )
            return
        result = self._call_handler(stream_id, running, method, request_message, call)
        if result is not None:
            self._arm(stream_id, running, deadline_s)
            self._await_result(stream_id, running, method, result)

    def _call_handler(
        self, stream_id: int, running: RunningCall, method: Method, message: Message, call: CallContext
    ) -> Any:
        """Call the handler of an admitted call. Return a result that must be awaited, or None if the call has ended."""
        self._http2.credit_call()
        try:
            result = method.handler(message, call)
        except Exception as error:  # noqa: BLE001 - each is an answer
            self._finish_call(stream_id, running, self._end_failed(stream_id, method, error))
            return None
        if result is None or isinstance(result, (bytes, Message)):
            self._http2.send_response(stream_id, _encode(result))
            self._finish_call(stream_id, running, Code.OK)
            return None
        return result

    def _refuse_call(self, stream_id: int, running: RunningCall, method: Method | None, error: Exception) -> None:
        """End a call that reaches no handler, and charge its peer."""
        code = self._end_failed(stream_id, method, error)
        self._http2.charge_call()
        self._finish_call(stream_id, running, code)

    def _arm(self, stream_id: int, running: RunningCall, deadline_s: float | None) -> None:
        self._running[stream_id] = running
        if deadline_s is not None:
            running.timer = self._loop.call_at(deadline_s, self._expire, stream_id)

    async def _run_admitted(
        self, stream_id: int, running: RunningCall, method: Method, message: Message, call: CallContext
    ) -> None:
        """Await the gate's decision on a call, then run its handler."""
        try:
            await running.result
        except asyncio.CancelledError:
            self._finish_call(stream_id, running, self._end_cancelled(stream_id, running))
            return
        except Exception as error:  # noqa: BLE001 - each is an answer
            self._refuse_call(stream_id, running, method, error)
            return
        result = self._call_handler(stream_id, running, method, message, call)
        if result is not None:
            self._await_result(stream_id, running, method, result)

    def _await_result(self, stream_id: int, running: RunningCall, method: Method, result: Any) -> None:
        """Finish a call when the result of its handler is there."""
        if isinstance(result, asyncio.Future):
            result = ResponseAfter(result, result.result)
        if isinstance(result, ResponseAfter):
            running.future = result.future
            running.future.add_done_callback(
                partial(self._on_future_done, stream_id, running, method, result.make_response)
            )
        else:
            self._start_task(stream_id, running, method, result)

    def _read_call(
        self, method: Method | None, request: RequestReceived, running: RunningCall, arrived_s: float
    ) -> tuple[Method, Message, CallContext, float | None]:
        """Decode a request and check its signature, before any handler sees it."""
        headers = request.headers
        path = headers[":path"]
        if method is None:
            raise GrpcError(Code.UNIMPLEMENTED, f"unknown method {path}")
        deadline_s = _deadline_s(headers, arrived_s)
        message = self._decompressed(request, running)
        signature = headers.get(HEADER)
        is_signed = signature is not None and self._server.secrets.verifies(path, message, signature)
        deadline_us = None if deadline_s is None else int(deadline_s * 1e6)
        call = CallContext(
            path, headers, peer=self._peer, is_signed=is_signed, deadline_us=deadline_us, connection=self
        )
        return method, _decode(method, message), call, deadline_s

    def _decompressed(self, request: RequestReceived, running: RunningCall) -> bytes:
        if not request.is_compressed:
            return request.message
        encoding = request.headers.get("grpc-encoding", "identity")
        if encoding != "gzip":
            code = Code.INTERNAL if encoding == "identity" else Code.UNIMPLEMENTED
            raise GrpcError(code, f"expected a message compressed with gzip or not at all, got {encoding[:100]}")
        allotment, limits = self._http2.allotment, self._server.limits
        bytes_max = max(_EXPANSION_BYTES_MIN, len(request.message) * limits.expansion_max)
        bytes_max = min(bytes_max, self._server.message_bytes_max(request.headers), max(0, allotment.left_bytes))
        expander = zlib.decompressobj(_GZIP)
        try:
            message = expander.decompress(request.message, max(1, bytes_max + 1))
        except zlib.error:
            raise GrpcError(Code.INVALID_ARGUMENT, "expected a gzip stream, got a message that is not gzip") from None
        if len(message) > bytes_max:
            raise GrpcError(
                Code.RESOURCE_EXHAUSTED,
                f"expected a message of at most {bytes_max} bytes after decompression, got more",
            )
        if not expander.eof or expander.unused_data:
            raise GrpcError(
                Code.INVALID_ARGUMENT, "expected one complete gzip stream, got an incomplete one or bytes after it"
            )
        running.held_bytes = len(message)
        allotment.hold(len(message))
        return message

    def _start_task(self, stream_id: int, running: RunningCall, method: Method, result: Any) -> None:
        running.result = result
        running.future = self._loop.create_task(self._run_task(stream_id, running, method))

    async def _run_task(self, stream_id: int, running: RunningCall, method: Method) -> None:
        """Run a call whose handler is a coroutine or an iterator of messages."""
        code, result = Code.OK, running.result
        try:
            if method.is_stream:
                async for message in result:
                    self._http2.send_message(stream_id, message.SerializeToString())
                    self._schedule_flush()
                self._http2.end_call(stream_id, Code.OK, "")
            else:
                self._http2.send_response(stream_id, _encode(await result))
        except asyncio.CancelledError:
            code = self._end_cancelled(stream_id, running)
        except Exception as error:  # noqa: BLE001 - each is an answer
            code = self._end_failed(stream_id, method, error)
        self._finish_call(stream_id, running, code)

    def _on_future_done(
        self,
        stream_id: int,
        running: RunningCall,
        method: Method,
        make_response: Callable[[], Response | ResponseCoroutine],
        future: asyncio.Future[Any],
    ) -> None:
        """Finish a call that waited for a future, or run the coroutine that makes its response."""
        code = Code.OK
        if future.cancelled() or running.is_cancelled:
            code = self._end_cancelled(stream_id, running)
        elif (error := future.exception()) is not None:
            code = self._end_failed(stream_id, method, error)
        else:
            try:
                result = make_response()
            except Exception as refusal:  # noqa: BLE001 - each is an answer
                code = self._end_failed(stream_id, method, refusal)
            else:
                if isinstance(result, Coroutine):
                    self._start_task(stream_id, running, method, result)
                    return
                self._http2.send_response(stream_id, _encode(result))
        self._finish_call(stream_id, running, code)

    def _end_cancelled(self, stream_id: int, running: RunningCall) -> Code:
        """End a call that was cancelled by its caller, by the server, or within its own handler."""
        self._http2.end_call(stream_id, Code.UNAVAILABLE, STOPPING)  # does nothing if the call was answered already
        if not running.is_cancelled:
            LOG.error("grpc.handler_cancelled", path=running.path)
        return Code.CANCELLED

    def _end_failed(self, stream_id: int, method: Method | None, error: BaseException) -> Code:
        """End a call with the status of its error. Returns the status code."""
        if isinstance(error, HeadraceError):
            error = to_grpc_error(error) if method is None else method.to_grpc_error(error)
        if not isinstance(error, GrpcError):
            LOG.error("grpc.handler_failed", exc_info=error)
            error = GrpcError(Code.INTERNAL, "internal error; see the server's log")
        self._http2.end_call(stream_id, error.code, error.message)
        return error.code

    def _finish_call(self, stream_id: int, running: RunningCall, code: Code) -> None:
        self._running.pop(stream_id, None)
        if running.timer is not None:
            running.timer.cancel()
        if running.held_bytes:
            self._http2.allotment.hold(-running.held_bytes)
        self._http2.handler_ended(stream_id)
        code = running.code if running.code is not None else code
        self._server.observe(running.path, code, perf_counter() - running.began_s)
        self._schedule_flush()

    def _expire(self, stream_id: int) -> None:
        running = self._running[stream_id]
        running.code = Code.DEADLINE_EXCEEDED
        self._http2.abandon_call(
            stream_id, Code.DEADLINE_EXCEEDED, "the call exceeded the deadline that its caller set"
        )
        self._cancel(stream_id, running)
        self._schedule_flush()

    def _cancel_reset_call(self, stream_id: int) -> None:
        """Cancel a call that its caller has reset."""
        running = self._running.get(stream_id)
        if running is not None:
            running.code = Code.CANCELLED
            self._cancel(stream_id, running)
            return
        self._waiting_calls = deque(pair for pair in self._waiting_calls if pair[0].stream_id != stream_id)
        self._http2.handler_ended(stream_id)

    def _cancel_all(self) -> None:
        for stream_id, running in self._running.items():
            self._cancel(stream_id, running)

    def _cancel(self, stream_id: int, running: RunningCall) -> None:
        running.is_cancelled = True
        if running.future is not None:
            running.future.cancel()
            running.future.add_done_callback(partial(self._on_cancelled_before_start, stream_id, running))

    def _on_cancelled_before_start(self, stream_id: int, running: RunningCall, _future: asyncio.Future[Any]) -> None:
        """End a call whose task was cancelled before its first step: the task itself never ran, so it did not end the
        call.
        """
        if self._running.get(stream_id) is running:
            if isinstance(running.result, Coroutine):
                running.result.close()
            self._finish_call(stream_id, running, self._end_cancelled(stream_id, running))

    # -- shutdown and idle connections

    def shutdown(self) -> None:
        """Accept no new calls, and close after the last response. Called by uvicorn, which defines the name."""
        self._http2.go_away()
        self._schedule_flush()

    def cut(self) -> None:
        """Abort the running calls and those that wait for a handler."""
        self._cancel_all()
        while self._waiting_calls:
            self._http2.end_call(self._waiting_calls.popleft()[0].stream_id, Code.UNAVAILABLE, STOPPING)
        self.shutdown()

    def _flush(self) -> None:
        super()._flush()
        http2 = self._http2
        while self._waiting_calls and not self._is_full:
            self._start_call(*self._waiting_calls.popleft())
        if http2.is_broken or (http2.is_leaving and not http2.streams_count):
            close_gracefully(self._transport)
            return
        self._has_stepped = False
        if self._is_blocked:
            return
        if http2.has_more:
            self._process()
        elif self._is_reading_paused:
            self._is_reading_paused = False
            self._transport.resume_reading()

    def _check_idle(self) -> None:
        """Check, twice in `idle_s`, that the peer is alive, reads responses, and completes the messages it began."""
        self._timer = self._loop.call_later(self._idle_s / 2, self._check_idle)
        now_s, http2 = self._loop.time(), self._http2
        if http2.sent_bytes != self._sent_bytes or not (http2.pending_bytes or self._is_paused):
            self._sent_bytes, self._progress_s = http2.sent_bytes, now_s
        silent_s, stuck_s = now_s - self._received_s, now_s - self._progress_s
        if stuck_s >= self._idle_s or silent_s >= 2 * self._idle_s or self._transport.is_closing():
            self._transport.abort()
            return
        if silent_s >= self._idle_s and not self._is_ping_sent:
            self._is_ping_sent = True
            http2.ping()
        if not self._is_reading_paused:
            for stream_id in http2.slow_calls(int(PROGRESS_BYTES_PER_S * self._idle_s / 2)):
                http2.reset_stream(stream_id, ErrorCode.CANCEL)
        self._schedule_flush()


def _deadline_s(headers: Headers, arrived_s: float) -> float | None:
    text = headers.get("grpc-timeout")
    if text is None:
        return None
    return arrived_s + _parse_timeout_s(text)


@lru_cache(256)
def _parse_timeout_s(text: str) -> float:
    """Parse a `grpc-timeout`. Raises `GrpcError`."""
    match = _TIMEOUT.fullmatch(text)
    if match is None:
        raise GrpcError(
            Code.INVALID_ARGUMENT,
            f"expected a grpc-timeout of 1 to 8 digits and a unit of H, M, S, m, u or n, got {text[:100]!r}",
        )
    return int(match[1]) * _UNIT_US[match[2]] / 1e6


def _encode(response: Response) -> bytes:
    if response is None:
        return b""
    return response if isinstance(response, bytes) else response.SerializeToString()


def _decode(method: Method, message: bytes) -> Message:
    try:
        return method.request.FromString(message)
    except DecodeError:
        name = method.request.DESCRIPTOR.full_name
        raise GrpcError(
            Code.INVALID_ARGUMENT, f"expected a {name}, got bytes that can't be decoded as one; retrying can't help"
        ) from None
