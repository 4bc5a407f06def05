"""Task broker of one server: the dispatcher that leases activations, and the service that workers call."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import NamedTuple

from headrace.grpc.taskbroker.activation_codec import is_killed
from headrace.grpc.taskbroker.consumer_service import Ack, ConsumerService, DeliveryMode
from headrace.runtime.dispatch.dispatcher import Dispatcher
from headrace.runtime.engine import Engine


class TaskBroker(NamedTuple):
    """`dispatcher` leases the activations; `consumer` answers workers that fetch and report."""

    dispatcher: Dispatcher
    consumer: ConsumerService


@asynccontextmanager
async def dispatching(
    engine: Engine,
    *,
    delivery: DeliveryMode = "pull",
    ack: Ack = "committed",
    flush_interval_ms: int | None = None,
    is_fenced: bool = False,
) -> AsyncGenerator[TaskBroker, None]:
    """Run a task broker while the block lasts. All calls to it must have ended before the block does.

    `flush_interval_ms`: how long a report may wait for others to share its commit; None for natural batching.
    `is_fenced`: the ids that workers see name the delivery; otherwise they are the activation's own.
    """
    dispatcher = Dispatcher(engine, flush_interval_ms=flush_interval_ms, is_fenced=is_fenced, is_killed=is_killed)
    await dispatcher.start()
    try:
        yield TaskBroker(dispatcher, ConsumerService(dispatcher, delivery=delivery, ack=ack))
    finally:
        await dispatcher.stop()
