"""The way between a simulated process and the shared store: late, lost, doubled, or the last thing it did.

Fault points are named `<verb>.asked` (before the request leaves), `<verb>.done` (the store has done it, the answer
is on its way) and `<verb>.answered` (the answer is back, nobody has acted on it); the loop adds `await:<place>` for
every other await. A request is delivered in one piece: the verbs of `MemoryStore` never wait inside, so each delivery
is one transaction. A request that left is delivered though its process dies meanwhile, as on a real network.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from headrace.foundation.errors import ObjectMissing, StoreUnavailable
from headrace.store.payloads import StoredObject
from tests.simulation.loop import BURIED, RUNNING, Process, SimulatedLoop

VERBS: Final = (
    "create_batch", "append", "seal", "stop_batch", "cancel_runs", "redrive", "start_session", "heartbeat",
    "end_session", "sessions", "recover", "claim", "settle", "release", "batch", "find_batch", "batches", "missing",
    "outcomes", "run", "runs", "queues", "pause_queue", "verify", "sweep", "prune", "unnamed", "next_due_us",
    "duties", "take_duty", "end_duty", "add_key", "find_key", "keys", "revoke_key", "signing_key", "spend",
    "keep_schedules", "tick", "schedules", "named_leases", "dead_letters", "purge_dead", "rules", "keep_rules",
    "move_waiting", "size_bytes", "forget",
)  # fmt: skip
STAGES: Final = ("asked", "done", "answered")
READS: Final = frozenset({
    "batch", "find_batch", "batches", "missing", "outcomes", "run", "runs", "queues", "verify", "unnamed",
    "add_key", "find_key", "keys", "revoke_key", "signing_key", "spend",
    "keep_schedules", "tick", "schedules", "named_leases", "dead_letters", "purge_dead", "rules", "keep_rules",
    "move_waiting", "size_bytes", "forget",
})  # fmt: skip
"""What no simulated process asks for: it changes nothing, and who dies of it has died at an await; or a server's."""

POINTS: Final = tuple(f"{verb}.{stage}" for verb in VERBS for stage in STAGES)


@dataclass(slots=True)
class Weather:
    """How the network is, each a chance for a request; `delay_s` is the usual longest way of a request."""

    lost: float = 0.0
    unanswered: float = 0.0
    doubled: float = 0.0
    stalled: float = 0.0
    delay_s: float = 0.0


CALM: Final = Weather(delay_s=0.002)


@dataclass(slots=True)
class Doom:
    """A process dies when it comes to a fault point for the n-th time."""

    point: str = ""
    times: int = 0

    def strikes(self, point: str) -> bool:
        """Whether this is the moment."""
        if point != self.point:
            return False
        self.times -= 1
        return self.times == 0


class Network:
    """Requests on their way to one store. `deliver` does one and answers what it came to, an error raised."""

    def __init__(self, loop: SimulatedLoop, random: Random, deliver: Callable[[Process, str, Any, Any], Any]) -> None:
        self.weather = CALM
        self.lost: list[asyncio.Future[Any]] = []
        self.points_passed: set[str] = set()
        self.busy_until_s = 0.0
        self._loop = loop
        self._random = random
        self._deliver = deliver

    async def ask(self, process: Process, doom: Doom, verb: str, args: Any, kwargs: Any) -> Any:
        """One request of a process."""
        if process.state == BURIED:
            raise asyncio.CancelledError
        await self._pass(process, doom, f"{verb}.asked")
        answer: asyncio.Future[Any] = self._loop.create_future()
        weather, random = self.weather, self._random
        delay_s = self._delay_s()
        if random.random() < weather.lost:
            self._later(delay_s, lambda: self._end(answer, None, StoreUnavailable("simulated: the request was lost")))
            return await answer

        def arrive() -> None:
            try:
                done, error = self._deliver(process, verb, args, kwargs), None
            except Exception as raised:  # noqa: BLE001 - it travels back as the answer
                done, error = None, raised
            if process.state == RUNNING and self._strikes(process, doom, f"{verb}.done"):
                return
            if random.random() < weather.unanswered:
                done, error = None, StoreUnavailable("simulated: the answer was lost")
            self._later(self._delay_s(), lambda: self._end(answer, done, error))

        def arrive_again() -> None:
            with suppress(Exception):  # nobody waits for this answer
                self._deliver(process, verb, args, kwargs)

        self._later(delay_s, arrive)
        if random.random() < weather.doubled:
            self._later(delay_s + random.expovariate(0.5), arrive_again)
        try:
            done = await answer
        except Exception:
            await self._pass(process, doom, f"{verb}.answered")
            raise
        await self._pass(process, doom, f"{verb}.answered")
        return done

    async def _pass(self, process: Process, doom: Doom, point: str) -> None:
        self.points_passed.add(point)
        if self._strikes(process, doom, point):
            await self.never()

    def _strikes(self, process: Process, doom: Doom, point: str) -> bool:
        self.points_passed.add(point)
        if doom.strikes(point):
            process.die(point)
        return not process.is_alive

    async def never(self) -> None:
        """What a dead process waits for."""
        answer: asyncio.Future[Any] = self._loop.create_future()
        self.lost.append(answer)
        await answer

    def _delay_s(self) -> float:
        weather, random = self.weather, self._random
        if random.random() < weather.stalled:
            return random.uniform(5, 40)
        return random.random() ** 3 * weather.delay_s

    def _later(self, delay_s: float, call: Callable[[], None]) -> None:
        if delay_s > CALM.delay_s:
            self.busy_until_s = max(self.busy_until_s, self._loop.time() + delay_s)
        self._loop.call_later(delay_s, call, context=Context())

    def _end(self, answer: asyncio.Future[Any], done: Any, error: Exception | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(done)
        else:
            answer.set_exception(error)


class SimulatedStore:
    """A process's store: every verb goes over the network."""

    def __init__(self, network: Network, process: Process, doom: Doom) -> None:
        self._network = network
        self._process = process
        self._doom = doom

    def __getattr__(self, verb: str) -> Any:
        if verb not in VERBS:
            raise AttributeError(verb)

        async def ask(*args: Any, **kwargs: Any) -> Any:
            return await self._network.ask(self._process, self._doom, verb, args, kwargs)

        return ask


class SimulatedObjects:
    """The object store: reachable or not, and otherwise a dict."""

    def __init__(self, loop: SimulatedLoop, random: Random, network: Network, kept: dict[str, bytes]) -> None:
        self._loop = loop
        self._random = random
        self._network = network
        self._kept = kept

    async def _way(self) -> None:
        await asyncio.sleep(self._random.random() * self._network.weather.delay_s)
        if self._random.random() < self._network.weather.lost:
            raise StoreUnavailable("simulated: the object store did not answer")

    async def put(self, key: str, data: bytes) -> None:
        """Keep an object."""
        await self._way()
        self._kept[key] = data

    async def get(self, key: str) -> bytes:
        """An object, or `ObjectMissing`."""
        await self._way()
        if key not in self._kept:
            raise ObjectMissing("the object is gone", key=key)
        return self._kept[key]

    async def list(self) -> AsyncIterator[StoredObject]:
        """Nothing: simulated objects have no age."""
        await self._way()
        for _ in ():
            yield _

    async def delete_older(self, _folder: str, _before_us: int) -> int:
        """Nothing: nobody uploads packets here."""
        await self._way()
        return 0

    async def delete(self, keys: Iterable[str]) -> None:
        """Let objects go."""
        await self._way()
        for key in keys:
            self._kept.pop(key, None)
