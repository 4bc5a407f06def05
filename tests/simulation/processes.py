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
from headrace.runtime.producing.producer import Producer
from headrace.runtime.tasks.call_options import Options
from headrace.runtime.wakeup import Wakeup
from headrace.runtime.worker.worker import Worker
from headrace.store.payloads import PayloadStore
from headrace.store.protocol import Store
from tests.simulation.faults import Doom, SimulatedObjects, SimulatedStore
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
AGAIN_S: Final = 3.0


class OrderedDoorbell(Wakeup):
    """A doorbell that wakes in the order of waiting: the order of a set of objects is another in each run."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting = cast("set[asyncio.Event]", _OrderedSet())


class _OrderedSet:
    def __init__(self) -> None:
        self._kept: dict[Any, None] = {}

    def add(self, one: Any) -> None:
        self._kept[one] = None

    def discard(self, one: Any) -> None:
        self._kept.pop(one, None)

    def __iter__(self) -> Any:
        return iter(list(self._kept))


@dataclass(slots=True)
class Wish:
    """What a client wants to be durable, kept by the client: it asks again until it is told, also after a crash."""

    task: str
    values: list[int]
    key: str
    options: Options
    is_map: bool
    is_done: bool = False


class SimulatedProcess(Process):
    """A process with a clock of its own and a store far away. `gone` is told once when it has ended, however."""

    def __init__(self, simulation: Simulation, name: str, *, doom: Doom, dies_at_step: int, offset_s: float) -> None:
        super().__init__(name)
        self.simulation = simulation
        self.doom = doom
        self.dies_at_step = dies_at_step
        self.random: Random = Random(simulation.random.getrandbits(32))
        self.clock = SimulatedClock(simulation.loop, offset_s)
        network = simulation.network
        self.engine = Engine(
            store=cast("Store", SimulatedStore(network, self, doom)),
            payloads=cast("PayloadStore", SimulatedObjects(simulation.loop, self.random, network, simulation.objects)),
            clock=self.clock,
            limits=LIMITS,
            environment="default",
            live_directory=None,
            beats_beside=False,
            wakeup=OrderedDoorbell(),
            recorded=OrderedDoorbell(),
        )

    @property
    def session_id(self) -> str:
        """The session this process believes to have."""
        return ""

    async def live(self) -> None:
        """What the process does, from its start to its end."""
        raise NotImplementedError

    async def leave(self) -> None:
        """End in good order."""
        raise NotImplementedError

    def die(self, where: str) -> None:
        """End at once; nothing of this process runs any more."""
        if self.is_alive:
            super().die(where)
            self.simulation.died(self, where)

    def freeze(self) -> None:
        """SIGSTOP."""
        if self.state == RUNNING:
            self.state = FROZEN
            self.simulation.trace(self.name, "freezes")

    def thaw(self) -> None:
        """SIGCONT."""
        if self.state == FROZEN:
            self.state = RUNNING
            self.simulation.trace(self.name, "thaws")
            self.simulation.loop.put_back(self)


class WorkerProcess(SimulatedProcess):
    """A worker. Several of its incarnations follow each other under one name."""

    def __init__(self, simulation: Simulation, name: str, *, concurrency: int, **more: Any) -> None:
        super().__init__(simulation, name, **more)
        hooks = Hooks(self._begin, self.die, simulation.loop.create_future)
        self.worker = Worker(self.engine, registry_of(hooks), concurrency=concurrency, inline_sync=True)

    @property
    def session_id(self) -> str:
        """The session this process believes to have."""
        return self.worker.session.session_id

    def _begin(self, value: int, task: str) -> tuple[Behaviour, int]:
        watch, plan = self.simulation.watch, self.simulation.plan
        before_count = watch.executions[value]
        self.simulation.trace(self.name, "runs", value)
        watch.started(value, self.session_id, at_most_once=task == ONCE)
        return plan[value], before_count

    async def live(self) -> None:
        """Start; what follows is the worker's own loops."""
        await self.worker.start()

    async def leave(self) -> None:
        """End in good order, or say that the store took no more."""
        await self.worker.stop()


class ProducerProcess(SimulatedProcess):
    """A producer that works off wishes, several at a time."""

    def __init__(self, simulation: Simulation, name: str, *, wishes: list[Wish], **more: Any) -> None:
        super().__init__(simulation, name, **more)
        hooks = Hooks(lambda _value, _task: (Behaviour(), 0), self.die, simulation.loop.create_future)
        self._registry = registry_of(hooks)
        self._producer = Producer(self.engine)
        self._wishes = wishes

    @property
    def session_id(self) -> str:
        """The session this process believes to have, if it needed one."""
        broker = self._producer._broker
        return "" if broker is None else broker.session_id

    async def live(self) -> None:
        """Ask for everything that is not known to be done, a few at a time."""
        waiting = [wish for wish in self._wishes if not wish.is_done]
        await asyncio.gather(*(self._work_off(waiting) for _ in range(3)))

    async def _work_off(self, waiting: list[Wish]) -> None:
        while waiting:
            wish = waiting.pop(0)
            while not wish.is_done:
                await self.clock.sleep(self.random.random() * 2)
                try:
                    await self._ask(wish)
                    wish.is_done = True
                except ClientFault as error:  # the batch was cancelled meanwhile
                    self.simulation.trace(self.name, "is refused", wish.key, error.code)
                    wish.is_done = True
                except HeadraceError as error:
                    self.simulation.trace(self.name, "asks again", wish.key, error.code)
                    await self.clock.sleep(AGAIN_S)

    async def _ask(self, wish: Wish) -> None:
        spec = self._registry.get(wish.task)
        if wish.is_map:
            await self._producer.map(spec, self._items(wish), wish.options, key=wish.key, metadata={})
            return
        batch_id, index = await self._producer.enqueue(spec, b"%d" % wish.values[0], wish.options)
        self.simulation.promised(wish.key, batch_id, index)

    async def _items(self, wish: Wish) -> AsyncIterator[int]:
        for value in wish.values:
            if self.random.random() < 0.05:
                await self.clock.sleep(self.random.random())
            yield value

    async def leave(self) -> None:
        """Write what waits, and seal the stream."""
        await self._producer.close()


class ConsoleProcess(SimulatedProcess):
    """A person who cancels, redrives and pauses. Each request is tried once; what came of it is not always known."""

    async def live(self) -> None:
        """Requests now and then, for as long as there is bad weather."""
        simulation, random = self.simulation, self.random
        doings: list[Callable[[], Any]] = [
            self._cancel_runs, self._cancel_runs, self._redrive, self._redrive, self._pause, self._cancel_batch
        ]  # fmt: skip
        while simulation.is_stormy:
            await self.clock.sleep(random.expovariate(0.25))
            try:
                await random.choice(doings)()
            except HeadraceError as error:
                simulation.trace(self.name, "is told", error.code)

    async def leave(self) -> None:
        """There is nothing to leave."""

    def _some_batch(self) -> str:
        known = [batch.id for batch in self.simulation.watch.batches()]
        return self.random.choice(known) if known else "batch_none"

    async def _cancel_batch(self) -> None:
        if self.random.random() < 0.3:
            await self.engine.store.stop_batch(self._some_batch(), "cancelled", now_us=self.clock.now_us())

    async def _cancel_runs(self) -> None:
        indexes = sorted({self.random.randrange(20) for _ in range(3)})
        await self.engine.store.cancel_runs(self._some_batch(), indexes, now_us=self.clock.now_us())

    async def _redrive(self) -> None:
        await self.engine.store.redrive(self._some_batch(), None)

    async def _pause(self) -> None:
        queue, paused = self.random.choice(("default", "side")), self.random.random() < 0.5
        await self.engine.store.pause_queue("default", queue, paused=paused)
