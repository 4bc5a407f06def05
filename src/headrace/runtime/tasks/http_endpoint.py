"""A task behind a URL: each attempt is one signed POST, and its status code decides the outcome of the run.

The name is resolved here, and the connection goes to an address that was checked. A name that resolves to another
address the second time (DNS rebinding) therefore has no effect. Proxies from the environment are not used, and
redirects are not followed.
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
    EndpointAddress,
    EndpointFailed,
    EndpointRefused,
    Network,
    is_allowed,
    judge,
    networks_of,
    parse_url,
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
"""An endpoint is attempted five times unless its task says otherwise: networks fail, and the idempotency key makes it
safe.
"""

_RESERVED_HEADERS: Final = frozenset({
    "host", "content-length", "content-type", "transfer-encoding", "connection", "accept-encoding", "idempotency-key",
    "webhook-id", "webhook-timestamp", "webhook-signature", "headrace-attempt", "headrace-task",
})  # fmt: skip


class Endpoint:
    """The URL of a task, its signing keys, and the networks that may be reached."""

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
            raise InvalidSetting(
                f"an endpoint requires the package {error.name}", hint="pip install 'headrace[endpoints]'"
            ) from None
        self._httpcore: Any = httpcore
        self.place: EndpointAddress = parse_url(url)
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
        """Make one attempt. The result is the response body: decoded JSON, a string for text, else None."""
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
            raise EndpointFailed(f"the endpoint did not respond: {error or type(error).__name__}") from error

    async def close(self) -> None:
        """Close the connections of the current event loop."""
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
                network_backend=GuardedBackend(self._httpcore, self.place.scheme, self._allowed),
            )
        return self._pools[loop]

    def _headers_of(self, content: bytes, context: Context) -> list[tuple[str, str]]:
        now_s = self._clock.now_us() // 1_000_000
        name = context.run_id if context is not DETACHED else f"call_{secrets.token_hex(16)}"
        default = 443 if self.place.scheme == "https" else 80
        host = f"[{self.place.host}]" if ":" in self.place.host else self.place.host
        # Of a run's headers only the trace is sent; the others belong to the worker.
        trace_headers = ((name, context.headers[name]) for name in tracing.NAMES if name in context.headers)
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
            *(header for header in trace_headers if _is_header(*header)),
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
                    f"expected a response of at most {ANSWER_BYTES_MAX} bytes, got more (status {answer.status})"
                )
            pieces.append(piece)
        body, kind = b"".join(pieces), headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if not body:
            return None
        if kind == "application/json" or kind.endswith("+json"):
            try:
                return msgspec.json.decode(body)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                raise EndpointRefused(f"the endpoint responded {answer.status} with invalid JSON") from None
        return body.decode("utf-8", "replace") if kind.startswith("text/") else None


class GuardedBackend:
    """A network backend for httpcore that connects only to addresses that were checked."""

    def __init__(self, httpcore: Any, scheme: str, allowed: Sequence[Network]) -> None:
        self._httpcore = httpcore
        self._inner = httpcore.AnyIOBackend()
        self._scheme = scheme
        self._allowed = allowed

    async def connect_tcp(self, host: str, port: int, timeout: float | None = None, **more: Any) -> Any:
        """Connect to the first of the name's addresses that accepts the connection."""
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
    """Return the addresses of a name that may be reached. Raises `EndpointRefused` if it has addresses and none is
    allowed.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise EndpointFailed(f"the endpoint's name {host!r} can't be resolved: {error}") from error
    resolved = list(dict.fromkeys(str(info[4][0]) for info in infos))
    allowed_addresses = [address for address in resolved if is_allowed(address, scheme, allowed)]
    if resolved and not allowed_addresses:
        raise EndpointRefused(
            f"{host} resolves to {', '.join(resolved[:3])}, which may not be reached over {scheme}: only public "
            "addresses over https are allowed, or the networks in the task's allow=[…]"
        )
    return allowed_addresses


def _checked(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the task's own headers, checked. Raises `InvalidSetting`, which never contains a header's value."""
    if len(headers) > HEADERS_MAX:
        raise InvalidSetting(f"headers: expected at most {HEADERS_MAX}, got {len(headers)}")
    for name, value in headers.items():
        if name.lower() in _RESERVED_HEADERS:
            raise InvalidSetting(f"headers: {name} is set by Headrace and can't be overridden")
        if not _is_header(name, value):
            raise InvalidSetting(f"headers: {name!r:.60} or its value is not valid in HTTP")
    return [(name, value) for name, value in headers.items()]


def _is_header(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, str) or not 0 < len(name) <= 200:
        return False
    is_token = name.isascii() and all(character.isalnum() or character in "!#$%&'*+-.^_`|~" for character in name)
    return is_token and len(value) <= HEADER_CHARS_MAX and value.isascii() and (value == "" or value.isprintable())
