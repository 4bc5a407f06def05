"""gRPC on a socket: calls become handlers under way, and their answers go back.

A call whose handler answers at once is over when its bytes were read; any other is a task or a future until then. What
is answered while the loop goes round once is one write. A peer that doesn't read gets no more answers made for it: its
calls wait, as many as it may have at a time, and after `idle_s` without room it is let go.
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

import structlog
from google.protobuf.message import DecodeError, Message

from headrace.foundation.errors import HeadraceError
from headrace.foundation.limits import Limits
from headrace.grpc.transport.asyncio_protocol import Talking
from headrace.grpc.transport.closing import part
from headrace.grpc.transport.connection import Bounds, Broke, Machine, Request, Reset
from headrace.grpc.transport.frames import Fault
from headrace.grpc.transport.headers import Headers
from headrace.grpc.transport.sender import Budget
from headrace.grpc.transport.service_methods import After, Answer, Awaited, Call, Method, Methods
from headrace.grpc.transport.signing import HEADER, Secrets
from headrace.grpc.transport.status import Code, GrpcError, of_error

LOG: Any = structlog.get_logger("headrace.grpc")
PENDING_BYTES_MAX: Final = 4 * 1024 * 1024
"""Answers that wait for room; over it a connection's calls wait before their handlers."""

STOPPING: Final = "the server is stopping; ask another one, or again in a moment"
_TIMEOUT: Final = re.compile(r"([0-9]{1,8})([HMSmun])")
_UNIT_US: Final = {"H": 3_600e6, "M": 60e6, "S": 1e6, "m": 1e3, "u": 1.0, "n": 1e-3}
_EXPANSION_BYTES_MIN: Final = 64 * 1024
_GZIP: Final = 31
Observe = Callable[[str, Code, float], None]


class GrpcServer:
    """What the connections of one process share. `observe` is told of each call: path, status, seconds."""

    def __init__(
        self, methods: Methods, *, limits: Limits, secrets: Secrets | None = None, observe: Observe | None = None
    ) -> None:
        self.methods = methods
        self.limits = limits
        self.secrets = Secrets() if secrets is None else secrets
        self.budget = Budget(limits.grpc_buffer_bytes_max)
        self.bounds = Bounds(limits.grpc_message_bytes_max, limits.grpc_calls_max)
        self.observe: Observe = observe or _unobserved
        self.connections: set[Connection] = set()

    def cut(self) -> None:
        """End what is under way: its callers are told to come again."""
        for connection in tuple(self.connections):
            connection.cut()


def _unobserved(_path: str, _code: Code, _seconds: float) -> None:
    return None


class Running:
    """One call whose handler is under way."""

    __slots__ = ("answered", "began_s", "code", "future", "held_bytes", "is_stopped", "path", "timer")

    def __init__(self, path: str) -> None:
        self.path = path
        self.held_bytes = 0
        self.is_stopped = False
        self.began_s = perf_counter()
        self.code: Code | None = None
        self.answered: Any = None
        self.future: asyncio.Future[Any] | None = None
        self.timer: asyncio.TimerHandle | None = None


class Connection(Talking):
    """One peer. `siblings` is who is told to leave when the server stops, whatever protocol they speak."""

    def __init__(self, server: GrpcServer, siblings: set[Any] | None = None) -> None:
        super().__init__(Machine(server.bounds, server.budget))
        self._server = server
        self._siblings: set[Any] = set() if siblings is None else siblings
        self._idle_s = float(server.limits.http_idle_s)
        self._running: dict[int, Running] = {}
        self._held: deque[tuple[Request, float]] = deque()
        self._peer = ""
        self._is_asked = False
        self._heard_s = self._moved_s = self._loop.time()
        self._sent_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    # -- what the transport says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A peer that speaks HTTP/2."""
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self._peer = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else ""
        self._server.connections.add(self)
        self._siblings.add(self)
        self._timer = self._loop.call_later(self._idle_s / 2, self._look)
        self._soon()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody waits for answers any more."""
        del exc
        self._server.connections.discard(self)
        self._siblings.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._machine.close()
        self._held.clear()
        self._stop_all()

    def data_received(self, data: bytes) -> None:
        """Frames of calls."""
        now_s = self._loop.time()
        self._heard_s, self._is_asked = now_s, False
        for event in self._machine.feed(data, now_us=int(now_s * 1e6)):
            if type(event) is Request:
                if self._is_full:
                    self._held.append((event, now_s))
                else:
                    self._begin(event, now_s)
            elif type(event) is Reset:
                self._give_up(event.stream_id)
            elif type(event) is Broke:
                LOG.info("a gRPC peer broke the protocol", peer=self._peer, fault=event.fault.name, what=event.what)
                self._held.clear()
                self._stop_all()
        self._soon()

    def eof_received(self) -> None:
        """The peer says nothing more, and reads nothing either."""

    # -- calls

    @property
    def _is_full(self) -> bool:
        return self._is_paused or self._machine.pending_bytes > PENDING_BYTES_MAX

    def _begin(self, request: Request, arrived_s: float) -> None:
        path = request.headers[":path"]
        method = self._server.methods.get(path)
        running = Running("none" if method is None else path)
        stream_id = request.stream_id
        try:
            method, asked, call, deadline_s = self._read(method, request, running, arrived_s)
            answered = method.handler(asked, call)
        except Exception as error:  # noqa: BLE001 - each is an answer
            self._ended(stream_id, running, self._failed(stream_id, method, error))
            return
        if answered is None or isinstance(answered, (bytes, Message)):
            self._machine.answer(stream_id, _encoded(answered))
            self._ended(stream_id, running, Code.OK)
            return
        self._running[stream_id] = running
        if deadline_s is not None:
            running.timer = self._loop.call_at(deadline_s, self._expire, stream_id)
        if isinstance(answered, asyncio.Future):
            answered = After(answered, answered.result)
        if isinstance(answered, After):
            running.future = answered.future
            running.future.add_done_callback(partial(self._on_done, stream_id, running, method, answered.answer))
        else:
            self._run_on(stream_id, running, method, answered)

    def _read(
        self, method: Method | None, request: Request, running: Running, arrived_s: float
    ) -> tuple[Method, Message, Call, float | None]:
        """What a handler is given; whose signature is wanted and wrong never comes to one."""
        headers, secrets = request.headers, self._server.secrets
        path = headers[":path"]
        if method is None:
            raise GrpcError(Code.UNIMPLEMENTED, f"there is no method {path}")
        deadline_s = _deadline_s(headers, arrived_s)
        message = self._unpacked(request, running)
        signature = headers.get(HEADER)
        is_signed = signature is not None and secrets.verifies(path, message, signature)
        if secrets and not (method.is_open or is_signed):
            raise GrpcError(Code.UNAUTHENTICATED, "Authentication failed")
        deadline_us = None if deadline_s is None else int(deadline_s * 1e6)
        call = Call(path, headers, peer=self._peer, is_signed=is_signed, deadline_us=deadline_us)
        return method, _decoded(method, message), call, deadline_s

    def _unpacked(self, request: Request, running: Running) -> bytes:
        if not request.is_packed:
            return request.message
        encoding = request.headers.get("grpc-encoding", "identity")
        if encoding != "gzip":
            code = Code.INTERNAL if encoding == "identity" else Code.UNIMPLEMENTED
            raise GrpcError(code, f"a message compressed as {encoding[:100]}; gzip and identity are known here")
        budget, limits = self._server.budget, self._server.limits
        bytes_max = max(_EXPANSION_BYTES_MIN, len(request.message) * limits.expansion_max)
        bytes_max = min(bytes_max, limits.grpc_message_bytes_max, budget.bytes_max - budget.held_bytes)
        expander = zlib.decompressobj(_GZIP)
        try:
            message = expander.decompress(request.message, max(1, bytes_max + 1))
        except zlib.error:
            raise GrpcError(Code.INVALID_ARGUMENT, "the message is not gzip") from None
        if len(message) > bytes_max:
            raise GrpcError(Code.RESOURCE_EXHAUSTED, f"the message expands to more than {bytes_max} bytes")
        if not expander.eof or expander.unused_data:
            raise GrpcError(Code.INVALID_ARGUMENT, "the message is not one whole gzip stream")
        running.held_bytes = len(message)
        budget.held_bytes += len(message)
        return message

    def _run_on(self, stream_id: int, running: Running, method: Method, answered: Any) -> None:
        running.answered = answered
        running.future = self._loop.create_task(self._run(stream_id, running, method))

    async def _run(self, stream_id: int, running: Running, method: Method) -> None:
        """See a call through whose handler is a coroutine, or an iterator of messages."""
        code, answered = Code.OK, running.answered
        try:
            if method.is_stream:
                async for message in answered:
                    self._machine.say(stream_id, message.SerializeToString())
                    self._soon()
                self._machine.fail(stream_id, Code.OK, "")
            else:
                self._machine.answer(stream_id, _encoded(await answered))
        except asyncio.CancelledError:
            code = self._cancelled(stream_id, running)
        except Exception as error:  # noqa: BLE001 - each is an answer
            code = self._failed(stream_id, method, error)
        self._ended(stream_id, running, code)

    def _on_done(
        self,
        stream_id: int,
        running: Running,
        method: Method,
        answer: Callable[[], Answer | Awaited],
        future: asyncio.Future[Any],
    ) -> None:
        """What a call waited for is done: its answer is here, or awaited from now on."""
        code = Code.OK
        if future.cancelled() or running.is_stopped:
            code = self._cancelled(stream_id, running)
        elif (error := future.exception()) is not None:
            code = self._failed(stream_id, method, error)
        else:
            try:
                answered = answer()
            except Exception as refusal:  # noqa: BLE001 - each is an answer
                code = self._failed(stream_id, method, refusal)
            else:
                if isinstance(answered, Coroutine):
                    self._run_on(stream_id, running, method, answered)
                    return
                self._machine.answer(stream_id, _encoded(answered))
        self._ended(stream_id, running, code)

    def _cancelled(self, stream_id: int, running: Running) -> Code:
        """A call was given up, by its caller, by us, or by its own handler."""
        self._machine.fail(stream_id, Code.UNAVAILABLE, STOPPING)  # unless it was answered already
        if not running.is_stopped:
            LOG.error("a handler was cancelled from within", path=running.path)
        return Code.CANCELLED

    def _failed(self, stream_id: int, method: Method | None, error: BaseException) -> Code:
        """Tell a caller what went wrong; answers its code."""
        if isinstance(error, HeadraceError):
            error = of_error(error) if method is None else method.of_error(error)
        if not isinstance(error, GrpcError):
            LOG.error("a call met an error that is nobody's", exc_info=error)
            error = GrpcError(Code.INTERNAL, "something went wrong; the server's log says more")
        self._machine.fail(stream_id, error.code, error.message)
        return error.code

    def _ended(self, stream_id: int, running: Running, code: Code) -> None:
        self._running.pop(stream_id, None)
        if running.timer is not None:
            running.timer.cancel()
        self._server.budget.held_bytes -= running.held_bytes
        self._machine.done(stream_id)
        code = running.code if running.code is not None else code
        self._server.observe(running.path, code, perf_counter() - running.began_s)
        self._soon()

    def _expire(self, stream_id: int) -> None:
        running = self._running[stream_id]
        running.code = Code.DEADLINE_EXCEEDED
        self._machine.abandon(stream_id, Code.DEADLINE_EXCEEDED, "the call took longer than its caller waits")
        self._stop(stream_id, running)
        self._soon()

    def _give_up(self, stream_id: int) -> None:
        """The caller wants no answer any more."""
        running = self._running.get(stream_id)
        if running is not None:
            running.code = Code.CANCELLED
            self._stop(stream_id, running)
            return
        self._held = deque(pair for pair in self._held if pair[0].stream_id != stream_id)
        self._machine.done(stream_id)

    def _stop_all(self) -> None:
        for stream_id, running in self._running.items():
            self._stop(stream_id, running)

    def _stop(self, stream_id: int, running: Running) -> None:
        running.is_stopped = True
        if running.future is not None:
            running.future.cancel()
            running.future.add_done_callback(partial(self._never_begun, stream_id, running))

    def _never_begun(self, stream_id: int, running: Running, _future: asyncio.Future[Any]) -> None:
        """A task that is cancelled before its first step takes none: then nobody has said yet that its call is over."""
        if self._running.get(stream_id) is running:
            if isinstance(running.answered, Coroutine):
                running.answered.close()
            self._ended(stream_id, running, self._cancelled(stream_id, running))

    # -- the end, and what leads there

    def shutdown(self) -> None:
        """Take no new calls; when those under way have their answers, the connection ends. uvicorn's word for it."""
        self._machine.leave()
        self._soon()

    def cut(self) -> None:
        """End the calls under way, and those that wait before their handlers."""
        self._stop_all()
        while self._held:
            self._machine.fail(self._held.popleft()[0].stream_id, Code.UNAVAILABLE, STOPPING)
        self.shutdown()

    def _flush(self) -> None:
        super()._flush()
        machine = self._machine
        while self._held and not self._is_full:
            self._begin(*self._held.popleft())
        if machine.is_broken or (machine.is_leaving and not machine.streams_count):
            part(self._transport)

    def _look(self) -> None:
        """Twice in `idle_s`: whether the peer still lives, reads, and ends what it began."""
        self._timer = self._loop.call_later(self._idle_s / 2, self._look)
        now_s, machine = self._loop.time(), self._machine
        if machine.sent_bytes != self._sent_bytes or not (machine.pending_bytes or self._is_paused):
            self._sent_bytes, self._moved_s = machine.sent_bytes, now_s
        silent_s, stuck_s = now_s - self._heard_s, now_s - self._moved_s
        if stuck_s >= self._idle_s or silent_s >= 2 * self._idle_s or self._transport.is_closing():
            self._transport.abort()
            return
        if silent_s >= self._idle_s and not self._is_asked:
            self._is_asked = True
            machine.ping()
        for stream_id in machine.stalled(int((now_s - self._idle_s) * 1e6)):
            machine.reset(stream_id, Fault.CANCEL)
        self._soon()


def _deadline_s(headers: Headers, arrived_s: float) -> float | None:
    text = headers.get("grpc-timeout")
    if text is None:
        return None
    return arrived_s + _seconds(text)


@lru_cache(256)
def _seconds(text: str) -> float:
    """What a `grpc-timeout` says. Raises `GrpcError`."""
    found = _TIMEOUT.fullmatch(text)
    if found is None:
        raise GrpcError(Code.INVALID_ARGUMENT, f"grpc-timeout is no timeout: {text[:100]}")
    return int(found[1]) * _UNIT_US[found[2]] / 1e6


def _encoded(answer: Answer) -> bytes:
    if answer is None:
        return b""
    return answer if isinstance(answer, bytes) else answer.SerializeToString()


def _decoded(method: Method, message: bytes) -> Message:
    try:
        return method.request.FromString(message)
    except DecodeError:
        name = method.request.DESCRIPTOR.full_name
        raise GrpcError(Code.INVALID_ARGUMENT, f"this is no {name}; sending it again can't help") from None
