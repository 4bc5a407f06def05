"""Behaviours of Sentry's taskbroker that no other test shows, on both databases.

`taskbroker_behaviours.txt` lists all of them.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from headrace.core.failure import decode
from headrace.grpc.messages import taskbroker_pb2 as wire
from headrace.grpc.taskbroker.dispatcher_deliveries import DispatcherDeliveries
from headrace.grpc.transport.status import Code
from headrace.runtime.clock import ManualClock
from headrace.runtime.dispatch.lease_buffer import DeliveredRun, QueueFilter
from headrace.runtime.maintenance.upkeep import Upkeep
from tests.support.broker import (
    COMPLETE,
    DEADLETTER,
    DISCARD,
    FAILURE,
    RETRY,
    BrokerRig,
    activation,
    on_databases,
    running_broker,
    status_of_error,
)

LEASE_MS = 5_000


def received_now(clock: ManualClock, *messages: wire.TaskActivation) -> tuple[wire.TaskActivation, ...]:
    for message in messages:
        message.received_at.FromMicroseconds(clock.now_us())
    return messages


# -- the store


async def test_opening_creates_the_database_file(tmp_path: Path) -> None:
    assert not (tmp_path / "headrace.db").exists()
    async with running_broker("sqlite", tmp_path):
        assert (tmp_path / "headrace.db").exists()


@on_databases
async def test_two_activations_are_two_runs(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        assert await broker.add(activation(0), activation(1)) == [True, True]
        assert len(await broker.runs()) == 2


@on_databases
async def test_depths_are_the_counts_of_the_states(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        assert await broker.engine.store.queues("default") == []
        await broker.add(*received_now(clock, *(activation(n, delay=60 * (n < 2)) for n in range(9))))
        await broker.get()
        await broker.set((await broker.get()).id, FAILURE)
        (view,) = await broker.engine.store.queues("default")
        assert (view.name, view.delayed_count) == ("app:mail", 2)
        assert view.waiting_count + view.leased_count == 6
        assert broker.dispatcher.delivered_count == 1


@on_databases
async def test_the_oldest_is_delivered_first_and_has_its_deadline_plus_the_grace(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        await broker.add(activation("old"))
        clock.advance(1)
        await broker.add(activation("new"))
        delivery = await broker.dispatcher.fetch(QueueFilter())
        assert delivery is not None
        assert (delivery.name, delivery.deadline_us) == ("id_old", clock.now_us() + 13_000_000)
        assert (await broker.counts()) == {"processing": 1, "waiting": 1}


@on_databases
async def test_two_thousand_claims_at_once_get_two_thousand_ids(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        names = await broker.add_many(2_000)
        fetched = await asyncio.gather(*(broker.dispatcher.fetch(QueueFilter("app")) for _ in range(2_000)))
        assert sorted(delivery.name for delivery in fetched if delivery is not None) == sorted(names)


@on_databases
async def test_several_namespaces_are_delivered_in_order_of_arrival(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        for number, namespace in enumerate(("a", "b", "c")):
            await broker.add(activation(number, namespace=namespace))
        taken = await broker.dispatcher.take(QueueFilter("app", ("a", "c")), 10, lease_ms=LEASE_MS)
        assert [delivery.name for delivery in taken] == ["id_0", "id_2"]
        assert all(delivery.is_claimed for delivery in taken)


@on_databases
@pytest.mark.parametrize(("count_max", "expected"), [(10_000, 50), (20, 20), (50, 50)])
async def test_a_claim_returns_at_most_the_requested_number(
    kind: str, count_max: int, expected: int, tmp_path: Path
) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(50)
        taken: list[DeliveredRun] = []
        while len(taken) < count_max and (
            more := await broker.dispatcher.take(QueueFilter(), count_max - len(taken), lease_ms=LEASE_MS)
        ):
            taken += more
        assert len(taken) == len({delivery.name for delivery in taken}) == expected
        assert all(delivery.is_claimed for delivery in taken)


@on_databases
@pytest.mark.parametrize(
    "retry", [{"on_attempts_exceeded": DISCARD}, {"on_attempts_exceeded": DEADLETTER}, {"attempts": 5}]
)
async def test_a_missed_deadline_does_not_depend_on_the_retry_state(
    kind: str, retry: dict[str, Any], tmp_path: Path
) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        await broker.add(activation(0, retry={"max_attempts": 1, **retry}))
        await broker.get()
        clock.advance(14)
        await broker.tick()
        assert await broker.counts() == {"waiting": 1}
        assert (await broker.get()).retry_state.attempts == retry.get("attempts", 0)


@on_databases
@pytest.mark.parametrize("at_most_once", [False, True])
async def test_a_lapsed_claim_releases_its_run_with_counts_unchanged(
    kind: str, at_most_once: bool, tmp_path: Path
) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        await broker.add(activation(0, retry={"at_most_once": at_most_once}))
        await broker.dispatcher.take(QueueFilter(), 1, lease_ms=LEASE_MS)
        clock.advance(6)
        await broker.tick()
        assert (await broker.get()).id == "id_0"


@on_databases
async def test_finished_activations_are_deleted_with_their_batch(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        await broker.add_many(30)
        for name in await broker.drain(3):
            assert name
        await broker.producer.close()
        clock.advance(8 * 86_400)
        assert await Upkeep(broker.engine).prune() >= 1
        assert await broker.runs() == []
        assert await broker.add(activation(0)) == [True], "its id is free again"


@on_databases
async def test_the_age_is_that_of_the_oldest_waiting_activation(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:

        async def oldest_s() -> float:
            views = await broker.engine.store.queues("default")
            return max(((clock.now_us() - view.oldest_us) / 1_000_000 for view in views if view.oldest_us), default=0)

        assert await oldest_s() == 0
        await broker.add(activation(0))
        clock.advance(20)
        await broker.add(*received_now(clock, activation(1), activation(2, delay=30)))
        assert await oldest_s() == 20
        await broker.set((await broker.get()).id, COMPLETE)
        await broker.set((await broker.get()).id, RETRY)
        clock.advance(5)
        assert await oldest_s() <= 5, "the age of a retry counts from its return to the queue"
        await broker.set((await broker.get()).id, COMPLETE)
        clock.advance(45)
        assert (await broker.get()).id == "id_2"
        assert await oldest_s() == 0


# -- the server


@on_databases
async def test_a_batched_report_is_accepted_and_written_with_others(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path, ack="received", flush_interval_ms=60_000) as broker:
        await broker.add_many(3)
        for number in range(3):
            assert (await broker.get()).id == f"id_{number}"
        assert await broker.set("id_0", COMPLETE, fetch={}) is None, "answered at once, as nothing else waits"
        await broker.set("id_1", COMPLETE)
        assert broker.dispatcher.reports_depth == 2
        states = [view.state for view in await broker.runs()]
        assert states == ["leased"] * 3
        await broker.dispatcher.stop()
        assert [view.state for view in await broker.runs()] == ["completed", "completed", "leased"], (
            "a stop writes all reports"
        )


@on_databases
async def test_a_report_to_a_stopped_server_is_answered_with_internal(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(1)
        await broker.get()
        await broker.dispatcher.stop()
        assert (await status_of_error(broker.set("id_0", COMPLETE)))[0] == Code.INTERNAL


# -- push


@on_databases
async def test_pushed_activations_are_marked_on_first_and_later_attempts(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path, delivery="push") as broker:
        deliveries = DispatcherDeliveries(broker.dispatcher)
        await broker.add_many(1)
        for attempt, name in enumerate(("id_0", "id_0~2.0")):
            (delivery,) = await deliveries.take("app", 5, lease_ms=LEASE_MS)
            message = wire.TaskActivation.FromString(delivery.activation)
            assert (delivery.id, message.id, message.retry_state.attempts) == (name, "id_0", attempt)
            await deliveries.mark([name])
            await broker.set("id_0", RETRY if not attempt else COMPLETE)
        assert await broker.counts() == {"completed": 1}


@on_databases
async def test_an_activation_that_could_not_be_pushed_waits_unmarked(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path, delivery="push") as broker:
        deliveries = DispatcherDeliveries(broker.dispatcher)
        assert await deliveries.parked(["app"]) == {}
        await broker.add(activation(0), activation(1, application="nobody"))
        (delivery,) = await deliveries.take("app", 5, lease_ms=LEASE_MS)
        await deliveries.release([delivery.id])
        await deliveries.mark([delivery.id])
        assert await broker.counts() == {"waiting": 2}
        assert await deliveries.parked(["app"]) == {"nobody": 1}
        (again,) = await deliveries.take("app", 5, lease_ms=LEASE_MS)
        assert again.activation == delivery.activation
        assert again.id != delivery.id, "a late mark of the first delivery does not count for the second one"


# -- upkeep


@on_databases
async def test_a_tick_and_a_sweep_end_overdue_and_expired_activations(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock, limits={"delivery_attempts_max": 1}) as broker:
        await broker.add(*(activation(n, retry={"on_attempts_exceeded": DISCARD}) for n in range(2)))
        await broker.add(*received_now(clock, *(activation(n, expires=20, namespace="x") for n in (2, 3))))
        for _ in range(2):
            await broker.get(application="app", namespace="mail")
        clock.advance(30)
        await broker.tick()
        await Upkeep(broker.engine).sweep()
        assert await broker.counts() == {"failed": 2, "expired": 2}
        assert await broker.engine.store.dead_letters("default") == [], "discarded"


@on_databases
async def test_an_elapsed_delay_makes_exactly_the_due_activations_claimable(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        await broker.add(*received_now(clock, activation(0, delay=10), activation(1, delay=20)))
        for name in ("id_0", "id_1"):
            assert (await status_of_error(broker.get()))[0] == Code.NOT_FOUND
            clock.advance(11)
            task = await broker.get()
            assert task.id == name
            await broker.set(name, COMPLETE)


# -- whole brokers, at the sizes of Sentry's tests


@on_databases
async def test_twenty_workers_complete_ten_thousand_tasks(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        names = await broker.add_many(10_000)
        delivered = await broker.drain(20)
        assert sorted(delivered) == sorted(names), "fetched as many as there are, each once"
        assert await broker.counts() == {"completed": 10_000}


@on_databases
async def test_five_thousand_tasks_complete_after_three_retries_each(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(5_000, retry={"max_attempts": 4})
        attempts: dict[str, int] = {}

        async def work() -> None:
            task: Any = await broker.get()
            while task is not None:
                name = task.id.partition("~")[0]
                assert task.retry_state.attempts == attempts.get(name, 0)
                attempts[name] = attempts.get(name, 0) + 1
                task = await broker.set(task.id, COMPLETE if attempts[name] == 4 else RETRY, fetch={})

        await asyncio.gather(*(work() for _ in range(20)))
        while (await broker.counts()).get("waiting"):
            await broker.drain(1)
        assert set(attempts.values()) == {4}
        assert await broker.counts() == {"completed": 5_000}


@on_databases
async def test_half_of_ten_thousand_failures_become_dead_letters(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        choices = (DEADLETTER, DISCARD)
        await broker.add(*(activation(n, retry={"on_attempts_exceeded": choices[n % 2]}) for n in range(10_000)))
        await broker.drain(20, FAILURE)
        dead = await broker.engine.store.dead_letters("default", limit=10_000)
        assert len(dead) == 5_000
        assert await broker.counts() == {"failed": 10_000}
        view = await broker.engine.store.run(dead[0].batch_id, dead[0].index)
        assert decode(view.result).type == "TaskFailed"


@on_databases
async def test_ten_thousand_activations_expire(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        await broker.add(*received_now(clock, *(activation(n, expires=10) for n in range(10_000))))
        clock.advance(12)
        await Upkeep(broker.engine).sweep()
        assert await broker.counts() == {"expired": 10_000}
        (view,) = await broker.engine.store.queues("default")
        assert (view.waiting_count, view.delayed_count, view.leased_count) == (0, 0, 0)


@on_databases
async def test_five_thousand_delayed_activations_are_delivered_when_due(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        start_us = clock.now_us()
        messages = [activation(n, delay=20 + n % 21, processing_deadline_duration=999) for n in range(5_000)]
        await broker.add(*received_now(clock, *messages))
        early = []
        while len(await broker.runs()) and (await broker.counts()).get("delayed"):
            clock.advance(2)
            waited_s = (clock.now_us() - start_us) / 1_000_000
            for name in await broker.drain(4):
                number = int(name.removeprefix("id_"))
                early += [name] if 20 + number % 21 > waited_s else []
        assert early == []
        assert await broker.counts() == {"completed": 5_000}


@on_databases
async def test_a_pusher_sends_each_once_and_each_is_processing(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path, delivery="push") as broker:
        await broker.add_many(500)
        pushed = await pushed_by(broker, threads_count=4, accepts=True)
        assert sorted(pushed) == sorted(f"id_{number}" for number in range(500))
        assert await broker.counts() == {"processing": 500}


@on_databases
async def test_workers_that_refuse_everything_lose_nothing(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path, delivery="push") as broker:
        await broker.add_many(200)
        assert await pushed_by(broker, threads_count=4, accepts=False) == []
        counts = await broker.counts()
        assert counts == {"waiting": 200}
        assert len(await broker.drain_by_push()) == 200


@on_databases
async def test_claims_of_a_hanging_worker_lapse_and_nothing_is_lost(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock, delivery="push") as broker:
        await broker.add_many(50)
        taken = await broker.dispatcher.take(QueueFilter("app"), 50, lease_ms=LEASE_MS)
        assert taken
        clock.advance(6)
        await broker.tick()
        assert broker.dispatcher.delivered_count == 0
        assert await broker.counts() == {"waiting": 50}


async def pushed_by(broker: BrokerRig, *, threads_count: int, accepts: bool) -> list[str]:
    """Push until nothing is left, or for some rounds if workers refuse."""
    deliveries = DispatcherDeliveries(broker.dispatcher)
    pushed: list[str] = []

    async def push() -> None:
        for _ in range(20):
            taken = await deliveries.take("app", 64, lease_ms=LEASE_MS) if accepts or len(pushed) < 1 else []
            if not taken:
                return
            names = [delivery.id for delivery in taken]
            if accepts:
                pushed.extend(names)
                await deliveries.mark(names)
            else:
                await deliveries.release(names)

    await asyncio.gather(*(push() for _ in range(threads_count)))
    return pushed
