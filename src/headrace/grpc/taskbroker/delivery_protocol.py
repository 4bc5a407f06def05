"""What pushing asks of whoever keeps the activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol


class Delivery(NamedTuple):
    """One activation on its way to a worker. `activation` is the message as it goes over the wire.

    `at_most_once`: it may not be given back once a worker may have begun it.
    """

    id: str
    application: str
    activation: bytes
    at_most_once: bool = False


class Deliveries(Protocol):
    """The activations that wait to be pushed."""

    async def take(self, application: str, count_max: int, *, lease_ms: int) -> list[Delivery]:
        """Claim at most so many activations of an application, best first.

        They are the caller's for `lease_ms`, by when it has marked them or given them back; what it did neither with is
        claimable again then, its attempts unchanged. None is an answer.
        """

    async def mark(self, ids: Sequence[str]) -> None:
        """These are with their workers: claimed becomes processing, whose deadline begins. One that has ended
        meanwhile, or is another's by now, stays what it is.
        """

    async def give_back(self, ids: Sequence[str]) -> None:
        """These did not reach a worker: claimed becomes pending at once, attempts unchanged."""

    async def parked(self, applications: Sequence[str]) -> Mapping[str, int]:
        """How many activations wait for applications that are none of these; nobody takes them until one is."""
