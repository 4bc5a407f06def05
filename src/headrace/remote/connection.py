"""Requests to one server with one API key, with timeouts, retries and backoff."""

from __future__ import annotations

import asyncio
import atexit
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import cache
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import msgspec

from headrace.foundation.errors import (
    ClientFault,
    HeadraceError,
    InvalidSetting,
    StoreBroken,
    StoreUnavailable,
    StoreUnreachable,
)
from headrace.foundation.tcp_keepalive import KEEPALIVE_IDLE_S
from headrace.runtime.clock import Clock, SystemClock
from headrace.runtime.outage import Outage
from headrace.store.reachability import Reachability
from headrace.store.rpc import error_of

REQUEST_S: Final = 60.0
CONNECT_S: Final = 10.0
QUIET_S: Final = 60.0
"""Seconds in which a server sends something on a stream: it sends blank lines while it has nothing else."""
SILENT_GRACE_S: Final = 2.0
"""Seconds that requests from before a silence get once a new connection works."""
POOL_S: Final = 30.0
"""Seconds an idle connection is kept: fewer than servers keep it, so that none is used just as the server closes it."""

SETTLE_S: Final = 0.05
"""Time at the end of the process, or of a store, in which the threads of the HTTP client finish. They attach to the
interpreter to release what a request held; while the interpreter ends, that aborts the process (measured: 9 of 40
processes without it, none of 120 with 0.01 s).
"""

ATTEMPTS: Final = 5
BACKOFF_BASE_S: Final = 1.0
BACKOFF_MAX_S: Final = 30.0
RETRIED_STATUSES: Final = (408, 409, 425, 429)
UNAUTHORIZED: Final = 401
KEY_HINT: Final = "set HEADRACE_API_KEY to a key of the server, or pass it: Headrace(api_key=…), Client(url, key)"
_WRONG_ENDPOINT: Final = (301, 302, 303, 307, 308, 404, 405)
_URL_HINT: Final = "expected the server's own URL: http://host:port, or https://host behind a proxy"


class ServerResponse(NamedTuple):
    """A server's response. Header names are in lower case; `url` is that of the request."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str = ""

    @property
    def json(self) -> Any:
        """Decode the body as JSON. Raises `StoreBroken` if it is none, as from another kind of server."""
        try:
            return msgspec.json.decode(self.body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            kind = self.headers.get("content-type", "no content type")
            raise StoreBroken(
                f"expected JSON from the Headrace server at {self.url}, got {kind[:60]}", hint=_URL_HINT
            ) from None

    def error(self) -> HeadraceError:
        """Convert the response to the error that it reports. An endpoint of another kind of server is named as such."""
        if self.status in _WRONG_ENDPOINT and not _has_error_code(self.body):
            return ClientFault(
                f"{self.url} is not an endpoint of a Headrace server: got HTTP status {self.status}", hint=_URL_HINT
            )
        error = error_of(self.status, self.body)
        if self.status == UNAUTHORIZED:
            error.hint = KEY_HINT
        return error

    @property
    def is_success(self) -> bool:
        """True for a 2xx status."""
        return 200 <= self.status < 300

    @property
    def is_retryable(self) -> bool:
        """True if the same request may succeed later. The header `x-should-retry` overrides the status."""
        should_retry = self.headers.get("x-should-retry")
        if should_retry in ("true", "false"):
            return should_retry == "true"
        return self.status in RETRIED_STATUSES or self.status >= 500

    def wait_s(self, now_us: int) -> float | None:
        """Return the seconds that the server asks to wait; None if it names none."""
        after = self.headers.get("retry-after", "")
        if after.isdigit():
            return float(after)
        reset = self.headers.get("x-ratelimit-reset", "")
        if self.status == 429 and reset.isdigit():
            return max(0.0, int(reset) / 1_000 - now_us / 1_000_000)
        return None


@cache
def _settle_at_exit() -> None:
    """Wait for the threads of the HTTP client before the interpreter ends: once a process."""
    atexit.register(time.sleep, SETTLE_S)


class ServerConnection:
    """A server's URL and an API key. May be used from several event loops at once.

    After a request without an answer, no connection from before it is used again: the network may have forgotten them.
    """

    def __init__(self, url: str, key: str | None, *, clock: Clock | None = None, attempts: int = ATTEMPTS) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InvalidSetting(
                f"expected a server URL like https://host or http://host:port, got {_without_credentials(url)!r}"
            )
        try:
            import pyqwest
        except ModuleNotFoundError as error:
            raise InvalidSetting(
                f"the HTTP client requires {error.name}, which is not installed", hint="pip install 'headrace[client]'"
            ) from None
        if not 1 <= attempts <= 100:
            raise InvalidSetting(f"expected attempts from 1 to 100, got {attempts}")
        _settle_at_exit()
        host = parts.netloc.rpartition("@")[2]
        self.url = f"{parts.scheme}://{host}{parts.path.rstrip('/')}"
        self.clock: Clock = clock or SystemClock()
        self.attempts = attempts
        self.outage: Outage | None = None
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._pyqwest = pyqwest
        self._reachability = Reachability()
        self._client_silences_count = 0
        self._client = self._new_client()
        self._pending: dict[asyncio.Timeout, tuple[asyncio.AbstractEventLoop, int]] = {}
        self._network_errors = (
            OSError,
            pyqwest.RemoteProtocolError,
            pyqwest.ReadError,
            pyqwest.WriteError,
            pyqwest.TooManyRedirects,
        )

    def follow(self, outage: Outage) -> None:
        """Wait for the end of an outage before a request is repeated, and renew the connections after a silence."""
        self.outage = outage
        self._reachability = outage.reachability
        self._reachability.listen(self._end_silent)

    def _new_client(self) -> Any:
        transport = self._pyqwest.HTTPTransport(
            connect_timeout=CONNECT_S,
            pool_idle_timeout=POOL_S,
            tcp_keepalive_interval=float(KEEPALIVE_IDLE_S),
            enable_cookie_store=False,
        )
        return self._pyqwest.Client(transport)

    def _current_client(self) -> Any:
        """Return the HTTP client; a new one, with connections of its own, after a silence."""
        silences_count = self._reachability.silences_count
        if silences_count != self._client_silences_count:
            self._client_silences_count, self._client = silences_count, self._new_client()
        return self._client

    def _end_silent(self) -> None:
        """End the requests from before a silence after `SILENT_GRACE_S`. Called from any thread."""
        for deadline, (loop, silences_count) in list(self._pending.items()):
            if silences_count != self._reachability.silences_count:
                with suppress(RuntimeError):  # that loop has ended
                    loop.call_soon_threadsafe(loop.call_later, SILENT_GRACE_S, self._end_request, loop, deadline)

    def _end_request(self, loop: asyncio.AbstractEventLoop, deadline: asyncio.Timeout) -> None:
        if deadline in self._pending:
            deadline.reschedule(loop.time())

    async def send_once(
        self,
        method: str,
        path: str,
        content: bytes | AsyncIterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout_s: float | None = REQUEST_S,
    ) -> ServerResponse:
        """Send a request once. Raises `StoreUnavailable` if there is no response."""
        is_elsewhere = path.startswith(("http://", "https://"))  # a signed URL: the API key must not be sent there
        target = path if is_elsewhere else self.url + path
        all_headers = dict(headers or {}) if is_elsewhere else {**self._headers, **(headers or {})}
        client, silences_count = self._current_client(), self._reachability.silences_count
        deadline = asyncio.timeout(timeout_s)
        try:
            async with deadline:
                self._pending[deadline] = asyncio.get_running_loop(), silences_count
                response = await client.execute(method, target, headers=all_headers, content=content)
                return ServerResponse(response.status, _lower_case(response.headers), bytes(response.content), target)
        except TimeoutError as error:
            within = f" within {timeout_s:g} s" if timeout_s is not None else ""
            unanswered = StoreUnreachable(f"no response from {self.url}{within}", url=self.url)
            if not is_elsewhere:
                self._reachability.fell_silent(unanswered, since=silences_count)
            raise unanswered from error
        except self._network_errors as error:
            raise self._unavailable(error) from error
        finally:
            self._pending.pop(deadline, None)

    @asynccontextmanager
    async def stream(self, method: str, path: str) -> AsyncGenerator[tuple[ServerResponse, AsyncIterator[bytes]], None]:
        """Send a request and stream the response. Raises `StoreUnavailable`, also while it is read."""
        target = self.url + path
        try:
            async with self._current_client().stream(method, target, headers=self._headers) as response:
                head = ServerResponse(response.status, _lower_case(response.headers), b"", target)
                yield head, self._body_pieces(response)
        except self._network_errors as error:
            raise self._unavailable(error) from error

    async def _body_pieces(self, response: Any) -> AsyncIterator[bytes]:
        try:
            pieces = aiter(response.content)
            while True:
                async with asyncio.timeout(QUIET_S):
                    piece = await anext(pieces)
                yield bytes(piece)
        except StopAsyncIteration:
            return
        except self._network_errors as error:
            raise self._unavailable(error) from error

    async def ask(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        attempts: int | None = None,
        timeout_s: float | None = REQUEST_S,
    ) -> ServerResponse:
        """Send a request, and repeat it while a retry can help. Raises the error of the last response."""
        return await self.retry(
            lambda: self.send_once(method, path, content, headers, timeout_s=timeout_s), attempts=attempts
        )

    async def retry(
        self, call: Callable[[], Awaitable[ServerResponse]], *, attempts: int | None = None
    ) -> ServerResponse:
        """Call until the response is a success or can't become one, or the attempts are used up."""
        left = self.attempts if attempts is None else attempts
        tries = 0
        while True:
            tries += 1
            left -= 1
            wait_s: float | None = None
            silences_count = self._reachability.silences_count
            try:
                response = await call()
            except StoreUnavailable as error:
                if silences_count == self._reachability.silences_count:  # else it shows nothing about new connections
                    self._note(error)
                if not left:
                    raise
            else:
                self._note(None if response.is_success else response.error())
                if response.is_success:
                    return response
                if not left or not response.is_retryable:
                    raise response.error()
                wait_s = response.wait_s(self.clock.now_us())
            pause_s = backoff_s(tries) if wait_s is None else wait_s + random.random()  # noqa: S311 - jitter
            if self.outage is not None and not self.outage.is_over:
                await self.outage.until_over(self.clock, pause_s)
            else:
                await self.clock.sleep(pause_s)

    def _note(self, error: HeadraceError | None) -> None:
        """Note whether the server and the store behind it were reached, if the owner of the connection waits for
        outages.
        """
        if self.outage is None:
            return
        if error is None:
            self.outage.reachability.succeeded()
        elif isinstance(error, StoreUnreachable):
            self.outage.reachability.failed(error)

    def _unavailable(self, error: BaseException) -> HeadraceError:
        text = str(error) or type(error).__name__
        return StoreUnreachable(
            f"no response from {self.url}: {text}",
            hint="check that the server is running and that the URL is right",
            url=self.url,
        )


def backoff_s(tries: int) -> float:
    """Return the seconds to wait before the next attempt: doubled each time with jitter, at most 30."""
    return min(BACKOFF_MAX_S, BACKOFF_BASE_S * float(2 ** min(tries - 1, 10)) * (1 + random.random()))  # noqa: S311 - jitter, not secrets


def _has_error_code(body: bytes) -> bool:
    """True for an error of the API. The error of an unknown path has a code of its own, or none."""
    try:
        code = msgspec.json.decode(body, type=dict[str, Any]).get("code", "")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return bool(code) and not str(code).startswith("HTTP_")


def _without_credentials(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _lower_case(headers: Any) -> dict[str, str]:
    return {str(name).lower(): str(value) for name, value in headers.items()}
