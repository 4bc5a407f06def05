"""Token buckets for rate limits, as one number each.

A bucket is stored as the time at which it will be full again. Taking tokens moves that time on by their price in time;
what would exceed the capacity is refused. Nothing has to be refilled, and a bucket whose time has passed is full and
need not be stored (the generic cell rate algorithm, ITU-T I.371, seen from the bucket's side).
"""

from __future__ import annotations

from typing import NamedTuple

from headrace.foundation.errors import InvalidInput


class Bucket(NamedTuple):
    """At most `capacity` tokens; a spent token is back `refill_us` after the one spent before it."""

    capacity: int
    refill_us: int


class Spent(NamedTuple):
    """The answer to a request for tokens. `wait_us`: until it could be granted; `full_us`: when the bucket is full."""

    is_granted: bool
    remaining: int
    wait_us: int
    full_us: int


def spend(bucket: Bucket, cost: int, *, full_us: int, now_us: int) -> Spent:
    """Take `cost` tokens, or nothing. A request for more than the capacity is granted by a full bucket."""
    if cost < 0 or bucket.capacity < 1 or bucket.refill_us < 1:
        raise InvalidInput(
            "expected a capacity and a refill time of at least 1 and a cost of at least 0, "
            f"got {bucket.capacity}, {bucket.refill_us} and {cost}"
        )
    owed_us = max(0, full_us - now_us)
    span_us = bucket.capacity * bucket.refill_us
    price_us = min(cost, bucket.capacity) * bucket.refill_us
    late_us = owed_us + price_us - span_us
    if late_us > 0:
        return Spent(False, (span_us - owed_us) // bucket.refill_us, late_us, now_us + owed_us)
    owed_us += price_us
    return Spent(True, (span_us - owed_us) // bucket.refill_us, 0, now_us + owed_us)


class StreamShares:
    """Places for item streams, shared by environments.

    An environment may take a further place while it holds fewer than are free. So one alone gets half of them, two a
    third each, and a further environment always finds a place.
    """

    def __init__(self, *, places: int, places_each: int) -> None:
        """`places_each`: the most that one environment may hold, however many are free."""
        self._places = places
        self._places_each = places_each
        self._held: dict[str, int] = {}
        self._held_count = 0

    @property
    def is_full(self) -> bool:
        """True if no place is free."""
        return self._held_count >= self._places

    def held(self, environment: str) -> int:
        """Count the places that an environment holds."""
        return self._held.get(environment, 0)

    def enter(self, environment: str) -> bool:
        """Take a place. False if none is free for this environment."""
        held = self.held(environment)
        if held >= min(self._places_each, self._places - self._held_count):
            return False
        self._held[environment] = held + 1
        self._held_count += 1
        return True

    def leave(self, environment: str) -> None:
        """Free a place that was taken."""
        held = self._held.pop(environment) - 1
        if held:
            self._held[environment] = held
        self._held_count -= 1
