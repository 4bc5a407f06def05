"""What is leased ahead of those who ask: when, how much, and what becomes of claims that are under way."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from headrace.foundation.errors import StoreBroken, StoreUnavailable
from headrace.runtime.clock import ManualClock
from headrace.runtime.dispatch.lease_buffer import QueueFilter
from headrace.runtime.dispatch.prefetcher import AHEAD_MAX, AHEAD_MIN, CLAIM_WAIT_S, MANY
from tests.support.broker import COMPLETE, Broker, broker

ANY = QueueFilter()


class Slow:
    """A store whose claims, once it is shut, are made at once and answered when it is opened; `asked`: runs wanted."""

    def __init__(self, own: Broker) -> None:
        self._store: Any = own.engine.store
        self.asked: list[int] = []
        self.faults: list[Exception] = []
        self.is_open = asyncio.Event()
        self.is_open.set()
        own.engine.store = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def claim(self, claim: Any, **more: Any) -> Any:
        """One claim, answered late."""
        self.asked.append(claim.runs_max)
        if self.faults:
            raise self.faults.pop()
        is_open, leases = self.is_open, await self._store.claim(claim, **more)
        await is_open.wait()
        return leases


async def settled() -> None:
    """Let whatever can go on go on."""
    for _ in range(20):
        await asyncio.sleep(0)


async def brisk(own: Broker, store: Slow) -> list[str]:
    """Ask until a claim was for many; answers what was had."""
    had = []
    while not store.asked or store.asked[-1] < MANY:
        handout = await own.dispatcher.fetch(ANY)
        assert handout is not None
        had.append(handout.name)
    return had


async def test_the_next_claim_starts_when_half_of_the_buffer_is_left(tmp_path: Path) -> None:
    async with broker("memory", tmp_path, clock=ManualClock()) as own:
        store = Slow(own)
        await own.filled(1_000)
        had = await brisk(own, store)
        store.is_open.clear()
        claims_count, in_line = len(store.asked), own.dispatcher.line_count
        while (handout := own.dispatcher.fetch_nowait(ANY)) is not None:
            had.append(handout.name)
            await settled()
            left_count = own.dispatcher.line_count
            assert len(store.asked) == claims_count + (left_count <= MANY // 2), (left_count, in_line)
        assert own.dispatcher.line_count == 0
        store.is_open.set()
        await settled()
        assert own.dispatcher.line_count > MANY
        while (handout := await own.dispatcher.fetch(ANY)) is not None:
            had.append(handout.name)
        assert sorted(had) == sorted(f"id_{number}" for number in range(1_000))


async def test_prefetched_leases_stay_within_the_bound_when_claimed_early(tmp_path: Path) -> None:
    async with broker("memory", tmp_path, clock=ManualClock()) as own:
        store = Slow(own)
        await own.filled(3 * AHEAD_MAX)
        most = 0
        for _ in range(3 * AHEAD_MAX):
            assert await own.dispatcher.fetch(ANY) is not None
            await settled()
            most = max(most, own.dispatcher.line_count)
        assert max(store.asked) == AHEAD_MAX
        assert AHEAD_MAX <= most <= AHEAD_MAX * 3 // 2


async def test_small_buffers_are_not_refilled_before_a_fetch(tmp_path: Path) -> None:
    async with broker("memory", tmp_path, clock=ManualClock()) as own:
        store = Slow(own)
        await own.filled(100)
        for _ in range(4):
            await own.dispatcher.fetch(ANY)
            await settled()
        assert (store.asked, own.dispatcher.line_count) == ([4], 0)


async def test_slow_fetching_causes_no_prefetch(tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker("memory", tmp_path, clock=clock) as own:
        store = Slow(own)
        await own.filled(1_000)
        await brisk(own, store)
        clock.advance(0.9)
        claims_count = len(store.asked)
        while own.dispatcher.fetch_nowait(ANY) is not None:
            await settled()
        assert len(store.asked) == claims_count


async def test_an_exhausted_queue_is_not_claimed_again_before_a_fetch(tmp_path: Path) -> None:
    async with broker("memory", tmp_path, clock=ManualClock()) as own:
        store = Slow(own)
        await own.filled(4 + 8 + 16 + 32 + MANY + 100)
        had = await brisk(own, store)
        while own.dispatcher.fetch_nowait(ANY) is not None:
            had.append("")
            await settled()
        assert (len(had), store.asked) == (4 + 8 + 16 + 32 + MANY + 100, [4, 8, 16, 32, 64, 128])


async def test_a_failed_prefetch_is_repeated_at_the_next_fetch(tmp_path: Path) -> None:
    unheard: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unheard.append(context))
    async with broker("memory", tmp_path, clock=ManualClock()) as own:
        store = Slow(own)
        await own.filled(1_000)
        had = await brisk(own, store)
        store.faults = [StoreBroken("damaged")] * 2
        while (handout := own.dispatcher.fetch_nowait(ANY)) is not None:
            had.append(handout.name)
            await settled()
        assert len(store.faults) == 1
        with pytest.raises(StoreBroken, match="damaged"):
            await own.dispatcher.fetch(ANY)
        while (handout := await own.dispatcher.fetch(ANY)) is not None:
            had.append(handout.name)
        assert len(had) == len(set(had)) == 1_000
    assert unheard == []


async def test_a_fetch_that_finds_the_buffer_empty_waits_for_a_claim_in_flight(tmp_path: Path) -> None:
    async with broker("memory", tmp_path, clock=ManualClock()) as own:
        store = Slow(own)
        await own.filled(3)
        store.is_open.clear()
        first = asyncio.create_task(own.dispatcher.fetch(QueueFilter("app")))
        await settled()  # its claim has leased all there is, and is not answered yet
        shut, store.is_open = store.is_open, asyncio.Event()
        store.is_open.set()
        second = asyncio.create_task(own.dispatcher.fetch(QueueFilter("app", ("mail",))))
        third = asyncio.create_task(own.dispatcher.fetch(QueueFilter("other")))
        await settled()
        seen = (len(store.asked), first.done(), second.done(), third.done())
        shut.set()
        handouts = await asyncio.gather(first, second, third)
        assert seen == (3, False, False, True)
        assert [handout is not None for handout in handouts] == [True, True, False]


async def test_leases_claimed_while_the_server_stops_are_released(tmp_path: Path) -> None:
    async with broker("memory", tmp_path, clock=ManualClock()) as own:
        store = Slow(own)
        await own.filled(1_000)
        had = await brisk(own, store)
        store.is_open.clear()
        while own.dispatcher.fetch_nowait(ANY) is not None:
            await settled()
        assert len(store.asked) > len(had) // MANY
        stopping = asyncio.create_task(own.dispatcher.stop())
        await settled()
        store.is_open.set()
        await stopping
        out_count = own.dispatcher.out_count
        states = [view.state for view in await own.runs()]
        assert states.count("waiting") == 1_000 - out_count, "workers have the rest"
        other = Broker(own.engine)
        await other.dispatcher.start()
        for name in list(own.dispatcher._out):
            await other.set(name, COMPLETE)
        assert len(await other.drained(4)) == 1_000 - out_count
        await other.dispatcher.stop()


async def test_a_stop_waits_once_for_all_claims_in_flight(tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker("memory", tmp_path, clock=clock) as own:
        store = Slow(own)
        store.is_open.clear()
        asking = [asyncio.create_task(own.dispatcher.fetch(QueueFilter(name))) for name in ("app", "other", "third")]
        await settled()
        assert len(store.asked) == 3
        await clock.advance_async(CLAIM_WAIT_S)
        for one in asking:
            with pytest.raises(StoreUnavailable):
                await one
        stopping = asyncio.create_task(own.dispatcher.stop())
        await settled()
        assert not stopping.done()
        await clock.advance_async(CLAIM_WAIT_S)
        await settled()
        assert stopping.done()
        store.is_open.set()


async def test_repeated_fetches_of_an_empty_store_do_not_increase_the_prefetch(tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker("memory", tmp_path, clock=clock) as own:
        store = Slow(own)
        for _ in range(20):
            assert await own.dispatcher.fetch(ANY) is None
            clock.advance(0.15)
        assert store.asked == [AHEAD_MIN] * 20
