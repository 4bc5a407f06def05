"""A task broker under test: on any kind of store, with a real or manual clock, and helpers for its messages."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

from headrace.compose import open_engine
from headrace.core.activation import LANE
from headrace.core.pack import ACTIVATION
from headrace.foundation.errors import HeadraceError
from headrace.foundation.settings import load
from headrace.grpc.messages import taskbroker_pb2 as wire
from headrace.grpc.taskbroker.activation_codec import decode_entry
from headrace.grpc.taskbroker.consumer_service import Ack, ConsumerService, DeliveryMode, to_grpc_error
from headrace.grpc.transport.service_methods import CallContext, ResponseAfter
from headrace.grpc.transport.status import Code, GrpcError
from headrace.runtime.clock import Clock, ManualClock
from headrace.runtime.dispatch.dispatcher import Dispatcher
from headrace.runtime.dispatch.lease_buffer import QueueFilter
from headrace.runtime.dispatch.report_outcome import ActivationReport
from headrace.runtime.engine import Engine
from headrace.runtime.producing.producer import Producer
from headrace.store.protocol import RunRecord
from tests.support import invariants
from tests.support.engines import engine_of
from tests.support.store_rig import fresh_schema

DATABASES = ("sqlite", "postgres")
EVERY = ("memory", *DATABASES)
on_databases = pytest.mark.parametrize("kind", DATABASES)
on_every_store = pytest.mark.parametrize("kind", EVERY)

COMPLETE = wire.TASK_ACTIVATION_STATUS_COMPLETE
FAILURE = wire.TASK_ACTIVATION_STATUS_FAILURE
RETRY = wire.TASK_ACTIVATION_STATUS_RETRY
PENDING = wire.TASK_ACTIVATION_STATUS_PENDING
DISCARD = wire.ON_ATTEMPTS_EXCEEDED_DISCARD
DEADLETTER = wire.ON_ATTEMPTS_EXCEEDED_DEADLETTER


def activation(number: int | str, **fields: Any) -> wire.TaskActivation:
    """An activation as Sentry's client sends it: application "app", namespace "mail", a deadline of 10 s."""
    retry = fields.pop("retry", None)
    defaults: dict[str, Any] = {
        "id": f"id_{number}",
        "application": "app",
        "namespace": "mail",
        "taskname": "send",
        "parameters_bytes": b"\x82\xa4args\x90\xa6kwargs\x80",
        "processing_deadline_duration": 10,
    }
    if retry is not None:
        defaults["retry_state"] = wire.RetryState(**retry)
    return wire.TaskActivation(**(defaults | fields))


def varint(number: int) -> bytes:
    """Encode a length as a varint."""
    result = bytearray()
    while number > 0x7F:
        result.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*result, number))


def stream(*messages: wire.TaskActivation | bytes) -> bytes:
    """Encode a stream of messages, each after its length."""
    parts = [message if isinstance(message, bytes) else message.SerializeToString() for message in messages]
    return b"".join(varint(len(part)) + part for part in parts)


class WorkerConnection:
    """The connection of a worker, as the service sees it."""

    is_connected = True


async def call_method(
    method: Callable[[Any, CallContext], Any], request: Message, connection: WorkerConnection | None = None
) -> bytes:
    """Call a method of the service and return its encoded response, immediate or deferred."""
    try:
        result = method(request, CallContext("/test", connection=connection))
        if isinstance(result, ResponseAfter):
            await result.future
            result = result.make_response()
        result = await result if isinstance(result, Awaitable) else result
    except HeadraceError as error:
        raise to_grpc_error(error) from error
    return result or b""


class BrokerRig:
    """One server's broker: dispatcher, service and producer."""

    def __init__(self, engine: Engine, *, delivery: DeliveryMode = "pull", ack: Ack = "committed", **more: Any) -> None:
        self.engine = engine
        self.producer = Producer(engine)
        self.dispatcher = Dispatcher(engine, **more)
        self.service = ConsumerService(self.dispatcher, delivery=delivery, ack=ack)

    async def add(self, *messages: wire.TaskActivation) -> list[bool]:
        """Store activations. Returns for each whether it is new."""
        return await self.add_bytes(*(message.SerializeToString() for message in messages))

    async def add_bytes(self, *result: bytes) -> list[bool]:
        """Store encoded activations. Returns for each whether it is new."""
        now_us = self.engine.clock.now_us()
        entries = [(data, decode_entry(data, self.engine.limits, now_us)) for data in result]
        puts = [self.producer.put_new(entry.key, data, ACTIVATION, entry.extra) for data, entry in entries]
        return [is_new for _, _, is_new in await asyncio.gather(*puts)]

    async def add_many(self, count: int, **fields: Any) -> list[str]:
        """Store `count` similar activations. Returns their ids."""
        messages = [activation(number, **fields) for number in range(count)]
        await self.add(*messages)
        return [message.id for message in messages]

    async def get(self, *, by: WorkerConnection | None = None, **filters: Any) -> wire.TaskActivation:
        """Call GetTask on a connection."""
        answer = await call_method(self.service.get_task, wire.GetTaskRequest(**filters), by)
        return wire.GetTaskResponse.FromString(answer).task

    async def set(
        self,
        name: str,
        status: int,
        fetch: dict[str, Any] | None = None,
        *,
        by: WorkerConnection | None = None,
        **more: Any,
    ) -> Any:
        """Call SetTaskStatus on a connection. Returns the next task, or None."""
        request = wire.SetTaskStatusRequest(id=name, status=status, **more)  # type: ignore[arg-type]  # any number
        if fetch is not None:
            request.fetch_next_task.SetInParent()
            for field, value in fetch.items():
                setattr(request.fetch_next_task, field, value)
        answer = wire.SetTaskStatusResponse.FromString(await call_method(self.service.set_task_status, request, by))
        return answer.task if answer.HasField("task") else None

    async def set_batch(self, *updates: tuple[str, int]) -> None:
        """Call SetBatchActivationStatus."""
        requests = [wire.SetTaskStatusRequest(id=name, status=status) for name, status in updates]  # type: ignore[arg-type]  # any number
        await call_method(
            self.service.set_batch_activation_status, wire.SetBatchActivationStatusRequest(updates=requests)
        )

    async def runs(self) -> list[RunRecord]:
        """Return all activations in order of arrival."""
        result = await self.engine.store.runs(self.engine.environment, task=LANE, limit=invariants.ALL)
        return sorted(result, key=lambda view: (view.batch_id, view.index))

    async def counts(self) -> dict[str, int]:
        """Count the activations by state. Leased but undelivered ones count as waiting."""
        result = Counter(view.state for view in await self.runs())
        result["waiting"] += result.pop("leased", 0) + result.pop("started", 0) - self.dispatcher.delivered_count
        result["processing"] = self.dispatcher.delivered_count
        return {state: count for state, count in result.items() if count}

    async def drain(self, workers_count: int, status: int = COMPLETE) -> list[str]:
        """Run workers that fetch and report until nothing is left, and wait until all reports are written. Returns the
        delivered ids in order.
        """
        delivered: list[str] = []

        async def work() -> None:
            task = await self._first()
            while task is not None:
                delivered.append(task.id)
                task = await self.set(task.id, status, fetch={})

        await asyncio.gather(*(work() for _ in range(workers_count)))
        await self.reports_written()
        return delivered

    async def drain_by_push(self) -> list[str]:
        """Take, mark and report until nothing is left. Returns the ids."""
        delivered: list[str] = []
        while taken := await self.dispatcher.take(QueueFilter(), 1_000, lease_ms=5_000):
            names = [delivery.name for delivery in taken]
            self.dispatcher.mark(names)
            await self.set_batch(*((name, COMPLETE) for name in names))
            delivered += names
        return delivered

    async def _first(self) -> wire.TaskActivation | None:
        try:
            return await self.get()
        except GrpcError as error:
            if error.code != Code.NOT_FOUND:
                raise
            return None

    async def tick(self) -> None:
        """Run the dispatcher's duties once, and wait until all their reports are written."""
        await self.dispatcher.tick()
        await self.reports_written()

    async def reports_written(self) -> None:
        """Wait until every accepted report is written: also those that the dispatcher itself made, which have no
        caller that waits for them.
        """
        await self.dispatcher.report([ActivationReport("nothing", "completed")])


async def engine_on(kind: str, folder: Path, clock: Clock | None = None, **limits: int) -> Engine:
    """Open an engine on a store of the given kind."""
    if kind != "postgres":
        return await engine_of(kind, folder, clock=clock, **limits)
    flags = {"store": fresh_schema(folder), **limits}
    engine = await open_engine(load(flags, {}, folder))
    return engine if clock is None else dataclasses.replace(engine, clock=clock)


@asynccontextmanager
async def running_broker(
    kind: str, folder: Path, *, clock: ManualClock | None = None, limits: dict[str, int] | None = None, **more: Any
) -> AsyncGenerator[BrokerRig, None]:
    """Run a broker while the block lasts; every invariant must hold at its end."""
    engine = await engine_on(kind, folder, clock, **(limits or {}))
    rig = BrokerRig(engine, **more)
    try:
        await rig.dispatcher.start()
        yield rig
        await rig.dispatcher.stop()
        await rig.producer.close()
        assert await invariants.faults(engine.store, engine.environment) == []
    finally:
        await rig.dispatcher.stop()
        await rig.producer.close()
        await engine.close()


def ids(tasks: Iterable[wire.TaskActivation]) -> list[str]:
    """Return the ids of tasks."""
    return [task.id for task in tasks]


async def status_of_error(call: Any) -> tuple[Code, str]:
    with pytest.raises(GrpcError) as error:
        await call
    return error.value.code, error.value.message
