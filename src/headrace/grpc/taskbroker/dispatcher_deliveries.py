"""What is pushed: the dispatcher's activations as the push pool asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace.core.activation import SEPARATOR
from headrace.grpc.taskbroker.activation_codec import told
from headrace.grpc.taskbroker.delivery_protocol import Delivery
from headrace.runtime.dispatch.dispatcher import Dispatcher
from headrace.runtime.dispatch.lease_buffer import Wish


class DispatchedDeliveries:
    """Deliveries of one dispatcher: activations for workers that are pushed to (see `delivery_protocol`)."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def take(self, application: str, count_max: int, *, lease_ms: int) -> list[Delivery]:
        """Claim at most so many of an application, best first."""
        found = []
        for handout in await self._dispatcher.take(Wish(application), count_max, lease_ms=lease_ms):
            message = told(self._dispatcher, handout)
            if message is not None:
                at_most_once = handout.held.work.lease.at_most_once
                found.append(Delivery(handout.name, application, message, at_most_once))
        return found

    async def mark(self, ids: Sequence[str]) -> None:
        """These are with their workers, and their deadlines begin."""
        self._dispatcher.mark(ids)

    async def give_back(self, ids: Sequence[str]) -> None:
        """These did not reach a worker."""
        self._dispatcher.put_back(ids)

    async def parked(self, applications: Sequence[str]) -> Mapping[str, int]:
        """How many wait for applications that are none of these."""
        engine = self._dispatcher.engine
        found: dict[str, int] = {}
        for view in await engine.store.queues(engine.environment):
            application, separator, _ = view.name.partition(SEPARATOR)
            if separator and application not in applications and view.waiting_count:
                found[application] = found.get(application, 0) + view.waiting_count
        return found
