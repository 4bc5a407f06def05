"""The calling end: one connection to an endpoint, many calls at a time on it, made anew when it breaks.

A call that can't be made fails at once with UNAVAILABLE; while an endpoint rests after a failure (`BACKOFF_S`), all do.
A call that got no answer in its time while nothing at all was heard takes the connection with it: the peer is gone.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, Final, NamedTuple, cast

from headrace.foundation.targets import PushTarget
from headrace.grpc.transport.asyncio_protocol import Talking
from headrace.grpc.transport.closing import part
from headrace.grpc.transport.connection import Answer, Away, Bounds, Broke, Machine, Reset
from headrace.grpc.transport.frames import Fault
from headrace.grpc.transport.headers import block, from_percent, literal
from headrace.grpc.transport.sender import CONTENT_TYPE, Budget
from headrace.grpc.transport.signing import HEADER, Secrets
from headrace.grpc.transport.status import Code, GrpcError

CONNECT_S: Final = 5.0
BACKOFF_S: Final = (0.0, 0.1, 0.3, 1.0, 3.0, 5.0)
HEADS_MAX: Final = 64
USER_AGENT: Final = "headrace"
_OF_HTTP: Final = {
    "400": Code.INTERNAL,
    "401": Code.UNAUTHENTICATED,
    "403": Code.PERMISSION_DENIED,
    "404": Code.UNIMPLEMENTED,
    "429": Code.UNAVAILABLE,
    "502": Code.UNAVAILABLE,
    "503": Code.UNAVAILABLE,
    "504": Code.UNAVAILABLE,
}


class NotSent(GrpcError):
    """The peer did not look at this call: it may be made again though it should happen only once."""


class Calling(NamedTuple):
    """One call that waits for its answer."""

    answered: asyncio.Future[bytes]
    timer: asyncio.TimerHandle
    began_s: float


class Link(Talking):
    """One connection; `is_open` until it takes no new calls."""

    def __init__(self, bounds: Bounds, budget: Budget) -> None:
        super().__init__(Machine(bounds, budget, is_client=True))
        self._calls: dict[int, Calling] = {}
        self._heard_s = self._loop.time()
        self.is_open = False

    @property
    def room(self) -> int:
        """How many more calls the peer takes now."""
        return self._machine.peer_calls_max - self._machine.streams_count

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The peer is there; it is spoken to before it greets."""
        self._transport = cast("asyncio.Transport", transport)
        self.is_open = True
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Every call that waits has failed."""
        self.is_open = False
        self._machine.close()
        self._fail_all("the connection is gone" if exc is None else f"the connection is gone: {exc}")

    def data_received(self, data: bytes) -> None:
        """Frames of answers."""
        self._heard_s = now_s = self._loop.time()
        for event in self._machine.feed(data, now_us=int(now_s * 1e6)):
            if type(event) is Answer:
                self._ended(event.stream_id, *_outcome(event))
            elif type(event) is Reset:
                kind = NotSent if event.fault == Fault.REFUSED_STREAM else GrpcError
                self._ended(event.stream_id, None, kind(Code.UNAVAILABLE, f"the peer reset the call: {event.fault}"))
            elif type(event) is Away:
                self.is_open = False
                for stream_id in [number for number in self._calls if number > event.last_id]:
                    self._ended(stream_id, None, NotSent(Code.UNAVAILABLE, "the peer goes away"))
            elif type(event) is Broke:
                self.is_open = False
                self._fail_all(f"the peer broke the protocol: {event.what}")
        self._soon()

    async def call(self, head: bytes, message: bytes, timeout_s: float) -> bytes:
        """One call. Raises `GrpcError`."""
        answered: asyncio.Future[bytes] = self._loop.create_future()
        stream_id = self._machine.call(head, message)
        if self._machine.is_spent:
            self.close()
        timer = self._loop.call_later(timeout_s, self._expire, stream_id)
        self._calls[stream_id] = Calling(answered, timer, self._loop.time())
        self._soon()
        try:
            return await answered
        finally:
            if self._calls.pop(stream_id, None) is not None:  # whoever asked wants no answer any more
                timer.cancel()
                self._machine.reset(stream_id, Fault.CANCEL)
                self._soon()

    def close(self) -> None:
        """Take no new calls, and end with the last one under way."""
        self.is_open = False
        self._machine.leave()
        self._soon()

    def _expire(self, stream_id: int) -> None:
        call = self._calls[stream_id]
        self._machine.reset(stream_id, Fault.CANCEL)
        self._ended(stream_id, None, GrpcError(Code.DEADLINE_EXCEEDED, "no answer came in time"))
        if self._heard_s < call.began_s:
            self._transport.abort()
        self._soon()

    def _ended(self, stream_id: int, message: bytes | None, error: GrpcError | None) -> None:
        call = self._calls.pop(stream_id, None)
        if call is None:
            return
        call.timer.cancel()
        if not call.answered.done():
            if error is not None:
                call.answered.set_exception(error)
            else:
                call.answered.set_result(message or b"")

    def _fail_all(self, why: str) -> None:
        for stream_id in tuple(self._calls):
            self._ended(stream_id, None, GrpcError(Code.UNAVAILABLE, why))

    def _flush(self) -> None:
        super()._flush()
        if self._machine.is_broken or (not self.is_open and not self._calls):
            part(self._transport)


class Channel:
    """An endpoint, whatever becomes of its connections."""

    def __init__(
        self,
        target: PushTarget,
        bounds: Bounds,
        budget: Budget,
        *,
        secrets: Secrets | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls` is what a certificate is checked with; without it, as the system does."""
        self.target = target
        self._bounds, self._budget = bounds, budget
        self._secrets = Secrets() if secrets is None else secrets
        self._tls: ssl.SSLContext | None = None
        if target.is_tls:
            self._tls = ssl.create_default_context() if tls is None else tls
            self._tls.set_alpn_protocols(["h2"])
        self._link: Link | None = None
        self._opening: asyncio.Task[Link] | None = None
        self._failures_count = 0
        self._rests_until_s = 0.0
        self._heads: dict[tuple[str, float], bytes] = {}

    async def call(self, path: str, message: bytes, *, timeout_s: float) -> bytes:
        """Make a call; answers with the message. Raises `GrpcError`, `NotSent` when the peer did not look at it."""
        link = self._link
        if link is None or not link.is_open:
            link = await self._linked()
        if link.room <= 0:
            raise NotSent(Code.RESOURCE_EXHAUSTED, "the peer takes no more calls at a time")
        head = self._heads.get((path, timeout_s))
        if head is None:
            if len(self._heads) >= HEADS_MAX:
                self._heads.clear()
            head = self._heads[path, timeout_s] = self._head(path, timeout_s)
        if self._secrets:
            head += literal(HEADER, self._secrets.sign(path, message), is_secret=True)
        return await link.call(head, message, timeout_s)

    def close(self) -> None:
        """Let calls under way end, and make no new ones."""
        self._rests_until_s = float("inf")
        if self._opening is not None:
            self._opening.cancel()
        if self._link is not None:
            self._link.close()

    def _head(self, path: str, timeout_s: float) -> bytes:
        return block(
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

    async def _linked(self) -> Link:
        """A connection, made by whoever needs it first and awaited by all who do."""
        if self._opening is None:
            if asyncio.get_running_loop().time() < self._rests_until_s:
                raise NotSent(Code.UNAVAILABLE, f"{self.target.authority} was not there a moment ago")
            self._opening = asyncio.create_task(self._open(), name="headrace-grpc-connect")
            self._opening.add_done_callback(self._opened)
        opening = self._opening
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if opening.cancelled() and task is not None and not task.cancelling():
                raise NotSent(Code.UNAVAILABLE, "the channel was closed") from None
            raise

    async def _open(self) -> Link:
        target, loop = self.target, asyncio.get_running_loop()
        made: Any = None
        try:
            async with asyncio.timeout(CONNECT_S):
                made, link = await loop.create_connection(
                    lambda: Link(self._bounds, self._budget), target.host, target.port, ssl=self._tls
                )
        except (OSError, TimeoutError) as error:
            why = str(error) or "no answer"
            raise NotSent(Code.UNAVAILABLE, f"{target.authority} is not there: {why}") from None
        found = made.get_extra_info("ssl_object")
        if found is not None and found.selected_alpn_protocol() != "h2":
            made.abort()
            raise NotSent(Code.UNAVAILABLE, f"{target.authority} does not speak HTTP/2")
        return link

    def _opened(self, opening: asyncio.Task[Link]) -> None:
        self._opening = None
        if opening.cancelled():
            return
        if opening.exception() is None:
            self._link, self._failures_count = opening.result(), 0
            return
        self._failures_count += 1
        rest_s = BACKOFF_S[min(self._failures_count, len(BACKOFF_S) - 1)]
        self._rests_until_s = asyncio.get_running_loop().time() + rest_s


def _outcome(answer: Answer) -> tuple[bytes | None, GrpcError | None]:
    """What an answer comes to."""
    text = answer.trailers.get("grpc-status", answer.headers.get("grpc-status", ""))
    if not text:
        status = answer.headers.get(":status", "")
        return None, GrpcError(_OF_HTTP.get(status, Code.UNKNOWN), f"HTTP status {status[:10]} instead of an answer")
    try:
        code = Code(int(text[:4]))
    except ValueError:
        code = Code.UNKNOWN
    if code is not Code.OK:
        return None, GrpcError(code, from_percent(answer.trailers.get("grpc-message", "")))
    if answer.message is None or answer.is_packed:
        return None, GrpcError(Code.INTERNAL, "an answer without a message that can be read")
    return answer.message, None
