"""What is leased for those who ask for activations, ahead of them: as much as they ask for in a fifth of a second.

While many are asked for, and briskly, the next claim is made when half of the last one is used up, so that handing out
goes on under it. Who asks when there is nothing in line shares the claims that are under way. What the store had none
of is not asked for again until there is news, or a moment has passed.
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
"""What is leased ahead of those who ask: as much as they ask for in this time."""
LONG_US: Final = 4 * AHEAD_US
AHEAD_MIN: Final = 4
AHEAD_MAX: Final = 2_048
MANY: Final = 64
"""A claim that brought so many is followed by the next before somebody waits for it; who uses few leaves the rest to
other servers.
"""
AHEAD_BYTES: Final = 64 * 1024 * 1024
"""Payloads in line over which no more is leased than is asked for."""
EMPTY_US: Final = 100_000
"""How long an answer of none is good while no news comes: a delayed run tells nobody that it is due."""
CLAIM_WAIT_S: Final = 5.0
"""How long somebody who asks waits for a store that does not answer."""
WISHES_MAX: Final = 1_024


class Prefetcher:
    """Owned by one event loop, like its dispatcher. Fills `line`."""

    def __init__(
        self, engine: Engine, broker: StoreSession, line: LeaseBuffer, *, on_ended: Callable[[], None]
    ) -> None:
        """`on_ended`: others took this server's session for dead."""
        self._engine = engine
        self._broker = broker
        self._line = line
        self._on_ended = on_ended
        self._paces: dict[QueueFilter, RequestRate] = {}
        self._claims_count = 0
        self._claiming: set[asyncio.Task[None]] = set()
        self._is_ended = False
        self._is_closed = False
        self._restarting = asyncio.Lock()

    def session_ended(self) -> None:
        """The next claim needs a session of its own."""
        self._is_ended = True

    async def close(self) -> None:
        """Claim no more, and wait for the claims that are under way, as long as somebody who asks would."""
        self._is_closed = True
        await asyncio.gather(*map(self._claimed_for, self._paces.values()), return_exceptions=True)

    async def refilled(self, wish: QueueFilter) -> bool:
        """Lease more for a wish, together with whoever else waits for it; False when the store has none.

        Raises `StoreUnavailable` when it does not answer.
        """
        if self._is_closed:
            return False
        pace = self._pace(wish)
        if not self._is_known_empty(pace):
            if not pace.is_claiming:
                self._begin(pace)
            await self._claimed_for(pace)
            if pace.empty_until_us == 0:
                return True
        for other in [other for other in self._paces.values() if other.overlaps(wish)]:
            with suppress(HeadraceError):  # what the store had none of may be on its way here
                await self._claimed_for(other)
        return self._line.has(wish)

    async def _claimed_for(self, pace: RequestRate) -> None:
        """Wait for the claim that is under way, if there is one, and raise what it raises."""
        if not pace.is_claiming:
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not pace.waiting:
            pace.silence = self._engine.clock.call_later(CLAIM_WAIT_S, lambda: self._answer(pace, _silent()))
        pace.waiting.append(turn)
        await turn

    @staticmethod
    def _answer(pace: RequestRate, error: BaseException | None) -> None:
        """All who wait for a claim wait no longer."""
        if pace.silence is not None:
            pace.silence.cancel()
        waiting, pace.waiting, pace.silence = pace.waiting, [], None
        for turn in waiting:
            if not turn.done():
                turn.set_result(None) if error is None else turn.set_exception(error)

    def half_used(self, pace: RequestRate) -> None:
        """Half of what was claimed for a wish is out: claim more under the other half, if that was brisk."""
        is_full = self._line.bytes_count > AHEAD_BYTES
        is_brisk = pace.lasts_us(self._engine.clock.now_us()) <= LONG_US
        if is_brisk and not (pace.is_claiming or is_full or self._is_closed or self._is_known_empty(pace)):
            self._begin(pace)

    def _is_known_empty(self, pace: RequestRate) -> bool:
        is_news = pace.empty_rings != self._engine.wakeup.notified_count
        return not is_news and self._engine.clock.now_us() < pace.empty_until_us

    def _pace(self, wish: QueueFilter) -> RequestRate:
        pace = self._paces.get(wish)
        if pace is None:
            if len(self._paces) >= WISHES_MAX:  # workers name few; whoever names more starts anew
                self._paces = {known: one for known, one in self._paces.items() if one.is_claiming}
            pace = self._paces[wish] = RequestRate(wish, AHEAD_MIN)
        return pace

    def _begin(self, pace: RequestRate) -> None:
        pace.is_claiming = True
        claiming = asyncio.create_task(self._claim(pace), name="headrace-claim")
        self._claiming.add(claiming)
        claiming.add_done_callback(partial(self._ended, pace))

    def _ended(self, pace: RequestRate, claiming: asyncio.Task[None]) -> None:
        """However a claim ended, who waits is told; who waits for nobody's answer need not hear of an error."""
        self._claiming.discard(claiming)
        pace.is_claiming = False
        self._answer(pace, _silent() if claiming.cancelled() else claiming.exception())

    async def _claim(self, pace: RequestRate) -> None:
        notified_count, clock = self._engine.wakeup.notified_count, self._engine.clock
        await asyncio.sleep(0)  # whoever asks in this turn of the loop shares the claim
        self._adjust(pace, clock.now_us())
        ahead = 0 if self._line.bytes_count > AHEAD_BYTES else pace.ahead_count
        runs_max = max(len(pace.waiting), ahead, 1)
        works = await self._claimed(pace.wish, runs_max)
        for work in works:
            self._claims_count += 1
            self._line.add(BufferedLease(work, self._claims_count, clock.now_us(), pace))
        count = sum(work.count for work in works)
        pace.leased(count, is_more=count >= max(runs_max, MANY))
        pace.empty_until_us = 0 if works else clock.now_us() + EMPTY_US
        pace.empty_rings = notified_count

    @staticmethod
    def _adjust(pace: RequestRate, now_us: int) -> None:
        """What lasts less than `AHEAD_US` should have been twice as much, what lasts long half."""
        lasts_us = pace.lasts_us(now_us)
        if lasts_us < AHEAD_US:
            pace.ahead_count = min(pace.ahead_count * 2, AHEAD_MAX)
        elif lasts_us > LONG_US:
            pace.ahead_count = max(pace.ahead_count // 2, AHEAD_MIN)
        pace.claimed_us = now_us

    async def _claimed(self, wish: QueueFilter, runs_max: int) -> list[ActiveLease]:
        await self._live()
        try:
            return await self._broker.claim([LANE], wish.queues, runs_max, queue_prefix=wish.prefix)
        except SessionEnded:
            self._on_ended()
            await self._live()
            return await self._broker.claim([LANE], wish.queues, runs_max, queue_prefix=wish.prefix)

    async def _live(self) -> None:
        """A session of this server's own, again when others took it for dead."""
        if not self._is_ended:
            return
        async with self._restarting:
            if self._is_ended:
                await self._broker.restart()
                self._is_ended = False


def _silent() -> StoreUnavailable:
    return StoreUnavailable("the store does not answer", hint="ask again in a moment")
