"""Servers of ours on real sockets, and a service to call."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import trustme

from headrace.foundation.limits import Limits
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


class Echo:
    """Answers with what it is asked; `waiting` are the calls that wait for `released`."""

    def __init__(self) -> None:
        self.calls: list[CallContext] = []
        self.waiting = 0
        self.arrived = asyncio.Event()
        self.released = asyncio.Event()
        self.cancelled = asyncio.Event()

    @property
    def methods(self) -> dict[str, Method]:
        """The paths that tests call; one of them needs no signature."""
        asked = wire.PushTaskRequest
        return {
            ECHO: Method(asked, self.echo),
            COUNT: Method(asked, self.count, is_stream=True),
            WAIT: Method(asked, self.wait, is_open=True),
            FAIL: Method(asked, self.fail),
        }

    async def echo(self, asked: wire.PushTaskRequest, call: CallContext) -> wire.PushTaskRequest:
        """What was asked."""
        self.calls.append(call)
        return asked

    async def count(self, asked: wire.PushTaskRequest, call: CallContext) -> AsyncIterator[wire.PushTaskRequest]:
        """What was asked, a letter at a time."""
        for letter in asked.callback_url:
            yield wire.PushTaskRequest(callback_url=letter)

    async def wait(self, asked: wire.PushTaskRequest, call: CallContext) -> wire.PushTaskRequest:
        """What was asked, once it is released."""
        self.waiting += 1
        self.arrived.set()
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.waiting -= 1
        return asked

    async def fail(self, asked: wire.PushTaskRequest, call: CallContext) -> wire.PushTaskRequest:
        """The error that was asked for."""
        if asked.callback_url == "crash":
            raise ZeroDivisionError
        raise GrpcError(Code.NOT_FOUND, asked.callback_url)


@asynccontextmanager
async def listening(
    methods: Methods,
    *,
    secrets: Sequence[str] = (),
    is_tls: bool = False,
    observe: Any = None,
    **limits: int,
) -> AsyncGenerator[tuple[GrpcServer, int], None]:
    """A server of these methods, and its port."""
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
    """What our servers show; nobody believes it but who knows `AUTHORITY`."""
    return AUTHORITY.issue_cert("localhost", "127.0.0.1")


def tls_context() -> ssl.SSLContext:
    """A server's own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate().configure_cert(context)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context
