"""The app on a socket, from its first request to a stop in good order.

uvicorn carries it (httptools, and uvloop where there is one): lighter than what else was measured, and its
back-pressure holds. `bench/README.md` has the figures, and why a faster server was passed over.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import structlog
import uvicorn

from headrace.foundation.errors import InvalidSetting
from headrace.http.requests.service import Service
from headrace.http.server.app import make_app
from headrace.http.server.http1_protocol import BoundedProtocol, uvicorn_settings

if TYPE_CHECKING:
    from headrace.grpc.transport.server import GrpcServer

LOG: Any = structlog.get_logger("headrace.http")
BACKLOG: Final = 2_048
CUT_S: Final = 10
"""What is left for the answers of streams that were cut: their items are flushed first."""


PROTOCOLS: Final = ("http/1.1", "h2")
"""By TLS's own negotiation, ours first: who speaks both (browsers, most clients) gets HTTP/1.1, where the API is;
gRPC clients offer HTTP/2 and nothing else."""


class Tls(NamedTuple):
    """The files of a server's certificate and its key."""

    certificate: str
    key: str

    def context(self) -> ssl.SSLContext:
        """What connections are made with. Raises `InvalidSetting`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise InvalidSetting(
                f"tls_cert and tls_key are no certificate with its key: {error.strerror or error}",
                hint="both are PEM files, the certificate with its chain",
            ) from None
        context.set_alpn_protocols(list(PROTOCOLS))
        return context


class _Uvicorn(uvicorn.Server):
    """Signals are whoever's who runs the loop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._ending = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield

    async def main_loop(self) -> None:
        """Once a second, for the header that tells the date, until the end."""
        while not self._ending.is_set():
            await self.on_tick(0)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), 1.0)

    def end(self) -> None:
        """Answer no more."""
        self.should_exit = True
        self._ending.set()


class Server:
    """One app that listens. Started once; `stop` may be called twice."""

    def __init__(
        self,
        service: Service,
        listener: socket.socket,
        *,
        grpc: GrpcServer | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`grpc` answers the calls of peers that speak HTTP/2 on the same port."""
        limits = service.limits
        protocol: Any = BoundedProtocol
        if grpc is not None:
            from headrace.grpc.transport.server import ServerProtocol

            protocol = partial(BoundedProtocol, second=partial(ServerProtocol, grpc))
        config = uvicorn.Config(
            make_app(service),
            timeout_keep_alive=limits.http_idle_s,
            limit_concurrency=limits.connections_max,
            timeout_graceful_shutdown=limits.shutdown_grace_s + CUT_S,
            backlog=BACKLOG,
            **uvicorn_settings(protocol),
        )
        config.load()
        if tls is not None:
            config.ssl = tls
        self.service = service
        self._grpc = grpc
        self._scheme = "http" if tls is None else "https"
        self._listener = listener
        self._uvicorn = _Uvicorn(config)
        self._serving: asyncio.Task[None] | None = None
        host, port = listener.getsockname()[:2]
        self.address: tuple[str, int] = (str(host), int(port))

    @property
    def url(self) -> str:
        """Where it listens, as a client writes it."""
        host, port = self.address
        return f"{self._scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    async def start(self) -> None:
        """Answer from now on."""
        self._serving = asyncio.create_task(self._uvicorn.serve([self._listener]), name="headrace-http")
        while not self._uvicorn.started:
            if self._serving.done():
                self._serving.result()
            await asyncio.sleep(0)

    async def stop(self) -> None:
        """Take no new streams, let those under way end within the grace, tell the others to come again, and leave."""
        if self._serving is None:
            return
        service = self.service
        service.drain()
        self._uvicorn.end()
        waiting = asyncio.create_task(self._cut_late())
        try:
            await asyncio.shield(self._serving)
        finally:
            waiting.cancel()
            self._serving = None

    async def _cut_late(self) -> None:
        service = self.service
        await service.engine.clock.sleep(service.limits.shutdown_grace_s)
        if service.streams_count:
            LOG.warning(
                "streams were cut by the stop; their clients send the rest again", streams=service.streams_count
            )
        service.cut()
        if self._grpc is not None:
            self._grpc.cut()


@asynccontextmanager
async def serving(
    service: Service,
    host: str,
    port: int,
    *,
    is_shared: bool = False,
    grpc: GrpcServer | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncGenerator[Server, None]:
    """A server while the block lasts. `is_shared`: other processes listen on the same port."""
    server = Server(service, listener(host, port, is_shared=is_shared), grpc=grpc, tls=tls)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def listener(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """A socket that listens. Raises `InvalidSetting` when there is no such address, or it is taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # The protocol by its number: asyncio turns Nagle's algorithm off for such sockets only, and with it on an
        # answer waits for the client's late acknowledgement of its head, 40 ms each.
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if is_shared:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            found.bind(address)
            found.listen(BACKLOG)
            found.setblocking(False)
        except BaseException:
            found.close()
            raise
    except OSError as error:
        raise InvalidSetting(
            f"nothing can listen on {host}:{port}: {error.strerror or error}", hint="choose another --host or --port"
        ) from error
    return found
