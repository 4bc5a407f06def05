"""The story of 10,000 activations, of workers that know only the contract, and of everybody being killed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pytest

from headrace.core.activation import LANE
from headrace.runtime.clock import SystemClock
from headrace.runtime.engine import Engine
from tests.journeys.test_serve import free_port
from tests.support.broker import activation, engine_on, stream
from tests.support.store_rig import fresh_schema

pytestmark = [pytest.mark.journey, pytest.mark.timeout(240)]

STORIES: Final = {"pull": ("sqlite", 10_000), "pull on PostgreSQL": ("postgres", 4_000), "push": ("sqlite", 4_000)}
ONCE_EACH: Final = 10
WORKERS: Final = 3
SECRET: Final = "a secret of many bytes"
WORKER: Final = Path(__file__).with_name("contract_worker.py")
HURRIED: Final = {
    "HEADRACE_GRPC_SECRETS": SECRET,
    "HEADRACE_DELIVERY_GRACE_MS": "500",
    "HEADRACE_DELIVERY_RECOVERY_MS": "1500",
    "HEADRACE_SESSION_TIMEOUT_MS": "1500",
    "HEADRACE_HEARTBEAT_MS": "300",
    "HEADRACE_UPKEEP_INTERVAL_MS": "300",
    "HEADRACE_LOG_LEVEL": "error",
}


class Cast:
    """The processes of the story."""

    def __init__(self, place: Path, store: str, *, is_pushed: bool) -> None:
        self._place = place
        self._ports = [free_port() for _ in range(WORKERS)] if is_pushed else []
        self._port = free_port()
        self._env = {**os.environ, **HURRIED, "HEADRACE_STORE": store}
        if is_pushed:
            self._env["HEADRACE_DELIVERY"] = "push"
            self._env["HEADRACE_PUSH"] = ",".join(f"app=http://127.0.0.1:{port}" for port in self._ports)
        self.log = place / "done.log"
        self.server: Any = None
        self.workers: list[Any] = []

    async def start_server(self) -> None:
        """A server, and when it says so."""
        command = (sys.executable, "-m", "headrace", "serve", "--port", str(self._port), "--no-auth")
        self.server = await asyncio.create_subprocess_exec(
            *command, cwd=self._place, env=self._env, stderr=asyncio.subprocess.PIPE
        )
        while b"serving" not in (said := await self.server.stderr.readline()):
            assert said, "the server ended before it served"

    async def start_worker(self) -> None:
        """One more worker."""
        own = [str(self._ports.pop())] if self._ports else []
        command = (sys.executable, str(WORKER), f"127.0.0.1:{self._port}", SECRET, str(self.log), *own)
        worker: Any = await asyncio.create_subprocess_exec(*command, cwd=self._place)
        self.workers.append((worker, own))

    async def replace_worker(self, number: int) -> None:
        """One dies, and another takes its place, where it was pushed to."""
        worker, own = self.workers.pop(number)
        await self.kill(worker)
        self._ports += map(int, own)
        await self.start_worker()

    async def load(self, data: bytes) -> None:
        """Activations, from a file."""
        (self._place / "all.bin").write_bytes(data)
        command = (sys.executable, "-m", "headrace", "activations", "load", "all.bin")
        loading = await asyncio.create_subprocess_exec(
            *command, cwd=self._place, env=self._env, stdout=asyncio.subprocess.DEVNULL
        )
        assert await loading.wait() == 0

    def done_count(self) -> int:
        """How many lines workers have written."""
        return self.log.read_bytes().count(b"\n") if self.log.exists() else 0

    async def kill(self, process: Any) -> None:
        """With -9."""
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        await process.wait()

    async def end(self) -> None:
        """Whoever is left."""
        for process in (*(worker for worker, _ in self.workers), self.server):
            if process is not None:
                await self.kill(process)


@pytest.mark.parametrize("name", STORIES)
async def test_each_is_done_at_least_once_recorded_once_and_those_that_may_run_once_at_most_once(
    name: str, tmp_path: Path
) -> None:
    dice = random.Random(11)
    kind, count = STORIES[name]
    store = fresh_schema(tmp_path) if kind == "postgres" else f"sqlite:///{tmp_path / 'headrace.db'}"
    cast = Cast(tmp_path, store, is_pushed=name == "push")
    messages = [
        activation(
            number,
            parameters_bytes=b"%d" % number,
            processing_deadline_duration=1,
            retry={"at_most_once": number % ONCE_EACH == 0},
        )
        for number in range(count)
    ]
    try:
        await cast.load(stream(*messages))
        await cast.start_server()
        for _ in range(WORKERS):
            await cast.start_worker()
        engine = await engine_on(kind, tmp_path)
        try:
            await disturb(cast, dice, count)
            await until_settled(engine)
            await judge(engine, cast, count)
        finally:
            await engine.close()
    finally:
        await cast.end()


async def disturb(cast: Cast, dice: random.Random, count: int) -> None:
    """Kill workers and the server, at marks that chance has set."""
    clock = SystemClock()
    marks = sorted(dice.sample(range(200, count - 500), 7))
    for number, mark in enumerate(marks):
        while cast.done_count() < mark:
            await clock.sleep(0.02)
        if number % 3 == 1:
            await cast.kill(cast.server)
            await cast.start_server()
        else:
            await cast.replace_worker(dice.randrange(len(cast.workers)))


async def until_settled(engine: Engine) -> None:
    """Until nothing waits, is delayed or is held."""
    while True:
        views = await engine.store.queues("default")
        if not sum(view.waiting_count + view.delayed_count + view.leased_count for view in views):
            return
        await engine.clock.sleep(0.1)


async def judge(engine: Engine, cast: Cast, count: int) -> None:
    """What the workers wrote down, against what the store says."""
    done = Counter(int(line) for line in cast.log.read_bytes().split())
    once = [number for number in range(count) if number % ONCE_EACH == 0]
    often = [number for number in range(count) if number % ONCE_EACH]
    assert all(done[number] >= 1 for number in often), "each executed at least once"
    assert all(done[number] <= 1 for number in once), "at most once"
    views = await engine.store.runs("default", task=LANE, limit=count + 1)
    assert len(views) == count, "each recorded once"
    states = Counter(view.state for view in views)
    assert states["completed"] + states["failed"] == count
    views.sort(key=lambda view: (view.batch_id, view.index))
    failed = [number for number, view in enumerate(views) if view.state == "failed"]
    assert set(failed) <= set(once), "only what may run once fails for somebody's death"
    assert len(failed) < len(once) // 2
    twice = sum(done[number] > 1 for number in often)
    assert twice < count // 10, f"{twice} were done more than once"
