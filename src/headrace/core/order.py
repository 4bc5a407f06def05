"""The order of claims: virtual time.

The clock of a queue is the highest order number claimed so far in it, rounded down to `CLOCK_STEP`: at light load, when
each claim is of one run, a claim would otherwise rewrite the row of its queue. A step is a quarter of a chunk, so no
batch is ahead of its share by more than that. The time of an environment is the highest clock
of its queues. The order number of a run is its index counted from the time at which its batch began, and never before
the current time. Inside a batch the order is therefore by index and not by arrival. A small batch does not wait
behind ten million items. Batches that run together share evenly, also across queues, and a batch that feeds slowly gets
neither credit nor penalty (start-time fair queueing, Goyal, Vin and Cheng 1996, with one unit of service per run).

New runs take the environment's time, not their queue's. A worker claims from several queues in one order, and a queue
that was never used would otherwise begin at zero, before everything that waits in the others.
"""

from __future__ import annotations

from typing import Final

CLOCK_STEP: Final = 64


def first_order_no(*, clock: int, base: int, index: int) -> int:
    """Return the order number of new runs that begin at `index`.

    `clock`: the environment's time now; `base`: its time when the batch first used the queue.
    """
    return max(clock, base + index)


def returned_order_no(*, clock: int) -> int:
    """Return the order number of runs that return (due, released, recovered): first among the waiting runs."""
    return clock


def clock_after(*, clock: int, claimed_order_no: int) -> int:
    """Return the queue's clock after a claim: a multiple of `CLOCK_STEP`, and it never goes back."""
    return max(clock, claimed_order_no // CLOCK_STEP * CLOCK_STEP)
