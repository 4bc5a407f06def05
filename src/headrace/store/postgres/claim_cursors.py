"""Rule R10: where claims begin to look.

What was claimed leaves dead entries at the head of the claimable index, which vacuum can't remove while any snapshot
of the server is older: each claim would visit all of them again. So a process that got all it wanted begins its next
claim at the priority and order number where it left off, lane by lane. What stands before that (a span that another
claim had locked and gave up, or one appended by who had not yet seen the clock move) is found by a claim of
everything, made each poll interval, and at once when a claim from the marks does not find enough, or when runs of a
higher priority wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from headrace.core.span import Span
from headrace.store.protocol import Claim

WISHES_MAX: Final = 64

Wish = tuple[str, str, tuple[str, ...], tuple[str, ...] | None, str]
Marks = dict[tuple[str, str], tuple[int, int]]
"""Priority and order number by queue and task."""


class ClaimCursors:
    """The marks of the wishes that were claimed last."""

    def __init__(self, *, everything_each_us: int) -> None:
        self._everything_each_us = everything_each_us
        self._marks: dict[Wish, tuple[int, Marks]] = {}

    def of(self, claim: Claim, now_us: int) -> Marks:
        """Where this claim may begin; nowhere in particular when it is time to look at everything."""
        since_us, marks = self._marks.get(_wish(claim), (0, {}))
        return marks if 0 <= now_us - since_us < self._everything_each_us else {}

    def claimed(
        self, claim: Claim, spans: Sequence[Span], *, is_enough: bool, was_everything: bool, now_us: int
    ) -> None:
        """What a claim answered, best first."""
        wish = _wish(claim)
        since_us, marks = self._marks.pop(wish, (now_us, {}))
        if not is_enough:
            return
        found = {} if was_everything else dict(marks)
        found |= {(span.queue, span.task): (span.priority, span.order_no) for span in spans}
        self._marks[wish] = now_us if was_everything else since_us, found
        if len(self._marks) > WISHES_MAX:
            del self._marks[next(iter(self._marks))]


def _wish(claim: Claim) -> Wish:
    queues = None if claim.queues is None else tuple(claim.queues)
    return claim.session_id, claim.environment, tuple(claim.tasks), queues, claim.queue_prefix
