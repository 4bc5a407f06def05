"""Random scenarios from a seed: servers start, stop, freeze and crash; workers are late, silent, repeat or misreport.

In every scenario no activation is lost, none is recorded twice, and an at-most-once activation is delivered once.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from headrace.foundation.errors import StoreUnavailable
from headrace.runtime.clock import ManualClock
from headrace.runtime.dispatch.lease_buffer import QueueFilter
from headrace.runtime.dispatch.report_outcome import ActivationReport
from headrace.runtime.maintenance.upkeep import Upkeep
from tests.support import invariants
from tests.support.broker import DEADLETTER, BrokerRig, activation, engine_on
from tests.support.engines import Faulty

COUNT = 40
STEPS = 250
SERVERS = 3
STATES = ("completed", "completed", "failed", "retry")
LIMITS = {
    "delivery_attempts_max": 3,
    "delivery_grace_ms": 1_000,
    "delivery_recovery_ms": 15_000,
    "poll_interval_ms": 100,
}


class Scenario:
    """Servers and workers of one seed over one store, and what they reported."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.is_fenced = bool(seed % 2)
        self.clock = ManualClock()
        self.engine: Any = None
        self.faulty: Any = None
        self.servers: list[BrokerRig] = []
        self.all: list[BrokerRig] = []
        self.delivered_counts: Counter[str] = Counter()
        self.held: list[tuple[BrokerRig, str]] = []
        self.reported: dict[str, set[str]] = {}
        self.names: list[str] = []

    async def open(self, kind: str, folder: Path) -> None:
        """Open a store with activations of every kind."""
        self.engine = await engine_on(kind, folder, self.clock, **LIMITS)
        self.faulty = Faulty(self.engine.store)
        self.engine.store = self.faulty
        first = BrokerRig(self.engine)
        random = self.random
        for number in range(COUNT):
            await first.add(
                activation(
                    number,
                    namespace=random.choice("ab"),
                    processing_deadline_duration=random.choice((1, 5, 20)),
                    delay=random.choice((0, 0, 0, 15)),
                    retry={
                        "at_most_once": number % 5 == 0,
                        "on_attempts_exceeded": DEADLETTER,
                        "delay_on_retry": random.choice((0, 3)),
                    },
                )
            )
        await first.producer.close()
        for _ in range(SERVERS):
            await self.start()

    async def start(self) -> None:
        """Start another server."""
        server = BrokerRig(self.engine, is_fenced=self.is_fenced)
        await server.dispatcher.start()
        self.servers.append(server)
        self.all.append(server)

    async def step(self) -> None:
        """Perform a random step."""
        random = self.random
        happens = random.choices(
            (self.fetch, self.report, self.wait, self.stop, self.crash, self.freeze, self.fail),
            (30, 30, 12, 1, 1, 1, 2),
        )[0]
        await self.pumped(happens())

    async def pumped(self, work: Coroutine[Any, Any, None]) -> None:
        """Await a coroutine to its end, advancing the clock while a flush waits for a failed store."""
        task = asyncio.create_task(work)
        while not task.done():
            await asyncio.sleep(0)
            if any(flusher is not None and flusher.last_error is not None for flusher in self.flushers()):
                self.clock.advance(0.1)
        await task

    def flushers(self) -> list[Any]:
        """The ids delivered by all servers so far."""
        return [server.dispatcher._flusher for server in self.all]

    async def fetch(self) -> None:
        server = self.random.choice(self.servers)
        queue_filter = self.random.choice(
            (QueueFilter(), QueueFilter("app"), QueueFilter("app", ("a",)), QueueFilter("app", ("b",)))
        )
        if self.random.random() < 0.2:
            for delivery in await server.dispatcher.take(queue_filter, 3, lease_ms=2_000):
                if self.random.random() < 0.5:
                    server.dispatcher.put_back([delivery.key])
                else:
                    server.dispatcher.mark([delivery.key])
                    self.delivered(server, delivery.name)
            return
        fetched = await server.dispatcher.fetch(queue_filter)
        if fetched is not None:
            self.delivered(server, fetched.name)

    def delivered(self, server: BrokerRig, name: str) -> None:
        self.delivered_counts[name] += 1
        if self.is_fenced:
            assert self.delivered_counts[name] == 1, "each delivery has an id of its own"
        self.names.append(name)
        self.held.append((server, name))

    async def report(self) -> None:
        """Report an activation that was delivered at any time, to its own server or to another."""
        if not self.names:
            return
        random = self.random
        if self.held and random.random() < 0.8:
            server, name = self.held.pop(random.randrange(len(self.held)))
        else:
            server, name = random.choice(self.servers), random.choice(self.names)
        if random.random() < 0.2 or server not in self.servers:
            server = random.choice(self.servers)
        state = random.choice(STATES)
        self.reported.setdefault(name.partition("~")[0], set()).add(state)
        await server.dispatcher.report([ActivationReport(name, state)] * random.choice((1, 1, 2)))

    async def wait(self) -> None:
        self.clock.advance(self.random.choice((0.2, 1, 3, 8)))
        await self.beat()
        for server in self.servers:
            await server.dispatcher.tick()
        if self.random.random() < 0.5:
            await Upkeep(self.engine).round()

    async def beat(self) -> None:
        """Send heartbeats of running servers; the session of a frozen one may end."""
        for server in self.servers:
            await server.dispatcher._session._heartbeat_once(lambda call, *values: call(*values))

    async def stop(self) -> None:
        await self.servers.pop(self.random.randrange(len(self.servers))).dispatcher.stop()
        await self.start()

    async def crash(self) -> None:
        """Crash a server as by kill -9: nothing is written or released."""
        server = self.servers.pop(self.random.randrange(len(self.servers)))
        tick_task, server.dispatcher._tick_task = server.dispatcher._tick_task, None
        if tick_task is not None:
            tick_task.cancel()
        await server.dispatcher._session._end_heartbeats()
        server.dispatcher._session.abandon()
        await self.start()

    async def freeze(self) -> None:
        """Freeze a server for longer than the session timeout; then it continues."""
        self.clock.advance(40)
        await Upkeep(self.engine).round()
        await self.beat()

    async def fail(self) -> None:
        """Fail the next settlement: it is lost, or only its answer is."""
        faults = self.faulty.after if self.random.random() < 0.5 else self.faulty.before
        faults.setdefault("settle", []).append(StoreUnavailable("the network"))
        await self.servers[0].dispatcher.report([ActivationReport("nobody", "completed")])

    async def end(self) -> None:
        """Complete all activations until none is left."""
        for _ in range(200):
            self.clock.advance(5)
            await self.beat()
            await Upkeep(self.engine).round()
            for server in self.servers:
                await server.dispatcher.tick()
                while (delivery := await server.dispatcher.fetch(QueueFilter())) is not None:
                    self.delivered(server, delivery.name)
                    self.reported.setdefault(delivery.name.partition("~")[0], set()).add("completed")
                    await server.dispatcher.report([ActivationReport(delivery.name, "completed")])
            views = await self.engine.store.queues("default")
            if not sum(view.waiting_count + view.delayed_count + view.leased_count for view in views):
                return

    async def judge(self) -> None:
        """Check what must hold after any scenario."""
        views = await self.servers[0].runs()
        assert len(views) == COUNT
        states = {f"id_{number}": view.state for number, view in enumerate(views)}
        assert set(states.values()) <= {"completed", "failed"}, states
        for name, state in states.items():
            once = int(name.removeprefix("id_")) % 5 == 0
            delivered_counts = sum(
                count
                for delivered_name, count in self.delivered_counts.items()
                if delivered_name.partition("~")[0] == name
            )
            if once:
                assert delivered_counts <= 1, f"{name} was delivered {delivered_counts} times"
            if state == "completed":
                assert "completed" in self.reported.get(name, ()), f"{name} completed without such a report"
        dead = {(letter.batch_id, letter.index) for letter in await self.engine.store.dead_letters("default", limit=99)}
        failed = {(view.batch_id, view.index) for view in views if view.state == "failed"}
        assert dead == failed
        assert await invariants.faults(self.engine.store) == []


@pytest.mark.parametrize("seed", range(25))
async def test_no_activation_is_lost_recorded_twice_or_delivered_too_often(seed: int, tmp_path: Path) -> None:
    await reported(Scenario(seed), "memory", tmp_path)


@pytest.mark.parametrize("seed", [98, 99])
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_the_same_is_true_on_a_database(kind: str, seed: int, tmp_path: Path) -> None:
    await reported(Scenario(seed), kind, tmp_path)


async def reported(scenario: Scenario, kind: str, folder: Path) -> None:
    await scenario.open(kind, folder)
    try:
        for _ in range(STEPS):
            await scenario.step()
        await scenario.pumped(scenario.end())
        await scenario.judge()
        for server in scenario.servers:
            await server.dispatcher.stop()
    finally:
        await scenario.engine.close()
