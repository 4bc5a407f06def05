"""Pusher: delivered activations are marked, others are released at once, and no endpoint gets more than it accepts."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from headrace.foundation.errors import StoreUnavailable
from headrace.foundation.limits import Limits
from headrace.foundation.targets import PushTarget
from headrace.grpc.messages import taskbroker_pb2 as wire
from headrace.grpc.taskbroker import pusher as pushes
from headrace.grpc.taskbroker.activation_codec import as_first_field
from headrace.grpc.taskbroker.delivery_protocol import PushDelivery
from headrace.grpc.taskbroker.pusher import BUSY_S, QUERY_MS, PushEndpoint, Pusher, lease_ms
from headrace.grpc.transport import client as channels
from headrace.grpc.transport.service_methods import CallContext, methods_of
from headrace.grpc.transport.signing import Secrets
from headrace.grpc.transport.status import Code, GrpcError
from headrace.runtime.clock import SystemClock
from headrace.runtime.wakeup import Wakeup
from tests.support.grpc_server import WORKER, WORKER_ACCESS, listening

SECRETS = ("a secret of many bytes",)


class FakeSource:
    """A source of activations: waiting, claimed or with workers, and the order of events."""

    def __init__(self, count: int, application: str = "app", *, at_most_once: bool = False) -> None:
        self.waiting = deque(
            PushDelivery(f"id_{n}", application, activation(n).SerializeToString(), at_most_once) for n in range(count)
        )
        self.claimed: dict[str, PushDelivery] = {}
        self.marked: list[str] = []
        self.returned: Counter[str] = Counter()
        self.taken_count = 0
        self.leases_ms: set[int] = set()
        self.strangers: dict[str, int] = {}
        self.changed = asyncio.Event()
        self.fails = 0

    async def take(self, application: str, count_max: int, *, lease_ms: int) -> list[PushDelivery]:
        """Take the oldest activations of an application."""
        if self.fails:
            self.fails -= 1
            raise StoreUnavailable("the store is unavailable")
        self.leases_ms.add(lease_ms)
        taken = [delivery for delivery in self.waiting if delivery.application == application][:count_max]
        for delivery in taken:
            self.waiting.remove(delivery)
            self.claimed[delivery.id] = delivery
        self.taken_count += len(taken)
        return taken

    async def mark(self, ids: Sequence[str]) -> None:
        """Mark activations as received by workers."""
        for name in ids:
            self.claimed.pop(name)
            self.marked.append(name)
        self.changed.set()

    async def release(self, ids: Sequence[str]) -> None:
        """Release activations to the front."""
        for name in ids:
            self.waiting.appendleft(self.claimed.pop(name))
            self.returned[name] += 1
        self.changed.set()

    async def parked(self, applications: Sequence[str]) -> Mapping[str, int]:
        """Count the activations of other applications."""
        self.changed.set()
        return {name: count for name, count in self.strangers.items() if name not in applications}

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until a condition is true."""
        while not is_so():
            self.changed.clear()
            await self.changed.wait()


def activation(number: int) -> wire.TaskActivation:
    """One activation."""
    return wire.TaskActivation(id=f"id_{number}", application="app", taskname="task", parameters_bytes=b"x" * 100)


class Worker:
    """A worker that accepts activations, or answers with the next of `refusals`."""

    def __init__(self, *refusals: Any) -> None:
        self.refusals = deque(refusals)
        self.always: Exception | None = None
        self.received: list[str] = []
        self.in_flight_count = 0
        self.most = 0
        self.opened = asyncio.Event()
        self.opened.set()

    async def push_task(self, request: wire.PushTaskRequest, call: CallContext) -> wire.PushTaskResponse:
        """Receive one activation."""
        self.in_flight_count += 1
        self.most = max(self.most, self.in_flight_count)
        try:
            await self.opened.wait()
            refusal = self.refusals.popleft() if self.refusals else self.always
            if refusal is not None:
                raise refusal
            self.received.append(request.task.id)
            return wire.PushTaskResponse()
        finally:
            self.in_flight_count -= 1


BUSY = GrpcError(Code.RESOURCE_EXHAUSTED, "worker busy")


@asynccontextmanager
async def pushing(
    source: FakeSource, *workers: Worker, secrets: Sequence[str] = (), client_secrets: Sequence[str] = (), **limits: int
) -> AsyncGenerator[Pusher, None]:
    """Run workers on sockets, and a pusher that sends them the activations of a shelf."""
    bounds = {"poll_interval_ms": 5, "upkeep_interval_ms": 10} | limits
    async with AsyncExitStack() as stack:
        targets = []
        for worker in workers:
            _, port = await stack.enter_async_context(
                listening(methods_of(WORKER, worker, access=WORKER_ACCESS), secrets=secrets)
            )
            targets.append(PushTarget("app", "127.0.0.1", port, is_tls=False))
        pusher = Pusher(
            source,
            targets,
            limits=Limits(**bounds),
            clock=SystemClock(),
            wakeup=Wakeup(),
            secrets=Secrets(client_secrets or secrets),
        )
        await pusher.start()
        await pusher.start()
        try:
            yield pusher
        finally:
            await pusher.stop()
            await pusher.stop()


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the backoff, so that failed endpoints are called again at once."""
    monkeypatch.setattr(channels, "BACKOFF_S", (0.0,))
    monkeypatch.setattr(pushes, "BUSY_S", (0.0, 0.001))


async def test_a_delivered_activation_is_marked_once() -> None:
    source, worker = FakeSource(500), Worker()
    async with pushing(source, worker) as pusher:
        await source.until(lambda: len(source.marked) == 500)
        (endpoint,) = pusher.endpoints["app"]
        assert (endpoint.pushed_count, endpoint.busy_count, endpoint.failed_count) == (500, 0, 0)
    assert sorted(worker.received) == sorted(source.marked) == sorted(f"id_{n}" for n in range(500))
    assert source.taken_count == 500
    assert source.leases_ms == {lease_ms(Limits())}


async def test_activations_that_arrive_later_are_pushed() -> None:
    source, worker = FakeSource(0), Worker()
    async with pushing(source, worker):
        source.waiting.append(PushDelivery("late", "app", activation(1).SerializeToString()))
        await source.until(lambda: source.marked == ["late"])


async def test_activations_refused_by_a_busy_worker_are_released_and_pushed_again() -> None:
    source, worker = FakeSource(50), Worker(*[BUSY] * 7)
    async with pushing(source, worker) as pusher:
        await source.until(lambda: len(source.marked) == 50)
        (endpoint,) = pusher.endpoints["app"]
        assert endpoint.busy_count == 7
    assert sorted(worker.received) == sorted(source.marked)
    assert sum(source.returned.values()) == 7


async def test_a_push_that_fails_marks_nothing() -> None:
    source, worker = FakeSource(5), Worker()
    worker.always = GrpcError(Code.UNAVAILABLE, "no")
    async with pushing(source, worker):
        await source.until(lambda: sum(source.returned.values()) > 20)
        assert source.marked == []
    assert len(source.waiting) == 5
    assert source.claimed == {}


async def test_pushes_in_flight_are_bounded_by_the_endpoint_and_no_claimed_activation_waits() -> None:
    source, worker = FakeSource(100), Worker()
    worker.opened.clear()
    async with pushing(source, worker, push_concurrency=4):
        while worker.in_flight_count < 4:
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert (source.taken_count, worker.most) == (4, 4)
        worker.opened.set()
        await source.until(lambda: len(source.marked) == 100)
    assert worker.most == 4


async def test_two_endpoints_of_an_application_share_its_activations() -> None:
    source, first, second = FakeSource(200), Worker(), Worker()
    first.opened.clear()
    async with pushing(source, first, second, push_concurrency=8):
        await source.until(lambda: len(source.marked) == 192)
        assert (len(first.received), len(second.received), first.in_flight_count) == (0, 192, 8)
        first.opened.set()
        await source.until(lambda: len(source.marked) == 200)


async def test_the_other_endpoint_takes_over_from_one_that_is_unreachable() -> None:
    source, worker = FakeSource(100), Worker()
    async with pushing(source, worker) as pusher:
        (endpoint,) = pusher.endpoints["app"]
        gone = PushTarget("app", "127.0.0.1", 1, is_tls=False)
        channel = channels.Channel(gone, endpoint.channel._bounds, endpoint.channel._budget)
        pusher.endpoints["app"].append(PushEndpoint(channel, 8))
        await source.until(lambda: len(source.marked) == 100)
    assert sorted(worker.received) == sorted(source.marked)


async def test_pushes_are_signed_with_the_first_secret() -> None:
    source, worker = FakeSource(3), Worker()
    async with pushing(source, worker, secrets=SECRETS, client_secrets=(*SECRETS, "an older secret")):
        await source.until(lambda: len(source.marked) == 3)
    source, worker = FakeSource(3), Worker()
    async with pushing(source, worker, secrets=SECRETS, client_secrets=("an older secret", *SECRETS)):
        await source.until(lambda: sum(source.returned.values()) > 3)
        assert (worker.received, source.marked) == ([], [])


async def test_an_at_most_once_activation_that_may_have_started_is_marked_and_not_released() -> None:
    source = FakeSource(1, at_most_once=True)
    async with pushing(source, Worker(GrpcError(Code.INTERNAL, "half way"))):
        await source.until(lambda: source.marked == ["id_0"])
    assert source.returned == {}
    source = FakeSource(1, at_most_once=True)
    async with pushing(source, Worker(BUSY)):
        await source.until(lambda: source.marked == ["id_0"])
    assert source.returned == {"id_0": 1}, "a busy worker has not started it"


async def test_an_activation_that_workers_refuse_as_invalid_does_not_block_others() -> None:
    class Picky(Worker):
        async def push_task(self, request: wire.PushTaskRequest, call: CallContext) -> wire.PushTaskResponse:
            if request.task.id == "id_0":
                raise GrpcError(Code.INVALID_ARGUMENT, "this one is invalid")
            return await super().push_task(request, call)

    source, worker = FakeSource(20), Picky()
    async with pushing(source, worker, push_concurrency=1):
        await source.until(lambda: len(source.marked) == 19)
    assert source.returned == {"id_0": pushes.REFUSALS_PER_ID_MAX - 1}
    assert list(source.claimed) == ["id_0"], "its lease ends it"


async def test_the_refusals_of_an_activation_are_forgotten_once_it_is_accepted() -> None:
    source, worker = FakeSource(1), Worker(*[GrpcError(Code.INTERNAL, "not now")] * (pushes.REFUSALS_PER_ID_MAX - 1))
    async with pushing(source, worker) as pusher:
        await source.until(lambda: source.marked == ["id_0"])
        assert pusher._refusals_by_id == {}


async def test_an_unavailable_store_is_claimed_from_again() -> None:
    source, worker = FakeSource(3), Worker()
    source.fails = 3
    async with pushing(source, worker):
        await source.until(lambda: len(source.marked) == 3)
    assert source.fails == 0


async def test_applications_without_an_endpoint_are_counted_and_never_claimed() -> None:
    source, worker = FakeSource(3, "stranger"), Worker()
    source.strangers = {"stranger": 3, "app": 7}
    async with pushing(source, worker) as pusher:
        await source.until(lambda: pusher.parked_count == 3)
        assert source.taken_count == 0
        source.strangers = {}
        await source.until(lambda: pusher.parked_count == 0)


async def test_a_stop_completes_pushes_in_flight_and_writes_their_marks() -> None:
    source, worker = FakeSource(100), Worker()
    worker.opened.clear()
    async with pushing(source, worker, push_concurrency=4) as pusher:
        while worker.in_flight_count < 4:
            await asyncio.sleep(0)
        stopping = asyncio.create_task(pusher.stop())
        for _ in range(20):
            await asyncio.sleep(0)
        worker.opened.set()
        await stopping
        assert len(source.marked) == len(worker.received) == 4
        assert len(source.waiting) == 96
        assert source.claimed == {}


async def test_a_stop_releases_pushes_that_do_not_complete_in_time() -> None:
    source, worker = FakeSource(4), Worker()
    worker.opened.clear()
    async with pushing(source, worker, shutdown_grace_s=0) as pusher:
        while worker.in_flight_count < 4:
            await asyncio.sleep(0)
        await pusher.stop()
        assert len(source.waiting) == 4
        assert source.marked == []


def test_refusals_halve_an_endpoint_s_concurrency_and_acceptances_raise_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushes, "BUSY_S", BUSY_S)
    channel: Any = channels.Channel.__new__(channels.Channel)
    channel.target = PushTarget("app", "h", 1, is_tls=False)
    endpoint = PushEndpoint(channel, 8)
    assert endpoint.capacity(0) == 8
    now_us = 0
    for width, rest_s in ((4, 0.02), (2, 0.1), (1, 0.5), (1, 1.0), (1, 1.0)):
        endpoint.on_refused(now_us, BUSY)
        endpoint.on_refused(now_us, BUSY)
        assert (endpoint.concurrency, endpoint.capacity(now_us)) == (width, 0), "several refusals at once count as one"
        now_us += int(rest_s * 1e6) - 1
        assert endpoint.capacity(now_us) == 0
        now_us += 1
        assert endpoint.capacity(now_us) == width
    for _ in range(1 + 2 + 3 + 4 + 5 + 6 + 7):
        endpoint.on_accepted()
    assert endpoint.concurrency == 8
    endpoint.in_flight_count = 10
    assert endpoint.capacity(now_us) == 0


def test_a_lease_lasts_for_the_worst_case() -> None:
    assert lease_ms(Limits(push_timeout_ms=5_000)) == 5_000 + 2 * QUERY_MS


@pytest.mark.parametrize("size", [0, 1, 100, 20_000, 3_000_000])
def test_a_push_carries_the_activation_s_original_bytes(size: int) -> None:
    message = wire.TaskActivation(id="x", parameters_bytes=b"y" * size)
    assert wire.PushTaskRequest.FromString(as_first_field(message.SerializeToString())).task == message
