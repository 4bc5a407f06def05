"""Claims that wait for work, settlements and releases of remote workers, over HTTP and gRPC."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from typing import Final

from headrace.core.span import LOST, Settlement
from headrace.foundation.errors import InvalidInput
from headrace.http.requests.service import Caller, Service
from headrace.runtime.sessions.cancel_watch import GAP_S, digest_of
from headrace.runtime.tasks.bounds import check_name
from headrace.store.protocol import Claim, Heartbeat, Lease, Release

RUNS_MAX: Final = 65_536
TASKS_MAX: Final = 10_000
KEEPALIVE_S: Final = 5.0
STEP_S: Final = 1.0
_SESSION: Final = re.compile(r"session_[0-9a-z]{26}\Z")


class RemoteWork:
    """Claims, settlements and releases, shared by the HTTP and gRPC interfaces for workers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def claim(self, context: Caller, claim: Claim, wait_s: float) -> AsyncIterator[list[Lease] | None]:
        """Claim leases, waiting up to `wait_s` for some.

        Yields None every `KEEPALIVE_S` seconds while there are none, then the leases, or an empty list after
        `wait_s`.
        """
        request = self._checked(context, claim)
        engine = context.engine
        clock = engine.clock
        until_us = clock.now_us() + int(wait_s * 1_000_000)
        keepalive_us = clock.now_us() + int(KEEPALIVE_S * 1_000_000)
        while True:
            notified_count = engine.wakeup.notified_count
            leases = await engine.store.claim(request, now_us=clock.now_us())
            left_s = (until_us - clock.now_us()) / 1_000_000
            if leases or left_s <= 0 or self._service.is_draining:
                self._service.metrics.claimed.inc(sum(len(lease.span_slots) for lease in leases))
                yield leases
                return
            step_s = min(left_s, STEP_S, engine.limits.poll_interval_ms / 1_000)
            await engine.wakeup.wait(clock, step_s, since=notified_count)
            if clock.now_us() >= keepalive_us:
                keepalive_us = clock.now_us() + int(KEEPALIVE_S * 1_000_000)
                yield None

    async def unwanted_runs(self, context: Caller, session_id: str, *, seen: int, wait_s: float) -> Heartbeat:
        """Return the cancelled runs of a session, once their digest is not `seen`, at most `wait_s` later."""
        engine = context.engine
        clock = engine.clock
        until_us = clock.now_us() + int(wait_s * 1_000_000)
        while True:
            notified_count = engine.cancelled.notified_count
            reply = await engine.store.unwanted_runs(session_id, owner=context.owner)
            if digest_of(reply) != seen:
                return reply
            is_notified = False
            while not is_notified:
                left_s = (until_us - clock.now_us()) / 1_000_000
                if left_s <= 0 or self._service.is_draining:
                    return reply
                is_notified = await engine.cancelled.wait(clock, min(left_s, STEP_S), since=notified_count)
            await clock.sleep(GAP_S)

    def _checked(self, context: Caller, claim: Claim) -> Claim:
        if not 0 < claim.runs_max <= RUNS_MAX or not 0 <= claim.claim_no < 2**62:
            raise InvalidInput(
                f"expected runs_max from 1 to {RUNS_MAX} and claim_no from 0, got {claim.runs_max} and {claim.claim_no}"
            )
        if len(claim.tasks) > TASKS_MAX or (claim.queues is not None and len(claim.queues) > TASKS_MAX):
            raise InvalidInput(f"expected at most {TASKS_MAX} tasks and queues in a claim")
        for task in claim.tasks:
            check_name("task", task)
        for queue in claim.queues or ():
            check_name("queue", queue)
        return Claim(
            session_id=claim.session_id,
            claim_no=claim.claim_no,
            environment=context.environment,
            tasks=claim.tasks,
            queues=claim.queues,
            runs_max=claim.runs_max,
            key_id=context.owner.key_id,
        )

    async def settle(self, context: Caller, settlements: Sequence[Settlement]) -> list[str]:
        """Record outcomes. Returns after the commit."""
        if not settlements:
            return []
        words = await context.engine.store.settle(settlements, now_us=context.engine.clock.now_us())
        runs_count = sum(
            len(settlement.codes) for settlement, word in zip(settlements, words, strict=True) if word != LOST
        )
        self._service.metrics.settled.inc(runs_count)
        context.engine.recorded.notify()
        return words

    async def release(self, context: Caller, releases: Sequence[Release]) -> list[str]:
        """Release leases."""
        if not releases:
            return []
        engine = context.engine
        words = await engine.store.release(
            releases, crashes_max=engine.limits.crashes_max, now_us=engine.clock.now_us()
        )
        engine.wakeup.notify()
        return words


def check_session(session_id: str) -> str:
    """Return a valid session id unchanged. Raises `InvalidInput`."""
    if not _SESSION.match(session_id):
        raise InvalidInput(f"expected a session id (session_ and 26 letters or digits), got {session_id[:40]!r}")
    return session_id
