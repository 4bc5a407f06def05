"""Dispatching: deadlines, lapsed servers, release of unrequested leases, pushing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from headrace.core.failure import decode
from headrace.foundation.errors import StoreUnavailable
from headrace.grpc.transport.status import Code
from headrace.runtime.clock import ManualClock
from headrace.runtime.dispatch.lease_buffer import QueueFilter
from headrace.runtime.dispatch.prefetcher import AHEAD_MAX
from headrace.runtime.maintenance.upkeep import Upkeep
from headrace.store.protocol import Suspects
from tests.support.broker import (
    COMPLETE,
    DEADLETTER,
    FAILURE,
    RETRY,
    BrokerRig,
    activation,
    engine_on,
    ids,
    on_databases,
    on_every_store,
    running_broker,
    status_of_error,
)
from tests.support.engines import Faulty

ANY = QueueFilter()


async def types_of_failures(broker: BrokerRig) -> list[str]:
    results = []
    for view in await broker.runs():
        if view.state == "failed":
            results.append(decode((await broker.engine.store.run(view.batch_id, view.index)).result).type)
    return results


# -- deadlines


@on_every_store
async def test_r6_a_fenced_report_after_the_deadline_changes_nothing(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock, is_fenced=True) as broker:
        await broker.add_many(2)
        late, in_time = await broker.get(), await broker.get()
        clock.advance(12.9)  # 10 s of deadline and 3 s of grace
        await broker.tick()
        assert await broker.counts() == {"processing": 2}
        await broker.set(in_time.id, COMPLETE)
        clock.advance(0.2)
        await broker.tick()
        again = await broker.get()
        assert (again.id, again.retry_state.attempts) == ("id_0~2.0", 0), "no attempt is used up"
        await broker.set(late.id, COMPLETE)
        assert await broker.counts() == {"completed": 1, "processing": 1}
        await broker.set(again.id, COMPLETE)
        assert await broker.counts() == {"completed": 2}


@on_every_store
async def test_a_run_past_its_deadline_too_often_fails_and_becomes_a_dead_letter_if_requested(
    kind: str, tmp_path: Path
) -> None:
    clock = ManualClock()
    async with running_broker(
        kind, tmp_path, clock=clock, is_fenced=True, limits={"delivery_attempts_max": 3}
    ) as broker:
        await broker.add(activation(0, retry={"on_attempts_exceeded": DEADLETTER}), activation(1))
        for overdue_count in range(3):
            tasks = [await broker.get(), await broker.get()]
            assert len({task.id for task in tasks}) == 2
            assert all(task.id.endswith(f"~{overdue_count + 1}.0") for task in tasks if overdue_count)
            clock.advance(14)
            await broker.tick()
        assert (await status_of_error(broker.get()))[0] == Code.NOT_FOUND
        assert await types_of_failures(broker) == ["DeliveryAttemptsExceeded"] * 2
        assert len(await broker.engine.store.dead_letters("default")) == 1


@on_every_store
async def test_an_at_most_once_run_fails_at_its_deadline(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        await broker.add(activation(0, retry={"at_most_once": True}))
        task = await broker.get()
        assert task.id == "id_0"
        clock.advance(14)
        await broker.tick()
        assert (await status_of_error(broker.get()))[0] == Code.NOT_FOUND
        await broker.set(task.id, COMPLETE)
        assert await broker.counts() == {"failed": 1}
        assert await types_of_failures(broker) == ["DeadlineExceeded"]


async def test_a_retry_resets_the_overdue_count_and_keeps_changes_of_earlier_reports(
    tmp_path: Path,
) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock, is_fenced=True) as broker:
        await broker.add_many(1)
        await broker.set((await broker.get()).id, RETRY, max_attempts=9, delay_on_retry=0)
        assert (await broker.get()).id == "id_0~2.0"
        clock.advance(14)
        await broker.tick()
        again = await broker.get()
        assert (again.id, again.retry_state.max_attempts, again.retry_state.attempts) == ("id_0~3.0", 9, 1)
        await broker.set(again.id, RETRY)
        assert (await broker.get()).id == "id_0~4.0"


@pytest.mark.parametrize(("seconds", "is_over"), [(0, 4), (1, 5), (3_600, 3_604)])
async def test_the_deadline_is_that_of_the_activation_plus_the_grace(
    seconds: int, is_over: int, tmp_path: Path
) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock) as broker:
        await broker.add(activation(0, processing_deadline_duration=seconds))
        await broker.get()
        clock.advance(seconds + 2)
        await broker.tick()
        assert broker.dispatcher.overdue_count == 0
        clock.advance(is_over - seconds - 2)
        await broker.tick()
        assert broker.dispatcher.overdue_count == 1


async def test_the_dispatcher_enforces_deadlines_without_ticks(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock) as broker:
        await broker.add_many(1)
        await broker.get()
        await clock.advance_async(14)
        assert await broker.counts() == {"waiting": 1}


async def test_a_clock_jump_counts_a_run_as_overdue_once(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock, is_fenced=True) as broker:
        await broker.add_many(3)
        names = [(await broker.get()).id for _ in range(3)]
        clock.advance(400 * 86_400)
        await broker.tick()
        await broker.tick()
        assert broker.dispatcher.overdue_count == 3
        for name in names:
            await broker.set(name, COMPLETE)
        assert await broker.counts() == {"waiting": 3}


# -- expiry, delays


@on_every_store
async def test_expired_activations_are_not_delivered_even_when_already_buffered(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        messages = [activation(n, expires=s, processing_deadline_duration=999) for n, s in enumerate((5, 60, 900))]
        for message in messages:
            message.received_at.FromMicroseconds(clock.now_us())
        await broker.add(*messages)
        clock.advance(7)
        assert (await broker.get()).id == "id_1"
        clock.advance(60)
        assert (await broker.get()).id == "id_2"
        assert (await broker.counts()).get("expired", 0) <= 1
        await Upkeep(broker.engine).sweep()
        await broker.set("id_1", COMPLETE)
        await broker.set("id_2", COMPLETE)
        assert await broker.counts() == {"completed": 2, "expired": 1}


@on_every_store
async def test_an_activation_that_expires_in_the_lease_buffer_is_recorded_as_expired(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        messages = [activation(number, expires=5) for number in range(3)]
        for message in messages:
            message.received_at.FromMicroseconds(clock.now_us())
        await broker.add(*messages)
        await broker.get()
        assert broker.dispatcher.buffered_count == 2
        clock.advance(7)
        assert (await status_of_error(broker.get()))[0] == Code.NOT_FOUND
        await broker.set("id_0", COMPLETE)
        assert await broker.counts() == {"completed": 1, "expired": 2}


@on_every_store
async def test_a_delayed_activation_waits_and_its_delay_is_clamped_to_the_limit(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        messages = [activation(0, delay=30), activation(1, delay=10**9), activation(2, delay=0)]
        for message in messages:
            message.received_at.FromMicroseconds(clock.now_us())
        await broker.add(*messages)
        for name, seconds in (("id_2", 32), ("id_0", 3_800), ("id_1", 0)):
            task = await broker.get()
            assert task.id == name
            assert await broker.set(task.id, COMPLETE, fetch={}) is None
            clock.advance(seconds)
        assert broker.engine.limits.delivery_delay_max_s == 3_600


# -- order and sharing


@on_every_store
async def test_a_queue_is_delivered_in_order_of_arrival(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        names = await broker.add_many(700)
        assert await broker.drain(1) == names


@on_every_store
async def test_concurrent_fetches_get_different_activations(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        names = await broker.add_many(300)
        results = await asyncio.gather(*(broker.get() for _ in range(300)))
        assert sorted(ids(results)) == sorted(names)
        await broker.set_batch(*((task.id, COMPLETE) for task in results))


@on_databases
async def test_servers_on_one_database_share_the_activations(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        names = await broker.add_many(1_000)
        others = [BrokerRig(broker.engine) for _ in range(2)]
        for other in others:
            await other.dispatcher.start()
        delivered = await asyncio.gather(*(rig.drain(4) for rig in (broker, *others)))
        assert sorted(name for delivered_names in delivered for name in delivered_names) == sorted(names)
        for other in others:
            await other.dispatcher.stop()
        assert await broker.counts() == {"completed": 1_000}


async def test_few_fetches_lease_few_activations_and_unrequested_leases_are_released(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock) as broker:
        await broker.add_many(100)
        await broker.get()
        assert broker.dispatcher.buffered_count < 10
        clock.advance(1.5)
        await broker.tick()
        assert broker.dispatcher.buffered_count == 0
        other = BrokerRig(broker.engine)
        await other.dispatcher.start()
        delivered = await other.drain(1)
        assert len(delivered) == 99
        await other.dispatcher.stop()
        await broker.set("id_0", COMPLETE)


async def test_fast_fetching_increases_the_lease_buffer_up_to_its_bound(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock) as broker:
        await broker.add_many(3_000)
        most = 0
        for _ in range(3_000):
            await broker.dispatcher.fetch(ANY)
            most = max(most, broker.dispatcher.buffered_count)
        assert 500 < most <= AHEAD_MAX


async def test_the_number_of_deliveries_in_flight_is_bounded(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path, limits={"deliveries_max": 3}) as broker:
        await broker.add_many(5)
        names = [(await broker.get()).id for _ in range(3)]
        assert (await status_of_error(broker.get()))[0] == Code.NOT_FOUND
        await broker.set(names[0], COMPLETE)
        assert (await broker.get()).id == "id_3"


async def test_a_cancelled_batch_is_no_longer_delivered(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock) as broker:
        await broker.add_many(4)
        task = await broker.get()
        batch_id = (await broker.runs())[0].batch_id
        await broker.engine.store.stop_batch(batch_id, "cancelled", now_us=clock.now_us())
        await clock.advance_async(6)  # the heartbeat reports the need of others, and the next round releases leases
        assert (await status_of_error(broker.get()))[0] == Code.NOT_FOUND
        await broker.set(task.id, COMPLETE)
        assert await broker.counts() == {"cancelled": 3, "completed": 1}


async def test_an_empty_answer_costs_no_store_query_until_a_notification(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock) as broker:
        counted = Faulty(broker.engine.store)
        broker.engine.store = counted
        for _ in range(50):
            assert (await status_of_error(broker.get()))[0] == Code.NOT_FOUND
        assert counted.calls.count("claim") == 1
        await broker.add_many(1)
        assert (await broker.get()).id == "id_0"
        clock.advance(1)
        assert (await status_of_error(broker.get()))[0] == Code.NOT_FOUND
        assert counted.calls.count("claim") == 3


async def test_a_claim_waits_for_an_unavailable_store_only_for_a_bounded_time(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock) as broker:
        await broker.add_many(1)
        faulty = Faulty(broker.engine.store)
        faulty.before["claim"] = [StoreUnavailable("away")] * 12
        broker.engine.store = faulty
        fetch = asyncio.create_task(broker.get())
        await clock.advance_async(6)
        assert (await status_of_error(fetch))[0] == Code.INTERNAL
        await clock.advance_async(60)
        assert (await broker.get()).id == "id_0"
        await broker.set("id_0", COMPLETE)


# -- servers that stop or lapse


@on_every_store
async def test_a_server_that_stops_releases_undelivered_leases(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(10)
        other = BrokerRig(broker.engine)
        await other.dispatcher.start()
        task = await other.get()
        await other.set(task.id, COMPLETE)
        await other.dispatcher.stop()
        await other.dispatcher.stop()
        broker.engine.wakeup.notify()
        assert len(await broker.drain(2)) == 9


@on_every_store
async def test_r6_runs_of_a_stopped_server_are_settled_through_another_server(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add(activation(0), activation(1, retry={"at_most_once": True}), activation(2))
        other = BrokerRig(broker.engine)
        await other.dispatcher.start()
        assert {(await other.get()).id for _ in range(3)} == {"id_0", "id_1", "id_2"}
        await other.dispatcher.stop()
        await broker.set("id_0", COMPLETE)
        await broker.set("id_1", COMPLETE)
        await broker.set("id_2", RETRY)
        assert [view.state for view in await broker.runs()] == ["completed", "completed", "waiting"]
        assert (await broker.get()).id == "id_2"
        await broker.set("id_2", COMPLETE)


@on_every_store
async def test_runs_of_a_lapsed_server_are_delivered_again_after_the_grace(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock, limits={"delivery_recovery_ms": 30_000}) as broker:
        await broker.add(activation(0), activation(1, retry={"at_most_once": True}))
        other = BrokerRig(broker.engine)
        await other.dispatcher.start()
        names = [(await other.get()).id for _ in range(2)]
        await other.dispatcher.stop()
        upkeep = Upkeep(broker.engine)
        clock.advance(20)
        await broker.engine.store.heartbeat(broker.dispatcher._session.session_id, now_us=clock.now_us())
        await upkeep.round()
        assert (await status_of_error(broker.get()))[0] == Code.NOT_FOUND
        clock.advance(15)
        await broker.engine.store.heartbeat(broker.dispatcher._session.session_id, now_us=clock.now_us())
        await upkeep.round()
        again = await broker.get()
        assert again.id == names[0]
        assert (await status_of_error(broker.get()))[0] == Code.NOT_FOUND
        assert await types_of_failures(broker) == ["WorkerLost"]
        await broker.set(again.id, COMPLETE)


@on_every_store
async def test_a_server_whose_session_lapsed_continues_with_a_new_session(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(5)
        task = await broker.get()
        engine = broker.engine
        await engine.maintenance.recover(
            broker.dispatcher._session.session_id,
            Suspects(span_slots=None, evidence="thawed"),
            silent_since_us=2**62,
            crashes_max=3,
            now_us=engine.clock.now_us(),
        )
        await broker.set(task.id, FAILURE)
        assert (await broker.counts()).get("failed", 0) == 0, "the lease was lost, and the report with it"
        broker.dispatcher._session._on_session_lost(broker.dispatcher._session.session_id)
        delivered = await broker.drain(1)
        assert sorted(delivered) == [f"id_{number}" for number in range(5)]
        assert await broker.counts() == {"completed": 5}


async def test_an_engine_that_starts_after_another_settles_reports_by_id(tmp_path: Path) -> None:
    async with running_broker("sqlite", tmp_path) as broker:
        await broker.add_many(3)
        names = [(await broker.get()).id for _ in range(2)]
        await broker.dispatcher.stop()
        engine = await engine_on("sqlite", tmp_path)
        again = BrokerRig(engine)
        await again.dispatcher.start()
        await again.set(names[0], COMPLETE)
        assert [view.state for view in await again.runs()] == ["completed", "leased", "waiting"]
        await again.set(names[1], COMPLETE)
        assert await again.drain(1) == ["id_2"]
        await again.dispatcher.stop()
        await engine.close()


# -- pushing


@on_every_store
async def test_taken_activations_are_marked_or_released_with_attempts_unchanged(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock, delivery="push") as broker:
        await broker.add_many(3)
        taken = await broker.dispatcher.take(QueueFilter("app"), 2, lease_ms=5_000)
        assert [delivery.name for delivery in taken] == ["id_0", "id_1"]
        assert broker.dispatcher.mark(["id_0", "nobody"]) == 1
        assert broker.dispatcher.mark(["id_0"]) == 0
        assert broker.dispatcher.put_back(["id_1", "id_0"]) == 1
        again = await broker.dispatcher.take(QueueFilter("app"), 9, lease_ms=5_000)
        assert [delivery.name for delivery in again] == ["id_1", "id_2"], (
            "released activations are delivered first, under their own ids"
        )
        assert broker.dispatcher.mark(["id_1"]) == 0, "that delivery was released"
        assert [delivery.key for delivery in again] == ["id_1~1.1", "id_2"]
        broker.dispatcher.mark(["id_1~1.1"])
        clock.advance(6)
        await broker.tick()
        (back,) = await broker.dispatcher.take(QueueFilter("app"), 9, lease_ms=5_000)
        assert back.name == "id_2", "an activation that was neither marked nor released is claimable after its lease"
        assert broker.dispatcher.mark(["id_2"]) == 0, "the mark of a delivery that was given up comes too late"
        broker.dispatcher.mark([back.key])
        await broker.set_batch(*((f"id_{number}", COMPLETE) for number in range(3)))
        assert await broker.counts() == {"completed": 3}


async def test_a_report_that_arrives_before_the_mark_is_kept(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path, delivery="push") as broker:
        await broker.add_many(1)
        await broker.dispatcher.take(QueueFilter("app"), 1, lease_ms=5_000)
        await broker.set("id_0", COMPLETE)
        assert broker.dispatcher.mark(["id_0"]) == 0
        assert await broker.counts() == {"completed": 1}


async def test_activations_released_to_the_buffer_return_to_the_store_when_the_server_stops(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path) as broker:
        await broker.add_many(2)
        other = BrokerRig(broker.engine)
        await other.dispatcher.start()
        await other.dispatcher.take(QueueFilter("app"), 2, lease_ms=5_000)
        other.dispatcher.put_back(["id_0", "id_1"])
        await other.dispatcher.stop()
        broker.engine.wakeup.notify()
        assert sorted(await broker.drain(1)) == ["id_0", "id_1"]


async def test_a_buffered_run_that_was_settled_by_id_elsewhere_is_not_delivered(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock) as broker:
        await broker.add_many(3)
        other = BrokerRig(broker.engine)
        await other.dispatcher.start()
        names = [(await other.get()).id for _ in range(3)]
        await other.dispatcher.stop()
        clock.advance(16)
        await broker.engine.store.heartbeat(broker.dispatcher._session.session_id, now_us=clock.now_us())
        await Upkeep(broker.engine).round()
        assert (await broker.get()).id == names[0], "its server lapsed, and it is delivered again"
        assert broker.dispatcher.buffered_count == 2
        await broker.set(names[1], COMPLETE)  # reported by the worker that got it from the lapsed server
        assert await broker.drain(1) == [names[2]]
        await broker.set(names[0], COMPLETE)
        assert await broker.counts() == {"completed": 3}


async def test_a_report_that_was_rejected_can_be_repeated(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock) as broker:
        names = await broker.add_many(4_200)
        for _ in names:
            await broker.dispatcher.fetch(ANY)
        faulty = Faulty(broker.engine.store)
        faulty.before["settle"] = [StoreUnavailable("away")] * 3
        broker.engine.store = faulty
        waiting = [asyncio.create_task(broker.set(name, COMPLETE)) for name in names]
        await clock.settle()
        assert broker.dispatcher.reports_depth == 4_096, (
            "no further reports are accepted while the store is unavailable"
        )
        late = waiting[-1]
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        await clock.advance_async(10)
        await asyncio.gather(*waiting[:-1])
        assert await broker.counts() == {"completed": 4_199, "processing": 1}
        await broker.set(names[-1], COMPLETE)
        assert await broker.counts() == {"completed": 4_200}


async def test_reported_runs_leave_no_deadline_or_buffered_bytes(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path) as broker:
        await broker.add_many(500)
        await broker.drain(5)
        assert broker.dispatcher._deadlines.next_us is None
        assert not any(broker.dispatcher._deadlines._buckets.values())
        assert broker.dispatcher._buffer.bytes_count == 0


async def test_a_paused_queue_is_no_longer_delivered(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock) as broker:
        await broker.add_many(20)
        await broker.get()
        await broker.engine.store.pause_queue("default", "app:mail", paused=True)
        clock.advance(2)
        await broker.tick()  # prefetched leases are released
        assert (await status_of_error(broker.get()))[0] == Code.NOT_FOUND
        await broker.engine.store.pause_queue("default", "app:mail", paused=False)
        broker.engine.wakeup.notify()
        assert len(await broker.drain(1)) == 19
        await broker.set("id_0", COMPLETE)
