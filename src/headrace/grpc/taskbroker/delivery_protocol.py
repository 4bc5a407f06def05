"""Interface between the pusher and the source of activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol


class PushDelivery(NamedTuple):
    """One activation to push. `id` names this delivery; `activation` is the encoded message that the worker receives.

    `at_most_once`: the activation must not be released once a worker may have started it.
    """

    id: str
    application: str
    activation: bytes
    at_most_once: bool = False


class DeliverySource(Protocol):
    """Source of the activations to push."""

    async def take(self, application: str, count_max: int, *, lease_ms: int) -> list[PushDelivery]:
        """Claim at most `count_max` activations of an application, best first. May return none.

        They belong to the caller for `lease_ms`. Until then it marks or releases each of them. An activation that was
        neither marked nor released becomes claimable again after that, with its attempts unchanged.
        """

    async def mark(self, ids: Sequence[str]) -> None:
        """Mark activations as received by a worker: claimed becomes processing, and the processing deadline begins.

        An activation that has ended, or that was leased again, is left unchanged.
        """

    async def release(self, ids: Sequence[str]) -> None:
        """Release activations that did not reach a worker: claimed becomes pending, with attempts unchanged."""

    async def parked(self, applications: Sequence[str]) -> Mapping[str, int]:
        """Count waiting activations of applications other than these. No endpoint would receive them."""
