"""The health service that gRPC clients and orchestrators know: `grpc.health.v1.Health`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection

from headrace.grpc.messages import health_pb2 as wire
from headrace.grpc.transport.service_methods import Call, Method, methods_of
from headrace.grpc.transport.status import Code, GrpcError

SERVICE = wire.DESCRIPTOR.services_by_name["Health"]


class Health:
    """Whether this server and its services can work, as whoever looks after them says by `tell`.

    Until told otherwise they can't. One that ends says so to those who watch, and lets them go.
    """

    def __init__(self, services: Collection[str] = ()) -> None:
        self._known = {"", SERVICE.full_name, *services}
        self._is_serving = False
        self._is_over = False
        self._news = asyncio.Event()

    @property
    def methods(self) -> dict[str, Method]:
        """Its paths; nobody has to sign."""
        return methods_of(SERVICE, self, is_open=True)

    def tell(self, *, is_serving: bool) -> None:
        """How things are."""
        if is_serving != self._is_serving and not self._is_over:
            self._is_serving = is_serving
            self._ring()

    def end(self) -> None:
        """Nothing is served from now on."""
        self._is_serving, self._is_over = False, True
        self._ring()

    def _ring(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _status(self, name: str) -> wire.HealthCheckResponse:
        if name not in self._known:
            return wire.HealthCheckResponse(status=wire.HealthCheckResponse.SERVICE_UNKNOWN)
        status = wire.HealthCheckResponse.SERVING if self._is_serving else wire.HealthCheckResponse.NOT_SERVING
        return wire.HealthCheckResponse(status=status)

    async def check(self, request: wire.HealthCheckRequest, _call: Call) -> wire.HealthCheckResponse:
        """How a service is."""
        if request.service not in self._known:
            raise GrpcError(Code.NOT_FOUND, f"there is no service {request.service[:200]}")
        return self._status(request.service)

    async def watch(self, request: wire.HealthCheckRequest, _call: Call) -> AsyncIterator[wire.HealthCheckResponse]:
        """How a service is, and each change."""
        while True:
            news = self._news
            yield self._status(request.service)
            if self._is_over:
                return
            await news.wait()
