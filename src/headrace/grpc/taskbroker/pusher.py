"""Pusher: sends activations to worker endpoints, as many concurrently as an endpoint accepts.

Each application has one loop, which claims activations only when one of its endpoints has capacity. So activations
never wait in the pusher. An activation that a worker refuses or does not answer is released at once, and its endpoint
backs off.

After RESOURCE_EXHAUSTED the concurrency of an endpoint is halved; it grows again with the activations that it accepts.
Activations of applications without an endpoint are never claimed. They are counted and logged.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from typing import Any, Final

from headrace.foundation.errors import HeadraceError
from headrace.foundation.limits import Limits
from headrace.foundation.logs import get_logger
from headrace.foundation.targets import PushTarget
from headrace.grpc.taskbroker.activation_codec import as_first_field
from headrace.grpc.taskbroker.delivery_protocol import DeliverySource, PushDelivery
from headrace.grpc.transport.bounds import Bounds
from headrace.grpc.transport.budget import Budget
from headrace.grpc.transport.client import CallNotSent, Channel
from headrace.grpc.transport.signing import Secrets
from headrace.grpc.transport.status import Code, GrpcError
from headrace.runtime.clock import SECOND_US, Clock
from headrace.runtime.flusher import Flusher, UpdatesUnflushed
from headrace.runtime.wakeup import Wakeup

LOG: Any = get_logger("headrace.push")
PATH: Final = "/sentry_protos.taskbroker.v1.WorkerService/PushTask"
QUERY_MS: Final = 1_000
"""Time allowed for one transaction of marks."""

BUSY_S: Final = (0.0, 0.02, 0.1, 0.5, 1.0)
"""Backoff of an endpoint after 1, 2, 3, ... refusals in a row."""

PARKED_SHOWN_MAX: Final = 10
REFUSALS_PER_ID_MAX: Final = 3
REFUSED_IDS_MAX: Final = 10_000


def lease_ms(limits: Limits) -> int:
    """Compute how long the lease of a pushed activation must last: until its mark is durable in the worst case.

        push_timeout_ms + 2 * QUERY_MS

    The call may use its whole timeout. It starts with the claim, since an activation is claimed only for a free place.
    The mark may just miss a flush and wait for the next one: two transactions, as natural batching adds no interval. If
    the store takes longer, the lease ends early, and the activation runs twice at worst.
    """
    return limits.push_timeout_ms + 2 * QUERY_MS


class PushEndpoint:
    """One worker endpoint, its concurrency, and counts since the start."""

    def __init__(self, channel: Channel, concurrency_max: int) -> None:
        self.channel = channel
        self.concurrency = self._concurrency_max = concurrency_max
        self.in_flight_count = 0
        self.pushed_count = 0
        self.busy_count = 0
        self.failed_count = 0
        self._refusals_count = 0
        self._accepted_count = 0
        self.backoff_until_us = 0

    @property
    def name(self) -> str:
        """Host and port of the endpoint."""
        return self.channel.target.authority

    def capacity(self, now_us: int) -> int:
        """Number of activations that may be sent to it now."""
        return 0 if now_us < self.backoff_until_us else max(0, self.concurrency - self.in_flight_count)

    def on_accepted(self) -> None:
        """Count an accepted activation. After as many as it takes concurrently, its concurrency grows by one."""
        self.pushed_count += 1
        if self._refusals_count:
            LOG.info("push.endpoint_recovered", endpoint=self.name)
        self._refusals_count = 0
        self._accepted_count += 1
        if self._accepted_count >= self.concurrency and self.concurrency < self._concurrency_max:
            self.concurrency, self._accepted_count = self.concurrency + 1, 0

    def on_refused(self, now_us: int, error: GrpcError) -> None:
        """Count a refusal: halve the concurrency and back off."""
        is_busy = error.code is Code.RESOURCE_EXHAUSTED
        self.busy_count += is_busy
        self.failed_count += not is_busy
        if now_us < self.backoff_until_us:  # one of several calls in flight at the first refusal
            return
        if not self._refusals_count:
            LOG.warning("push.endpoint_refused", endpoint=self.name, code=error.code.name, error=error.message)
        self._accepted_count, self.concurrency = 0, max(1, self.concurrency // 2)
        self._refusals_count = min(self._refusals_count + 1, len(BUSY_S) - 1)
        self.backoff_until_us = now_us + int(BUSY_S[self._refusals_count] * SECOND_US)


class Pusher:
    """Pushes the activations of a source to endpoints, on one event loop. `start` and `stop` may be repeated."""

    def __init__(
        self,
        deliveries: DeliverySource,
        targets: Sequence[PushTarget],
        *,
        limits: Limits,
        clock: Clock,
        wakeup: Wakeup,
        secrets: Secrets | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._deliveries = deliveries
        self._limits = limits
        self._clock = clock
        self._wakeup = wakeup
        self._has_capacity = asyncio.Event()
        self._stopped = asyncio.Event()
        self._refusals_by_id: dict[str, int] = {}
        self.parked_count = 0
        bounds = Bounds(limits.grpc_message_bytes_max, limits.push_concurrency)
        budget = Budget(limits.grpc_buffer_bytes_max)
        self.endpoints: dict[str, list[PushEndpoint]] = {}
        for target in targets:
            channel = Channel(target, bounds, budget, secrets=secrets, tls=tls)
            self.endpoints.setdefault(target.application, []).append(PushEndpoint(channel, limits.push_concurrency))
        self._marks: Flusher[str] = Flusher(
            deliveries.mark, name="marks", clock=clock, on_refused=self._on_mark_refused, size=limits.flush_size
        )
        self._loops: list[asyncio.Task[None]] = []
        self._pushes: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start pushing."""
        if self._loops or self._stopped.is_set():
            return
        for application in self.endpoints:
            loop = asyncio.create_task(self._push_application(application), name=f"headrace-push-{application}")
            self._loops.append(loop)
        self._loops.append(asyncio.create_task(self._watch_parked(), name="headrace-push-parked"))

    async def stop(self) -> None:
        """Stop claiming, let calls in flight finish, write their marks, and close the connections."""
        self._stopped.set()
        self._has_capacity.set()
        self._wakeup.notify_local()
        loops, self._loops = self._loops, []
        if loops:
            await asyncio.wait(loops, timeout=self._limits.shutdown_grace_s)
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        if self._pushes:
            await asyncio.wait(self._pushes, timeout=self._limits.shutdown_grace_s)
        for push in tuple(self._pushes):
            push.cancel()
        await asyncio.gather(*self._pushes, return_exceptions=True)
        try:
            await self._marks.close(deadline_s=self._limits.shutdown_grace_s)
        except UpdatesUnflushed as error:  # their leases end, and they are delivered again
            LOG.warning("push.marks_lost", marks=len(error.unflushed))
        for endpoints in self.endpoints.values():
            for endpoint in endpoints:
                endpoint.channel.close()

    # -- one application

    async def _push_application(self, application: str) -> None:
        endpoints = self.endpoints[application]
        poll_s = self._limits.poll_interval_ms / 1_000
        while not self._stopped.is_set():
            notified_count = self._wakeup.notified_count
            self._has_capacity.clear()
            now_us = self._clock.now_us()
            capacity = sum(endpoint.capacity(now_us) for endpoint in endpoints)
            if not capacity:
                backoffs_us = [
                    endpoint.backoff_until_us for endpoint in endpoints if endpoint.backoff_until_us > now_us
                ]
                wait_s = (min(backoffs_us) - now_us) / SECOND_US if backoffs_us else None
                await self._clock.wait_for(self._has_capacity, wait_s)
                continue
            try:
                deliveries = await self._deliveries.take(application, capacity, lease_ms=lease_ms(self._limits))
            except HeadraceError as error:
                LOG.warning("push.claim_failed", application=application, error=error.message)
                await self._clock.wait_for(self._stopped, poll_s)
                continue
            for delivery in deliveries:
                self._send(endpoints, delivery)
            if not deliveries:
                await self._wakeup.wait(self._clock, poll_s, since=notified_count)

    def _send(self, endpoints: list[PushEndpoint], delivery: PushDelivery) -> None:
        """Send an activation to the endpoint with the most capacity."""
        now_us = self._clock.now_us()
        endpoint = max(endpoints, key=lambda candidate: candidate.capacity(now_us))
        endpoint.in_flight_count += 1
        push = asyncio.create_task(self._push(endpoint, delivery))
        self._pushes.add(push)
        push.add_done_callback(self._pushes.discard)

    async def _push(self, endpoint: PushEndpoint, delivery: PushDelivery) -> None:
        try:
            await endpoint.channel.call(
                PATH, as_first_field(delivery.activation), timeout_s=self._limits.push_timeout_ms / 1_000
            )
        except GrpcError as error:
            endpoint.on_refused(self._clock.now_us(), error)
            if error.code in _NOT_ABOUT_ACTIVATION or not self._is_refused_too_often(delivery.id):
                await self._release_or_mark(
                    delivery, is_sure=isinstance(error, CallNotSent) or error.code in _NOT_STARTED
                )
        except asyncio.CancelledError:
            await self._release_or_mark(delivery, is_sure=False)
            raise
        else:
            endpoint.on_accepted()
            self._refusals_by_id.pop(delivery.id, None)
            await self._marks.put(delivery.id)
        finally:
            endpoint.in_flight_count -= 1
            self._has_capacity.set()  # the application's loop continues once all calls that end together have ended

    def _is_refused_too_often(self, name: str) -> bool:
        """True if workers refused this very activation so often that others go first, until its lease ends."""
        if len(self._refusals_by_id) >= REFUSED_IDS_MAX:
            self._refusals_by_id.clear()
        self._refusals_by_id[name] = self._refusals_by_id.get(name, 0) + 1
        return self._refusals_by_id[name] >= REFUSALS_PER_ID_MAX

    async def _release_or_mark(self, delivery: PushDelivery, *, is_sure: bool) -> None:
        """Release the activation, unless it may have started and must run at most once: then its deadline decides."""
        try:
            if delivery.at_most_once and not is_sure:
                await self._marks.put(delivery.id)
            else:
                await self._deliveries.release([delivery.id])
        except HeadraceError as error:  # its lease ends without it
            LOG.warning("push.release_failed", id=delivery.id, error=error.message)

    def _on_mark_refused(self, name: str, error: HeadraceError) -> None:
        LOG.warning("push.mark_refused", id=name, error=error.message)

    # -- applications without an endpoint

    async def _watch_parked(self) -> None:
        """Log, as long as there are any, which applications have waiting activations and no endpoint."""
        logged_applications: frozenset[str] = frozenset()
        while not self._stopped.is_set():
            try:
                parked = await self._deliveries.parked(tuple(self.endpoints))
            except HeadraceError as error:
                LOG.warning("push.parked_count_failed", error=error.message)
            else:
                self.parked_count = sum(parked.values())
                if parked and parked.keys() != logged_applications:
                    names = sorted(parked)[:PARKED_SHOWN_MAX]
                    hint = "add an endpoint to HEADRACE_PUSH, or let workers fetch them"
                    LOG.warning("push.applications_without_endpoint", applications=names, hint=hint)
                logged_applications = frozenset(parked)
            await self._clock.wait_for(self._stopped, self._limits.upkeep_interval_ms / 1_000)


_NOT_ABOUT_ACTIVATION: Final = frozenset(
    (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.UNAUTHENTICATED, Code.CANCELLED)
)
"""Statuses that do not depend on the activation that was pushed."""

_NOT_STARTED: Final = frozenset(
    (Code.RESOURCE_EXHAUSTED, Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.UNIMPLEMENTED, Code.INVALID_ARGUMENT)
)
"""Statuses after which the worker has certainly not started the activation."""
