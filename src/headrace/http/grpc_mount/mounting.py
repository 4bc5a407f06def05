"""gRPC services on the HTTP port: health, Headrace's broker, and Sentry's task broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress

from headrace.foundation.targets import PushTarget
from headrace.grpc.taskbroker.consumer_service import SERVICE as CONSUMER
from headrace.grpc.taskbroker.delivery_protocol import DeliverySource
from headrace.grpc.taskbroker.pusher import Pusher
from headrace.grpc.transport.health import HealthService
from headrace.grpc.transport.server import GrpcServer
from headrace.grpc.transport.service_methods import Methods, methods_of
from headrace.grpc.transport.signing import Secrets
from headrace.http.grpc_mount.broker_service import ACCESS, SERVICE, BrokerService
from headrace.http.grpc_mount.call_gate import CallGate
from headrace.http.requests.metrics import PushMetrics
from headrace.http.requests.service import Service


@asynccontextmanager
async def grpc_server(
    service: Service, *, secrets: Sequence[str] = (), consumer: Methods | None = None
) -> AsyncGenerator[GrpcServer, None]:
    """Create the gRPC server for an HTTP server's connections. `consumer`: the service of workers that fetch
    activations.
    """
    methods = methods_of(SERVICE, BrokerService(service), access=ACCESS)
    if consumer is not None:
        methods |= consumer
    health = HealthService((SERVICE.full_name, CONSUMER.full_name) if consumer is not None else (SERVICE.full_name,))
    server = GrpcServer(
        methods | health.methods,
        limits=service.limits,
        secrets=Secrets(secrets),
        gate=CallGate(service, has_secrets=bool(secrets)),
        observe=service.metrics.calls.observe,
    )
    updates = asyncio.create_task(_update_health(service, health), name="headrace-grpc-health")
    try:
        yield server
    finally:
        updates.cancel()
        await asyncio.gather(updates, return_exceptions=True)


@asynccontextmanager
async def pushing(
    service: Service, deliveries: DeliverySource, targets: Sequence[PushTarget], *, secrets: Sequence[str] = ()
) -> AsyncGenerator[Pusher, None]:
    """Push activations to workers while the block lasts, or until the server starts to stop."""
    engine = service.engine
    pusher = Pusher(
        deliveries,
        targets,
        limits=service.limits,
        clock=engine.clock,
        wakeup=engine.wakeup,
        secrets=Secrets(secrets),
    )
    service.metrics.registry.register(PushMetrics(pusher))

    async def end_with_server() -> None:
        await service.draining.wait()
        await pusher.stop()

    await pusher.start()
    ending = asyncio.create_task(end_with_server(), name="headrace-push-end")
    try:
        yield pusher
    finally:
        await pusher.stop()
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)


async def _update_health(service: Service, health: HealthService) -> None:
    """Update the health status once per upkeep interval, until the server stops."""
    while not service.is_draining:
        health.set_serving(is_serving=not await service.why_not_ready())
        with suppress(TimeoutError):
            async with asyncio.timeout(service.limits.upkeep_interval_ms / 1_000):
                await service.draining.wait()
    health.shut_down()
