"""A task behind a URL: each attempt is one signed POST, and the status code decides what becomes of the run.

The name is resolved here and the connection goes to an address that was looked at, so a name that answers something
else the second time (DNS rebinding) leads nowhere; proxies of the environment are not used, redirects not followed.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary

import msgspec

from headrace.core.endpoint import (
    EndpointFailed,
    EndpointRefused,
    Network,
    Place,
    is_allowed,
    judge,
    networks_of,
    place_of,
    secrets_of,
    signature,
)
from headrace.core.retry import Retry
from headrace.foundation.errors import InvalidSetting
from headrace.foundation.limits import MIB
from headrace.runtime.clock import Clock, SystemClock
from headrace.runtime.tasks import tracing
from headrace.runtime.tasks.context import DETACHED, Context

CONNECT_S: Final = 10.0
IDLE_S: Final = 15.0
CONNECTIONS_MAX: Final = 1_000
ANSWER_BYTES_MAX: Final = MIB
HEADERS_MAX: Final = 50
HEADER_CHARS_MAX: Final = 4_096
RETRY: Final = Retry(attempts=5, delay_s=1.0, jitter=0.5)
"""An endpoint is tried five times unless its task says otherwise: networks fail, and the key makes it safe."""

_OWN: Final = frozenset({
    "host", "content-length", "content-type", "transfer-encoding", "connection", "accept-encoding", "idempotency-key",
    "webhook-id", "webhook-timestamp", "webhook-signature", "headrace-attempt", "headrace-task",
})  # fmt: skip


class Endpoint:
    """Where a task lives, and who may be asked there."""

    def __init__(
        self,
        url: str,
        secret: str | Sequence[str],
        *,
        headers: Mapping[str, str] | None = None,
        allow: Sequence[str] = (),
        ca_file: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        try:
            import httpcore
        except ModuleNotFoundError as error:
            raise InvalidSetting(f"an endpoint needs {error.name}", hint="pip install 'headrace[endpoints]'") from None
        self._httpcore: Any = httpcore
        self.place: Place = place_of(url)
        self._keys = secrets_of(secret)
        self._headers = _checked(headers or {})
        self._allowed = networks_of(allow)
        self._clock: Clock = clock or SystemClock()
        try:
            self._tls = ssl.create_default_context(cafile=ca_file)
        except (OSError, ssl.SSLError) as error:
            raise InvalidSetting(f"ca_file can't be read: {error}", ca_file=ca_file) from None
        self._pools: WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = WeakKeyDictionary()

    async def deliver(self, body: Any = None, context: Context = DETACHED) -> Any:
        """One attempt. Its result is the answer's body: as JSON if it is, as text if it is that, else nothing."""
        hc = self._httpcore
        content = msgspec.json.encode(body)
        request = hc.Request(
            "POST",
            hc.URL(
                scheme=self.place.scheme.encode(),
                host=self.place.host.encode(),
                port=self.place.port,
                target=self.place.target.encode(),
            ),
            headers=self._headers_of(content, context),
            content=content,
            extensions={"timeout": {"connect": CONNECT_S, "pool": None, "read": None, "write": None}},
        )
        try:
            answer = await self._pool().handle_async_request(request)
            try:
                return await self._result_of(answer)
            finally:
                await answer.aclose()
        except (hc.NetworkError, hc.ProtocolError, hc.TimeoutException) as error:
            raise EndpointFailed(f"the endpoint did not answer: {error or type(error).__name__}") from error

    async def close(self) -> None:
        """End the connections of this loop."""
        pool = self._pools.pop(asyncio.get_running_loop(), None)
        if pool is not None:
            await pool.aclose()

    def _pool(self) -> Any:
        loop = asyncio.get_running_loop()
        if loop not in self._pools:
            self._pools[loop] = self._httpcore.AsyncConnectionPool(
                ssl_context=self._tls,
                max_connections=CONNECTIONS_MAX,
                max_keepalive_connections=CONNECTIONS_MAX,
                keepalive_expiry=IDLE_S,
                network_backend=Guarded(self._httpcore, self.place.scheme, self._allowed),
            )
        return self._pools[loop]

    def _headers_of(self, content: bytes, context: Context) -> list[tuple[str, str]]:
        now_s = self._clock.now_us() // 1_000_000
        name = context.run_id if context is not DETACHED else f"call_{secrets.token_hex(16)}"
        default = 443 if self.place.scheme == "https" else 80
        host = f"[{self.place.host}]" if ":" in self.place.host else self.place.host
        # Of a run's headers the trace alone goes on; the others are the worker's own.
        told = ((name, context.headers[name]) for name in tracing.NAMES if name in context.headers)
        return [
            ("host", host if self.place.port == default else f"{host}:{self.place.port}"),
            ("content-type", "application/json"),
            ("content-length", str(len(content))),
            ("accept-encoding", "identity"),
            ("user-agent", "headrace"),
            ("idempotency-key", name),
            ("webhook-id", name),
            ("webhook-timestamp", str(now_s)),
            ("webhook-signature", signature(self._keys, name, now_s, content)),
            ("headrace-attempt", str(context.attempt)),
            ("headrace-task", context.task.encode("unicode_escape").decode()),
            *(header for header in told if _is_header(*header)),
            *self._headers,
        ]

    async def _result_of(self, answer: Any) -> Any:
        headers = {name.lower(): value.decode("latin-1") for name, value in answer.headers}
        judge(answer.status, headers.get(b"retry-after"), self._clock.now_us())
        pieces, size = [], 0
        async for piece in answer.stream:
            size += len(piece)
            if size > ANSWER_BYTES_MAX:
                raise EndpointRefused(
                    f"the endpoint answered {answer.status} with more than the {ANSWER_BYTES_MAX} bytes of a result"
                )
            pieces.append(piece)
        body, kind = b"".join(pieces), headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if not body:
            return None
        if kind == "application/json" or kind.endswith("+json"):
            try:
                return msgspec.json.decode(body)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                raise EndpointRefused(f"the endpoint answered {answer.status} with JSON that can't be read") from None
        return body.decode("utf-8", "replace") if kind.startswith("text/") else None


class Guarded:
    """A network backend of httpcore's that connects only where it may, to the very address that was looked at."""

    def __init__(self, httpcore: Any, scheme: str, allowed: Sequence[Network]) -> None:
        self._httpcore = httpcore
        self._inner = httpcore.AnyIOBackend()
        self._scheme = scheme
        self._allowed = allowed

    async def connect_tcp(self, host: str, port: int, timeout: float | None = None, **more: Any) -> Any:
        """The first of the name's addresses that takes the connection."""
        problem: Exception = self._httpcore.ConnectError("the name has no address")
        for address in await addresses_of(host, port, self._scheme, self._allowed, timeout):
            try:
                return await self._inner.connect_tcp(address, port, timeout, **more)
            except (self._httpcore.ConnectError, self._httpcore.ConnectTimeout) as error:
                problem = error
        raise problem


async def addresses_of(
    host: str, port: int, scheme: str, allowed: Sequence[Network], timeout_s: float | None
) -> list[str]:
    """The addresses of a name that may be reached. Raises `EndpointRefused` when it has some, and none of them may."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise EndpointFailed(f"the endpoint's name {host!r} can't be resolved: {error}") from error
    every = list(dict.fromkeys(str(one[4][0]) for one in found))
    good = [address for address in every if is_allowed(address, scheme, allowed)]
    if every and not good:
        raise EndpointRefused(
            f"{host} leads to {', '.join(every[:3])}, where no request may go over {scheme}: "
            "public addresses over https only, or a network that the task's allow=[…] names"
        )
    return good


def _checked(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Headers of the task's own. Raises `InvalidSetting`, which does not repeat a value."""
    if len(headers) > HEADERS_MAX:
        raise InvalidSetting(f"an endpoint has at most {HEADERS_MAX} headers")
    for name, value in headers.items():
        if name.lower() in _OWN:
            raise InvalidSetting(f"the header {name} is written by Headrace")
        if not _is_header(name, value):
            raise InvalidSetting(f"the header {name!r:.60} is none, or its value has a form that headers don't take")
    return [(name, value) for name, value in headers.items()]


def _is_header(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, str) or not 0 < len(name) <= 200:
        return False
    is_token = name.isascii() and all(one.isalnum() or one in "!#$%&'*+-.^_`|~" for one in name)
    return is_token and len(value) <= HEADER_CHARS_MAX and value.isascii() and (value == "" or value.isprintable())
