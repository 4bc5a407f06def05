"""gRPC servers on real sockets, and a service to call."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import trustme

from headrace.foundation.access import Access, open_to_all
from headrace.foundation.limits import KIB, MIB, Limits
from headrace.grpc.messages import taskbroker_pb2 as wire
from headrace.grpc.transport.server import GrpcServer, ServerProtocol
from headrace.grpc.transport.service_methods import CallContext, Method, Methods
from headrace.grpc.transport.signing import Secrets
from headrace.grpc.transport.status import Code, GrpcError

AUTHORITY = trustme.CA()
WORKER = wire.DESCRIPTOR.services_by_name["WorkerService"]
PUSH = "/sentry_protos.taskbroker.v1.WorkerService/PushTask"
ECHO = "/echo/Echo"
COUNT = "/echo/Count"
WAIT = "/echo/Wait"
FAIL = "/echo/Fail"
SIGNED = Access(credential="key", scopes=("work",), body_bytes_max=None, unauthenticated_bytes_max=64 * KIB)
"""Access with a signature, where the server has secrets."""
WORKER_ACCESS = {"PushTask": SIGNED}


class Echo:
    """A service that returns its requests. `waiting` counts the calls that wait for `released`."""

    def __init__(self) -> None:
        self.calls: list[CallContext] = []
        self.waiting = 0
        self.arrived = asyncio.Event()
        self.released = asyncio.Event()
        self.cancelled = asyncio.Event()

    @property
    def methods(self) -> dict[str, Method]:
        """Method table for the tests. `WAIT` needs no signature."""
        request = wire.PushTaskRequest
        return {
            ECHO: Method(request, self.echo, SIGNED),
            COUNT: Method(request, self.count, SIGNED, is_stream=True),
            WAIT: Method(request, self.wait, open_to_all(64 * MIB)),
            FAIL: Method(request, self.fail, SIGNED),
        }

    async def echo(self, request: wire.PushTaskRequest, call: CallContext) -> wire.PushTaskRequest:
        """Return the request."""
        self.calls.append(call)
        return request

    async def count(self, request: wire.PushTaskRequest, call: CallContext) -> AsyncIterator[wire.PushTaskRequest]:
        """Yield the letters of the request's text."""
        for letter in request.callback_url:
            yield wire.PushTaskRequest(callback_url=letter)

    async def wait(self, request: wire.PushTaskRequest, call: CallContext) -> wire.PushTaskRequest:
        """Return the request once `released` is set."""
        self.waiting += 1
        self.arrived.set()
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.waiting -= 1
        return request

    async def fail(self, request: wire.PushTaskRequest, call: CallContext) -> wire.PushTaskRequest:
        """Raise the error that the request's text names."""
        if request.callback_url == "crash":
            raise ZeroDivisionError
        raise GrpcError(Code.NOT_FOUND, request.callback_url)


@asynccontextmanager
async def listening(
    methods: Methods,
    *,
    secrets: Sequence[str] = (),
    is_tls: bool = False,
    observe: Any = None,
    **limits: int,
) -> AsyncGenerator[tuple[GrpcServer, int], None]:
    """Run a gRPC server with these methods. Yields the server and its port."""
    server = GrpcServer(methods, limits=Limits(**limits), secrets=Secrets(secrets), observe=observe)
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(
        lambda: ServerProtocol(server), "127.0.0.1", 0, ssl=tls_context() if is_tls else None
    )
    try:
        yield server, listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        server.cut()
        while server.connections:
            await asyncio.sleep(0)
        await listener.wait_closed()


@cache
def certificate() -> trustme.LeafCert:
    """Certificate of the test servers. Only clients that trust `AUTHORITY` accept it."""
    return AUTHORITY.issue_cert("localhost", "127.0.0.1")


def tls_context() -> ssl.SSLContext:
    """TLS context of the test servers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate().configure_cert(context)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context
