"""Simulated network between a process and the shared store: requests are delayed, lost or duplicated, or crash the
process.

Fault points are named `<operation>.requested` (before the request leaves), `<operation>.done` (the store has done it,
and the response is in flight) and `<operation>.returned` (the response is back and not yet used). The loop adds
`await:<place>` for every other await. A request is delivered as a whole: the operations of `MemoryStore` never wait, so
each delivery is a transaction. A request that was sent is delivered even if its process crashes in the meantime, as in
a real network.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from headrace.foundation.errors import ObjectMissing, StoreUnavailable, StoreUnreachable
from headrace.store.payloads import StoredObject
from headrace.store.reachability import Reachability
from tests.simulation.loop import DISCARDED, RUNNING, Process, SimulatedLoop

OPERATIONS: Final = (
    "create_batch", "append", "seal", "stop_batch", "cancel_runs", "redrive", "start_session", "heartbeat",
    "end_session", "sessions", "recover", "claim", "settle", "release", "unwanted_runs", "batch", "find_batch",
    "batches", "missing", "outcomes", "run", "runs", "queues", "pause_queue", "verify", "sweep", "prune",
    "unnamed", "next_due_us", "duties", "take_duty", "end_duty", "add_key", "find_key", "keys", "revoke_key",
    "find_signing_key", "signing_key", "has_keys", "spend", "keep_schedules", "tick", "schedules", "named_leases",
    "complete_waiting",
    "dead_letters", "purge_dead", "rules", "keep_rules", "move_waiting", "size_bytes", "forget", "stalled_lanes",
    "lease_loads", "tasks_of_batches",
)  # fmt: skip
STAGES: Final = ("requested", "done", "returned")
UNUSED_OPERATIONS: Final = frozenset({
    "batch", "find_batch", "batches", "missing", "outcomes", "run", "runs", "queues", "verify", "unnamed",
    "add_key", "find_key", "has_keys", "keys", "revoke_key", "find_signing_key", "signing_key", "spend",
    "keep_schedules", "tick", "schedules", "named_leases", "complete_waiting", "dead_letters", "purge_dead", "rules",
    "keep_rules", "move_waiting", "size_bytes", "forget", "stalled_lanes",
    "lease_loads", "tasks_of_batches",
})  # fmt: skip
"""Operations that no simulated process requests, or that only servers request. They need no fault point: a crash in one
of the reads is a crash at an await.
"""

POINTS: Final = tuple(f"{operation}.{stage}" for operation in OPERATIONS for stage in STAGES)


@dataclass(slots=True)
class Conditions:
    """Probabilities of network faults for a request; `delay_s` is the usual longest delay."""

    lost: float = 0.0
    unacknowledged: float = 0.0
    duplicated: float = 0.0
    stalled: float = 0.0
    delay_s: float = 0.0


NO_FAULTS: Final = Conditions(delay_s=0.002)


@dataclass(slots=True)
class PlannedCrash:
    """A crash of a process when it reaches a fault point for the n-th time."""

    point: str = ""
    times: int = 0

    def triggers(self, point: str) -> bool:
        """Return True if the process crashes now."""
        if point != self.point:
            return False
        self.times -= 1
        return self.times == 0


class Network:
    """Requests in flight to a store. `deliver` performs a request and returns its result or raises its error."""

    def __init__(self, loop: SimulatedLoop, random: Random, deliver: Callable[[Process, str, Any, Any], Any]) -> None:
        self.conditions = NO_FAULTS
        self.lost: list[asyncio.Future[Any]] = []
        self.points_passed: set[str] = set()
        self.busy_until_s = 0.0
        self._loop = loop
        self._random = random
        self._deliver = deliver

    async def request(
        self, process: Process, planned_crash: PlannedCrash, operation: str, args: Any, kwargs: Any
    ) -> Any:
        """Send a request of a process and return the response."""
        if process.state == DISCARDED:
            raise asyncio.CancelledError
        await self._pass(process, planned_crash, f"{operation}.requested")
        response: asyncio.Future[Any] = self._loop.create_future()
        conditions, random = self.conditions, self._random
        delay_s = self._delay_s()
        if random.random() < conditions.lost:
            self._later(delay_s, lambda: self._end(response, None, StoreUnreachable("simulated: the request was lost")))
            return await response

        def arrive() -> None:
            try:
                result, error = self._deliver(process, operation, args, kwargs), None
            except Exception as raised:  # noqa: BLE001 - it travels back as the response
                result, error = None, raised
            if process.state == RUNNING and self._crashes_at(process, planned_crash, f"{operation}.done"):
                return
            if random.random() < conditions.unacknowledged:
                result, error = None, StoreUnreachable("simulated: the response was lost")
            self._later(self._delay_s(), lambda: self._end(response, result, error))

        def arrive_again() -> None:
            with suppress(Exception):  # the first response was returned already
                self._deliver(process, operation, args, kwargs)

        self._later(delay_s, arrive)
        if random.random() < conditions.duplicated:
            self._later(delay_s + random.expovariate(0.5), arrive_again)
        try:
            result = await response
        except Exception:
            await self._pass(process, planned_crash, f"{operation}.returned")
            raise
        await self._pass(process, planned_crash, f"{operation}.returned")
        return result

    async def _pass(self, process: Process, planned_crash: PlannedCrash, point: str) -> None:
        self.points_passed.add(point)
        if self._crashes_at(process, planned_crash, point):
            await self.never()

    def _crashes_at(self, process: Process, planned_crash: PlannedCrash, point: str) -> bool:
        self.points_passed.add(point)
        if planned_crash.triggers(point):
            process.crash(point)
        return not process.is_alive

    async def never(self) -> None:
        """Wait for ever, as a crashed process does."""
        response: asyncio.Future[Any] = self._loop.create_future()
        self.lost.append(response)
        await response

    def _delay_s(self) -> float:
        conditions, random = self.conditions, self._random
        if random.random() < conditions.stalled:
            return random.uniform(5, 40)
        return random.random() ** 3 * conditions.delay_s

    def _later(self, delay_s: float, call: Callable[[], None]) -> None:
        if delay_s > NO_FAULTS.delay_s:
            self.busy_until_s = max(self.busy_until_s, self._loop.time() + delay_s)
        self._loop.call_later(delay_s, call, context=Context())

    def _end(self, response: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
        if response.done():
            return
        if error is None:
            response.set_result(result)
        else:
            response.set_exception(error)


class SimulatedStore:
    """The store of a process: each operation goes over the simulated network."""

    def __init__(self, network: Network, process: Process, planned_crash: PlannedCrash) -> None:
        self._network = network
        self._process = process
        self._planned_crash = planned_crash
        self.reachability = Reachability(self._probe)

    async def _probe(self) -> None:
        await self.duties()

    def __getattr__(self, operation: str) -> Any:
        if operation not in OPERATIONS:
            raise AttributeError(operation)

        async def request(*args: Any, **kwargs: Any) -> Any:
            try:
                result = await self._network.request(self._process, self._planned_crash, operation, args, kwargs)
            except StoreUnreachable as error:
                self.reachability.failed(error)
                raise
            self.reachability.succeeded()
            return result

        return request


class SimulatedObjects:
    """Object store in a dict, sometimes unreachable."""

    def __init__(self, loop: SimulatedLoop, random: Random, network: Network, objects: dict[str, bytes]) -> None:
        self._loop = loop
        self._random = random
        self._network = network
        self._objects = objects

    async def _travel(self) -> None:
        await asyncio.sleep(self._random.random() * self._network.conditions.delay_s)
        if self._random.random() < self._network.conditions.lost:
            raise StoreUnavailable("simulated: the object store did not respond")

    async def put(self, key: str, data: bytes) -> None:
        """Store an object."""
        await self._travel()
        self._objects[key] = data

    async def get(self, key: str) -> bytes:
        """Return an object, or raise `ObjectMissing`."""
        await self._travel()
        if key not in self._objects:
            raise ObjectMissing("the object is missing", key=key)
        return self._objects[key]

    async def list(self) -> AsyncIterator[StoredObject]:
        """Yield nothing: simulated objects have no age."""
        await self._travel()
        for _ in ():
            yield _

    async def delete_older(self, _folder: str, _before_us: int) -> int:
        """Delete nothing: the simulation uploads no packets."""
        await self._travel()
        return 0

    async def delete(self, keys: Iterable[str]) -> None:
        """Delete objects."""
        await self._travel()
        for key in keys:
            self._objects.pop(key, None)
