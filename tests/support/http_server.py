"""The real HTTP server on a real socket, and a client made of nothing but a socket.

The client knows HTTP/1.1 and nothing of Headrace: requests are written out, and responses are bytes.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self
from unittest.mock import patch

from headrace.core.span import Settlement
from headrace.foundation.ids import new_session_id
from headrace.foundation.limits import DEFAULT, Limits
from headrace.grpc.transport.service_methods import Methods
from headrace.http.grpc_mount.mounting import grpc_server
from headrace.http.requests.service import Service
from headrace.http.server.app import make_app
from headrace.http.server.server import Server, serving
from headrace.runtime.clock import SystemClock
from headrace.runtime.engine import Engine
from headrace.runtime.tasks.task_registry import Registry
from headrace.runtime.wakeup import Wakeup
from headrace.store.object_store import open_payloads
from headrace.store.protocol import Claim, Lease, Session, Store
from tests.support.store_rig import FACTORIES, settlement_of

KEY = "tr_test_key_of_the_whole_environment"
AUTH = {"authorization": f"Bearer {KEY}"}
NDJSON = {"content-type": "application/x-ndjson"}
LIMITS = DEFAULT.replaced(poll_interval_ms=20)


class HttpAnswer(NamedTuple):
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, decoded as JSON."""
        return json.loads(self.body)


class HttpPeer:
    """One connection, kept alive as long as the server keeps it."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def connect(self) -> Self:
        """Open the connection."""
        self.reader, self.writer = await asyncio.open_connection(self._host, self._port, limit=1 << 24)
        return self

    async def close(self) -> None:
        """Close the connection."""
        if self.writer is not None:
            self.writer.close()
            self.reader = self.writer = None

    async def send(self, data: bytes) -> None:
        """Send bytes unchanged."""
        assert self.writer is not None
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Send the head of a request."""
        if self.writer is None:
            await self.connect()
        lines = [f"{method} {path} HTTP/1.1", "host: test", *(f"{name}: {value}" for name, value in headers.items())]
        await self.send(("\r\n".join(lines) + "\r\n\r\n").encode())

    async def chunk(self, data: bytes) -> None:
        """Send one chunk of a body."""
        await self.send(b"%x\r\n" % len(data) + data + b"\r\n")

    async def end(self) -> None:
        """Send the end of a chunked body."""
        await self.send(b"0\r\n\r\n")

    async def answer(self, method: str = "POST") -> HttpAnswer:
        """Read a whole response. Raises `ConnectionError` if the server closes the connection first."""
        head = await self.head_of_answer()
        if method == "HEAD" or head.status in (204, 304):
            body = b""
        elif head.headers.get("transfer-encoding") == "chunked":
            pieces = []
            while (piece := await self.piece()) is not None:
                pieces.append(piece)
            body = b"".join(pieces)
        else:
            assert self.reader is not None
            body = await self.reader.readexactly(int(head.headers.get("content-length", 0)))
        if head.headers.get("connection") == "close":
            await self.close()
        return head._replace(body=body)

    async def head_of_answer(self) -> HttpAnswer:
        """Read the status and headers of a response."""
        assert self.reader is not None
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            raise ConnectionError(f"the server closed the connection after {error.partial!r}") from None
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return HttpAnswer(int(first.split(" ")[1]), headers, b"")

    async def piece(self) -> bytes | None:
        """Read the next chunk of a response; None at its end."""
        assert self.reader is not None
        size = int((await self.reader.readuntil(b"\r\n")).strip(), 16)
        data = await self.reader.readexactly(size + 2)
        return data[:-2] if size else None

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] | AsyncIterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        auth: bool = True,
    ) -> HttpAnswer:
        """Send a request and read its response. A body of bytes is sent with its length, an iterable in chunks."""
        all_headers = {**(AUTH if auth else {}), **(headers or {})}
        if body is None or isinstance(body, bytes):
            if body is not None or method in ("POST", "PUT"):
                all_headers["content-length"] = str(len(body or b""))
            await self.head(method, path, all_headers)
            if body:
                await self.send(body)
            return await self.answer(method)
        await self.head(method, path, {**all_headers, "transfer-encoding": "chunked"})
        if isinstance(body, AsyncIterable):
            async for piece in body:
                await self.chunk(piece)
        else:
            for piece in body:
                await self.chunk(piece)
        await self.end()
        return await self.answer(method)


@dataclass
class ServerUnderTest:
    """A server under test and its engine."""

    engine: Engine
    service: Service
    server: Server
    stack: AsyncExitStack

    def peer(self) -> HttpPeer:
        """A new connection, closed with the server."""
        peer = HttpPeer(*self.server.address)
        self.stack.push_async_callback(peer.close)
        return peer

    async def ask(
        self, method: str, path: str, body: Any = None, headers: Any = None, *, auth: bool = True
    ) -> HttpAnswer:
        """Send a request on a connection of its own. A dict is sent as JSON."""
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), {"content-type": "application/json", **(headers or {})}
        return await self.peer().ask(method, path, body, headers, auth=auth)

    async def create(self, count: int, **more: Any) -> str:
        """Create a batch in trigger.dev's API. Returns its id."""
        answer = await self.ask("POST", "/api/v3/batches", {"runCount": count, **more})
        assert answer.status in (200, 202), answer
        return str(answer.json["id"])

    async def stream(self, batch_id: str, lines: Any, **headers: str) -> HttpAnswer:
        """Send items into a batch."""
        return await self.ask("POST", f"/api/v3/batches/{batch_id}/items", lines, {**NDJSON, **headers})

    async def filled(self, count: int, **more: Any) -> str:
        """Create a sealed batch with `count` runs."""
        batch_id = await self.create(count)
        answer = await self.stream(batch_id, [line(index, **more) for index in range(count)])
        assert answer.json["sealed"], answer
        return batch_id

    async def work(self, settle: str = "c", environment: str = "default") -> int:
        """Claim and settle all waiting runs, as a worker would. Returns their number."""
        store, clock = self.engine.store, self.engine.clock
        session = new_session_id(clock.now_us())
        await store.start_session(
            Session(id=session, kind="worker", host="h", pid=1, started_us=clock.now_us(), environment=environment),
            now_us=clock.now_us(),
        )
        count = number = 0
        while True:
            number += 1
            claim = Claim(
                session_id=session,
                claim_no=number,
                environment=environment,
                tasks=["task", "other"],
                queues=None,
                runs_max=10_000,
            )
            leases: list[Lease] = await store.claim(claim, now_us=clock.now_us())
            if not leases:
                break
            settlements: list[Settlement] = [settlement_of(lease, settle) for lease in leases]
            await store.settle(settlements, now_us=clock.now_us())
            count += sum(len(lease.span_slots) for lease in leases)
        await store.end_session(session, now_us=clock.now_us())
        self.engine.recorded.notify()
        return count


class StoreHook:
    """A store that awaits a hook before one call of an operation."""

    def __init__(self, store: Store, verb: str, hook: Any) -> None:
        self._store, self._verb, self._hook = store, verb, hook

    def __getattr__(self, name: str) -> Any:
        all_headers = getattr(self._store, name)
        if name != self._verb or self._hook is None:
            return all_headers

        async def call(*arguments: Any, **more: Any) -> Any:
            hook, self._hook = self._hook, None
            if hook is not None:
                await hook(self._store, arguments[0])
            return await all_headers(*arguments, **more)

        return call


class ResponseFaults:
    """ASGI wrapper that disturbs the next requests to a path, in order.

    A number is returned as status instead of calling the app. `lost`: the app runs, but its response is dropped. `cut`:
    the body ends in the middle, and so does the connection. A mapping is the headers of a 429.
    """

    def __init__(self, path: str, *faults: Any) -> None:
        self._path, self.left, self.requests_count = path, list(faults), 0
        self.app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].endswith(self._path):
            await self.app(scope, receive, send)
            return
        self.requests_count += 1
        fault = self.left.pop(0) if self.left else None
        if fault is None:
            await self.app(scope, receive, send)
            return
        if fault in ("lost", "cut"):
            await self.app(scope, self._cut(receive) if fault == "cut" else receive, self._swallow)
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
            return
        while (await receive()).get("more_body"):
            pass
        status, headers = (fault, {}) if isinstance(fault, int) else (429, fault)
        all_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": all_headers})
        await send({"type": "http.response.body", "body": b"{}"})

    @staticmethod
    async def _swallow(_message: Any) -> None:
        return

    @staticmethod
    def _cut(receive: Any) -> Any:
        messages: list[Any] = [{"type": "http.disconnect"}, {}]

        async def half() -> Any:
            if len(messages) == 1:
                return messages[0]
            messages.pop()
            message = await receive()
            body = message.get("body", b"")
            return {"type": "http.request", "body": body[: len(body) // 2], "more_body": True}

        return half


class RecordingClock(SystemClock):
    """A clock that records sleeps instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


def line(index: int, payload: Any = ..., task: str = "task", **options: Any) -> bytes:
    """Encode an item as trigger.dev's client does."""
    item: dict[str, Any] = {"index": index, "task": task, "payload": {"i": index} if payload is ... else payload}
    if options:
        item["options"] = options
    return json.dumps(item, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


@asynccontextmanager
async def running_server(
    folder: Path,
    kind: str = "memory",
    *,
    limits: Limits = LIMITS,
    registry: Registry | None = None,
    is_open: bool = False,
    api_key: str | None = KEY,
    hosts: Sequence[str] = ("test",),
    wrap: Any = lambda store: store,
    payloads: Any = None,
    faults: ResponseFaults | None = None,
    secrets: Sequence[str] = (),
    consumer: Methods | None = None,
    tls: ssl.SSLContext | None = None,
    port: int = 0,
) -> AsyncGenerator[ServerUnderTest, None]:
    """Run a server over a store of the given kind, with gRPC on the same port. `wrap` may wrap the store."""
    store: Store = FACTORIES[kind](folder, limits)
    await store.open()
    engine = Engine(
        store=wrap(store),
        payloads=payloads or open_payloads(str(folder / "objects")),
        clock=SystemClock(),
        limits=limits,
        environment="default",
        live_directory=None,
        beats_beside=False,
        wakeup=Wakeup(),
    )
    service = Service(engine, registry=registry, api_key=api_key, is_open=is_open, hosts=hosts)
    try:
        async with AsyncExitStack() as stack:
            if faults is not None:
                faults.app = make_app(service)
                stack.enter_context(patch("headrace.http.server.server.make_app", lambda _service: faults))
            grpc = await stack.enter_async_context(grpc_server(service, secrets=secrets, consumer=consumer))
            server = await stack.enter_async_context(serving(service, "127.0.0.1", port, grpc=grpc, tls=tls))
            yield ServerUnderTest(engine, service, server, stack)
    finally:
        await store.close()


def in_environment(engine: Engine, environment: str) -> Engine:
    """Return the engine as another environment sees it."""
    return replace(engine, environment=environment)
