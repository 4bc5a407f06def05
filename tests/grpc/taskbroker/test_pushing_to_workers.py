"""Activations of real stores, pushed over real sockets to workers that report in batches."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from headrace.foundation.targets import PushTarget
from headrace.grpc.messages import taskbroker_pb2 as wire
from headrace.grpc.taskbroker.delivery_protocol import PushDelivery
from headrace.grpc.taskbroker.dispatcher_deliveries import DispatcherDeliveries
from headrace.grpc.taskbroker.pusher import Pusher
from headrace.grpc.transport.service_methods import CallContext, methods_of
from headrace.grpc.transport.status import Code, GrpcError
from headrace.http.grpc_mount.mounting import pushing
from tests.support.broker import COMPLETE, BrokerRig, on_databases, running_broker
from tests.support.grpc_server import WORKER, WORKER_ACCESS, listening
from tests.support.grpcio_client import channel
from tests.support.http_server import running_server

CONSUMER = "/sentry_protos.taskbroker.v1.ConsumerService/SetBatchActivationStatus"
SIZE = 16


class Worker:
    """A worker that queues activations, refuses when its queue is full, and reports in batches, as Sentry's does."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.queue: asyncio.Queue[str] = asyncio.Queue(SIZE)
        self.delivered: list[str] = []

    async def push_task(self, request: wire.PushTaskRequest, _call: CallContext) -> wire.PushTaskResponse:
        """Queue an activation, or refuse it as busy."""
        try:
            self.queue.put_nowait(request.task.id)
        except asyncio.QueueFull:
            raise GrpcError(Code.RESOURCE_EXHAUSTED, "worker busy") from None
        return wire.PushTaskResponse()

    async def work(self) -> None:
        """Execute the queued activations."""
        async with channel(self._port) as rig:
            report = rig.unary_unary(
                CONSUMER, request_serializer=wire.SetBatchActivationStatusRequest.SerializeToString
            )
            while True:
                names = [await self.queue.get()]
                while len(names) < SIZE and not self.queue.empty():
                    names.append(self.queue.get_nowait())
                self.delivered += names
                updates = [wire.SetTaskStatusRequest(id=name, status=COMPLETE) for name in names]
                await report(wire.SetBatchActivationStatusRequest(updates=updates))


def pusher_of(rig: BrokerRig, *ports: int) -> Pusher:
    """Run a pusher of a broker's activations."""
    targets = [PushTarget("app", "127.0.0.1", port, is_tls=False) for port in ports]
    engine = rig.engine
    return Pusher(
        DispatcherDeliveries(rig.dispatcher),
        targets,
        limits=engine.limits,
        clock=engine.clock,
        wakeup=engine.wakeup,
    )


@on_databases
async def test_each_activation_is_pushed_and_recorded_once(tmp_path: Path, kind: str) -> None:
    limits = {"poll_interval_ms": 20}
    async with (
        running_broker(kind, tmp_path, delivery="push", limits=limits) as rig,
        listening(rig.service.methods) as (_, port),
    ):
        workers = [Worker(port), Worker(port)]
        async with (
            listening(methods_of(WORKER, workers[0], access=WORKER_ACCESS)) as (_, first_port),
            listening(methods_of(WORKER, workers[1], access=WORKER_ACCESS)) as (_, second_port),
        ):
            names = await rig.add_many(500)
            pusher = pusher_of(rig, first_port, second_port)
            await pusher.start()
            working = [asyncio.create_task(worker.work()) for worker in workers]
            while (await rig.counts()).get("completed") != 500:
                await asyncio.sleep(0)
            await pusher.stop()
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)
        delivered = workers[0].delivered + workers[1].delivered
        assert Counter(delivered) == dict.fromkeys(names, 1)


async def test_a_server_counts_its_pushes_and_stops_them_with_itself(tmp_path: Path) -> None:
    worker = Worker(0)
    async with (
        running_server(tmp_path) as server,
        listening(methods_of(WORKER, worker, access=WORKER_ACCESS)) as (_, port),
    ):
        shelf: Any = Shelf()
        async with pushing(server.service, shelf, [PushTarget("app", "127.0.0.1", port, is_tls=False)]) as pusher:
            while pusher.endpoints["app"][0].pushed_count < 1 or not pusher.parked_count:
                await asyncio.sleep(0)
            text = (await server.ask("GET", "/metrics")).body.decode()
            labels = f'application="app",endpoint="127.0.0.1:{port}"'
            assert f'headrace_pushes_total{{{labels},outcome="taken"}} 1.0' in text
            assert f"headrace_pushes_under_way{{{labels}}} 0.0" in text
            assert "headrace_push_parked 4.0" in text
            await server.server.stop()
            assert shelf.marked == ["one"]


class Shelf:
    """A source with one activation, and some of an application without an endpoint."""

    def __init__(self) -> None:
        self.left = ["one"]
        self.marked: list[str] = []

    async def take(self, application: str, _count_max: int, *, lease_ms: int) -> list[Any]:
        """Take the activation."""
        taken, self.left = self.left, []
        return [PushDelivery(name, application, wire.TaskActivation(id=name).SerializeToString()) for name in taken]

    async def mark(self, ids: list[str]) -> None:
        """Mark activations as received."""
        self.marked += ids

    async def parked(self, _applications: Any) -> dict[str, int]:
        """Count the activations of other applications."""
        return {"stranger": 4}


@pytest.mark.parametrize("at_most_once", [False, True])
async def test_an_activation_that_a_worker_refuses_waits_unchanged(tmp_path: Path, at_most_once: bool) -> None:
    async with running_broker("memory", tmp_path, delivery="push", limits={"poll_interval_ms": 5}) as rig:
        worker = Worker(0)
        for _ in range(SIZE):
            worker.queue.put_nowait("full")
        async with listening(methods_of(WORKER, worker, access=WORKER_ACCESS)) as (_, port):
            await rig.add_many(3, retry={"at_most_once": at_most_once})
            pusher = pusher_of(rig, port)
            await pusher.start()
            while pusher.endpoints["app"][0].busy_count < 4:
                await asyncio.sleep(0)
            await pusher.stop()
        assert rig.dispatcher.delivered_count == 0
        assert await rig.counts() == {"waiting": 3}
