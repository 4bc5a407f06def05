"""HTTP server: listens, serves the app, and shuts down in order.

Built on uvicorn (httptools, and uvloop where available): it uses less memory than the alternative that was measured,
applies back-pressure, and answers open streams before it stops. `bench/README.md` has the figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import uvicorn

from headrace.foundation.addresses import is_loopback
from headrace.foundation.connection_table import ConnectionTable
from headrace.foundation.descriptors import connections_max_of, descriptor_limit
from headrace.foundation.errors import InvalidSetting
from headrace.foundation.limits import DEFAULT, Limits
from headrace.foundation.logs import get_logger
from headrace.foundation.tcp_keepalive import keep_alive
from headrace.http.requests.service import Service
from headrace.http.server.app import make_app
from headrace.http.server.http1_protocol import BoundedProtocol, uvicorn_settings

if TYPE_CHECKING:
    from headrace.grpc.transport.server import GrpcServer

LOG: Any = get_logger("headrace.http")
BACKLOG: Final = 2_048
CUT_S: Final = 10
"""Seconds allowed for the responses of aborted streams: their items are flushed first."""

HANDSHAKE_S: Final = 10.0
"""Seconds that a TLS handshake may take."""
STARTUP_FAILED: Final = 3

PROTOCOLS: Final = ("http/1.1", "h2")
"""Protocols offered in TLS negotiation, preferred first. Clients that speak both (browsers, most HTTP clients) get
HTTP/1.1, which serves the API. gRPC clients offer HTTP/2 only.
"""


class Tls(NamedTuple):
    """Paths of a server's certificate and its private key."""

    certificate: str
    key: str

    def context(self) -> ssl.SSLContext:
        """Create the TLS context. Raises `InvalidSetting`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise InvalidSetting(
                f"can't load tls_cert {self.certificate!r} with tls_key {self.key!r}: {error.strerror or error}",
                hint="expected PEM files: the certificate with its chain, and its private key",
            ) from None
        context.set_alpn_protocols(list(PROTOCOLS))
        return context


class _Uvicorn(uvicorn.Server):
    """A uvicorn server that leaves signal handling to the program that runs the event loop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._ending = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle no signals."""
        yield

    async def main_loop(self) -> None:
        """Update the Date header once a second, until the server ends."""
        while not self._ending.is_set():
            await self.on_tick(0)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), 1.0)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the app and listen. Unlike uvicorn's own method, this one bounds the time of a TLS handshake."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILED)
        config, loop = self.config, asyncio.get_running_loop()

        def create_protocol() -> asyncio.Protocol:
            protocol: asyncio.Protocol = config.http_protocol_class(  # type: ignore[call-arg]  # as uvicorn calls it
                config=config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop
            )
            return protocol

        handshake_s = None if config.ssl is None else HANDSHAKE_S
        self.servers = [
            await loop.create_server(
                create_protocol,
                sock=listening,
                ssl=config.ssl,
                backlog=config.backlog,
                ssl_handshake_timeout=handshake_s,
            )
            for listening in sockets or ()
        ]
        self.started = True

    def end(self) -> None:
        """Stop serving."""
        self.should_exit = True
        self._ending.set()


class Server:
    """One listening app. Can be started once; `stop` may be called more than once."""

    def __init__(
        self,
        service: Service,
        listener: socket.socket,
        *,
        grpc: GrpcServer | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`grpc`: answers the calls of HTTP/2 clients on the same port."""
        limits = service.limits
        self.connections = table_of(limits)
        protocol: Any = partial(BoundedProtocol, table=self.connections)
        if grpc is not None:
            from headrace.grpc.transport.server import ServerProtocol

            protocol = partial(protocol, second=partial(ServerProtocol, grpc))
        config = uvicorn.Config(
            make_app(service),
            timeout_keep_alive=limits.http_idle_s,
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
        service.is_on_loopback = is_loopback(self.address[0])

    @property
    def url(self) -> str:
        """Base URL of the server."""
        host, port = self.address
        return f"{self._scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    async def start(self) -> None:
        """Start serving."""
        self._serving = asyncio.create_task(self._uvicorn.serve([self._listener]), name="headrace-http")
        while not self._uvicorn.started:
            if self._serving.done():
                self._serving.result()
            await asyncio.sleep(0)

    async def stop(self) -> None:
        """Stop accepting streams, let those in progress finish within the grace period, abort the others, and end."""
        if self._serving is None:
            return
        service = self.service
        service.drain()
        self._uvicorn.end()
        waiting = asyncio.create_task(self._abort_late_streams())
        try:
            await asyncio.shield(self._serving)
        finally:
            waiting.cancel()
            self._serving = None

    async def _abort_late_streams(self) -> None:
        service = self.service
        await service.engine.clock.sleep(service.limits.shutdown_grace_s)
        if service.streams_count:
            LOG.warning("http.streams_aborted", streams=service.streams_count)
        service.cut()
        if self._grpc is not None:
            self._grpc.cut()


def table_of(limits: Limits) -> ConnectionTable:
    """Make the table of a server's connections, for the descriptors that this process may have."""
    connections_max = connections_max_of(
        limits.connections_max, descriptors=descriptor_limit(), reserve=limits.reserved_descriptors
    )
    peer_connections_max = max(1, connections_max * limits.peer_connections_percent // 100)
    return ConnectionTable(connections_max=connections_max, peer_connections_max=peer_connections_max)


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
    """Run a server while the block lasts. `is_shared`: other processes listen on the same port."""
    server = Server(
        service, listener(host, port, is_shared=is_shared, idle_s=service.limits.http_idle_s), grpc=grpc, tls=tls
    )
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def listener(host: str, port: int, *, is_shared: bool = False, idle_s: int = DEFAULT.http_idle_s) -> socket.socket:
    """Open a listening socket. Its connections end when the peer is gone for about `idle_s`.

    Raises `InvalidSetting` if the address does not exist or is in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # The protocol number is required: asyncio disables Nagle's algorithm only for such sockets. With Nagle's
        # algorithm a response waits up to 40 ms for the client's delayed acknowledgement.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if is_shared:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            keep_alive(listening, idle_s=idle_s, unacknowledged_ms=2 * idle_s * 1_000)  # inherited by connections
            listening.bind(address)
            listening.listen(BACKLOG)
            listening.setblocking(False)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise InvalidSetting(
            f"can't listen on {host}:{port}: {error.strerror or error}", hint="choose another --host or --port"
        ) from error
    return listening
