"""Requests to a server: one address, one key, and what each answer means for trying again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import msgspec

from headrace.foundation.errors import HeadraceError, InvalidSetting, StoreUnavailable
from headrace.runtime.clock import Clock, SystemClock
from headrace.store.rpc import fault_of

REQUEST_S: Final = 60.0
CONNECT_S: Final = 10.0
POOL_S: Final = 30.0
"""How long an idle connection is kept: shorter than a server does, so that none is used that it just closed."""

ATTEMPTS: Final = 5
BASE_S: Final = 1.0
MOST_S: Final = 30.0
RETRIED: Final = (408, 409, 425, 429)


class Answer(NamedTuple):
    """What came back. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, as JSON."""
        return msgspec.json.decode(self.body)

    @property
    def is_good(self) -> bool:
        """It was done."""
        return 200 <= self.status < 300

    @property
    def is_retryable(self) -> bool:
        """Whether the same request may be answered otherwise later; the server's word wins over the status."""
        told = self.headers.get("x-should-retry")
        if told in ("true", "false"):
            return told == "true"
        return self.status in RETRIED or self.status >= 500

    def wait_s(self, now_us: int) -> float | None:
        """How long the server asks to be left alone; None when it does not say."""
        after = self.headers.get("retry-after", "")
        if after.isdigit():
            return float(after)
        reset = self.headers.get("x-ratelimit-reset", "")
        if self.status == 429 and reset.isdigit():
            return max(0.0, int(reset) / 1_000 - now_us / 1_000_000)
        return None


class Connection:
    """Where a server is and who asks. Works on any event loop, on several at once too."""

    def __init__(self, url: str, key: str | None, *, clock: Clock | None = None, attempts: int = ATTEMPTS) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InvalidSetting("a server is named as https://host or http://host:port")
        try:
            import pyqwest
        except ModuleNotFoundError as error:
            raise InvalidSetting(
                f"a server far away needs {error.name}", hint="pip install 'headrace[client]'"
            ) from None
        if not 1 <= attempts <= 100:
            raise InvalidSetting(f"attempts is from 1 to 100, not {attempts}")
        host = parts.netloc.rpartition("@")[2]
        self.url = f"{parts.scheme}://{host}{parts.path.rstrip('/')}"
        self.clock: Clock = clock or SystemClock()
        self.attempts = attempts
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        transport = pyqwest.HTTPTransport(
            connect_timeout=CONNECT_S, pool_idle_timeout=POOL_S, enable_cookie_store=False
        )
        self._client = pyqwest.Client(transport)
        self._faults = (OSError, pyqwest.RemoteProtocolError, pyqwest.ReadError, pyqwest.WriteError)

    async def once(
        self,
        method: str,
        path: str,
        content: bytes | AsyncIterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout_s: float | None = REQUEST_S,
    ) -> Answer:
        """One request. Raises `StoreUnavailable` when no answer came."""
        is_elsewhere = path.startswith(("http://", "https://"))  # a signed URL, which is no business of the key
        target = path if is_elsewhere else self.url + path
        own = dict(headers or {}) if is_elsewhere else {**self._headers, **(headers or {})}
        try:
            async with asyncio.timeout(timeout_s):
                found = await self._client.execute(method, target, headers=own, content=content)
                return Answer(found.status, _lowered(found.headers), bytes(found.content))
        except TimeoutError as error:
            raise StoreUnavailable(f"the server did not answer within {timeout_s:g} s", url=self.url) from error
        except self._faults as error:
            raise self._away(error) from error

    @asynccontextmanager
    async def opened(self, method: str, path: str) -> AsyncGenerator[tuple[Answer, AsyncIterator[bytes]], None]:
        """An answer that is read as it comes. Raises `StoreUnavailable`; so does reading it."""
        try:
            async with self._client.stream(method, self.url + path, headers=self._headers) as found:
                yield Answer(found.status, _lowered(found.headers), b""), self._pieces(found)
        except self._faults as error:
            raise self._away(error) from error

    async def _pieces(self, found: Any) -> AsyncIterator[bytes]:
        try:
            async for piece in found.content:
                yield bytes(piece)
        except self._faults as error:
            raise self._away(error) from error

    async def ask(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        attempts: int | None = None,
        timeout_s: float | None = REQUEST_S,
    ) -> Answer:
        """A request that is repeated while that may help. Raises what the last answer was."""
        return await self.retried(
            lambda: self.once(method, path, content, headers, timeout_s=timeout_s), attempts=attempts
        )

    async def retried(self, call: Callable[[], Awaitable[Answer]], *, attempts: int | None = None) -> Answer:
        """Call until the answer is good, or can't become so, or it was enough."""
        left = self.attempts if attempts is None else attempts
        tries = 0
        while True:
            tries += 1
            left -= 1
            wait_s: float | None = None
            try:
                answer = await call()
            except StoreUnavailable:
                if not left:
                    raise
            else:
                if answer.is_good:
                    return answer
                if not left or not answer.is_retryable:
                    raise fault_of(answer.status, answer.body)
                wait_s = answer.wait_s(self.clock.now_us())
            await self.clock.sleep(backoff_s(tries) if wait_s is None else wait_s + random.random())  # noqa: S311 - jitter

    def _away(self, error: BaseException) -> HeadraceError:
        text = str(error) or type(error).__name__
        return StoreUnavailable(f"the server did not answer: {text}", hint="is it up, and the URL right?", url=self.url)


def backoff_s(tries: int) -> float:
    """Between two tries: doubled each time, spread over its second half, half a minute at most."""
    return min(MOST_S, BASE_S * float(2 ** min(tries - 1, 10)) * (1 + random.random()))  # noqa: S311 - jitter, not secrets


def _lowered(headers: Any) -> dict[str, str]:
    return {str(name).lower(): str(value) for name, value in headers.items()}
