"""Prefetching: when activations are leased ahead of fetches, how many, and how claims in flight end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from headrace.foundation.errors import StoreBroken, StoreUnavailable
from headrace.runtime.clock import ManualClock
from headrace.runtime.dispatch.lease_buffer import QueueFilter
from headrace.runtime.dispatch.prefetcher import AHEAD_MAX, AHEAD_MIN, CLAIM_WAIT_S, SMALL_CLAIM
from tests.support.broker import COMPLETE, BrokerRig, running_broker

ANY = QueueFilter()


class SlowStore:
    """A store that, while `is_open` is not set, delays the answers of claims. `requested`: the numbers of requested
    runs.
    """

    def __init__(self, broker: BrokerRig) -> None:
        self._store: Any = broker.engine.store
        self.requested: list[int] = []
        self.faults: list[Exception] = []
        self.is_open = asyncio.Event()
        self.is_open.set()
        broker.engine.store = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def claim(self, claim: Any, **more: Any) -> Any:
        """Claim at once, and answer when the store is open."""
        self.requested.append(claim.runs_max)
        if self.faults:
            raise self.faults.pop()
        is_open, leases = self.is_open, await self._store.claim(claim, **more)
        await is_open.wait()
        return leases


async def settled() -> None:
    """Run everything that can run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def fetch_fast(broker: BrokerRig, store: SlowStore) -> list[str]:
    """Fetch until a claim requested many runs. Returns the delivered ids."""
    delivered = []
    while not store.requested or store.requested[-1] < SMALL_CLAIM:
        delivery = await broker.dispatcher.fetch(ANY)
        assert delivery is not None
        delivered.append(delivery.name)
    return delivered


async def test_the_next_claim_starts_when_half_of_the_buffer_is_left(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path, clock=ManualClock()) as broker:
        store = SlowStore(broker)
        await broker.add_many(1_000)
        delivered = await fetch_fast(broker, store)
        store.is_open.clear()
        claims_count, buffered_count = len(store.requested), broker.dispatcher.buffered_count
        while (delivery := broker.dispatcher.fetch_nowait(ANY)) is not None:
            delivered.append(delivery.name)
            await settled()
            left_count = broker.dispatcher.buffered_count
            assert len(store.requested) == claims_count + (left_count <= SMALL_CLAIM // 2), (left_count, buffered_count)
        assert broker.dispatcher.buffered_count == 0
        store.is_open.set()
        await settled()
        assert broker.dispatcher.buffered_count > SMALL_CLAIM
        while (delivery := await broker.dispatcher.fetch(ANY)) is not None:
            delivered.append(delivery.name)
        assert sorted(delivered) == sorted(f"id_{number}" for number in range(1_000))


async def test_prefetched_leases_stay_within_the_bound_when_claimed_early(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path, clock=ManualClock()) as broker:
        store = SlowStore(broker)
        await broker.add_many(3 * AHEAD_MAX)
        most = 0
        for _ in range(3 * AHEAD_MAX):
            assert await broker.dispatcher.fetch(ANY) is not None
            await settled()
            most = max(most, broker.dispatcher.buffered_count)
        assert max(store.requested) == AHEAD_MAX
        assert AHEAD_MAX <= most <= AHEAD_MAX * 3 // 2


async def test_small_buffers_are_not_refilled_before_a_fetch(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path, clock=ManualClock()) as broker:
        store = SlowStore(broker)
        await broker.add_many(100)
        for _ in range(4):
            await broker.dispatcher.fetch(ANY)
            await settled()
        assert (store.requested, broker.dispatcher.buffered_count) == ([4], 0)


async def test_slow_fetching_causes_no_prefetch(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock) as broker:
        store = SlowStore(broker)
        await broker.add_many(1_000)
        await fetch_fast(broker, store)
        clock.advance(0.9)
        claims_count = len(store.requested)
        while broker.dispatcher.fetch_nowait(ANY) is not None:
            await settled()
        assert len(store.requested) == claims_count


async def test_an_exhausted_queue_is_not_claimed_again_before_a_fetch(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path, clock=ManualClock()) as broker:
        store = SlowStore(broker)
        await broker.add_many(4 + 8 + 16 + 32 + SMALL_CLAIM + 100)
        delivered = await fetch_fast(broker, store)
        while broker.dispatcher.fetch_nowait(ANY) is not None:
            delivered.append("")
            await settled()
        assert (len(delivered), store.requested) == (4 + 8 + 16 + 32 + SMALL_CLAIM + 100, [4, 8, 16, 32, 64, 128])


async def test_a_failed_prefetch_is_repeated_at_the_next_fetch(tmp_path: Path) -> None:
    unheard: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unheard.append(context))
    async with running_broker("memory", tmp_path, clock=ManualClock()) as broker:
        store = SlowStore(broker)
        await broker.add_many(1_000)
        delivered = await fetch_fast(broker, store)
        store.faults = [StoreBroken("damaged")] * 2
        while (delivery := broker.dispatcher.fetch_nowait(ANY)) is not None:
            delivered.append(delivery.name)
            await settled()
        assert len(store.faults) == 1
        with pytest.raises(StoreBroken, match="damaged"):
            await broker.dispatcher.fetch(ANY)
        while (delivery := await broker.dispatcher.fetch(ANY)) is not None:
            delivered.append(delivery.name)
        assert len(delivered) == len(set(delivered)) == 1_000
    assert unheard == []


async def test_a_fetch_that_finds_the_buffer_empty_waits_for_a_claim_in_flight(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path, clock=ManualClock()) as broker:
        store = SlowStore(broker)
        await broker.add_many(3)
        store.is_open.clear()
        first = asyncio.create_task(broker.dispatcher.fetch(QueueFilter("app")))
        await settled()  # its claim has leased everything and is not answered yet
        shut, store.is_open = store.is_open, asyncio.Event()
        store.is_open.set()
        second = asyncio.create_task(broker.dispatcher.fetch(QueueFilter("app", ("mail",))))
        third = asyncio.create_task(broker.dispatcher.fetch(QueueFilter("other")))
        await settled()
        state = (len(store.requested), first.done(), second.done(), third.done())
        shut.set()
        fetched = await asyncio.gather(first, second, third)
        assert state == (3, False, False, True)
        assert [delivery is not None for delivery in fetched] == [True, True, False]


async def test_leases_claimed_while_the_server_stops_are_released(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path, clock=ManualClock()) as broker:
        store = SlowStore(broker)
        await broker.add_many(1_000)
        delivered = await fetch_fast(broker, store)
        store.is_open.clear()
        while broker.dispatcher.fetch_nowait(ANY) is not None:
            await settled()
        assert len(store.requested) > len(delivered) // SMALL_CLAIM
        stopping = asyncio.create_task(broker.dispatcher.stop())
        await settled()
        store.is_open.set()
        await stopping
        delivered_count = broker.dispatcher.delivered_count
        states = [view.state for view in await broker.runs()]
        assert states.count("waiting") == 1_000 - delivered_count, "workers have the others"
        other = BrokerRig(broker.engine)
        await other.dispatcher.start()
        for name in list(broker.dispatcher._delivered):
            await other.set(name, COMPLETE)
        assert len(await other.drain(4)) == 1_000 - delivered_count
        await other.dispatcher.stop()


async def test_a_stop_waits_once_for_all_claims_in_flight(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock) as broker:
        store = SlowStore(broker)
        store.is_open.clear()
        asking = [asyncio.create_task(broker.dispatcher.fetch(QueueFilter(name))) for name in ("app", "other", "third")]
        await settled()
        assert len(store.requested) == 3
        await clock.advance_async(CLAIM_WAIT_S)
        for task in asking:
            with pytest.raises(StoreUnavailable):
                await task
        stopping = asyncio.create_task(broker.dispatcher.stop())
        await settled()
        assert not stopping.done()
        await clock.advance_async(CLAIM_WAIT_S)
        await settled()
        assert stopping.done()
        store.is_open.set()


async def test_repeated_fetches_of_an_empty_store_do_not_increase_the_prefetch(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock) as broker:
        store = SlowStore(broker)
        for _ in range(20):
            assert await broker.dispatcher.fetch(ANY) is None
            clock.advance(0.15)
        assert store.requested == [AHEAD_MIN] * 20
