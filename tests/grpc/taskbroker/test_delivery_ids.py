"""The ids of deliveries: the activation's own by default, and which reports of earlier deliveries count."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from headrace.runtime.clock import ManualClock
from headrace.runtime.dispatch.lease_buffer import QueueFilter
from headrace.runtime.maintenance.upkeep import Upkeep
from tests.support.broker import (
    COMPLETE,
    FAILURE,
    RETRY,
    BrokerRig,
    WorkerConnection,
    activation,
    on_every_store,
    running_broker,
)

OVERDUE_S = 14


async def make_overdue(broker: BrokerRig, clock: ManualClock) -> None:
    """Advance the clock past the deadline of every delivery."""
    clock.advance(OVERDUE_S)
    await broker.tick()


@on_every_store
async def test_an_activation_has_the_same_id_on_every_delivery(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        sent = activation(0)
        await broker.add(sent)
        assert await broker.get() == sent
        await make_overdue(broker, clock)
        assert await broker.get() == sent, "a missed deadline changes nothing of the activation"
        await broker.set("id_0", RETRY)
        again = await broker.get()
        assert (again.id, again.retry_state.attempts) == ("id_0", 1)
        await broker.set("id_0", COMPLETE)
        assert await broker.counts() == {"completed": 1}


@on_every_store
async def test_a_late_completion_completes_a_run_that_waits_again(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        await broker.add_many(3)
        for _ in range(3):
            await broker.get()
        await make_overdue(broker, clock)
        assert await broker.counts() == {"waiting": 3}
        await broker.set_batch(("id_0", COMPLETE), ("id_2", COMPLETE))
        await broker.set("id_0", COMPLETE)
        assert await broker.counts() == {"completed": 2, "waiting": 1}
        assert (await broker.get()).id == "id_1"
        await broker.set("id_1", COMPLETE)
        assert await broker.counts() == {"completed": 3}


@on_every_store
async def test_a_late_completion_completes_a_run_that_was_delivered_again_once(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    early, later = WorkerConnection(), WorkerConnection()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        await broker.add_many(1)
        await broker.get(by=early)
        await make_overdue(broker, clock)
        await broker.get(by=later)
        await broker.set("id_0", COMPLETE, by=early)
        assert await broker.counts() == {"completed": 1}
        await broker.set("id_0", FAILURE, by=later)
        assert await broker.counts() == {"completed": 1}


@on_every_store
@pytest.mark.parametrize("status", [FAILURE, RETRY])
async def test_a_late_failure_or_retry_never_undoes_or_charges_a_newer_delivery(
    kind: str, status: int, tmp_path: Path
) -> None:
    clock = ManualClock()
    early, later = WorkerConnection(), WorkerConnection()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        await broker.add_many(1)
        await broker.get(by=early)
        await make_overdue(broker, clock)
        late_before = broker.dispatcher.late_count
        await broker.set("id_0", status, by=early)
        assert await broker.counts() == {"waiting": 1}, "the run waits for its next delivery"
        again = await broker.get(by=later)
        await broker.set("id_0", status, by=early)
        assert await broker.counts() == {"processing": 1}
        assert broker.dispatcher.late_count == late_before + 2
        assert again.retry_state.attempts == 0
        await broker.set("id_0", status, by=later)
        assert await broker.counts() == ({"failed": 1} if status == FAILURE else {"waiting": 1})


async def test_a_repeated_retry_does_not_charge_the_next_attempt_that_waits_in_the_lease_buffer(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path) as broker:
        names = await broker.add_many(2)
        for _ in names:
            await broker.get()
        await broker.set_batch(*((name, RETRY) for name in names))
        delivered = await broker.get()
        assert broker.dispatcher.buffered_count == 1
        (buffered,) = set(names) - {delivered.id}
        await broker.set(buffered, RETRY)
        assert [(view.state, view.attempt) for view in await broker.runs()] == [("leased", 2)] * 2
        assert broker.dispatcher.late_count == 1
        assert await broker.drain(1) == [buffered]
        await broker.set(delivered.id, COMPLETE)


async def test_a_worker_that_reconnected_reports_on_its_delivery(tmp_path: Path) -> None:
    clock = ManualClock()
    early, later, reconnected = WorkerConnection(), WorkerConnection(), WorkerConnection()
    async with running_broker("memory", tmp_path, clock=clock) as broker:
        await broker.add_many(1)
        await broker.get(by=early)
        await make_overdue(broker, clock)
        await broker.get(by=later)
        await broker.set("id_0", FAILURE, by=reconnected)
        assert await broker.counts() == {"processing": 1}, "the current worker is still connected: it is another one"
        later.is_connected = False
        await broker.set("id_0", FAILURE, by=reconnected)
        assert await broker.counts() == {"failed": 1}


async def test_a_first_delivery_is_reported_on_any_connection(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path) as broker:
        await broker.add_many(2)
        for _ in range(2):
            await broker.get(by=WorkerConnection())
        await broker.set("id_0", FAILURE, by=WorkerConnection())
        await broker.set("id_1", RETRY, by=WorkerConnection())
        assert await broker.counts() == {"failed": 1, "waiting": 1}


@on_every_store
async def test_reports_to_another_server_count_for_a_delivery_that_missed_no_deadline(
    kind: str, tmp_path: Path
) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        await broker.add_many(4)
        for _ in range(4):
            await broker.get()
        other = BrokerRig(broker.engine)
        await other.dispatcher.start()
        await other.set_batch(("id_0", COMPLETE), ("id_1", FAILURE))
        assert [view.state for view in await broker.runs()][:2] == ["completed", "failed"]
        await make_overdue(broker, clock)
        await broker.get()
        await broker.get()
        await other.set_batch(("id_2", FAILURE), ("id_3", COMPLETE))
        assert [view.state for view in await broker.runs()][2:] == ["leased", "completed"]
        assert other.dispatcher.late_count == 1, "it can't tell whose failure it is, and the deadline decides"
        await other.dispatcher.stop()
        await broker.set("id_2", COMPLETE)


@on_every_store
async def test_a_fenced_id_is_never_delivered_twice_also_after_a_server_lapsed(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    limits = {"delivery_recovery_ms": 15_000}
    async with running_broker(kind, tmp_path, clock=clock, is_fenced=True, limits=limits) as broker:
        await broker.add_many(2)
        other = BrokerRig(broker.engine, is_fenced=True)
        await other.dispatcher.start()
        names = [(await other.get()).id for _ in range(2)]
        assert names == ["id_0", "id_1"]
        await other.dispatcher.stop()
        clock.advance(30)
        await broker.engine.store.heartbeat(broker.dispatcher._session.session_id, now_us=clock.now_us())
        await Upkeep(broker.engine).round()
        again = [(await broker.get()).id for _ in range(2)]
        assert set(again).isdisjoint(names), "a worker of the lapsed server may still have the first delivery"
        await broker.set_batch(*((name, FAILURE) for name in names))
        assert await broker.counts() == {"processing": 2}
        await broker.set_batch(*((name, COMPLETE) for name in again))
        assert await broker.counts() == {"completed": 2}


async def test_a_fenced_push_that_a_worker_may_have_received_is_repeated_under_another_id(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path, delivery="push", is_fenced=True) as broker:
        await broker.add_many(1)
        (first,) = await broker.dispatcher.take(QueueFilter("app"), 1, lease_ms=5_000)
        first_name = first.name
        broker.dispatcher.put_back([first.key])
        (second,) = await broker.dispatcher.take(QueueFilter("app"), 1, lease_ms=5_000)
        assert second.name != first_name
        broker.dispatcher.mark([second.key])
        await broker.set(first_name, FAILURE)
        assert await broker.counts() == {"processing": 1}
        await broker.set(second.name, COMPLETE)
        assert await broker.counts() == {"completed": 1}


async def test_a_completion_that_arrives_while_the_missed_deadline_is_being_written_counts(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock) as broker:
        await broker.add_many(1)
        await broker.get()
        clock.advance(OVERDUE_S)
        ticking = asyncio.create_task(broker.dispatcher.tick())
        await broker.set("id_0", COMPLETE)
        await ticking
        assert await broker.counts() == {"completed": 1}
