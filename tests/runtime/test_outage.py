"""Outages of a store: one task probes, everything else waits, and all of it continues with the first success."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise

import pytest

from headrace.compose import memory_engine
from headrace.foundation.errors import Conflict, HeadraceError, StoreBroken, StoreUnavailable, StoreUnreachable
from headrace.foundation.limits import DEFAULT
from headrace.handles import Outcome
from headrace.runtime.clock import SECOND_US, ManualClock
from headrace.runtime.flusher import Flusher
from headrace.runtime.outage import AT_ONCE, NEXT_S, PROBE_MAX_S, Outage
from headrace.runtime.retrying import backoff_s, retry_transient
from headrace.store.reachability import Reachability
from headrace.task import Task
from tests.support import invariants
from tests.support.engines import DetachableStore, app_on, detachable_engine

AWAY = StoreUnreachable("away")
OUTAGE_S = 10.0


class FlakyStore:
    """A store of which only the way to it matters."""

    def __init__(self) -> None:
        self.is_away = False
        self.probes_count = 0
        self.calls_us: list[int] = []
        self.clock = ManualClock()
        self.reachability = Reachability(self._probe)
        self.outage = Outage(self.reachability, jitter=lambda: 0.0)

    async def _probe(self) -> None:
        self.probes_count += 1
        if self.is_away:
            raise AWAY

    async def call(self) -> str:
        """Answer, or fail while the store is away."""
        self.calls_us.append(self.clock.now_us())
        if self.is_away:
            self.reachability.failed(AWAY)
            raise AWAY
        self.reachability.succeeded()
        return "answer"

    def retried(self, waits_max: int | None = None) -> asyncio.Task[str]:
        """Call until the store answers."""
        return asyncio.create_task(
            retry_transient(self.call, self.clock, what="the store", waits_max=waits_max, outage=self.outage)
        )


# -- two workers and a producer


@asynccontextmanager
async def cluster(
    clock: ManualClock, ran_us: dict[int, int]
) -> AsyncGenerator[tuple[Task[[int], None], list[DetachableStore]]]:
    """Start two workers, and return a task to enqueue. Each of the three processes has its own way to one store."""
    shared = await memory_engine(DEFAULT, clock)
    stores, tasks, apps = [], [], []

    async def note(number: int) -> None:
        ran_us.setdefault(number, clock.now_us())

    async with AsyncExitStack() as stack:
        for _ in range(3):
            engine, store = detachable_engine(shared, clock)
            app = await stack.enter_async_context(app_on(engine))
            stores.append(store)
            apps.append(app)
            tasks.append(app.task(name="note")(note))
        for app in apps[:2]:
            await stack.enter_async_context(app.worker(concurrency=4))
        yield tasks[2], stores
    assert await invariants.faults(shared.store, shared.environment) == []


async def test_after_an_outage_of_ten_seconds_runs_start_within_one_and_pick_up_is_normal_within_two() -> None:
    clock, ran_us, sent_us = ManualClock(), dict[int, int](), dict[int, int]()
    async with cluster(clock, ran_us) as (note, stores):
        pending = []

        async def produce(seconds: float) -> None:
            for _ in range(int(seconds * 20)):
                number = len(sent_us)
                sent_us[number] = clock.now_us()
                pending.append(asyncio.create_task(note.enqueue(number)))
                await clock.advance_async(0.05)

        await produce(3)
        assert len(ran_us) == 60
        lost_us = clock.now_us()
        for store in stores:
            store.is_away = True
        await produce(OUTAGE_S)
        assert len(ran_us) == 60
        for store in stores:
            sent = store.sent_since(lost_us)
            assert OUTAGE_S - 1 <= sent.pop("probe") <= OUTAGE_S / PROBE_MAX_S + 5
            assert sum(sent.values()) <= 8, sent  # what was in flight, and the heartbeats
            times_us = [at_us for at_us, name in store.sent if name == "probe"]
            assert max(after - before for before, after in pairwise(times_us)) <= PROBE_MAX_S * SECOND_US
        back_us = clock.now_us()
        for store in stores:
            store.is_away = False
        await produce(5)
        assert min(at_us for at_us in ran_us.values() if at_us >= back_us) <= back_us + PROBE_MAX_S * SECOND_US
        late = [number for number, at_us in sent_us.items() if at_us >= back_us + 2 * SECOND_US]
        assert max(ran_us[number] - sent_us[number] for number in late) <= 50_000
        await asyncio.gather(*pending)
    assert sorted(ran_us) == sorted(sent_us)


# -- waiting


async def test_while_a_store_is_away_one_task_probes_and_the_others_send_nothing() -> None:
    store = FlakyStore()
    store.is_away = True
    calls = [store.retried() for _ in range(50)]
    await store.clock.advance_async(60)
    assert len(store.calls_us) == 50  # each found out once, or waited for the one that did
    assert 60 <= store.probes_count <= 90
    store.is_away = False
    await store.clock.advance_async(PROBE_MAX_S + 1)
    assert [await call for call in calls] == ["answer"] * 50
    await store.clock.advance_async(60)
    assert store.probes_count <= 91


async def test_tasks_that_wait_for_a_store_continue_a_few_at_a_time() -> None:
    store = FlakyStore()
    store.is_away = True
    calls = [store.retried() for _ in range(3 * AT_ONCE)]
    await store.clock.advance_async(5)
    store.calls_us.clear()
    store.is_away = False
    store.reachability.succeeded()
    await store.clock.advance_async(0)
    assert len(store.calls_us) == AT_ONCE
    await store.clock.advance_async(NEXT_S)
    assert len(store.calls_us) == 2 * AT_ONCE
    await store.clock.advance_async(NEXT_S)
    assert all(call.done() for call in calls)


@pytest.mark.parametrize(
    "error", [Conflict("no"), StoreBroken("no"), StoreUnavailable("its disk is full"), ValueError("no")]
)
async def test_an_error_that_says_nothing_about_the_way_to_the_store_starts_no_outage(error: Exception) -> None:
    store = FlakyStore()
    errors = [error]

    async def call() -> str:
        if errors:
            raise errors.pop()
        return await store.call()

    retried = asyncio.create_task(retry_transient(call, store.clock, what="the store", outage=store.outage))
    await store.clock.advance_async(1)
    await asyncio.wait([retried])
    assert store.outage.is_over
    assert store.probes_count == 0
    assert retried.exception() in (None, error)


async def test_a_call_that_loses_its_own_connection_each_time_backs_off_although_the_store_answers() -> None:
    store, calls_us = FlakyStore(), list[int]()

    async def call() -> None:
        calls_us.append(store.clock.now_us())
        store.reachability.failed(AWAY)
        raise AWAY

    retried = asyncio.create_task(retry_transient(call, store.clock, what="the store", outage=store.outage))
    await store.clock.advance_async(30)
    assert len(calls_us) <= 14
    retried.cancel()


async def test_a_call_with_bounded_waits_fails_after_the_time_of_its_waits() -> None:
    store = FlakyStore()
    store.is_away = True
    began_us = store.clock.now_us()
    call = store.retried(waits_max=6)
    call.add_done_callback(lambda _: ended_us.append(store.clock.now_us()))
    ended_us: list[int] = []
    await store.clock.advance_async(60)
    with pytest.raises(StoreUnreachable):
        await call
    assert (ended_us[0] - began_us) / SECOND_US == pytest.approx(sum(backoff_s(count) for count in range(1, 7)))


async def test_a_flush_continues_with_the_first_success_of_any_other_operation() -> None:
    store = FlakyStore()
    flushed: list[int] = []

    async def flush(updates: object) -> None:
        await store.call()
        flushed.append(store.clock.now_us())

    refused: list[HeadraceError] = []
    flusher: Flusher[int] = Flusher(
        flush, name="test", clock=store.clock, on_refused=lambda _, error: refused.append(error), outage=store.outage
    )
    store.is_away = True
    flusher.put_nowait(1)
    await store.clock.advance_async(20.1)
    tries_count = len(store.calls_us)
    store.is_away = False
    await store.call()
    await store.clock.advance_async(0)
    assert flushed == [store.clock.now_us()]
    assert tries_count == 1
    await flusher.close()


async def test_a_flusher_that_closes_during_an_outage_does_not_wait_for_its_end() -> None:
    store = FlakyStore()
    store.is_away = True

    async def flush(updates: object) -> None:
        await store.call()

    flusher: Flusher[int] = Flusher(
        flush, name="test", clock=store.clock, on_refused=lambda _, error: None, outage=store.outage
    )
    flusher.put_nowait(1)
    await store.clock.advance_async(20)
    closing = asyncio.create_task(flusher.close(deadline_s=3))
    await store.clock.advance_async(3)
    with pytest.raises(HeadraceError, match="were not written"):
        await closing
    assert len(store.calls_us) == 2


async def test_a_success_in_another_thread_ends_the_waits_of_every_event_loop() -> None:
    store = FlakyStore()
    store.reachability.failed(AWAY)
    waiting = asyncio.create_task(store.outage.until_over(ManualClock()))
    await asyncio.sleep(0)
    await asyncio.to_thread(store.reachability.succeeded)
    assert await waiting


# -- callers that wait for runs


async def test_a_caller_that_waits_for_a_result_waits_through_an_outage() -> None:
    clock = ManualClock()
    engine, store = detachable_engine(await memory_engine(DEFAULT, clock), clock)
    async with app_on(engine) as app:
        gate = asyncio.Event()

        @app.task
        async def double(number: int) -> int:
            await gate.wait()
            return 2 * number

        async with app.worker():
            run, batch = await double.enqueue(2), await double.map([3])
            result, end = asyncio.create_task(run.result()), asyncio.create_task(batch.wait())
            results = asyncio.create_task(collected(batch.results()))
            impatient = asyncio.create_task(run.result(timeout_s=5))
            await clock.advance_async(1)
            store.is_away = True
            await clock.advance_async(60)
            with pytest.raises(HeadraceError):
                await impatient
            with pytest.raises(StoreUnreachable):
                await run.result()  # the first read of this caller
            gate.set()
            store.is_away = False
            await clock.advance_async(5)
            assert (await result, (await end).completed) == (4, 1)
            assert await results == [6]


async def collected(outcomes: AsyncIterator[Outcome[int]]) -> list[int | None]:
    """Return the outputs."""
    return [outcome.output async for outcome in outcomes]
