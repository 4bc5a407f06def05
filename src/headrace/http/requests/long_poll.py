"""Claims that wait for work, and outcomes that are acknowledged after their commit, for workers far away."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from typing import Final

from headrace.core.span import LOST, Settlement
from headrace.foundation.errors import InvalidInput
from headrace.http.requests.service import Caller, Service
from headrace.runtime.tasks.bounds import check_name
from headrace.store.protocol import Claim, Lease, Release

RUNS_MAX: Final = 65_536
TASKS_MAX: Final = 10_000
BEAT_S: Final = 5.0
STEP_S: Final = 1.0
_SESSION: Final = re.compile(r"session_[0-9a-z]{26}\Z")


class Claiming:
    """What the two kinds of remote workers share."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def leases(self, call: Caller, claim: Claim, wait_s: float) -> AsyncIterator[list[Lease] | None]:
        """Leases, after a None for each sign of life that is due while there are none; an empty list in the end."""
        wish = self._checked(call, claim)
        engine = call.engine
        clock = engine.clock
        until_us = clock.now_us() + int(wait_s * 1_000_000)
        beat_us = clock.now_us() + int(BEAT_S * 1_000_000)
        while True:
            rings_count = engine.doorbell.rings_count
            leases = await engine.store.claim(wish, now_us=clock.now_us())
            left_s = (until_us - clock.now_us()) / 1_000_000
            if leases or left_s <= 0 or self._service.is_draining:
                self._service.metrics.claimed.inc(sum(len(lease.places) for lease in leases))
                yield leases
                return
            step_s = min(left_s, STEP_S, engine.limits.poll_interval_ms / 1_000)
            await engine.doorbell.wait(clock, step_s, since=rings_count)
            if clock.now_us() >= beat_us:
                beat_us = clock.now_us() + int(BEAT_S * 1_000_000)
                yield None

    def _checked(self, call: Caller, claim: Claim) -> Claim:
        if not 0 < claim.runs_max <= RUNS_MAX or not 0 <= claim.claim_no < 2**62:
            raise InvalidInput(f"a claim is for 1 to {RUNS_MAX} runs, and is numbered")
        if len(claim.tasks) > TASKS_MAX or (claim.queues is not None and len(claim.queues) > TASKS_MAX):
            raise InvalidInput(f"a claim names at most {TASKS_MAX} tasks and queues")
        for task in claim.tasks:
            check_name("task", task)
        for queue in claim.queues or ():
            check_name("queue", queue)
        return Claim(
            session_id=claim.session_id,
            claim_no=claim.claim_no,
            environment=call.environment,
            tasks=claim.tasks,
            queues=claim.queues,
            runs_max=claim.runs_max,
        )

    async def settle(self, call: Caller, settlements: Sequence[Settlement]) -> list[str]:
        """Record outcomes; the answer comes after the commit."""
        if not settlements:
            return []
        words = await call.engine.store.settle(settlements, now_us=call.engine.clock.now_us())
        runs_count = sum(len(one.codes) for one, word in zip(settlements, words, strict=True) if word != LOST)
        self._service.metrics.settled.inc(runs_count)
        call.engine.recorded.ring()
        return words

    async def release(self, call: Caller, releases: Sequence[Release]) -> list[str]:
        """Give leases back."""
        if not releases:
            return []
        engine = call.engine
        words = await engine.store.release(
            releases, crashes_max=engine.limits.crashes_max, now_us=engine.clock.now_us()
        )
        engine.doorbell.ring()
        return words


def check_session(session_id: str) -> str:
    """`session_id` when it can be one. Raises `InvalidInput`."""
    if not _SESSION.match(session_id):
        raise InvalidInput(f"{session_id[:40]!r} is not a session id")
    return session_id
