"""Claims that wait for work, settlements and releases of remote workers, over HTTP and gRPC."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Final

import msgspec

from headrace.core.pack import REFERENCE
from headrace.core.page import count_within
from headrace.core.serving import Serving
from headrace.core.span import LOST, Settlement
from headrace.foundation.errors import InvalidInput
from headrace.http.requests.service import Caller, Service
from headrace.runtime.sessions.cancel_watch import GAP_S, digest_of
from headrace.runtime.tasks.bounds import check_name
from headrace.store.protocol import Claim, Heartbeat, Lease, Release

RUNS_MAX: Final = 65_536
TASKS_MAX: Final = 10_000
STATED_SESSIONS_MAX: Final = 1_000
"""Sessions whose last claimed tasks are remembered; others state them again."""
KEEPALIVE_S: Final = 5.0
STEP_S: Final = 1.0
RUN_BYTES: Final = 128
"""Bytes of a run, or of a header, beside its values in a response; those of gRPC are fewer."""
_SESSION: Final = re.compile(r"session_[0-9a-z]{26}\Z")


class RemoteWork:
    """Claims, settlements and releases, shared by the HTTP and gRPC interfaces for workers."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._stated_lanes: dict[tuple[str, ...], tuple[Sequence[str], Sequence[str] | None]] = {}

    async def claim(
        self,
        context: Caller,
        claim: Claim,
        wait_s: float,
        *,
        bytes_max: int | None = None,
        states_lanes: bool = False,
    ) -> AsyncIterator[list[Lease] | None]:
        """Claim leases, waiting up to `wait_s` for some. `states_lanes`: the session records what it claims.

        Yields None every `KEEPALIVE_S` seconds while there are none, then the leases, or an empty list after
        `wait_s`. With `bytes_max`, the runs whose inputs would exceed it, with those in the object store, are released.
        """
        request = self._checked(context, claim)
        engine = context.engine
        clock = engine.clock
        if states_lanes:
            await self._state_lanes(context, request)
        until_us = clock.now_us() + int(wait_s * 1_000_000)
        keepalive_us = clock.now_us() + int(KEEPALIVE_S * 1_000_000)
        while True:
            notified_count = engine.wakeup.notified_count
            leases = await engine.store.claim(request, now_us=clock.now_us())
            if bytes_max is not None:
                leases = await self._within_bytes(context, leases, bytes_max)
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

    async def _within_bytes(self, context: Caller, leases: list[Lease], bytes_max: int) -> list[Lease]:
        """Return the first runs of leases, at least one, that fit into a response. The others wait again.

        A repeat of the claim returns what was kept (R1, claims are repeatable by number).
        """
        if sum(map(_least_bytes, leases)) <= bytes_max and not any(lease.extras for lease in leases):
            return leases
        runs_left = count_within((size for lease in leases for size in _input_sizes(lease)), bytes_max)
        kept: list[Lease] = []
        surplus: list[Release] = []
        for lease in leases:
            count = min(runs_left, len(lease.span_slots))
            runs_left -= count
            if count:
                kept.append(_first_runs(lease, count))
            if not count:
                surplus.append(Release(span_id=lease.span_id, token=lease.token))
            elif count < len(lease.span_slots):
                span_slots = tuple(lease.span_slots[count:])
                surplus.append(Release(span_id=lease.span_id, token=lease.token, span_slots=span_slots))
        await self.release(context, surplus)
        return kept

    async def _state_lanes(self, context: Caller, claim: Claim) -> None:
        """Add the tasks and queues of a claim to those of its session, unless the last claim had the same."""
        lanes = (claim.tasks, claim.queues)
        session = (claim.session_id, *context.owner)  # another owner's claims find out that they have no such session
        if self._stated_lanes.get(session) == lanes:
            return
        serves = Serving(
            environment=context.environment,
            tasks=tuple(claim.tasks),
            queues=None if claim.queues is None else tuple(claim.queues),
        )
        await context.engine.store.heartbeat(
            claim.session_id, now_us=context.engine.clock.now_us(), owner=context.owner, serves=serves
        )
        self._stated_lanes[session] = lanes
        while len(self._stated_lanes) > STATED_SESSIONS_MAX:
            self._stated_lanes.pop(next(iter(self._stated_lanes)))

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


def _names_bytes(lease: Lease) -> int:
    return RUN_BYTES + 4 * (len(lease.task) + len(lease.queue))


def _least_bytes(lease: Lease) -> int:
    """Return how many bytes a lease has in a response without what only some runs have."""
    return _names_bytes(lease) + sum(map(len, lease.payloads)) + RUN_BYTES * len(lease.payloads)


def _input_sizes(lease: Lease) -> Iterator[int]:
    """Yield how many bytes the input of each run has in a response, with its headers."""
    kinds = lease.kinds
    lease_bytes = _names_bytes(lease)
    for lease_offset, payload in enumerate(lease.payloads):
        size = len(payload) + RUN_BYTES + lease_bytes
        lease_bytes = 0
        if (extra := lease.extras.get(lease.span_slots[lease_offset])) is not None:
            size += sum(len(name) + len(value) + RUN_BYTES for name, value in extra.headers.items())
            if kinds is not None and kinds[lease_offset] == REFERENCE:
                size += extra.object_bytes
        yield size


def _first_runs(lease: Lease, count: int) -> Lease:
    """Return a lease with its first `count` runs."""
    if count == len(lease.span_slots):
        return lease
    return msgspec.structs.replace(
        lease,
        whole=False,
        span_slots=lease.span_slots[:count],
        indexes=lease.indexes[:count],
        payloads=lease.payloads[:count],
        kinds=None if lease.kinds is None else lease.kinds[:count],
    )


def check_session(session_id: str) -> str:
    """Return a valid session id unchanged. Raises `InvalidInput`."""
    if not _SESSION.match(session_id):
        raise InvalidInput(f"expected a session id (session_ and 26 letters or digits), got {session_id[:40]!r}")
    return session_id
