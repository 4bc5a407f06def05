"""Source of the activations to push: those of a dispatcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace.core.activation import SEPARATOR
from headrace.grpc.taskbroker.activation_codec import delivery_message
from headrace.grpc.taskbroker.delivery_protocol import PushDelivery
from headrace.runtime.dispatch.dispatcher import Dispatcher
from headrace.runtime.dispatch.lease_buffer import QueueFilter


class DispatcherDeliveries:
    """Implementation of `delivery_protocol` by a dispatcher."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def take(self, application: str, count_max: int, *, lease_ms: int) -> list[PushDelivery]:
        """Claim at most `count_max` activations of an application, best first."""
        deliveries = []
        for delivered in await self._dispatcher.take(QueueFilter(application), count_max, lease_ms=lease_ms):
            message = delivery_message(self._dispatcher, delivered)
            if message is not None:
                at_most_once = delivered.buffered.active.lease.at_most_once
                deliveries.append(PushDelivery(delivered.key, application, message, at_most_once))
        return deliveries

    async def mark(self, ids: Sequence[str]) -> None:
        """Mark activations as received by a worker; their processing deadlines begin."""
        self._dispatcher.mark(ids)

    async def release(self, ids: Sequence[str]) -> None:
        """Release activations that did not reach a worker."""
        self._dispatcher.put_back(ids)

    async def parked(self, applications: Sequence[str]) -> Mapping[str, int]:
        """Count waiting activations of applications other than these."""
        engine = self._dispatcher.engine
        counts: dict[str, int] = {}
        for view in await engine.store.queues(engine.environment):
            application, separator, _ = view.name.partition(SEPARATOR)
            if separator and application not in applications and view.waiting_count:
                counts[application] = counts.get(application, 0) + view.waiting_count
        return counts
