"""ConsumerService: the tests of Sentry's taskbroker for its server, on both databases, and further promises."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from headrace.core.failure import decode
from headrace.foundation.errors import InvalidInput, StoreUnavailable
from headrace.grpc.messages import taskbroker_pb2 as wire
from headrace.grpc.taskbroker.dispatcher_deliveries import DispatcherDeliveries
from headrace.grpc.transport.status import Code
from headrace.runtime.clock import ManualClock
from headrace.runtime.dispatch.lease_buffer import QueueFilter
from tests.support.broker import (
    COMPLETE,
    DEADLETTER,
    FAILURE,
    PENDING,
    RETRY,
    activation,
    ids,
    on_databases,
    on_every_store,
    running_broker,
    status_of_error,
)
from tests.support.engines import Faulty

EXPECTS = "Invalid status, expects 3 (Failure), 4 (Retry), or 5 (Complete), but got: "


# -- GetTask


@on_databases
async def test_get_task(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        assert await status_of_error(broker.get()) == (Code.NOT_FOUND, "No pending activations")


@on_databases
async def test_get_task_push_mode_returns_permission_denied(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path, delivery="push") as broker:
        await broker.add_many(1)
        assert await status_of_error(broker.get()) == (
            Code.PERMISSION_DENIED,
            "Cannot call while broker is in PUSH mode",
        )


@on_databases
async def test_get_task_success(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(1)
        assert (await broker.get()) == activation(0)
        assert await broker.counts() == {"processing": 1}


@on_databases
async def test_get_task_with_application_success(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add(activation(0, application="hammers"), activation(1))
        assert (await broker.get(application="app")).id == "id_1"
        assert (await status_of_error(broker.get(application="app")))[0] == Code.NOT_FOUND
        assert (await broker.get(application="hammers")).id == "id_0"


@on_databases
async def test_get_task_with_namespace_requires_application(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(1)
        assert await status_of_error(broker.get(namespace="mail")) == (Code.NOT_FOUND, "No pending activations")
        assert (await broker.get(namespace="mail", application="app")).id == "id_0"


@on_databases
async def test_get_task_with_namespace_and_application_returns_only_matching_tasks(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add(activation(0, namespace="a"), activation(1, namespace="b"), activation(2, application="x"))
        assert (await broker.get(namespace="b", application="app")).id == "id_1"
        assert (await status_of_error(broker.get(namespace="b", application="app")))[0] == Code.NOT_FOUND
        assert (await broker.get(application="app")).id == "id_0"


async def test_an_application_name_never_matches_a_longer_one_or_one_with_a_separator(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path) as broker:
        await broker.add(activation(0, application="apple"), activation(1, namespace="b:c"))
        for application in ("appl", "app:b", "app:", ":"):
            assert (await status_of_error(broker.get(application=application)))[0] == Code.NOT_FOUND
        assert (await broker.get(application="app", namespace="b:c")).id == "id_1"


async def test_an_activation_without_application_matches_the_empty_filter_and_no_filter(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path) as broker:
        message = activation(0)
        message.ClearField("application")
        await broker.add(message, activation(1, application=""))
        assert (await broker.get()).id == "id_0"
        assert (await broker.get(application="")).id == "id_1"


# -- SetTaskStatus


@on_databases
async def test_set_task_status(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        assert await broker.set("nobody", COMPLETE) is None
        assert await broker.set("nobody", COMPLETE, fetch={}) is None
        assert broker.dispatcher.late_count == 2


@on_databases
async def test_set_task_status_invalid(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(1)
        task = await broker.get()
        assert await status_of_error(broker.set(task.id, PENDING)) == (Code.INVALID_ARGUMENT, f"{EXPECTS}Pending")
        assert await status_of_error(broker.set(task.id, 0)) == (Code.INVALID_ARGUMENT, f"{EXPECTS}Unspecified")
        assert await status_of_error(broker.set(task.id, 2)) == (Code.INVALID_ARGUMENT, f"{EXPECTS}Processing")
        assert await status_of_error(broker.set(task.id, 99)) == (Code.INVALID_ARGUMENT, f"{EXPECTS}99")
        assert await broker.counts() == {"processing": 1}


@on_databases
async def test_set_task_status_success(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(2)
        assert (await broker.get()).id == "id_0"
        assert (await broker.set("id_0", COMPLETE, fetch={})).id == "id_1"
        assert await broker.counts() == {"completed": 1, "processing": 1}
        assert await broker.set("id_1", FAILURE, fetch={}) is None
        assert await broker.counts() == {"completed": 1, "failed": 1}


@on_databases
async def test_set_task_status_with_application(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add(activation(0), activation(1, application="hammers"), activation(2))
        assert (await broker.get(application="app")).id == "id_0"
        assert (await broker.set("id_0", COMPLETE, fetch={"application": "app"})).id == "id_2"


@on_databases
async def test_set_task_status_with_application_no_match(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(2)
        await broker.get()
        assert await broker.set("id_0", COMPLETE, fetch={"application": "none"}) is None


@on_databases
async def test_set_task_status_with_namespace_requires_application(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(2)
        await broker.get()
        assert await broker.set("id_0", COMPLETE, fetch={"namespace": "mail"}) is None
        assert await broker.counts() == {"completed": 1, "waiting": 1}


async def test_in_push_mode_reports_return_no_next_task(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path, delivery="push") as broker:
        await broker.add_many(1)
        assert await broker.set("nobody", COMPLETE, fetch={}) is None


@on_databases
async def test_an_answered_report_is_durable(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(3)
        for _ in range(3):
            task = await broker.get()
            await broker.set(task.id, COMPLETE)
        assert await broker.counts() == {"completed": 3}
        assert broker.dispatcher.delivered_count == 0


async def test_a_report_is_answered_before_its_commit_only_with_ack_received(tmp_path: Path) -> None:
    for ack in ("committed", "received"):
        (tmp_path / ack).mkdir()
        async with running_broker("memory", tmp_path / ack, ack=ack) as broker:
            await broker.add_many(2)
            await broker.get()
            held = HeldStore(broker.engine.store)
            broker.engine.store = held
            report = asyncio.create_task(broker.set("id_0", COMPLETE, fetch={}))
            await held.called.wait()
            for _ in range(20):
                await asyncio.sleep(0)
            assert report.done() is (ack == "received")
            held.allowed.set()
            assert (await report).id == "id_1"
            broker.engine.store = held.store


class HeldStore:
    """A store whose `settle` waits until the test allows it."""

    def __init__(self, store: Any) -> None:
        self.store, self.called, self.allowed = store, asyncio.Event(), asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    async def settle(self, *args: Any, **kwargs: Any) -> Any:
        self.called.set()
        await self.allowed.wait()
        return await self.store.settle(*args, **kwargs)


@on_databases
async def test_concurrent_reports_share_a_transaction(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(64)
        tasks = [await broker.get() for _ in range(64)]
        before = broker.dispatcher.flushes_count
        await asyncio.gather(*(broker.set(task.id, COMPLETE) for task in tasks))
        assert broker.dispatcher.flushes_count - before <= 2
        assert await broker.counts() == {"completed": 64}


async def test_an_unavailable_store_is_reported_as_internal_and_no_report_is_lost(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock) as broker:
        await broker.add_many(2)
        task = await broker.get()
        faulty = Faulty(broker.engine.store)
        faulty.before["settle"] = [StoreUnavailable("away")] * 3
        faulty.after["settle"] = [StoreUnavailable("the answer was lost")]
        broker.engine.store = faulty
        report = asyncio.create_task(broker.set(task.id, COMPLETE))
        await clock.advance_async(5)
        await report
        assert await broker.counts() == {"completed": 1, "waiting": 1}
        assert faulty.calls.count("settle") == 5


# -- SetBatchActivationStatus


@on_databases
async def test_set_batch_activation_status_success(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(3)
        for _ in range(3):
            await broker.get()
        await broker.set_batch(("id_0", COMPLETE), ("id_1", COMPLETE), ("id_2", FAILURE))
        assert await broker.counts() == {"completed": 2, "failed": 1}


@on_databases
async def test_set_batch_activation_status_empty(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.set_batch()


@on_databases
async def test_set_batch_activation_status_invalid_status(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(1)
        await broker.get()
        assert await status_of_error(broker.set_batch(("id_0", COMPLETE), ("id_0", 99))) == (
            Code.INVALID_ARGUMENT,
            f"{EXPECTS}99",
        )
        assert await broker.counts() == {"processing": 1}, "validated before anything is written"


@on_databases
async def test_set_batch_activation_status_retry(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(1)
        await broker.get()
        await broker.set_batch(("id_0", RETRY))
        assert await broker.counts() == {"waiting": 1}
        task = await broker.get()
        assert (task.id, task.retry_state.attempts) == ("id_0", 1)


@on_databases
async def test_set_batch_activation_status_mixed(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(3)
        for _ in range(3):
            await broker.get()
        updates = (("id_0", COMPLETE), ("id_1", RETRY), ("id_2", FAILURE), ("unknown", COMPLETE))
        await broker.set_batch(*updates)
        await broker.set_batch(*updates)
        assert await broker.counts() == {"completed": 1, "failed": 1, "waiting": 1}


# -- retries


@on_databases
async def test_a_retry_can_change_max_attempts_and_delay_for_all_later_attempts(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        await broker.add(activation(0, retry={"attempts": 1, "max_attempts": 2}, delay=0, expires=900))
        first = await broker.get()
        await broker.set(first.id, RETRY, max_attempts=7, delay_on_retry=30)
        assert (await status_of_error(broker.get()))[0] == Code.NOT_FOUND
        clock.advance(33)
        second = await broker.get()
        assert second.retry_state.max_attempts == 7
        assert (second.retry_state.attempts, second.retry_state.delay_on_retry, second.delay) == (2, 30, 30)
        assert second.parameters_bytes == first.parameters_bytes
        assert second.received_at.ToMicroseconds() == clock.now_us()
        await broker.set(second.id, RETRY)
        assert (await status_of_error(broker.get()))[0] == Code.NOT_FOUND, "the delay lasts"
        clock.advance(33)
        third = await broker.get()
        assert (third.retry_state.attempts, third.retry_state.max_attempts) == (3, 7)
        await broker.set(third.id, RETRY, delay_on_retry=0)
        fourth = await broker.get()
        assert (fourth.retry_state.attempts, fourth.delay) == (4, 0)


@on_databases
async def test_a_retry_without_delay_is_claimable_at_once_and_one_with_delay_on_retry_waits(
    kind: str, tmp_path: Path
) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        await broker.add(activation(0, retry={"max_attempts": 3}), activation(1, retry={"delay_on_retry": 5}))
        for _ in range(2):
            await broker.get()
        await broker.set_batch(("id_0", RETRY), ("id_1", RETRY))
        assert (await broker.get()).id == "id_0"
        assert (await status_of_error(broker.get()))[0] == Code.NOT_FOUND
        clock.advance(6)
        task = await broker.get()
        assert (task.id, task.delay) == ("id_1", 5)


async def test_an_at_most_once_activation_fails_when_its_worker_requests_a_retry(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path) as broker:
        await broker.add(activation(0, retry={"at_most_once": True}))
        await broker.get()
        await broker.set("id_0", RETRY)
        (view,) = await broker.runs()
        assert view.state == "failed"
        view = await broker.engine.store.run(view.batch_id, view.index)
        assert "at-most-once" in decode(view.result).message


# -- late, repeated and foreign reports


@on_every_store
async def test_a_repeated_report_is_recorded_once(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(1)
        await broker.get()
        await asyncio.gather(*(broker.set("id_0", status) for status in (COMPLETE, COMPLETE, FAILURE)))
        await broker.set("id_0", FAILURE)
        await broker.set("id_0", RETRY)
        assert await broker.counts() == {"completed": 1}
        assert broker.dispatcher.late_count >= 3


@on_every_store
async def test_a_fenced_report_of_an_earlier_attempt_changes_nothing(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path, is_fenced=True) as broker:
        await broker.add_many(1)
        await broker.get()
        await broker.set("id_0", RETRY)
        second = await broker.get()
        await broker.set("id_0", COMPLETE)
        assert await broker.counts() == {"processing": 1}
        await broker.set(second.id, RETRY)
        third = await broker.get()
        assert third.id == "id_0~3.0"
        for stale in ("id_0", "id_0~2.0", "id_0~3.1", "id_0~4.0"):
            await broker.set(stale, COMPLETE)
        assert await broker.counts() == {"processing": 1}
        await broker.set(third.id, FAILURE)
        assert await broker.counts() == {"failed": 1}


@on_every_store
async def test_a_report_to_another_server_is_settled_by_id(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add_many(4)
        names = [(await broker.get()).id for _ in range(3)]
        other = type(broker)(broker.engine)
        await other.dispatcher.start()
        await other.set(names[0], COMPLETE)
        await other.set_batch((names[1], FAILURE), (names[2], RETRY), ("nobody", COMPLETE))
        states = [view.state for view in await broker.runs()]
        assert states[:3] == ["completed", "failed", "waiting"]
        await broker.set(names[0], FAILURE)
        await broker.set_batch((names[1], COMPLETE), (names[2], COMPLETE))
        again = await other.get()
        assert again.id == "id_2"
        await other.set(again.id, COMPLETE)
        await other.dispatcher.stop()
        assert [view.state for view in await broker.runs()][:3] == ["completed", "failed", "completed"]


# -- invalid input


@pytest.mark.parametrize(
    ("message", "error_text"),
    [
        (activation("", id=""), "1 to 200 printable"),
        (activation("", id="x" * 201), "1 to 200 printable"),
        (activation("", id="a\x00b"), "printable"),
        (activation("", id="id~2.0"), "~2.0"),
        (activation(0, taskname=""), "task"),
        (activation(0, application="a:b"), "application"),
        (activation(0, namespace="x" * 200), "queue"),
        (activation(0, parameters_bytes=b"x" * 5_000_001), "at most 5000000 bytes"),
    ],
)
async def test_an_invalid_activation_is_refused_with_the_reason(
    message: wire.TaskActivation, error_text: str, tmp_path: Path
) -> None:
    async with running_broker("memory", tmp_path) as broker:
        with pytest.raises(InvalidInput, match=error_text):
            await broker.add(message)
        assert await broker.runs() == []


async def test_bytes_that_are_no_activation_are_refused(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path) as broker:
        for data in (b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02a"):
            with pytest.raises(InvalidInput, match="expected a TaskActivation"):
                await broker.add_bytes(data)


async def test_an_id_that_was_accepted_before_is_recognised(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path) as broker:
        assert await broker.add(activation(0), activation(0, taskname="other")) == [True, False]
        assert await broker.add(activation(0)) == [False]
        assert len(await broker.runs()) == 1


@on_every_store
async def test_times_out_of_range_are_clamped(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        most = 2**64 - 1
        ever = activation(0, processing_deadline_duration=most, expires=most, retry={"delay_on_retry": most})
        ever.received_at.FromSeconds(253_402_300_799)
        never = activation(1, processing_deadline_duration=0, delay=0)
        never.received_at.FromSeconds(-62_135_596_800)
        await broker.add(ever, never)
        tasks = [await broker.get(), await broker.get()]
        assert ids(tasks) == ["id_0", "id_1"]
        await broker.set("id_0", RETRY, delay_on_retry=most, max_attempts=2**32 - 1)
        await broker.set("id_1", FAILURE)
        assert await broker.counts() == {"delayed": 1, "failed": 1}


@on_databases
async def test_a_large_activation_is_stored_in_the_object_store(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path, limits={"inline_bytes_max": 1_000}) as broker:
        large = activation(0, parameters_bytes=b"x" * 5_000)
        await broker.add(large, activation(1))
        assert await broker.get() == large
        assert (await broker.set("id_0", RETRY, fetch={})).id == "id_1"
        again = await broker.get()
        assert (again.id, again.parameters_bytes) == ("id_0", large.parameters_bytes)


@on_databases
async def test_a_large_activation_is_fetched_from_the_object_store_for_a_push(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path, delivery="push", limits={"inline_bytes_max": 1_000}) as broker:
        sent = [activation(number, parameters_bytes=b"x" * 5_000 * number) for number in range(4)]
        await broker.add(*sent)
        taken = await DispatcherDeliveries(broker.dispatcher).take("app", 9, lease_ms=5_000)
        activations = [wire.TaskActivation.FromString(activation.activation) for activation in taken]
        assert sorted(activations, key=lambda activation: activation.id) == sent, (
            "the order of arrival may differ: each is stored as soon as it is offloaded"
        )


async def test_activations_taken_before_an_object_store_failure_are_still_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(_key: str) -> bytes:
        raise StoreUnavailable("the object store is unavailable")

    async with running_broker("sqlite", tmp_path, delivery="push", limits={"inline_bytes_max": 1_000}) as broker:
        await broker.add(activation(0), activation(1, parameters_bytes=b"x" * 5_000))
        with monkeypatch.context() as patched:
            patched.setattr(broker.engine.payloads, "get", away)
            assert [
                delivery.name for delivery in await broker.dispatcher.take(QueueFilter("app"), 9, lease_ms=5_000)
            ] == ["id_0"]
            with pytest.raises(StoreUnavailable):
                await broker.dispatcher.take(QueueFilter("app"), 9, lease_ms=5_000)
        assert [delivery.name for delivery in await broker.dispatcher.take(QueueFilter("app"), 9, lease_ms=5_000)] == [
            "id_1"
        ]


async def test_a_run_of_the_activation_task_without_a_valid_payload_fails_alone(tmp_path: Path) -> None:
    from headrace.core.activation import LANE
    from headrace.core.block import Extra
    from headrace.core.span import Key

    async with running_broker("memory", tmp_path) as broker:
        key = Key(LANE, queue="app:mail")
        await broker.producer.put(key, b"{}", 0, None)
        await broker.producer.put(key, b"\xff\xff", 0, Extra(idempotency_key="odd"))
        await broker.add_many(1)
        assert (await broker.get()).id == "id_0"
        await broker.set("id_0", COMPLETE)
        assert [view.state for view in await broker.runs()] == ["failed", "failed", "completed"]


# -- dead letters


@on_databases
async def test_a_failure_becomes_a_dead_letter_if_the_activation_requests_it(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:
        await broker.add(
            activation(0, retry={"on_attempts_exceeded": DEADLETTER}), activation(1, retry={}), activation(2)
        )
        for _ in range(3):
            await broker.get()
        await broker.set_batch(*((f"id_{number}", FAILURE) for number in range(3)))
        (dead,) = await broker.engine.store.dead_letters("default")
        view = await broker.engine.store.run(dead.batch_id, dead.index)
        assert wire.TaskActivation.FromString(view.payload).id == "id_0"
        assert await broker.engine.store.redrive(dead.batch_id, [dead.index]) == 1
        broker.engine.wakeup.notify()
        again = await broker.get()
        assert again == activation(0, retry={"on_attempts_exceeded": DEADLETTER})
        await broker.set(again.id, COMPLETE)
        assert await broker.engine.store.dead_letters("default") == []
