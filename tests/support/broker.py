"""A task broker under test: a store of any kind, a clock that is real or held, and short words for messages."""

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
CALL = CallContext("/test")


def activation(number: int | str, **fields: Any) -> wire.TaskActivation:
    """An activation as the field's client makes it: application "app", namespace "mail", 10 s to do it in."""
    retry = fields.pop("retry", None)
    known: dict[str, Any] = {
        "id": f"id_{number}",
        "application": "app",
        "namespace": "mail",
        "taskname": "send",
        "parameters_bytes": b"\x82\xa4args\x90\xa6kwargs\x80",
        "processing_deadline_duration": 10,
    }
    if retry is not None:
        known["retry_state"] = wire.RetryState(**retry)
    return wire.TaskActivation(**(known | fields))


def varint(number: int) -> bytes:
    """A length as it goes before a message."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*found, number))


def stream(*messages: wire.TaskActivation | bytes) -> bytes:
    """Messages as they are sent: each after its length."""
    parts = [one if isinstance(one, bytes) else one.SerializeToString() for one in messages]
    return b"".join(varint(len(part)) + part for part in parts)


async def called(method: Callable[[Any, CallContext], Any], request: Message) -> bytes:
    """What a method of the service comes to, at once or later, as its caller is told."""
    try:
        found = method(request, CALL)
        if isinstance(found, ResponseAfter):
            await found.future
            found = found.make_response()
        found = await found if isinstance(found, Awaitable) else found
    except HeadraceError as error:
        raise to_grpc_error(error) from error
    return found or b""


class Broker:
    """One server's side of the broker: what workers call, and what stands behind it."""

    def __init__(self, engine: Engine, *, delivery: DeliveryMode = "pull", ack: Ack = "committed", **more: Any) -> None:
        self.engine = engine
        self.producer = Producer(engine)
        self.dispatcher = Dispatcher(engine, **more)
        self.service = ConsumerService(self.dispatcher, delivery=delivery, ack=ack)

    async def add(self, *messages: wire.TaskActivation) -> list[bool]:
        """Make activations durable; answers which are new."""
        return await self.add_bytes(*(message.SerializeToString() for message in messages))

    async def add_bytes(self, *found: bytes) -> list[bool]:
        """The same, of their bytes."""
        now_us = self.engine.clock.now_us()
        entries = [(data, decode_entry(data, self.engine.limits, now_us)) for data in found]
        puts = [self.producer.put_new(entry.key, data, ACTIVATION, entry.extra) for data, entry in entries]
        return [is_new for _, _, is_new in await asyncio.gather(*puts)]

    async def filled(self, count: int, **fields: Any) -> list[str]:
        """So many activations alike; answers their ids."""
        messages = [activation(number, **fields) for number in range(count)]
        await self.add(*messages)
        return [message.id for message in messages]

    async def get(self, **filters: Any) -> wire.TaskActivation:
        """GetTask."""
        answer = await called(self.service.get_task, wire.GetTaskRequest(**filters))
        return wire.GetTaskResponse.FromString(answer).task

    async def set(self, name: str, status: int, fetch: dict[str, Any] | None = None, **more: Any) -> Any:
        """SetTaskStatus; answers the next task, or None."""
        request = wire.SetTaskStatusRequest(id=name, status=status, **more)  # type: ignore[arg-type]  # any number
        if fetch is not None:
            request.fetch_next_task.SetInParent()
            for field, value in fetch.items():
                setattr(request.fetch_next_task, field, value)
        answer = wire.SetTaskStatusResponse.FromString(await called(self.service.set_task_status, request))
        return answer.task if answer.HasField("task") else None

    async def set_batch(self, *updates: tuple[str, int]) -> None:
        """SetBatchActivationStatus."""
        told = [wire.SetTaskStatusRequest(id=name, status=status) for name, status in updates]  # type: ignore[arg-type]  # any number
        await called(self.service.set_batch_activation_status, wire.SetBatchActivationStatusRequest(updates=told))

    async def runs(self) -> list[RunRecord]:
        """All activations there are, in the order they came."""
        found = await self.engine.store.runs(self.engine.environment, task=LANE, limit=invariants.ALL)
        return sorted(found, key=lambda view: (view.batch_id, view.index))

    async def counts(self) -> dict[str, int]:
        """How many activations are in which state; leased ones that nobody has count as waiting."""
        found = Counter(view.state for view in await self.runs())
        found["waiting"] += found.pop("leased", 0) + found.pop("started", 0) - self.dispatcher.out_count
        found["processing"] = self.dispatcher.out_count
        return {state: count for state, count in found.items() if count}

    async def drained(self, workers_count: int, status: int = COMPLETE) -> list[str]:
        """Workers that each fetch and report until nothing is left; answers what they had, in order."""
        had: list[str] = []

        async def work() -> None:
            task = await self._first()
            while task is not None:
                had.append(task.id)
                task = await self.set(task.id, status, fetch={})

        await asyncio.gather(*(work() for _ in range(workers_count)))
        return had

    async def drained_by_push(self) -> list[str]:
        """What is taken, marked and reported on until nothing is left."""
        had: list[str] = []
        while taken := await self.dispatcher.take(QueueFilter(), 1_000, lease_ms=5_000):
            names = [handout.name for handout in taken]
            self.dispatcher.mark(names)
            await self.set_batch(*((name, COMPLETE) for name in names))
            had += names
        return had

    async def _first(self) -> wire.TaskActivation | None:
        try:
            return await self.get()
        except GrpcError as error:
            if error.code != Code.NOT_FOUND:
                raise
            return None

    async def tick(self) -> None:
        """One round of the dispatcher's duties, and all that it came to durable: a report of nothing comes last."""
        await self.dispatcher.tick()
        await self.dispatcher.report([ActivationReport("nothing", "completed")])


async def engine_on(kind: str, folder: Path, clock: Clock | None = None, **limits: int) -> Engine:
    """An open engine on a store of this kind."""
    if kind != "postgres":
        return await engine_of(kind, folder, clock=clock, **limits)
    flags = {"store": fresh_schema(folder), "objects": str(folder / "objects"), **limits}
    engine = await open_engine(load(flags, {}, folder))
    return engine if clock is None else dataclasses.replace(engine, clock=clock)


@asynccontextmanager
async def broker(
    kind: str, folder: Path, *, clock: ManualClock | None = None, limits: dict[str, int] | None = None, **more: Any
) -> AsyncGenerator[Broker, None]:
    """A broker for a block, which ends with every invariant."""
    engine = await engine_on(kind, folder, clock, **(limits or {}))
    made = Broker(engine, **more)
    try:
        await made.dispatcher.start()
        yield made
        await made.dispatcher.stop()
        await made.producer.close()
        assert await invariants.faults(engine.store, engine.environment) == []
    finally:
        await made.dispatcher.stop()
        await engine.close()


def ids(tasks: Iterable[wire.TaskActivation]) -> list[str]:
    """The ids of some tasks."""
    return [task.id for task in tasks]


async def refused(call: Any) -> tuple[Code, str]:
    with pytest.raises(GrpcError) as error:
        await call
    return error.value.code, error.value.message
