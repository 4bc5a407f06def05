"""Activations pushed to workers: as many at a time as an endpoint takes, none lost that was not taken.

An application has a line, and the line its endpoints; activations are claimed when there is room for them, so that none
waits in a queue of ours. What a worker refuses or does not answer goes back at once, and its endpoint rests: after
RESOURCE_EXHAUSTED it is asked with half as many at a time, which grows again with each that it takes. Applications
without an endpoint are never claimed; that there are some is counted and said.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from typing import Any, Final

import structlog

from headrace.foundation.errors import HeadraceError
from headrace.foundation.limits import Limits
from headrace.foundation.targets import PushTarget
from headrace.grpc.taskbroker.delivery_protocol import Deliveries, Delivery
from headrace.grpc.transport.client import CallNotSent, Channel
from headrace.grpc.transport.connection import Bounds
from headrace.grpc.transport.sender import Budget
from headrace.grpc.transport.signing import Secrets
from headrace.grpc.transport.status import Code, GrpcError
from headrace.runtime.clock import SECOND_US, Clock
from headrace.runtime.flusher import Flusher, UpdatesUnflushed
from headrace.runtime.wakeup import Doorbell

LOG: Any = structlog.get_logger("headrace.push")
PATH: Final = "/sentry_protos.taskbroker.v1.WorkerService/PushTask"
QUERY_MS: Final = 1_000
"""What one transaction of marks is reckoned with."""

BUSY_S: Final = (0.0, 0.02, 0.1, 0.5, 1.0)
"""How long an endpoint rests that refuses again and again."""

PARKED_SHOWN_MAX: Final = 10
STRIKES_MAX: Final = 3
STRIKES_KEPT_MAX: Final = 10_000


def lease_ms(limits: Limits) -> int:
    """How long a claim of ours must hold: until its mark is durable, at worst.

        push_timeout_ms + 2 * QUERY_MS

    The call may take all of its time, from the claim on: an activation is claimed only when there is a place for it at
    an endpoint, so it waits in no queue. Its mark may have missed a flush by a moment, and then goes with the next:
    two transactions (natural batching waits for no interval). When the store takes longer, the lease ends
    early, and the activation runs twice at worst.
    """
    return limits.push_timeout_ms + 2 * QUERY_MS


class Endpoint:
    """One worker's server, and how it takes what it is sent. Counts are since the start."""

    def __init__(self, channel: Channel, width_max: int) -> None:
        self.channel = channel
        self.width = self._width_max = width_max
        self.under_way = 0
        self.pushed_count = 0
        self.busy_count = 0
        self.failed_count = 0
        self._refusals = 0
        self._grown = 0
        self.rests_until_us = 0

    @property
    def name(self) -> str:
        """Where it is."""
        return self.channel.target.authority

    def room(self, now_us: int) -> int:
        """How many more it may be sent now."""
        return 0 if now_us < self.rests_until_us else max(0, self.width - self.under_way)

    def taken(self) -> None:
        """It took one: a round of as many as it is wide earns it one more at a time."""
        self.pushed_count += 1
        if self._refusals:
            LOG.info("an endpoint takes activations again", endpoint=self.name)
        self._refusals = 0
        self._grown += 1
        if self._grown >= self.width and self.width < self._width_max:
            self.width, self._grown = self.width + 1, 0

    def refused(self, now_us: int, error: GrpcError) -> None:
        """It took none: half as many at a time, after a rest."""
        is_busy = error.code is Code.RESOURCE_EXHAUSTED
        self.busy_count += is_busy
        self.failed_count += not is_busy
        if now_us < self.rests_until_us:  # one of several that were under way
            return
        if not self._refusals:
            LOG.warning("an endpoint took no activation", endpoint=self.name, code=error.code.name, error=error.message)
        self._grown, self.width = 0, max(1, self.width // 2)
        self._refusals = min(self._refusals + 1, len(BUSY_S) - 1)
        self.rests_until_us = now_us + int(BUSY_S[self._refusals] * SECOND_US)


class Pusher:
    """Owned by one event loop. `start`, then `stop`; each may be called twice."""

    def __init__(
        self,
        deliveries: Deliveries,
        targets: Sequence[PushTarget],
        *,
        limits: Limits,
        clock: Clock,
        doorbell: Doorbell,
        secrets: Secrets | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._deliveries = deliveries
        self._limits = limits
        self._clock = clock
        self._doorbell = doorbell
        self._room = asyncio.Event()
        self._stopped = asyncio.Event()
        self._strikes: dict[str, int] = {}
        self.parked_count = 0
        bounds = Bounds(limits.grpc_message_bytes_max, limits.push_concurrency)
        budget = Budget(limits.grpc_buffer_bytes_max)
        self.endpoints: dict[str, list[Endpoint]] = {}
        for target in targets:
            channel = Channel(target, bounds, budget, secrets=secrets, tls=tls)
            self.endpoints.setdefault(target.application, []).append(Endpoint(channel, limits.push_concurrency))
        self._marks: Flusher[str] = Flusher(
            deliveries.mark, name="marks", clock=clock, on_refused=self._unmarked, size=limits.flush_size
        )
        self._lines: list[asyncio.Task[None]] = []
        self._pushes: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Push from now on."""
        if self._lines or self._stopped.is_set():
            return
        for application in self.endpoints:
            line = asyncio.create_task(self._line(application), name=f"headrace-push-{application}")
            self._lines.append(line)
        self._lines.append(asyncio.create_task(self._look(), name="headrace-push-parked"))

    async def stop(self) -> None:
        """Claim nothing more, let what is on its way arrive, write its marks, and hang up."""
        self._stopped.set()
        self._room.set()
        self._doorbell.hear()  # whoever waits for news looks up, and sees that it is over
        lines, self._lines = self._lines, []
        if lines:
            await asyncio.wait(lines, timeout=self._limits.shutdown_grace_s)
        for line in lines:
            line.cancel()
        await asyncio.gather(*lines, return_exceptions=True)
        if self._pushes:
            await asyncio.wait(self._pushes, timeout=self._limits.shutdown_grace_s)
        for push in tuple(self._pushes):
            push.cancel()
        await asyncio.gather(*self._pushes, return_exceptions=True)
        try:
            await self._marks.close(deadline_s=self._limits.shutdown_grace_s)
        except UpdatesUnflushed as error:  # their leases end, and they are handed out again
            LOG.warning("the store did not take the last marks", marks=len(error.unflushed))
        for endpoints in self.endpoints.values():
            for endpoint in endpoints:
                endpoint.channel.close()

    # -- one application

    async def _line(self, application: str) -> None:
        endpoints = self.endpoints[application]
        poll_s = self._limits.poll_interval_ms / 1_000
        while not self._stopped.is_set():
            rings_count = self._doorbell.rings_count
            self._room.clear()
            now_us = self._clock.now_us()
            room = sum(endpoint.room(now_us) for endpoint in endpoints)
            if not room:
                resting_us = [one.rests_until_us for one in endpoints if one.rests_until_us > now_us]
                wait_s = (min(resting_us) - now_us) / SECOND_US if resting_us else None
                await self._clock.wait_for(self._room, wait_s)
                continue
            try:
                found = await self._deliveries.take(application, room, lease_ms=lease_ms(self._limits))
            except HeadraceError as error:
                LOG.warning("nothing could be claimed to be pushed", application=application, error=error.message)
                await self._clock.wait_for(self._stopped, poll_s)
                continue
            for delivery in found:
                self._send(endpoints, delivery)
            if not found:
                await self._doorbell.wait(self._clock, poll_s, since=rings_count)

    def _send(self, endpoints: list[Endpoint], delivery: Delivery) -> None:
        """On its way to whoever has the most room."""
        now_us = self._clock.now_us()
        endpoint = max(endpoints, key=lambda one: one.room(now_us))
        endpoint.under_way += 1
        push = asyncio.create_task(self._push(endpoint, delivery))
        self._pushes.add(push)
        push.add_done_callback(self._pushes.discard)

    async def _push(self, endpoint: Endpoint, delivery: Delivery) -> None:
        try:
            await endpoint.channel.call(
                PATH, request_of(delivery.activation), timeout_s=self._limits.push_timeout_ms / 1_000
            )
        except GrpcError as error:
            endpoint.refused(self._clock.now_us(), error)
            if error.code in _PASSING or not self._has_struck_out(delivery.id):
                await self._undo(delivery, is_sure=isinstance(error, CallNotSent) or error.code in _REFUSALS)
        except asyncio.CancelledError:
            await self._undo(delivery, is_sure=False)
            raise
        else:
            endpoint.taken()
            self._strikes.pop(delivery.id, None)
            await self._marks.put(delivery.id)
        finally:
            endpoint.under_way -= 1
            self._room.set()  # its line looks once all that ended together did

    def _has_struck_out(self, name: str) -> bool:
        """Whether an activation was refused for its own sake so often that others go first, until its lease ends."""
        if len(self._strikes) >= STRIKES_KEPT_MAX:
            self._strikes.clear()
        self._strikes[name] = self._strikes.get(name, 0) + 1
        return self._strikes[name] >= STRIKES_MAX

    async def _undo(self, delivery: Delivery, *, is_sure: bool) -> None:
        """It goes back at once, unless it may have begun and may do so once only: then its deadline decides."""
        try:
            if delivery.at_most_once and not is_sure:
                await self._marks.put(delivery.id)
            else:
                await self._deliveries.give_back([delivery.id])
        except HeadraceError as error:  # its lease ends
            LOG.warning("a push could not be undone", id=delivery.id, error=error.message)

    def _unmarked(self, name: str, error: HeadraceError) -> None:
        LOG.warning("the store refused a mark", id=name, error=error.message)

    # -- applications that nobody serves

    async def _look(self) -> None:
        """Say, as long as there are any, that activations wait for an application without an endpoint."""
        told: frozenset[str] = frozenset()
        while not self._stopped.is_set():
            try:
                parked = await self._deliveries.parked(tuple(self.endpoints))
            except HeadraceError as error:
                LOG.warning("parked activations could not be counted", error=error.message)
            else:
                self.parked_count = sum(parked.values())
                if parked and parked.keys() != told:
                    names = sorted(parked)[:PARKED_SHOWN_MAX]
                    hint = "give them one in HEADRACE_PUSH, or let workers pull them"
                    LOG.warning("activations wait for applications without an endpoint", applications=names, hint=hint)
                told = frozenset(parked)
            await self._clock.wait_for(self._stopped, self._limits.upkeep_interval_ms / 1_000)


_PASSING: Final = frozenset(
    (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.UNAUTHENTICATED, Code.CANCELLED)
)
"""What says nothing about the activation that was pushed."""

_REFUSALS: Final = frozenset(
    (Code.RESOURCE_EXHAUSTED, Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.UNIMPLEMENTED, Code.INVALID_ARGUMENT)
)
"""A worker that answers so has not begun."""


def request_of(activation: bytes) -> bytes:
    """`PushTaskRequest` around an activation's bytes, as they are: its first field, a length, and they."""
    size, head = len(activation), bytearray(b"\x0a")
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head) + activation
