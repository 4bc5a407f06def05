"""One simulation: some workers, producers and a person over one store, in the weather that a seed brings.

Two acts. In the storm, requests are lost, doubled, late; processes die (at a named fault point, at any await, or of
what they run), freeze, thaw, leave and come again; clocks jump. Then it is calm: everybody thaws, the queues are open,
and within a quarter of an hour of virtual time everything must have come to its end, with nothing leased and no
session left.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from random import Random
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

import structlog

from headrace.foundation import ids
from headrace.foundation.errors import Conflict
from headrace.runtime.producing import producer as producer_module
from headrace.runtime.tasks.call_options import Options
from headrace.runtime.worker import claim_sizing as pace_module
from headrace.runtime.worker import executor as executor_module
from headrace.runtime.worker import outcome_recorder as outcome_module
from headrace.store.memory import MemoryStore
from tests.simulation.faults import CALM, POINTS, Doom, Network, Weather
from tests.simulation.loop import BURIED, DEAD, Process, SimulatedLoop, Stuck
from tests.simulation.processes import (
    LIMITS,
    ConsoleProcess,
    ProducerProcess,
    SimulatedProcess,
    Wish,
    WorkerProcess,
)
from tests.simulation.tasks import ONCE, PLAIN, QUEUES, SYNC, WORK, Behaviour
from tests.simulation.watch import Watch, done_at_once

CALM_S_MAX: Final = 900.0
LOOK_EVERY_S: Final = 1.0
DOOMS_AT_POINT: Final = 8


class Violation(AssertionError):
    """Something that must never be was seen."""


class Simulation:
    """Everything follows from `seed`. `run` raises `Violation`; `lines` tell what happened.

    `point`: a fault point at which the first processes die that come to it, whatever else the seed brings.
    """

    def __init__(self, seed: int, *, point: str = "") -> None:
        self.seed = seed
        self._point = point
        self._dooms_at_point = DOOMS_AT_POINT if point else 0
        self.random = Random(seed)
        self.loop = SimulatedLoop(Random(self._bits()), shuffle=self.random.choice((0.0, 0.2, 1.0)))
        self.store = MemoryStore(LIMITS)
        self.watch = Watch(self.store, self._fault)
        self.network = Network(self.loop, Random(self._bits()), self._deliver)
        self.objects: dict[str, bytes] = {}
        self.lines: list[str] = []
        self.deaths: list[str] = []
        self.plan: dict[int, Behaviour] = {}
        self.promises: dict[str, tuple[str, int]] = {}
        self.is_stormy = True
        self._is_judged = False
        self.storm_s = self.random.uniform(5, 40)
        self._processes: list[SimulatedProcess] = []
        self._lives: dict[SimulatedProcess, asyncio.Task[None]] = {}
        self._dooms_left = self.random.choice((0, 1, 2, 4, 8))
        self._offset_s_max = self.random.choice((0.0, 0.0, 1.0, 3.0, 240.0))
        self._concurrency = self.random.choice((1, 2, 4, 16))
        self._workers_count = self.random.randint(1, 4)
        self._wishes = [self._wishes_of(number) for number in range(self.random.randint(1, 2))]

    def _bits(self) -> int:
        return self.random.getrandbits(64)

    # -- what is wished

    def _wishes_of(self, producer: int) -> list[Wish]:
        random = self.random
        wishes = []
        kills_left = random.choice((0, 0, 0, 1))
        for number in range(random.randint(1, 3)):
            task = random.choice((WORK, WORK, PLAIN, SYNC, ONCE))
            runs_count = random.choice((0, 1, 5, 30, 30, 100))
            values = [self._item(task) for _ in range(runs_count)]
            if values and kills_left and task != SYNC:
                kills_left -= 1
                self.plan[random.choice(values)] = Behaviour(kills_count=random.choice((1, 2, 99)))
            options = Options(delay_s=random.choice((0, 0, 0, 5)), priority=random.choice((None, None, 3)))
            wishes.append(Wish(task, values, f"map-{producer}-{number}", options, is_map=True))
        for number in range(random.choice((0, 3, 15))):
            task = random.choice((WORK, PLAIN, SYNC, ONCE))
            key = f"enqueue-{producer}-{number}"
            options = Options(
                delay_s=random.choice((0, 0, 0, 2)),
                expires_s=random.choice((0, 0, 0, 10)),
                queue=random.choice((None, *QUEUES)),
                idempotency_key=key,
            )
            wishes.append(Wish(task, [self._item(task)], key, options, is_map=False))
        random.shuffle(wishes)
        return wishes

    def _item(self, task: str) -> int:
        random, value = self.random, len(self.plan)
        dice = random.random()
        sleep_s = random.random() * 2 if dice < 0.5 and task != SYNC else 0.0
        if dice < 0.05:
            behaviour = Behaviour(failures_count=99)
        elif dice < 0.12:
            behaviour = Behaviour(sleep_s=sleep_s, failures_count=random.randint(1, 3))
        elif dice < 0.16:
            behaviour = Behaviour(failures_count=1, retry_after_s=random.random() * 10)
        elif dice < 0.17:
            behaviour = Behaviour(hangs=True)
        elif dice < 0.18:
            behaviour = Behaviour(result_chars=600)
        else:
            behaviour = Behaviour(sleep_s=sleep_s)
        self.plan[value] = behaviour
        return value

    # -- what happens

    def trace(self, *words: object) -> None:
        """One line of what happened; a seed always tells the same story."""
        if self._is_judged:
            return
        self.lines.append(f"{self.loop.time():.6f} {' '.join(map(str, words))}")

    @property
    def story_hash(self) -> str:
        """Of all that happened."""
        return hashlib.blake2b("\n".join(self.lines).encode(), digest_size=16).hexdigest()

    def _fault(self, fault: str) -> None:
        self.trace("FAULT", fault)
        if self.loop.broken is None and not self._is_judged:
            self.loop.broken = Violation(fault)

    def _deliver(self, process: Process, verb: str, args: Any, kwargs: Any) -> Any:
        """One request reaches the store."""
        if verb == "redrive" and self._holds_once(args[0]):
            raise Conflict("simulated: what runs at most once is not sent round again")
        try:
            answer = done_at_once(getattr(self.store, verb)(*args, **kwargs))
        except Exception as error:
            self.trace(process.name, verb, "->", type(error).__name__)
            self.watch.delivered("", args, None)  # nothing may have changed
            raise
        self.trace(process.name, verb, "->", _told(answer))
        self.watch.delivered(verb, args, answer)
        return answer

    def _holds_once(self, batch_id: str) -> bool:
        return any(span.at_most_once for span in self.store._tables.spans.values() if span.batch_id == batch_id)

    def promised(self, key: str, batch_id: str, index: int) -> None:
        """A producer was told where its run is."""
        known = self.promises.setdefault(key, (batch_id, index))
        if known != (batch_id, index):
            self._fault(f"the key {key} names run {known} and then {(batch_id, index)}")
        if index not in self.store._tables.received[batch_id]:
            self._fault(f"run {batch_id}/{index} was promised and is not in the store")

    def died(self, process: SimulatedProcess, where: str) -> None:
        """A process ended at once."""
        self.deaths.append(where)
        self.trace(process.name, "dies at", where)

    # -- the two acts

    def run(self) -> None:
        """The whole simulation. Raises `Violation` or `Stuck`."""
        with _seeded(self):
            asyncio.set_event_loop(None)
            try:
                self.loop.run_until_complete(self._play())
            finally:
                self._bury()

    async def _play(self) -> None:
        await self.store.open()
        self.network.weather = self._weather()
        self.trace("weather", self.network.weather)
        for number in range(self._workers_count):
            self._spawn_worker(f"worker-{number}")
        for number in range(len(self._wishes)):
            self._spawn_producer(number)
        self._spawn(ConsoleProcess(self, "console", doom=Doom(self._point, 1), dies_at_step=0, offset_s=0))
        until_s = self.loop.time() + self.storm_s
        while self.loop.time() < until_s:
            await asyncio.sleep(self.random.expovariate(0.7))
            self._something_happens()
            self._restart_the_dead()
        await self._calm()
        self.watch.look_at_all()

    def _weather(self) -> Weather:
        random = self.random
        kind = random.choice(("calm", "lossy", "slow", "bad"))
        delay_s = random.choice((0.002, 0.05, 1.0))
        if kind == "calm":
            return Weather(delay_s=delay_s)
        if kind == "lossy":
            return Weather(lost=0.1, unanswered=0.1, doubled=0.1, delay_s=delay_s)
        if kind == "slow":
            return Weather(stalled=0.03, doubled=0.05, delay_s=2.0)
        return Weather(lost=0.15, unanswered=0.15, doubled=0.3, stalled=0.02, delay_s=3.0)

    def _something_happens(self) -> None:
        random = self.random
        alive = [process for process in self._processes if process.is_alive and not isinstance(process, ConsoleProcess)]
        if not alive:
            return
        process = random.choice(alive)
        dice = random.random()
        if dice < 0.10:
            process.freeze()
            self.loop.call_later(random.choice((0.5, 3, 8, 20)), process.thaw)
        elif dice < 0.14:
            process.clock.jump(random.uniform(-1, 1) * self._offset_s_max)
        elif dice < 0.20:
            process.die("signal 9")
        elif dice < 0.25 and process in self._lives and process.state != DEAD:
            self._leave(process)

    def _leave(self, process: SimulatedProcess) -> asyncio.Task[None]:
        """SIGTERM: end in good order, and be gone."""
        self.trace(process.name, "leaves")

        async def leave() -> None:
            self._lives[process].cancel()
            try:
                await process.leave()
            except Exception as error:  # noqa: BLE001 - a process that can't leave in good order just ends
                self.trace(process.name, "leaves with", type(error).__name__)
            process.die("left")

        return self.loop.run_as(process, leave())

    def _restart_the_dead(self) -> None:
        for process in list(self._processes):
            if not process.is_alive and self.random.random() < 0.5:
                self._processes.remove(process)
                if not isinstance(process, ProducerProcess) or not self._has_all(process):
                    self._restart(process)

    def _restart(self, process: SimulatedProcess) -> None:
        if isinstance(process, WorkerProcess):
            self._spawn_worker(process.name)
        elif isinstance(process, ProducerProcess):
            self._spawn_producer(int(process.name.rpartition("-")[2]))

    def _spawn_worker(self, name: str) -> None:
        self._spawn(WorkerProcess(self, name, concurrency=self._concurrency, **self._fate()))

    def _spawn_producer(self, number: int) -> None:
        self._spawn(ProducerProcess(self, f"producer-{number}", wishes=self._wishes[number], **self._fate()))

    def _fate(self) -> dict[str, Any]:
        """When a new process will die, if it does: at a fault point, or at one of its awaits."""
        random = self.random
        fate: dict[str, Any] = {
            "doom": Doom(), "dies_at_step": 0, "offset_s": random.uniform(-1, 1) * self._offset_s_max
        }  # fmt: skip
        if self._dooms_left and self.is_stormy:
            self._dooms_left -= 1
            if random.random() < 0.5:
                fate["doom"] = Doom(random.choice(POINTS), random.choice((1, 1, 2, 5)))
            else:
                fate["dies_at_step"] = int(2 ** random.uniform(0, 11))
        if self._dooms_at_point and self.is_stormy:
            self._dooms_at_point -= 1
            fate |= {"doom": Doom(self._point, 1), "dies_at_step": 0}
        return fate

    def _spawn(self, process: SimulatedProcess) -> None:
        self.trace(process.name, "starts")
        self._processes.append(process)
        life = self.loop.run_as(process, process.live())
        self._lives[process] = life

        def ended(done: asyncio.Task[None]) -> None:
            if not done.cancelled() and done.exception() is not None:
                process.die(f"start: {type(done.exception()).__name__}")

        life.add_done_callback(ended)

    async def _calm(self) -> None:
        self.trace("it is calm")
        self.is_stormy = False
        self.network.weather = CALM
        for process in self._processes:
            process.doom.point, process.dies_at_step = "", 0
            process.clock.jump(0)
            process.thaw()
        self._offset_s_max = 0
        until_s = self.loop.time() + CALM_S_MAX
        while not self._is_over():
            for queue in QUEUES:
                await self.store.pause_queue("default", queue, paused=False)
            if self.loop.time() > until_s:
                raise Violation(f"after a quarter of an hour of calm: {'; '.join(self._rest())}")
            self._restart_the_dead()
            self._end_idle_producers()
            await asyncio.sleep(LOOK_EVERY_S)
        leaving = [self._leave(process) for process in self._processes if process.is_alive]
        while not all(task.done() for task in leaving) and self.loop.time() < until_s + 60:
            await asyncio.sleep(LOOK_EVERY_S)
        if rest := self._rest():
            raise Violation(f"when everybody had left: {'; '.join(rest)}")
        if lost := [key for key, name in self.promises.items() if not self.watch.is_final(*name)]:
            raise Violation(f"promised runs have not ended: {lost}")

    def _end_idle_producers(self) -> None:
        for process in self._processes:
            if isinstance(process, ProducerProcess) and process.is_alive and self._lives[process].done():
                self._leave(process)

    def _has_all(self, process: SimulatedProcess) -> bool:
        return all(wish.is_done for wish in self._wishes[int(process.name.rpartition("-")[2])])

    def _is_over(self) -> bool:
        """Everything wished is done, every batch has ended, and only live processes, all started, have sessions."""
        living = [process for process in self._processes if process.is_alive]
        live = {process.session_id for process in living}
        return (
            self.loop.time() > self.network.busy_until_s
            and all(self._lives[process].done() for process in living if isinstance(process, WorkerProcess))
            and all(wish.is_done for wishes in self._wishes for wish in wishes)
            and not self.watch.rest()
            and {session.id for session in done_at_once(self.store.sessions())} <= live
        )

    def _rest(self) -> list[str]:
        sessions = [session.id for session in done_at_once(self.store.sessions())]
        wishes = [wish.key for wishes in self._wishes for wish in wishes if not wish.is_done]
        return self.watch.rest() + [f"session {name} lives" for name in sessions] + [f"{key} waits" for key in wishes]

    def _bury(self) -> None:
        """Let the tasks of all processes end, so that nothing is left to the garbage collector."""
        self._is_judged = True
        self.loop.broken = None
        self.loop.set_exception_handler(lambda _loop, _context: None)
        for process in self._lives:
            process.state = BURIED
            self.loop.put_back(process)
        for lost in self.network.lost:
            lost.cancel()

        async def end() -> None:
            own = asyncio.current_task()
            for _ in range(30):
                left = [task for task in self.loop.pending if task is not own]
                if not left:
                    return
                for task in left:
                    task.cancel()
                await asyncio.wait(left, timeout=10)

        self.loop.run_until_complete(end())


def _told(answer: Any) -> str:
    if isinstance(answer, list):
        return f"{len(answer)} {answer[0] if answer and isinstance(answer[0], str) else ''}"
    return type(answer).__name__ if not isinstance(answer, int) else str(answer)


@contextmanager
def _seeded(simulation: Simulation) -> Iterator[None]:
    """Chance, time and the log of the real classes come from the simulation."""
    dice = Random(simulation._bits())
    before = structlog.get_config()

    def note(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
        """An error with a trace is one that nobody had foreseen."""
        error = event.get("exc_info")
        if error:
            simulation._fault(f"an error nobody expected: {event}")
        raise structlog.DropEvent

    def loop_broke(_loop: Any, context: dict[str, Any]) -> None:
        simulation._fault(f"an error nobody caught: {context.get('message')}: {context.get('exception')!r}")

    simulation.loop.set_exception_handler(loop_broke)
    structlog.configure(
        processors=[note],
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        cache_logger_on_first_use=False,
    )
    clock = simulation.loop.time
    try:
        with (
            patch.object(ids, "secrets", SimpleNamespace(randbits=dice.getrandbits)),
            patch.object(outcome_module, "random", SimpleNamespace(Random=lambda: Random(dice.getrandbits(64)))),
            patch.object(executor_module, "perf_counter", clock),
            patch.object(executor_module, "monotonic", clock),
            patch.object(pace_module, "perf_counter", clock),
            patch.object(producer_module, "perf_counter", clock),
        ):
            yield
    finally:
        structlog.configure(**before)


def simulate(seed: int, *, point: str = "") -> Simulation:
    """Run one seed to its end; a failure says how to see it again."""
    simulation = Simulation(seed, point=point)
    try:
        simulation.run()
    except (Violation, Stuck) as error:
        error.add_note(f"seed {seed}: HEADRACE_TEST_SEED={seed} replays it{f' at {point}' if point else ''}")
        raise
    finally:
        simulation.loop.close()
    return simulation
