"""Cursors of claims: where a claim begins to scan (R10, claims start at the queue's watermark).

A claimed span leaves a dead entry at the head of the claimable index. Vacuum can't remove it while any snapshot of the
server is older, so each claim would visit all of them again. A process that got all it requested therefore begins its
next claim at the priority and order number where it stopped, lane by lane.

Spans before the cursor exist: another claim had locked a span and rolled back, or a producer had not yet seen the clock
advance. A full scan finds them. It runs each poll interval, and at once if a claim from the cursors does not find
enough or if runs of a higher priority wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from headrace.core.span import Span
from headrace.store.protocol import Claim

CLAIM_REQUESTS_MAX: Final = 64

ClaimKey = tuple[str, str, tuple[str, ...], tuple[str, ...] | None, str]
Cursors = dict[tuple[str, str], tuple[int, int]]
"""Priority and order number by queue and task."""


class ClaimCursors:
    """The cursors of the most recent claim requests."""

    def __init__(self, *, everything_each_us: int) -> None:
        self._everything_each_us = everything_each_us
        self._cursors: dict[ClaimKey, tuple[int, Cursors]] = {}

    def of(self, claim: Claim, now_us: int) -> Cursors:
        """Return the cursors of a claim, or none if it is time for a full scan."""
        since_us, cursors = self._cursors.get(_key_of(claim), (0, {}))
        return cursors if 0 <= now_us - since_us < self._everything_each_us else {}

    def claimed(
        self, claim: Claim, spans: Sequence[Span], *, is_enough: bool, was_everything: bool, now_us: int
    ) -> None:
        """Store the cursors after a claim, from the spans that it leased."""
        key = _key_of(claim)
        since_us, cursors = self._cursors.pop(key, (now_us, {}))
        if not is_enough:
            return
        new_cursors = {} if was_everything else dict(cursors)
        new_cursors |= {(span.queue, span.task): (span.priority, span.order_no) for span in spans}
        self._cursors[key] = now_us if was_everything else since_us, new_cursors
        if len(self._cursors) > CLAIM_REQUESTS_MAX:
            del self._cursors[next(iter(self._cursors))]


def _key_of(claim: Claim) -> ClaimKey:
    queues = None if claim.queues is None else tuple(claim.queues)
    return claim.session_id, claim.environment, tuple(claim.tasks), queues, claim.queue_prefix
