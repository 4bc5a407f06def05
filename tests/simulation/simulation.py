"""A simulation: workers, producers and a console over a store, with the faults that a seed draws.

It has two phases. In the fault phase, requests are lost, duplicated and delayed; processes crash (at a named fault
point, at any await, or in a run), freeze, thaw, shut down and restart; clocks jump. In the quiet phase all processes
thaw and the queues are open. Within a quarter of an hour of virtual time everything must have ended, with no lease and
no session left.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

from headrace.foundation import ids
from headrace.foundation.errors import Conflict
from headrace.runtime.producing import caller_items as caller_items_module
from headrace.runtime.tasks.call_options import Options
from headrace.runtime.worker import claim_sizing as claim_sizing_module
from headrace.runtime.worker import executor as executor_module
from headrace.runtime.worker import outcome_recorder as outcome_module
from headrace.store.memory import MemoryStore
from tests.simulation.faults import NO_FAULTS, POINTS, Conditions, Network, PlannedCrash
from tests.simulation.intruder import Intruder
from tests.simulation.invariant_monitor import InvariantMonitor, result_of
from tests.simulation.loop import CRASHED, DISCARDED, Process, SimulatedLoop, Stuck
from tests.simulation.processes import (
    LIMITS,
    ClientRequest,
    ConsoleProcess,
    ProducerProcess,
    SimulatedProcess,
    WorkerProcess,
)
from tests.simulation.tasks import ONCE, PLAIN, QUEUES, SYNC, WORK, Behaviour

QUIET_S_MAX: Final = 900.0
CHECK_EVERY_S: Final = 1.0
CRASHES_AT_POINT: Final = 8


class Violation(AssertionError):
    """A violated invariant."""


class Simulation:
    """A simulation that is determined by `seed`. `run` raises `Violation`; `lines` is the trace.

    `point`: a fault point at which the first processes to reach it crash, in addition to the faults of the seed.
    """

    def __init__(self, seed: int, *, point: str = "") -> None:
        self.seed = seed
        self._point = point
        self._crashes_at_point = CRASHES_AT_POINT if point else 0
        self.random = Random(seed)
        self.loop = SimulatedLoop(Random(self._bits()), shuffle=self.random.choice((0.0, 0.2, 1.0)))
        self.store = MemoryStore(LIMITS)
        self.monitor = InvariantMonitor(self.store, self._fault)
        self.intruder = Intruder(self.store, self._fault)
        self.network = Network(self.loop, Random(self._bits()), self._deliver)
        self.objects: dict[str, bytes] = {}
        self.lines: list[str] = []
        self.crashes: list[str] = []
        self.plan: dict[int, Behaviour] = {}
        self.promises: dict[str, tuple[str, int]] = {}
        self.has_faults = True
        self._is_finished = False
        self.fault_phase_s = self.random.uniform(5, 40)
        self._processes: list[SimulatedProcess] = []
        self._executions: dict[SimulatedProcess, asyncio.Task[None]] = {}
        self._crashes_left = self.random.choice((0, 1, 2, 4, 8))
        self._offset_s_max = self.random.choice((0.0, 0.0, 1.0, 3.0, 240.0))
        self._concurrency = self.random.choice((1, 2, 4, 16))
        self._workers_count = self.random.randint(1, 4)
        self._requests = [self._requests_of(number) for number in range(self.random.randint(1, 2))]

    def _bits(self) -> int:
        return self.random.getrandbits(64)

    # -- requests of the clients

    def _requests_of(self, producer: int) -> list[ClientRequest]:
        random = self.random
        requests = []
        kills_left = random.choice((0, 0, 0, 1))
        for number in range(random.randint(1, 3)):
            task = random.choice((WORK, WORK, PLAIN, SYNC, ONCE))
            runs_count = random.choice((0, 1, 5, 30, 30, 100))
            values = [self._item(task) for _ in range(runs_count)]
            if values and kills_left and task != SYNC:
                kills_left -= 1
                self.plan[random.choice(values)] = Behaviour(kills_count=random.choice((1, 2, 99)))
            options = Options(delay_s=random.choice((0, 0, 0, 5)), priority=random.choice((None, None, 3)))
            requests.append(ClientRequest(task, values, f"map-{producer}-{number}", options, is_map=True))
        for number in range(random.choice((0, 3, 15))):
            task = random.choice((WORK, PLAIN, SYNC, ONCE))
            key = f"enqueue-{producer}-{number}"
            options = Options(
                delay_s=random.choice((0, 0, 0, 2)),
                expires_s=random.choice((0, 0, 0, 10)),
                queue=random.choice((None, *QUEUES)),
                idempotency_key=key,
            )
            requests.append(ClientRequest(task, [self._item(task)], key, options, is_map=False))
        random.shuffle(requests)
        return requests

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

    # -- trace and faults

    def trace(self, *words: object) -> None:
        """Append a line to the trace; a seed always gives the same trace."""
        if self._is_finished:
            return
        self.lines.append(f"{self.loop.time():.6f} {' '.join(map(str, words))}")

    @property
    def trace_hash(self) -> str:
        """Hash of the whole trace."""
        return hashlib.blake2b("\n".join(self.lines).encode(), digest_size=16).hexdigest()

    def _fault(self, fault: str) -> None:
        self.trace("FAULT", fault)
        if self.loop.broken is None and not self._is_finished:
            self.loop.broken = Violation(fault)

    def _deliver(self, process: Process, operation: str, args: Any, kwargs: Any) -> Any:
        """Perform a request on the store."""
        if self.intruder.see(operation, args, kwargs):
            self.monitor.delivered("", args, None)  # expects no change
        if operation == "redrive" and self._has_at_most_once_runs(args[0]):
            raise Conflict("simulated: runs of at-most-once tasks are not redriven")
        try:
            response = result_of(getattr(self.store, operation)(*args, **kwargs))
        except Exception as error:
            self.trace(process.name, operation, "->", type(error).__name__)
            self.monitor.delivered("", args, None)  # expects no change
            raise
        self.trace(process.name, operation, "->", _summary_of(response))
        self.monitor.delivered(operation, args, response)
        return response

    def notify_cancelled(self) -> None:
        """Notify some of the processes that runs were cancelled: notifications may be lost."""
        for process in self._processes:
            if process.is_alive and self.random.random() < 0.7:
                process.engine.cancelled.notify_local()

    def _has_at_most_once_runs(self, batch_id: str) -> bool:
        return any(span.at_most_once for span in self.store._tables.spans.values() if span.batch_id == batch_id)

    def record_promise(self, key: str, batch_id: str, index: int) -> None:
        """Record that a producer received the location of its run."""
        earlier = self.promises.setdefault(key, (batch_id, index))
        if earlier != (batch_id, index):
            self._fault(f"the key {key} names run {earlier} and then {(batch_id, index)}")
        if index not in self.store._tables.received[batch_id]:
            self._fault(f"run {batch_id}/{index} was acknowledged and is not in the store")

    def record_crash(self, process: SimulatedProcess, where: str) -> None:
        """Record that a process crashed."""
        self.crashes.append(where)
        self.trace(process.name, "crashes at", where)

    # -- the two phases

    def run(self) -> None:
        """Run the whole simulation. Raises `Violation` or `Stuck`."""
        with _seeded(self):
            asyncio.set_event_loop(None)
            try:
                self.loop.run_until_complete(self._run_phases())
            finally:
                self._discard()

    async def _run_phases(self) -> None:
        await self.store.open()
        self.network.conditions = self._draw_conditions()
        self.trace("conditions", self.network.conditions)
        for number in range(self._workers_count):
            self._spawn_worker(f"worker-{number}")
        for number in range(len(self._requests)):
            self._spawn_producer(number)
        self._spawn(
            ConsoleProcess(self, "console", planned_crash=PlannedCrash(self._point, 1), crashes_at_step=0, offset_s=0)
        )
        until_s = self.loop.time() + self.fault_phase_s
        while self.loop.time() < until_s:
            await asyncio.sleep(self.random.expovariate(0.7))
            self._inject_fault()
            self._restart_crashed()
        await self._quiet_phase()
        self.monitor.check_all()

    def _draw_conditions(self) -> Conditions:
        random = self.random
        kind = random.choice(("reliable", "lossy", "slow", "bad"))
        delay_s = random.choice((0.002, 0.05, 1.0))
        if kind == "reliable":
            return Conditions(delay_s=delay_s)
        if kind == "lossy":
            return Conditions(lost=0.1, unacknowledged=0.1, duplicated=0.1, delay_s=delay_s)
        if kind == "slow":
            return Conditions(stalled=0.03, duplicated=0.05, delay_s=2.0)
        return Conditions(lost=0.15, unacknowledged=0.15, duplicated=0.3, stalled=0.02, delay_s=3.0)

    def _inject_fault(self) -> None:
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
            process.crash("signal 9")
        elif dice < 0.25 and process in self._executions and process.state != CRASHED:
            self._shut_down(process)

    def _shut_down(self, process: SimulatedProcess) -> asyncio.Task[None]:
        """Shut a process down gracefully, as SIGTERM does."""
        self.trace(process.name, "shuts-down")

        async def shut_down() -> None:
            self._executions[process].cancel()
            try:
                await process.shut_down()
            except Exception as error:  # noqa: BLE001 - a process that can't shut_down in good order just ends
                self.trace(process.name, "shutdown failed:", type(error).__name__)
            process.crash("shutdown")

        return self.loop.run_as(process, shut_down())

    def _restart_crashed(self) -> None:
        for process in list(self._processes):
            if not process.is_alive and self.random.random() < 0.5:
                self._processes.remove(process)
                if not isinstance(process, ProducerProcess) or not self._is_served(process):
                    self._restart(process)

    def _restart(self, process: SimulatedProcess) -> None:
        if isinstance(process, WorkerProcess):
            self._spawn_worker(process.name)
        elif isinstance(process, ProducerProcess):
            self._spawn_producer(int(process.name.rpartition("-")[2]))

    def _spawn_worker(self, name: str) -> None:
        self._spawn(WorkerProcess(self, name, concurrency=self._concurrency, **self._crash_plan()))

    def _spawn_producer(self, number: int) -> None:
        self._spawn(ProducerProcess(self, f"producer-{number}", requests=self._requests[number], **self._crash_plan()))

    def _crash_plan(self) -> dict[str, Any]:
        """Draw when a new process will crash, if it does: at a fault point, or at one of its awaits."""
        random = self.random
        crash_plan: dict[str, Any] = {
            "planned_crash": PlannedCrash(),
            "crashes_at_step": 0,
            "offset_s": random.uniform(-1, 1) * self._offset_s_max,
        }
        if self._crashes_left and self.has_faults:
            self._crashes_left -= 1
            if random.random() < 0.5:
                crash_plan["planned_crash"] = PlannedCrash(random.choice(POINTS), random.choice((1, 1, 2, 5)))
            else:
                crash_plan["crashes_at_step"] = int(2 ** random.uniform(0, 11))
        if self._crashes_at_point and self.has_faults:
            self._crashes_at_point -= 1
            crash_plan |= {"planned_crash": PlannedCrash(self._point, 1), "crashes_at_step": 0}
        return crash_plan

    def _spawn(self, process: SimulatedProcess) -> None:
        self.trace(process.name, "starts")
        self._processes.append(process)
        execution = self.loop.run_as(process, process.live())
        self._executions[process] = execution

        def on_end(done: asyncio.Task[None]) -> None:
            if not done.cancelled() and done.exception() is not None:
                process.crash(f"start: {type(done.exception()).__name__}")

        execution.add_done_callback(on_end)

    async def _quiet_phase(self) -> None:
        self.trace("quiet phase")
        self.has_faults = False
        self.network.conditions = NO_FAULTS
        for process in self._processes:
            process.planned_crash.point, process.crashes_at_step = "", 0
            process.clock.jump(0)
            process.thaw()
        self._offset_s_max = 0
        until_s = self.loop.time() + QUIET_S_MAX
        while not self._is_over():
            for queue in QUEUES:
                await self.store.pause_queue("default", queue, paused=False)
            if self.loop.time() > until_s:
                raise Violation(f"pending after a quarter of an hour without faults: {'; '.join(self._unfinished())}")
            self._restart_crashed()
            self._end_idle_producers()
            await asyncio.sleep(CHECK_EVERY_S)
        shutting_down = [self._shut_down(process) for process in self._processes if process.is_alive]
        while not all(task.done() for task in shutting_down) and self.loop.time() < until_s + 60:
            await asyncio.sleep(CHECK_EVERY_S)
        if unfinished := self._unfinished():
            raise Violation(f"pending after all processes shut down: {'; '.join(unfinished)}")
        if unended := [key for key, name in self.promises.items() if not self.monitor.is_final(*name)]:
            raise Violation(f"acknowledged runs have not ended: {unended}")

    def _end_idle_producers(self) -> None:
        for process in self._processes:
            if isinstance(process, ProducerProcess) and process.is_alive and self._executions[process].done():
                self._shut_down(process)

    def _is_served(self, process: SimulatedProcess) -> bool:
        return all(request.is_done for request in self._requests[int(process.name.rpartition("-")[2])])

    def _is_over(self) -> bool:
        """Return True if all requests are served, all batches have ended, and only live, started processes have
        sessions.
        """
        live_processes = [process for process in self._processes if process.is_alive]
        live = {process.session_id for process in live_processes}
        return (
            self.loop.time() > self.network.busy_until_s
            and all(
                self._executions[process].done() for process in live_processes if isinstance(process, WorkerProcess)
            )
            and all(request.is_done for requests in self._requests for request in requests)
            and not self.monitor.unfinished()
            and {session.id for session in result_of(self.store.sessions())} <= live
        )

    def _unfinished(self) -> list[str]:
        sessions = [session.id for session in result_of(self.store.sessions())]
        requests = [request.key for requests in self._requests for request in requests if not request.is_done]
        return (
            self.monitor.unfinished()
            + [f"session {name} is live" for name in sessions]
            + [f"{key} waits" for key in requests]
        )

    def _discard(self) -> None:
        """End the tasks of all processes, so that none is left to the garbage collector."""
        self._is_finished = True
        self.loop.broken = None
        self.loop.set_exception_handler(lambda _loop, _context: None)
        for process in self._executions:
            process.state = DISCARDED
            self.loop.resume(process)
        for response in self.network.lost:
            response.cancel()

        async def end() -> None:
            current = asyncio.current_task()
            for _ in range(30):
                remaining = [task for task in self.loop.pending if task is not current]
                if not remaining:
                    return
                for task in remaining:
                    task.cancel()
                await asyncio.wait(remaining, timeout=10)

        self.loop.run_until_complete(end())


def _summary_of(response: Any) -> str:
    if isinstance(response, list):
        return f"{len(response)} {response[0] if response and isinstance(response[0], str) else ''}"
    return type(response).__name__ if not isinstance(response, int) else str(response)


@contextmanager
def _seeded(simulation: Simulation) -> Iterator[None]:
    """Take random numbers, time and the log of the real classes from the simulation."""
    dice = Random(simulation._bits())
    logger = logging.getLogger("headrace")

    def report_error(record: logging.LogRecord) -> bool:
        """Report a logged error with a traceback: the code did not expect it."""
        if record.exc_info:
            simulation._fault(f"unexpected error: {record.getMessage()}")
        return False

    errors = logging.NullHandler(logging.ERROR)
    errors.handle = report_error  # type: ignore[method-assign]  # the handler has nothing to write

    def report_uncaught(_loop: Any, context: dict[str, Any]) -> None:
        simulation._fault(f"uncaught error: {context.get('message')}: {context.get('exception')!r}")

    simulation.loop.set_exception_handler(report_uncaught)
    logger.addHandler(errors)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    clock = simulation.loop.time
    try:
        with (
            patch.object(ids, "secrets", SimpleNamespace(randbits=dice.getrandbits)),
            patch.object(outcome_module, "random", SimpleNamespace(Random=lambda: Random(dice.getrandbits(64)))),
            patch.object(executor_module, "perf_counter", clock),
            patch.object(executor_module, "monotonic", clock),
            patch.object(claim_sizing_module, "perf_counter", clock),
            patch.object(caller_items_module, "perf_counter", clock),
        ):
            yield
    finally:
        logger.removeHandler(errors)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


def simulate(seed: int, *, point: str = "") -> Simulation:
    """Run the simulation of a seed to its end; an error has a note on how to replay it."""
    simulation = Simulation(seed, point=point)
    try:
        simulation.run()
    except (Violation, Stuck) as error:
        error.add_note(f"seed {seed}: HEADRACE_TEST_SEED={seed} replays it{f' at {point}' if point else ''}")
        raise
    finally:
        simulation.loop.close()
    return simulation
