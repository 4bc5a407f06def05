"""10,000 activations, workers written from the contract alone, and kills of all processes."""

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
from tests.support.broker import activation, engine_on, stream
from tests.support.postgres_server import free_port
from tests.support.store_rig import fresh_schema

pytestmark = [pytest.mark.journey, pytest.mark.timeout(240)]

SCENARIOS: Final = {"pull": ("sqlite", 10_000), "pull on PostgreSQL": ("postgres", 4_000), "push": ("sqlite", 4_000)}
AT_MOST_ONCE_EVERY: Final = 10
WORKERS: Final = 3
SECRET: Final = "a secret of many bytes"
WORKER: Final = Path(__file__).with_name("contract_worker.py")
SHORT_INTERVALS: Final = {
    "HEADRACE_GRPC_SECRETS": SECRET,
    "HEADRACE_DELIVERY_GRACE_MS": "500",
    "HEADRACE_DELIVERY_RECOVERY_MS": "1500",
    "HEADRACE_SESSION_TIMEOUT_MS": "1500",
    "HEADRACE_HEARTBEAT_MS": "300",
    "HEADRACE_UPKEEP_INTERVAL_MS": "300",
    "HEADRACE_LOG_LEVEL": "error",
}


class BrokerProcesses:
    """The processes of a scenario."""

    def __init__(self, folder: Path, store: str, *, is_pushed: bool) -> None:
        self._folder = folder
        self._ports = [free_port() for _ in range(WORKERS)] if is_pushed else []
        self._port = free_port()
        self._env = {**os.environ, **SHORT_INTERVALS, "HEADRACE_STORE": store}
        if is_pushed:
            self._env["HEADRACE_DELIVERY"] = "push"
            self._env["HEADRACE_PUSH"] = ",".join(f"app=http://127.0.0.1:{port}" for port in self._ports)
        self.log = folder / "done.log"
        self.server: Any = None
        self.workers: list[Any] = []

    async def start_server(self) -> None:
        """Start a server, and wait until it serves."""
        command = (sys.executable, "-m", "headrace", "serve", "--port", str(self._port), "--no-auth")
        self.server = await asyncio.create_subprocess_exec(
            *command, cwd=self._folder, env=self._env, stderr=asyncio.subprocess.PIPE
        )
        while b"serving" not in (line := await self.server.stderr.readline()):
            assert line, "the server ended before it served"

    async def start_worker(self) -> None:
        """Start another worker."""
        ports = [str(self._ports.pop())] if self._ports else []
        command = (sys.executable, str(WORKER), f"127.0.0.1:{self._port}", SECRET, str(self.log), *ports)
        worker: Any = await asyncio.create_subprocess_exec(*command, cwd=self._folder)
        self.workers.append((worker, ports))

    async def replace_worker(self, number: int) -> None:
        """Kill a worker and start another on the same push port."""
        worker, ports = self.workers.pop(number)
        await self.kill(worker)
        self._ports += map(int, ports)
        await self.start_worker()

    async def load(self, data: bytes) -> None:
        """Load activations from a file."""
        (self._folder / "all.bin").write_bytes(data)
        command = (sys.executable, "-m", "headrace", "activations", "load", "all.bin")
        loading = await asyncio.create_subprocess_exec(
            *command, cwd=self._folder, env=self._env, stdout=asyncio.subprocess.DEVNULL
        )
        assert await loading.wait() == 0

    def done_count(self) -> int:
        """Return the number of lines that workers have logged."""
        return self.log.read_bytes().count(b"\n") if self.log.exists() else 0

    async def kill(self, process: Any) -> None:
        """Kill a process with SIGKILL."""
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        await process.wait()

    async def end(self) -> None:
        """Kill all remaining processes."""
        for process in (*(worker for worker, _ in self.workers), self.server):
            if process is not None:
                await self.kill(process)


@pytest.mark.parametrize("name", SCENARIOS)
async def test_each_activation_is_executed_by_its_delivery_guarantee_and_recorded_once(
    name: str, tmp_path: Path
) -> None:
    dice = random.Random(11)
    kind, count = SCENARIOS[name]
    store = fresh_schema(tmp_path) if kind == "postgres" else f"sqlite:///{tmp_path / 'headrace.db'}"
    processes = BrokerProcesses(tmp_path, store, is_pushed=name == "push")
    messages = [
        activation(
            number,
            parameters_bytes=b"%d" % number,
            processing_deadline_duration=1,
            retry={"at_most_once": number % AT_MOST_ONCE_EVERY == 0},
        )
        for number in range(count)
    ]
    try:
        await processes.load(stream(*messages))
        await processes.start_server()
        for _ in range(WORKERS):
            await processes.start_worker()
        engine = await engine_on(kind, tmp_path)
        try:
            await kill_processes(processes, dice, count)
            await until_settled(engine)
            await check_outcomes(engine, processes, count)
        finally:
            await engine.close()
    finally:
        await processes.end()


async def kill_processes(processes: BrokerProcesses, dice: random.Random, count: int) -> None:
    """Kill workers and the server, each when a randomly drawn number of tasks is done."""
    clock = SystemClock()
    marks = sorted(dice.sample(range(200, count - 500), 7))
    for number, mark in enumerate(marks):
        while processes.done_count() < mark:
            await clock.sleep(0.02)
        if number % 3 == 1:
            await processes.kill(processes.server)
            await processes.start_server()
        else:
            await processes.replace_worker(dice.randrange(len(processes.workers)))


async def until_settled(engine: Engine) -> None:
    """Wait until no activation is waiting, delayed or leased."""
    while True:
        views = await engine.store.queues("default")
        if not sum(view.waiting_count + view.delayed_count + view.leased_count for view in views):
            return
        await engine.clock.sleep(0.1)


async def check_outcomes(engine: Engine, processes: BrokerProcesses, count: int) -> None:
    """Compare the log of the workers with the outcomes in the store."""
    done = Counter(int(line) for line in processes.log.read_bytes().split())
    at_most_once = [number for number in range(count) if number % AT_MOST_ONCE_EVERY == 0]
    at_least_once = [number for number in range(count) if number % AT_MOST_ONCE_EVERY]
    assert all(done[number] >= 1 for number in at_least_once), "expected each activation to be executed at least once"
    assert all(done[number] <= 1 for number in at_most_once), (
        "expected each at-most-once activation to be executed at most once"
    )
    views = await engine.store.runs("default", task=LANE, limit=count + 1)
    assert len(views) == count, "expected each activation to be recorded once"
    states = Counter(view.state for view in views)
    assert states["completed"] + states["failed"] == count
    views.sort(key=lambda view: (view.batch_id, view.index))
    failed = [number for number, view in enumerate(views) if view.state == "failed"]
    assert set(failed) <= set(at_most_once), "expected only at-most-once activations to fail after a kill"
    assert len(failed) < len(at_most_once) // 2
    twice = sum(done[number] > 1 for number in at_least_once)
    assert twice < count // 10, f"{twice} were done more than once"
