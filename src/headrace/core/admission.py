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
