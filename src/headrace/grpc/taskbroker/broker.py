"""The task broker of one server: what hands out, and what answers its workers."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import NamedTuple

from headrace.grpc.taskbroker.activation_codec import is_killed
from headrace.grpc.taskbroker.consumer_service import Ack, ConsumerService, DeliveryMode
from headrace.runtime.dispatch.dispatcher import Dispatcher
from headrace.runtime.engine import Engine


class TaskBroker(NamedTuple):
    """`dispatcher` has the activations, `consumer` answers who pulls and reports."""

    dispatcher: Dispatcher
    consumer: ConsumerService


@asynccontextmanager
async def dispatching(
    engine: Engine,
    *,
    delivery: DeliveryMode = "pull",
    ack: Ack = "committed",
    flush_interval_ms: int | None = None,
) -> AsyncGenerator[TaskBroker, None]:
    """A task broker while the block lasts; its calls must have ended before it does.

    `flush_interval_ms`: how long a report may wait for others; None for natural batching.
    """
    dispatcher = Dispatcher(engine, flush_interval_ms=flush_interval_ms, is_killed=is_killed)
    await dispatcher.start()
    try:
        yield TaskBroker(dispatcher, ConsumerService(dispatcher, delivery=delivery, ack=ack))
    finally:
        await dispatcher.stop()
