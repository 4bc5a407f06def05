"""The standard gRPC health service, `grpc.health.v1.HealthService`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from typing import Final

from headrace.foundation.access import open_to_all
from headrace.grpc.messages import health_pb2 as wire
from headrace.grpc.transport.service_methods import CallContext, Method, methods_of
from headrace.grpc.transport.status import Code, GrpcError

CHECK_BYTES_MAX: Final = 4_096
SERVICE = wire.DESCRIPTOR.services_by_name["Health"]


class HealthService:
    """Health of the server and its services, as set by `set_serving`. Initially NOT_SERVING.

    After `shut_down` every open watch receives NOT_SERVING and ends.
    """

    def __init__(self, services: Collection[str] = ()) -> None:
        self._service_names = {"", SERVICE.full_name, *services}
        self._is_serving = False
        self._is_over = False
        self._status_changed = asyncio.Event()

    @property
    def methods(self) -> dict[str, Method]:
        """Method table of the service. No signature is required."""
        return methods_of(SERVICE, self, access=dict.fromkeys(("Check", "Watch"), open_to_all(CHECK_BYTES_MAX)))

    def set_serving(self, *, is_serving: bool) -> None:
        """Set the status of all services and notify the watches."""
        if is_serving != self._is_serving and not self._is_over:
            self._is_serving = is_serving
            self._notify()

    def shut_down(self) -> None:
        """Report NOT_SERVING from now on, and end the watches."""
        self._is_serving, self._is_over = False, True
        self._notify()

    def _notify(self) -> None:
        status_changed, self._status_changed = self._status_changed, asyncio.Event()
        status_changed.set()

    def _status(self, name: str) -> wire.HealthCheckResponse:
        if name not in self._service_names:
            return wire.HealthCheckResponse(status=wire.HealthCheckResponse.SERVICE_UNKNOWN)
        status = wire.HealthCheckResponse.SERVING if self._is_serving else wire.HealthCheckResponse.NOT_SERVING
        return wire.HealthCheckResponse(status=status)

    async def check(self, request: wire.HealthCheckRequest, _call: CallContext) -> wire.HealthCheckResponse:
        """Return the status of a service."""
        if request.service not in self._service_names:
            raise GrpcError(
                Code.NOT_FOUND,
                f"expected one of {sorted(filter(None, self._service_names))}, got service {request.service[:200]!r}",
            )
        return self._status(request.service)

    async def watch(
        self, request: wire.HealthCheckRequest, _call: CallContext
    ) -> AsyncIterator[wire.HealthCheckResponse]:
        """Yield the status of a service, then each change."""
        while True:
            status_changed = self._status_changed
            yield self._status(request.service)
            if self._is_over:
                return
            await status_changed.wait()
