"""Stories told from a seed: servers that come, stop, freeze and die, workers that are late, silent, doubled or lying.

Whatever happens, no activation is lost, none is recorded twice, and one that may run once is handed out once.
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


class Story:
    """One seed's servers and workers over one store, and what was told to whom."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.clock = ManualClock()
        self.engine: Any = None
        self.faulty: Any = None
        self.servers: list[BrokerRig] = []
        self.all: list[BrokerRig] = []
        self.handed: Counter[str] = Counter()
        self.held: list[tuple[BrokerRig, str]] = []
        self.told: dict[str, set[str]] = {}
        self.names: list[str] = []

    async def open(self, kind: str, folder: Path) -> None:
        """A store with activations of every sort."""
        self.engine = await engine_on(kind, folder, self.clock, **LIMITS)
        self.faulty = Faulty(self.engine.store)
        self.engine.store = self.faulty
        first = BrokerRig(self.engine)
        dice = self.dice
        for number in range(COUNT):
            await first.add(
                activation(
                    number,
                    namespace=dice.choice("ab"),
                    processing_deadline_duration=dice.choice((1, 5, 20)),
                    delay=dice.choice((0, 0, 0, 15)),
                    retry={
                        "at_most_once": number % 5 == 0,
                        "on_attempts_exceeded": DEADLETTER,
                        "delay_on_retry": dice.choice((0, 3)),
                    },
                )
            )
        await first.producer.close()
        for _ in range(SERVERS):
            await self.start()

    async def start(self) -> None:
        """One more server."""
        server = BrokerRig(self.engine)
        await server.dispatcher.start()
        self.servers.append(server)
        self.all.append(server)

    async def step(self) -> None:
        """Something happens."""
        dice = self.dice
        happens = dice.choices(
            (self.fetch, self.report, self.wait, self.stop, self.die, self.freeze, self.fail), (30, 30, 12, 1, 1, 1, 2)
        )[0]
        await self.pumped(happens())

    async def pumped(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something to its end, letting time pass while a flush waits for a store that failed."""
        task = asyncio.create_task(work)
        while not task.done():
            await asyncio.sleep(0)
            if any(flusher is not None and flusher.last_error is not None for flusher in self.flushers()):
                self.clock.advance(0.1)
        await task

    def flushers(self) -> list[Any]:
        """Those of all servers there ever were."""
        return [server.dispatcher._flusher for server in self.all]

    async def fetch(self) -> None:
        server = self.dice.choice(self.servers)
        wish = self.dice.choice(
            (QueueFilter(), QueueFilter("app"), QueueFilter("app", ("a",)), QueueFilter("app", ("b",)))
        )
        if self.dice.random() < 0.2:
            for delivery in await server.dispatcher.take(wish, 3, lease_ms=2_000):
                if self.dice.random() < 0.5:
                    server.dispatcher.put_back([delivery.name])
                else:
                    server.dispatcher.mark([delivery.name])
                    self.delivered(server, delivery.name)
            return
        fetched = await server.dispatcher.fetch(wish)
        if fetched is not None:
            self.delivered(server, fetched.name)

    def delivered(self, server: BrokerRig, name: str) -> None:
        self.handed[name] += 1
        self.names.append(name)
        self.held.append((server, name))

    async def report(self) -> None:
        """Of what somebody has, or had long ago; to the server that it is from, or to any other."""
        if not self.names:
            return
        dice = self.dice
        if self.held and dice.random() < 0.8:
            server, name = self.held.pop(dice.randrange(len(self.held)))
        else:
            server, name = dice.choice(self.servers), dice.choice(self.names)
        if dice.random() < 0.2 or server not in self.servers:
            server = dice.choice(self.servers)
        state = dice.choice(STATES)
        self.told.setdefault(name.partition("~")[0], set()).add(state)
        await server.dispatcher.report([ActivationReport(name, state)] * dice.choice((1, 1, 2)))

    async def wait(self) -> None:
        self.clock.advance(self.dice.choice((0.2, 1, 3, 8)))
        await self.beat()
        for server in self.servers:
            await server.dispatcher.tick()
        if self.dice.random() < 0.5:
            await Upkeep(self.engine).round()

    async def beat(self) -> None:
        """Live servers are heard of; a frozen one's session may have ended."""
        for server in self.servers:
            await server.dispatcher._session._heartbeat_once(lambda news, *values: news(*values))

    async def stop(self) -> None:
        await self.servers.pop(self.dice.randrange(len(self.servers))).dispatcher.stop()
        await self.start()

    async def die(self) -> None:
        """With -9: nothing is written and nobody is told."""
        server = self.servers.pop(self.dice.randrange(len(self.servers)))
        ticking, server.dispatcher._tick_task = server.dispatcher._tick_task, None
        if ticking is not None:
            ticking.cancel()
        await server.dispatcher._session._end_heartbeats()
        server.dispatcher._session.abandon()
        await self.start()

    async def freeze(self) -> None:
        """For longer than a session may be silent; then it goes on."""
        self.clock.advance(40)
        await Upkeep(self.engine).round()
        await self.beat()

    async def fail(self) -> None:
        """The next settlement is done and its answer is lost, or it is not done at all."""
        faults = self.faulty.after if self.dice.random() < 0.5 else self.faulty.before
        faults.setdefault("settle", []).append(StoreUnavailable("the network"))
        await self.servers[0].dispatcher.report([ActivationReport("nobody", "completed")])

    async def end(self) -> None:
        """Until nothing is left: workers complete all they get."""
        for _ in range(200):
            self.clock.advance(5)
            await self.beat()
            await Upkeep(self.engine).round()
            for server in self.servers:
                await server.dispatcher.tick()
                while (delivery := await server.dispatcher.fetch(QueueFilter())) is not None:
                    self.delivered(server, delivery.name)
                    self.told.setdefault(delivery.name.partition("~")[0], set()).add("completed")
                    await server.dispatcher.report([ActivationReport(delivery.name, "completed")])
            views = await self.engine.store.queues("default")
            if not sum(view.waiting_count + view.delayed_count + view.leased_count for view in views):
                return

    async def judge(self) -> None:
        """What must be true however the story went."""
        views = await self.servers[0].runs()
        assert len(views) == COUNT
        states = {f"id_{number}": view.state for number, view in enumerate(views)}
        assert set(states.values()) <= {"completed", "failed"}, states
        for name, state in states.items():
            once = int(name.removeprefix("id_")) % 5 == 0
            handed = sum(count for known, count in self.handed.items() if known.partition("~")[0] == name)
            if once:
                assert handed <= 1, f"{name} was handed out {handed} times"
            if state == "completed":
                assert "completed" in self.told.get(name, ()), f"nobody said that {name} completed"
        dead = {(letter.batch_id, letter.index) for letter in await self.engine.store.dead_letters("default", limit=99)}
        failed = {(view.batch_id, view.index) for view in views if view.state == "failed"}
        assert dead == failed
        assert await invariants.faults(self.engine.store) == []


@pytest.mark.parametrize("seed", range(25))
async def test_no_activation_is_lost_recorded_twice_or_delivered_too_often(seed: int, tmp_path: Path) -> None:
    await told(Story(seed), "memory", tmp_path)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_the_same_is_true_on_a_database(kind: str, tmp_path: Path) -> None:
    await told(Story(99), kind, tmp_path)


async def told(story: Story, kind: str, folder: Path) -> None:
    await story.open(kind, folder)
    try:
        for _ in range(STEPS):
            await story.step()
        await story.pumped(story.end())
        await story.judge()
        for server in story.servers:
            await server.dispatcher.stop()
    finally:
        await story.engine.close()
