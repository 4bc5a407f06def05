"""How activations get into workers' hands and back: deadlines, dead servers, what nobody asks for, pushing."""

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
    Broker,
    activation,
    broker,
    engine_on,
    ids,
    on_databases,
    on_every_store,
    refused,
)
from tests.support.engines import Faulty

ANY = QueueFilter()


async def types_of_failures(own: Broker) -> list[str]:
    found = []
    for view in await own.runs():
        if view.state == "failed":
            found.append(decode((await own.engine.store.run(view.batch_id, view.index)).result).type)
    return found


# -- deadlines


@on_every_store
async def test_r6_a_report_after_the_deadline_changes_nothing(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker(kind, tmp_path, clock=clock) as own:
        await own.filled(2)
        late, in_time = await own.get(), await own.get()
        clock.advance(12.9)  # 10 s to do it in, and 3 s of grace
        await own.tick()
        assert await own.counts() == {"processing": 2}
        await own.set(in_time.id, COMPLETE)
        clock.advance(0.2)
        await own.tick()
        again = await own.get()
        assert (again.id, again.retry_state.attempts) == ("id_0~1.1", 0), "no attempt is used up"
        await own.set(late.id, COMPLETE)
        assert await own.counts() == {"completed": 1, "processing": 1}
        await own.set(again.id, COMPLETE)
        assert await own.counts() == {"completed": 2}


@on_every_store
async def test_a_run_past_its_deadline_too_often_fails_and_becomes_a_dead_letter_if_requested(
    kind: str, tmp_path: Path
) -> None:
    clock = ManualClock()
    async with broker(kind, tmp_path, clock=clock, limits={"delivery_attempts_max": 3}) as own:
        await own.add(activation(0, retry={"on_attempts_exceeded": DEADLETTER}), activation(1))
        for overdue_count in range(3):
            tasks = [await own.get(), await own.get()]
            assert len({task.id for task in tasks}) == 2
            assert all(task.id.endswith(f"~1.{overdue_count}") for task in tasks if overdue_count)
            clock.advance(14)
            await own.tick()
        assert (await refused(own.get()))[0] == Code.NOT_FOUND
        assert await types_of_failures(own) == ["DeliveryAttemptsExceeded"] * 2
        assert len(await own.engine.store.dead_letters("default")) == 1


@on_every_store
async def test_an_at_most_once_run_fails_at_its_deadline(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker(kind, tmp_path, clock=clock) as own:
        await own.add(activation(0, retry={"at_most_once": True}))
        task = await own.get()
        assert task.id == "id_0"
        clock.advance(14)
        await own.tick()
        assert (await refused(own.get()))[0] == Code.NOT_FOUND
        await own.set(task.id, COMPLETE)
        assert await own.counts() == {"failed": 1}
        assert await types_of_failures(own) == ["DeadlineExceeded"]


async def test_a_retry_resets_the_overdue_count_and_keeps_changes_of_earlier_reports(
    tmp_path: Path,
) -> None:
    clock = ManualClock()
    async with broker("memory", tmp_path, clock=clock) as own:
        await own.filled(1)
        await own.set((await own.get()).id, RETRY, max_attempts=9, delay_on_retry=0)
        assert (await own.get()).id == "id_0~2.0"
        clock.advance(14)
        await own.tick()
        again = await own.get()
        assert (again.id, again.retry_state.max_attempts, again.retry_state.attempts) == ("id_0~2.1", 9, 1)
        await own.set(again.id, RETRY)
        assert (await own.get()).id == "id_0~3.0"


@pytest.mark.parametrize(("seconds", "is_over"), [(0, 4), (1, 5), (3_600, 3_604)])
async def test_the_deadline_is_that_of_the_activation_plus_the_grace(
    seconds: int, is_over: int, tmp_path: Path
) -> None:
    clock = ManualClock()
    async with broker("memory", tmp_path, clock=clock) as own:
        await own.add(activation(0, processing_deadline_duration=seconds))
        await own.get()
        clock.advance(seconds + 2)
        await own.tick()
        assert own.dispatcher.overdue_count == 0
        clock.advance(is_over - seconds - 2)
        await own.tick()
        assert own.dispatcher.overdue_count == 1


async def test_the_dispatcher_enforces_deadlines_without_ticks(tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker("memory", tmp_path, clock=clock) as own:
        await own.filled(1)
        await own.get()
        await clock.advance_async(14)
        assert await own.counts() == {"waiting": 1}


async def test_a_clock_jump_counts_a_run_as_overdue_once(tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker("memory", tmp_path, clock=clock) as own:
        await own.filled(3)
        names = [(await own.get()).id for _ in range(3)]
        clock.advance(400 * 86_400)
        await own.tick()
        await own.tick()
        assert own.dispatcher.overdue_count == 3
        for name in names:
            await own.set(name, COMPLETE)
        assert await own.counts() == {"waiting": 3}


# -- expiry, delays


@on_every_store
async def test_expired_activations_are_not_delivered_even_when_already_buffered(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker(kind, tmp_path, clock=clock) as own:
        messages = [activation(n, expires=s, processing_deadline_duration=999) for n, s in enumerate((5, 60, 900))]
        for message in messages:
            message.received_at.FromMicroseconds(clock.now_us())
        await own.add(*messages)
        clock.advance(7)
        assert (await own.get()).id == "id_1"
        clock.advance(60)
        assert (await own.get()).id == "id_2"
        assert (await own.counts()).get("expired", 0) <= 1
        await Upkeep(own.engine).sweep()
        await own.set("id_1", COMPLETE)
        await own.set("id_2", COMPLETE)
        assert await own.counts() == {"completed": 2, "expired": 1}


@on_every_store
async def test_an_activation_that_expires_in_the_lease_buffer_is_recorded_as_expired(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker(kind, tmp_path, clock=clock) as own:
        messages = [activation(number, expires=5) for number in range(3)]
        for message in messages:
            message.received_at.FromMicroseconds(clock.now_us())
        await own.add(*messages)
        await own.get()
        assert own.dispatcher.line_count == 2
        clock.advance(7)
        assert (await refused(own.get()))[0] == Code.NOT_FOUND
        await own.set("id_0", COMPLETE)
        assert await own.counts() == {"completed": 1, "expired": 2}


@on_every_store
async def test_a_delayed_activation_waits_and_its_delay_is_clamped_to_the_limit(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker(kind, tmp_path, clock=clock) as own:
        messages = [activation(0, delay=30), activation(1, delay=10**9), activation(2, delay=0)]
        for message in messages:
            message.received_at.FromMicroseconds(clock.now_us())
        await own.add(*messages)
        for name, seconds in (("id_2", 32), ("id_0", 3_800), ("id_1", 0)):
            task = await own.get()
            assert task.id == name
            assert await own.set(task.id, COMPLETE, fetch={}) is None
            clock.advance(seconds)
        assert own.engine.limits.delivery_delay_max_s == 3_600


# -- order and shares


@on_every_store
async def test_a_queue_is_delivered_in_order_of_arrival(kind: str, tmp_path: Path) -> None:
    async with broker(kind, tmp_path) as own:
        names = await own.filled(700)
        assert await own.drained(1) == names


@on_every_store
async def test_concurrent_fetches_get_different_activations(kind: str, tmp_path: Path) -> None:
    async with broker(kind, tmp_path) as own:
        names = await own.filled(300)
        found = await asyncio.gather(*(own.get() for _ in range(300)))
        assert sorted(ids(found)) == sorted(names)
        await own.set_batch(*((task.id, COMPLETE) for task in found))


@on_databases
async def test_servers_on_one_database_share_the_activations(kind: str, tmp_path: Path) -> None:
    async with broker(kind, tmp_path) as own:
        names = await own.filled(1_000)
        others = [Broker(own.engine) for _ in range(2)]
        for other in others:
            await other.dispatcher.start()
        had = await asyncio.gather(*(one.drained(4) for one in (own, *others)))
        assert sorted(name for one in had for name in one) == sorted(names)
        for other in others:
            await other.dispatcher.stop()
        assert await own.counts() == {"completed": 1_000}


async def test_few_fetches_lease_few_activations_and_unrequested_leases_are_released(tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker("memory", tmp_path, clock=clock) as own:
        await own.filled(100)
        await own.get()
        assert own.dispatcher.line_count < 10
        clock.advance(1.5)
        await own.tick()
        assert own.dispatcher.line_count == 0
        other = Broker(own.engine)
        await other.dispatcher.start()
        had = await other.drained(1)
        assert len(had) == 99
        await other.dispatcher.stop()
        await own.set("id_0", COMPLETE)


async def test_fast_fetching_increases_the_lease_buffer_up_to_its_bound(tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker("memory", tmp_path, clock=clock) as own:
        await own.filled(3_000)
        most = 0
        for _ in range(3_000):
            await own.dispatcher.fetch(ANY)
            most = max(most, own.dispatcher.line_count)
        assert 500 < most <= AHEAD_MAX


async def test_the_number_of_deliveries_in_flight_is_bounded(tmp_path: Path) -> None:
    async with broker("memory", tmp_path, limits={"deliveries_max": 3}) as own:
        await own.filled(5)
        names = [(await own.get()).id for _ in range(3)]
        assert (await refused(own.get()))[0] == Code.NOT_FOUND
        await own.set(names[0], COMPLETE)
        assert (await own.get()).id == "id_3"


async def test_a_cancelled_batch_is_no_longer_delivered(tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker("memory", tmp_path, clock=clock) as own:
        await own.filled(4)
        task = await own.get()
        batch_id = (await own.runs())[0].batch_id
        await own.engine.store.stop_batch(batch_id, "cancelled", now_us=clock.now_us())
        await clock.advance_async(6)  # a heartbeat tells, and the next round gives back
        assert (await refused(own.get()))[0] == Code.NOT_FOUND
        await own.set(task.id, COMPLETE)
        assert await own.counts() == {"cancelled": 3, "completed": 1}


async def test_an_empty_answer_costs_no_store_query_until_a_notification(tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker("memory", tmp_path, clock=clock) as own:
        counted = Faulty(own.engine.store)
        own.engine.store = counted
        for _ in range(50):
            assert (await refused(own.get()))[0] == Code.NOT_FOUND
        assert counted.calls.count("claim") == 1
        await own.filled(1)
        assert (await own.get()).id == "id_0"
        clock.advance(1)
        assert (await refused(own.get()))[0] == Code.NOT_FOUND
        assert counted.calls.count("claim") == 3


async def test_a_claim_waits_for_an_unavailable_store_only_for_a_bounded_time(tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker("memory", tmp_path, clock=clock) as own:
        await own.filled(1)
        faulty = Faulty(own.engine.store)
        faulty.before["claim"] = [StoreUnavailable("away")] * 12
        own.engine.store = faulty
        asked = asyncio.create_task(own.get())
        await clock.advance_async(6)
        assert (await refused(asked))[0] == Code.INTERNAL
        await clock.advance_async(60)
        assert (await own.get()).id == "id_0"
        await own.set("id_0", COMPLETE)


# -- servers that end


@on_every_store
async def test_a_server_that_stops_releases_undelivered_leases(kind: str, tmp_path: Path) -> None:
    async with broker(kind, tmp_path) as own:
        await own.filled(10)
        other = Broker(own.engine)
        await other.dispatcher.start()
        task = await other.get()
        await other.set(task.id, COMPLETE)
        await other.dispatcher.stop()
        await other.dispatcher.stop()
        own.engine.wakeup.notify()
        assert len(await own.drained(2)) == 9


@on_every_store
async def test_r6_runs_of_a_stopped_server_are_settled_through_another_server(kind: str, tmp_path: Path) -> None:
    async with broker(kind, tmp_path) as own:
        await own.add(activation(0), activation(1, retry={"at_most_once": True}), activation(2))
        other = Broker(own.engine)
        await other.dispatcher.start()
        assert {(await other.get()).id for _ in range(3)} == {"id_0", "id_1", "id_2"}
        await other.dispatcher.stop()
        await own.set("id_0", COMPLETE)
        await own.set("id_1", COMPLETE)
        await own.set("id_2", RETRY)
        assert [view.state for view in await own.runs()] == ["completed", "completed", "waiting"]
        assert (await own.get()).id == "id_2~2.0"
        await own.set("id_2~2.0", COMPLETE)


@on_every_store
async def test_runs_of_a_lapsed_server_are_delivered_again_after_the_grace(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker(kind, tmp_path, clock=clock, limits={"delivery_recovery_ms": 30_000}) as own:
        await own.add(activation(0), activation(1, retry={"at_most_once": True}))
        other = Broker(own.engine)
        await other.dispatcher.start()
        names = [(await other.get()).id for _ in range(2)]
        await other.dispatcher.stop()
        upkeep = Upkeep(own.engine)
        clock.advance(20)
        await own.engine.store.heartbeat(own.dispatcher._broker.session_id, now_us=clock.now_us())
        await upkeep.round()
        assert (await refused(own.get()))[0] == Code.NOT_FOUND
        clock.advance(15)
        await own.engine.store.heartbeat(own.dispatcher._broker.session_id, now_us=clock.now_us())
        await upkeep.round()
        again = await own.get()
        assert again.id == names[0]
        assert (await refused(own.get()))[0] == Code.NOT_FOUND
        assert await types_of_failures(own) == ["WorkerLost"]
        await own.set(again.id, COMPLETE)


@on_every_store
async def test_a_server_whose_session_lapsed_continues_with_a_new_session(kind: str, tmp_path: Path) -> None:
    async with broker(kind, tmp_path) as own:
        await own.filled(5)
        task = await own.get()
        engine = own.engine
        await engine.maintenance.recover(
            own.dispatcher._broker.session_id,
            Suspects(span_slots=None, evidence="thawed"),
            silent_since_us=2**62,
            crashes_max=3,
            now_us=engine.clock.now_us(),
        )
        await own.set(task.id, FAILURE)
        assert (await own.counts()).get("failed", 0) == 0, "the lease was lost, and so is the report"
        own.dispatcher._broker._on_session_lost(own.dispatcher._broker.session_id)
        had = await own.drained(1)
        assert sorted(had) == [f"id_{number}" for number in range(5)]
        assert await own.counts() == {"completed": 5}


async def test_an_engine_that_starts_after_another_settles_reports_by_id(tmp_path: Path) -> None:
    async with broker("sqlite", tmp_path) as own:
        await own.filled(3)
        names = [(await own.get()).id for _ in range(2)]
        await own.dispatcher.stop()
        engine = await engine_on("sqlite", tmp_path)
        again = Broker(engine)
        await again.dispatcher.start()
        await again.set(names[0], COMPLETE)
        assert [view.state for view in await again.runs()] == ["completed", "leased", "waiting"]
        await again.set(names[1], COMPLETE)
        assert await again.drained(1) == ["id_2"]
        await again.dispatcher.stop()
        await engine.close()


# -- pushing


@on_every_store
async def test_taken_activations_are_marked_or_released_with_attempts_unchanged(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker(kind, tmp_path, clock=clock, delivery="push") as own:
        await own.filled(3)
        taken = await own.dispatcher.take(QueueFilter("app"), 2, lease_ms=5_000)
        assert [handout.name for handout in taken] == ["id_0", "id_1"]
        assert own.dispatcher.mark(["id_0", "nobody"]) == 1
        assert own.dispatcher.mark(["id_0"]) == 0
        assert own.dispatcher.put_back(["id_1", "id_0"]) == 1
        again = await own.dispatcher.take(QueueFilter("app"), 9, lease_ms=5_000)
        assert [handout.name for handout in again] == ["id_1", "id_2"], "what came back goes first, under its own id"
        own.dispatcher.mark(["id_1"])
        clock.advance(6)
        await own.tick()
        (back,) = await own.dispatcher.take(QueueFilter("app"), 9, lease_ms=5_000)
        assert back.name == "id_2", "what was neither marked nor given back is claimable after its lease"
        own.dispatcher.mark(["id_2"])
        await own.set_batch(*((f"id_{number}", COMPLETE) for number in range(3)))
        assert await own.counts() == {"completed": 3}


async def test_a_report_that_arrives_before_the_mark_is_kept(tmp_path: Path) -> None:
    async with broker("memory", tmp_path, delivery="push") as own:
        await own.filled(1)
        await own.dispatcher.take(QueueFilter("app"), 1, lease_ms=5_000)
        await own.set("id_0", COMPLETE)
        assert own.dispatcher.mark(["id_0"]) == 0
        assert await own.counts() == {"completed": 1}


async def test_activations_released_to_the_buffer_return_to_the_store_when_the_server_stops(tmp_path: Path) -> None:
    async with broker("memory", tmp_path) as own:
        await own.filled(2)
        other = Broker(own.engine)
        await other.dispatcher.start()
        await other.dispatcher.take(QueueFilter("app"), 2, lease_ms=5_000)
        other.dispatcher.put_back(["id_0", "id_1"])
        await other.dispatcher.stop()
        own.engine.wakeup.notify()
        assert sorted(await own.drained(1)) == ["id_0", "id_1"]


async def test_a_buffered_run_that_was_settled_by_id_elsewhere_is_not_delivered(tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker("memory", tmp_path, clock=clock) as own:
        await own.filled(3)
        other = Broker(own.engine)
        await other.dispatcher.start()
        names = [(await other.get()).id for _ in range(3)]
        await other.dispatcher.stop()
        clock.advance(16)
        await own.engine.store.heartbeat(own.dispatcher._broker.session_id, now_us=clock.now_us())
        await Upkeep(own.engine).round()
        assert (await own.get()).id == names[0], "its server died, and it is handed out anew"
        assert own.dispatcher.line_count == 2
        await own.set(names[1], COMPLETE)  # by the worker that had it from the server that died
        assert await own.drained(1) == [names[2]]
        await own.set(names[0], COMPLETE)
        assert await own.counts() == {"completed": 3}


async def test_a_report_that_was_rejected_can_be_repeated(tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker("memory", tmp_path, clock=clock) as own:
        names = await own.filled(4_200)
        for _ in names:
            await own.dispatcher.fetch(ANY)
        faulty = Faulty(own.engine.store)
        faulty.before["settle"] = [StoreUnavailable("away")] * 3
        own.engine.store = faulty
        waiting = [asyncio.create_task(own.set(name, COMPLETE)) for name in names]
        await clock.settle()
        assert own.dispatcher.reports_depth == 4_096, "no more are taken in while the store is away"
        late = waiting[-1]
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        await clock.advance_async(10)
        await asyncio.gather(*waiting[:-1])
        assert await own.counts() == {"completed": 4_199, "processing": 1}
        await own.set(names[-1], COMPLETE)
        assert await own.counts() == {"completed": 4_200}


async def test_reported_runs_leave_no_deadline_or_buffered_bytes(tmp_path: Path) -> None:
    async with broker("memory", tmp_path) as own:
        await own.filled(500)
        await own.drained(5)
        assert own.dispatcher._deadlines.next_us is None
        assert not any(own.dispatcher._deadlines._buckets.values())
        assert own.dispatcher._line.bytes_count == 0


async def test_a_paused_queue_is_no_longer_delivered(tmp_path: Path) -> None:
    clock = ManualClock()
    async with broker("memory", tmp_path, clock=clock) as own:
        await own.filled(20)
        await own.get()
        await own.engine.store.pause_queue("default", "app:mail", paused=True)
        clock.advance(2)
        await own.tick()  # what was leased ahead goes back
        assert (await refused(own.get()))[0] == Code.NOT_FOUND
        await own.engine.store.pause_queue("default", "app:mail", paused=False)
        own.engine.wakeup.notify()
        assert len(await own.drained(1)) == 19
        await own.set("id_0", COMPLETE)
