"""Order is virtual time: who comes first among what waits.

A queue's clock is the highest order number claimed so far in it; what time it is in an environment is the furthest
of its queues' clocks. A run's order number is its index counted from the time its batch found, never behind the time
of now. So inside a batch order is by index whatever arrived first, a small batch is not stuck behind ten million
items, batches that run together share evenly, also when they use different queues, and a batch that feeds slowly gets
neither credit nor penalty (start-time fair queueing, Goyal, Vin and Cheng 1996, with one unit of service a run).
New runs take the environment's time, not their queue's: a worker claims from several queues by one order, and a queue
that was never used would else begin at zero, before everything that waits in the others.
"""

from __future__ import annotations


def first_order_no(*, clock: int, base: int, index: int) -> int:
    """The order number of new runs that begin at `index`.

    `clock`: the environment's time now; `base`: its time when the batch first met the queue.
    """
    return max(clock, base + index)


def returned_order_no(*, clock: int) -> int:
    """The order number of what comes back (due, released, recovered): the head of the line, never behind it."""
    return clock


def clock_after(*, clock: int, claimed_order_no: int) -> int:
    """The queue's clock after a claim: it never goes back."""
    return max(clock, claimed_order_no)
