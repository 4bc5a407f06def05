"""Simulated processes: a worker and a producer made of the real classes, and a person with a console."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Final, cast

from headrace.foundation.errors import ClientFault, HeadraceError
from headrace.foundation.limits import Limits
from headrace.runtime.engine import Engine
from headrace.runtime.outage import Outage
from headrace.runtime.producing.producer import Producer
from headrace.runtime.tasks.call_options import Options
from headrace.runtime.wakeup import Wakeup
from headrace.runtime.worker.worker import Worker
from headrace.store.payloads import PayloadStore
from headrace.store.protocol import Store
from tests.simulation.faults import PlannedCrash, SimulatedObjects, SimulatedStore
from tests.simulation.loop import FROZEN, RUNNING, Process, SimulatedClock
from tests.simulation.tasks import ONCE, Behaviour, Hooks, registry_of

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation

LIMITS: Final = Limits(
    chunk_runs_max=64,
    heartbeat_ms=1_000,
    session_timeout_ms=4_000,
    upkeep_interval_ms=2_000,
    inline_bytes_max=512,
    flush_size=4,
    shutdown_grace_s=5,
)
RETRY_S: Final = 3.0


class OrderedWakeup(Wakeup):
    """A wake-up in the order of waiting: the order of a set of objects differs between runs."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting = cast("set[asyncio.Event]", _OrderedSet())


class _OrderedSet:
    def __init__(self) -> None:
        self._items: dict[Any, None] = {}

    def add(self, item: Any) -> None:
        self._items[item] = None

    def discard(self, item: Any) -> None:
        self._items.pop(item, None)

    def __iter__(self) -> Any:
        return iter(list(self._items))


@dataclass(slots=True)
class ClientRequest:
    """A request of a client, which repeats it until it is acknowledged, also after a crash."""

    task: str
    values: list[int]
    key: str
    options: Options
    is_map: bool
    is_done: bool = False


class SimulatedProcess(Process):
    """A process with its own clock and a remote store; the simulation records its crash."""

    def __init__(
        self, simulation: Simulation, name: str, *, planned_crash: PlannedCrash, crashes_at_step: int, offset_s: float
    ) -> None:
        super().__init__(name)
        self.simulation = simulation
        self.planned_crash = planned_crash
        self.crashes_at_step = crashes_at_step
        self.random: Random = Random(simulation.random.getrandbits(32))
        self.clock = SimulatedClock(simulation.loop, offset_s)
        network = simulation.network
        store = SimulatedStore(network, self, planned_crash)
        self.engine = Engine(
            store=cast("Store", store),
            payloads=cast("PayloadStore", SimulatedObjects(simulation.loop, self.random, network, simulation.objects)),
            clock=self.clock,
            limits=LIMITS,
            environment="default",
            live_directory=None,
            beats_beside=False,
            wakeup=OrderedWakeup(),
            recorded=OrderedWakeup(),
            cancelled=OrderedWakeup(),
            outage=Outage(store.reachability, jitter=self.random.random),
        )

    @property
    def session_id(self) -> str:
        """Session that this process uses."""
        return ""

    async def live(self) -> None:
        """Run the process from its start to its end."""
        raise NotImplementedError

    async def shut_down(self) -> None:
        """Shut down gracefully."""
        raise NotImplementedError

    def crash(self, where: str) -> None:
        """End at once; no callback of this process runs any more."""
        if self.is_alive:
            super().crash(where)
            self.simulation.record_crash(self, where)

    def freeze(self) -> None:
        """Freeze, as SIGSTOP does."""
        if self.state == RUNNING:
            self.state = FROZEN
            self.simulation.trace(self.name, "freezes")

    def thaw(self) -> None:
        """Thaw, as SIGCONT does."""
        if self.state == FROZEN:
            self.state = RUNNING
            self.simulation.trace(self.name, "thaws")
            self.simulation.loop.resume(self)


class WorkerProcess(SimulatedProcess):
    """A worker; a restarted worker keeps the name."""

    def __init__(self, simulation: Simulation, name: str, *, concurrency: int, **options: Any) -> None:
        super().__init__(simulation, name, **options)
        hooks = Hooks(self._begin, self.crash, simulation.loop.create_future)
        self.worker = Worker(self.engine, registry_of(hooks), concurrency=concurrency, inline_sync=True)

    @property
    def session_id(self) -> str:
        """Session that this worker uses."""
        return self.worker.session.session_id

    def _begin(self, value: int, task: str) -> tuple[Behaviour, int]:
        monitor, plan = self.simulation.monitor, self.simulation.plan
        before_count = monitor.executions[value]
        self.simulation.trace(self.name, "runs", value)
        monitor.started(value, self.session_id, at_most_once=task == ONCE)
        return plan[value], before_count

    async def live(self) -> None:
        """Start the worker, whose loops then run on their own."""
        await self.worker.start()

    async def shut_down(self) -> None:
        """Shut down gracefully, or fail because the store accepts no more updates."""
        await self.worker.stop()


class ProducerProcess(SimulatedProcess):
    """A producer that sends requests, several at a time."""

    def __init__(self, simulation: Simulation, name: str, *, requests: list[ClientRequest], **options: Any) -> None:
        super().__init__(simulation, name, **options)
        hooks = Hooks(lambda _value, _task: (Behaviour(), 0), self.crash, simulation.loop.create_future)
        self._registry = registry_of(hooks)
        self._producer = Producer(self.engine)
        self._requests = requests

    @property
    def session_id(self) -> str:
        """Session that this producer uses, if it needed one."""
        session = self._producer._session
        return "" if session is None else session.session_id

    async def live(self) -> None:
        """Send all requests that are not acknowledged, a few at a time."""
        waiting = [request for request in self._requests if not request.is_done]
        await asyncio.gather(*(self._send_all(waiting) for _ in range(3)))

    async def _send_all(self, waiting: list[ClientRequest]) -> None:
        while waiting:
            request = waiting.pop(0)
            while not request.is_done:
                await self.clock.sleep(self.random.random() * 2)
                try:
                    await self._send(request)
                    request.is_done = True
                except ClientFault as error:  # the batch was cancelled in the meantime
                    self.simulation.trace(self.name, "is refused", request.key, error.code)
                    request.is_done = True
                except HeadraceError as error:
                    self.simulation.trace(self.name, "retries", request.key, error.code)
                    await self.clock.sleep(RETRY_S)

    async def _send(self, request: ClientRequest) -> None:
        spec = self._registry.get(request.task)
        if request.is_map:
            await self._producer.map(spec, self._items(request), request.options, key=request.key, metadata={})
            return
        batch_id, index = await self._producer.enqueue(spec, b"%d" % request.values[0], request.options)
        self.simulation.record_promise(request.key, batch_id, index)

    async def _items(self, request: ClientRequest) -> AsyncIterator[int]:
        for value in request.values:
            if self.random.random() < 0.05:
                await self.clock.sleep(self.random.random())
            yield value

    async def shut_down(self) -> None:
        """Flush what is buffered, and seal the stream."""
        await self._producer.close()


class ConsoleProcess(SimulatedProcess):
    """A person who cancels, redrives and pauses. Each request is tried once; its outcome may stay unknown."""

    async def live(self) -> None:
        """Send requests at intervals for as long as faults are injected."""
        simulation, random = self.simulation, self.random
        actions: list[Callable[[], Any]] = [
            self._cancel_runs, self._cancel_runs, self._redrive, self._redrive, self._pause, self._cancel_batch
        ]  # fmt: skip
        while simulation.has_faults:
            await self.clock.sleep(random.expovariate(0.25))
            try:
                await random.choice(actions)()
            except HeadraceError as error:
                simulation.trace(self.name, "request-failed", error.code)

    async def shut_down(self) -> None:
        """Do nothing: a console has no state to flush."""

    def _random_batch(self) -> str:
        batch_ids = [batch.id for batch in self.simulation.monitor.batches()]
        return self.random.choice(batch_ids) if batch_ids else "batch_none"

    async def _cancel_batch(self) -> None:
        if self.random.random() < 0.3:
            await self.engine.stop_batch(self._random_batch(), "cancelled")
            self.simulation.notify_cancelled()

    async def _cancel_runs(self) -> None:
        indexes = sorted({self.random.randrange(20) for _ in range(3)})
        await self.engine.cancel_runs(self._random_batch(), indexes)
        self.simulation.notify_cancelled()

    async def _redrive(self) -> None:
        await self.engine.store.redrive(self._random_batch(), None)

    async def _pause(self) -> None:
        queue, paused = self.random.choice(("default", "side")), self.random.random() < 0.5
        await self.engine.store.pause_queue("default", queue, paused=paused)
