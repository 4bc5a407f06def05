"""The prefetcher: it leases activations ahead of the requests for them, as many as are requested in a fifth of a
second.

At a high request rate the next claim is made when half of the last one is used, so that delivery continues during the
claim. A request that finds the buffer empty waits for the claims in flight. A filter for which the store had nothing is
claimed for again after a notification, or after a short time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from headrace.core.activation import LANE
from headrace.foundation.errors import HeadraceError, SessionEnded, StoreUnavailable
from headrace.runtime.dispatch.lease_buffer import BufferedLease, LeaseBuffer, QueueFilter, RequestRate
from headrace.runtime.engine import Engine
from headrace.runtime.sessions.active_lease import ActiveLease
from headrace.runtime.sessions.session import StoreSession

AHEAD_US: Final = 200_000
"""Runs are leased ahead for this time, at the rate of the recent requests."""
LONG_US: Final = 4 * AHEAD_US
AHEAD_MIN: Final = 4
AHEAD_MAX: Final = 2_048
SMALL_CLAIM: Final = 64
"""A claim that returned this many is followed by the next before a request waits for it; smaller ones leave runs to
other servers.
"""
AHEAD_BYTES: Final = 64 * 1024 * 1024
"""Buffered payloads above which no more is leased than is requested."""
EMPTY_US: Final = 100_000
"""How long the answer "none" holds without a notification: a delayed run that becomes due causes none."""
CLAIM_WAIT_S: Final = 5.0
"""How long a request waits for a store that does not respond."""
FILTERS_MAX: Final = 1_024


class Prefetcher:
    """Fills the lease buffer. Owned by one event loop, the dispatcher's."""

    def __init__(
        self, engine: Engine, session: StoreSession, lease_buffer: LeaseBuffer, *, on_ended: Callable[[], None]
    ) -> None:
        """`on_ended` is called when another process ended this server's session."""
        self._engine = engine
        self._session = session
        self._buffer = lease_buffer
        self._on_ended = on_ended
        self._rates: dict[QueueFilter, RequestRate] = {}
        self._claims_count = 0
        self._claiming: set[asyncio.Task[None]] = set()
        self._is_ended = False
        self._is_closed = False
        self._restarting = asyncio.Lock()

    def session_ended(self) -> None:
        """Start a new session before the next claim."""
        self._is_ended = True

    async def close(self) -> None:
        """Stop claiming. Wait for the claims in flight, but not longer than a request would."""
        self._is_closed = True
        await asyncio.gather(*map(self._wait_for_claim, self._rates.values()), return_exceptions=True)

    async def refill(self, queue_filter: QueueFilter) -> bool:
        """Lease more runs for a filter, together with other requests for it; False if the store has none.

        Raises `StoreUnavailable` if the store does not respond.
        """
        if self._is_closed:
            return False
        rate = self._rate(queue_filter)
        if not self._is_known_empty(rate):
            if not rate.is_claiming:
                self._start_claim(rate)
            await self._wait_for_claim(rate)
            if rate.empty_until_us == 0:
                return True
        for other in [other for other in self._rates.values() if other.overlaps(queue_filter)]:
            with suppress(HeadraceError):  # runs that the store did not have may be part of another claim in flight
                await self._wait_for_claim(other)
        return self._buffer.has(queue_filter)

    async def _wait_for_claim(self, rate: RequestRate) -> None:
        """Wait for the claim in flight, if there is one, and raise its error."""
        if not rate.is_claiming:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not rate.waiting:
            rate.silence = self._engine.clock.call_later(
                CLAIM_WAIT_S, lambda: self._wake_waiting(rate, _store_silent())
            )
        rate.waiting.append(waiter)
        await waiter

    @staticmethod
    def _wake_waiting(rate: RequestRate, error: BaseException | None) -> None:
        """Wake all requests that wait for a claim."""
        if rate.silence is not None:
            rate.silence.cancel()
        waiting, rate.waiting, rate.silence = rate.waiting, [], None
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None) if error is None else waiter.set_exception(error)

    def on_half_used(self, rate: RequestRate) -> None:
        """Claim more when half of a claim was delivered, if the requests come fast."""
        is_full = self._buffer.bytes_count > AHEAD_BYTES
        is_fast = rate.lasts_us(self._engine.clock.now_us()) <= LONG_US
        if is_fast and not (rate.is_claiming or is_full or self._is_closed or self._is_known_empty(rate)):
            self._start_claim(rate)

    def _is_known_empty(self, rate: RequestRate) -> bool:
        is_notified = rate.empty_rings != self._engine.wakeup.notified_count
        return not is_notified and self._engine.clock.now_us() < rate.empty_until_us

    def _rate(self, queue_filter: QueueFilter) -> RequestRate:
        rate = self._rates.get(queue_filter)
        if rate is None:
            if len(self._rates) >= FILTERS_MAX:  # workers use few filters; a peer that uses more resets the rates
                self._rates = {key: rate for key, rate in self._rates.items() if rate.is_claiming}
            rate = self._rates[queue_filter] = RequestRate(queue_filter, AHEAD_MIN)
        return rate

    def _start_claim(self, rate: RequestRate) -> None:
        rate.is_claiming = True
        claiming = asyncio.create_task(self._claim(rate), name="headrace-claim")
        self._claiming.add(claiming)
        claiming.add_done_callback(partial(self._on_claim_end, rate))

    def _on_claim_end(self, rate: RequestRate, claiming: asyncio.Task[None]) -> None:
        """Wake the requests that wait, however the claim ended; an error without waiting requests is dropped."""
        self._claiming.discard(claiming)
        rate.is_claiming = False
        self._wake_waiting(rate, _store_silent() if claiming.cancelled() else claiming.exception())

    async def _claim(self, rate: RequestRate) -> None:
        notified_count, clock = self._engine.wakeup.notified_count, self._engine.clock
        await asyncio.sleep(0)  # requests of the same turn of the event loop share the claim
        self._adjust(rate, clock.now_us())
        ahead = 0 if self._buffer.bytes_count > AHEAD_BYTES else rate.ahead_count
        runs_max = max(len(rate.waiting), ahead, 1)
        leases = await self._claimed(rate.queue_filter, runs_max)
        for work in leases:
            self._claims_count += 1
            self._buffer.add(BufferedLease(work, self._claims_count, clock.now_us(), rate))
        count = sum(work.count for work in leases)
        rate.leased(count, is_more=count >= max(runs_max, SMALL_CLAIM))
        rate.empty_until_us = 0 if leases else clock.now_us() + EMPTY_US
        rate.empty_rings = notified_count

    @staticmethod
    def _adjust(rate: RequestRate, now_us: int) -> None:
        """Adapt the number of runs leased ahead: double it if it lasted less than `AHEAD_US`, halve it if it lasted
        long.
        """
        lasts_us = rate.lasts_us(now_us)
        if lasts_us < AHEAD_US:
            rate.ahead_count = min(rate.ahead_count * 2, AHEAD_MAX)
        elif lasts_us > LONG_US:
            rate.ahead_count = max(rate.ahead_count // 2, AHEAD_MIN)
        rate.claimed_us = now_us

    async def _claimed(self, queue_filter: QueueFilter, runs_max: int) -> list[ActiveLease]:
        await self._ensure_session()
        try:
            return await self._session.claim([LANE], queue_filter.queues, runs_max, queue_prefix=queue_filter.prefix)
        except SessionEnded:
            self._on_ended()
            await self._ensure_session()
            return await self._session.claim([LANE], queue_filter.queues, runs_max, queue_prefix=queue_filter.prefix)

    async def _ensure_session(self) -> None:
        """Start a new session if another process ended this server's."""
        if not self._is_ended:
            return
        async with self._restarting:
            if self._is_ended:
                await self._session.restart()
                self._is_ended = False


def _store_silent() -> StoreUnavailable:
    return StoreUnavailable("the store does not respond", hint="retry later")
