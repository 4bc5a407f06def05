"""A database, a producer and four workers that are killed and stopped repeatedly, while the database is restarted. In
the end no run is lost or duplicated, and no ended run ran again.

The task itself logs its executions in a side log outside the store, so the proof does not rest on the store's own
report. The seed is printed; HEADRACE_TEST_SEED replays the choices, but not the timing of the machine.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, Final

import asyncpg
import pytest

from headrace import compose
from headrace.core.run import COMPLETED, FAILED
from headrace.foundation.ids import parse_run_id
from headrace.foundation.settings import load
from tests.support import invariants
from tests.support.postgres_server import Server

pytestmark = [pytest.mark.journey, pytest.mark.timeout(1_800)]

ITEMS: Final = 200_000
SINGLES: Final = 2_000
WORKERS: Final = 4
RESTARTS: Final = 2
CHAOS_S: Final = float(os.environ.get("HEADRACE_TEST_MINUTES", "0.4")) * 60
SEED: Final = int(os.environ.get("HEADRACE_TEST_SEED", str(random.randrange(10**6))))
SETTINGS: Final = {
    "HEADRACE_HEARTBEAT_MS": "200",
    "HEADRACE_SESSION_TIMEOUT_MS": "1000",
    "HEADRACE_UPKEEP_INTERVAL_MS": "200",
    "HEADRACE_POLL_INTERVAL_MS": "200",
    "HEADRACE_CRASHES_MAX": "1000",  # processes are killed from outside, so no run is to blame
    "HEADRACE_LOG_LEVEL": "error",
}
TASKS: Final = """
import asyncio, os
from headrace import Headrace

app = Headrace("chaos")
LOG = os.open(os.environ["SIDE_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


@app.task
async def work(item):
    os.write(LOG, b"%d\\n" % item["n"])
    if item["n"] % 50 == 3:
        await asyncio.sleep(0.002)
    if item["n"] % 1000 == 7:
        raise ValueError(f"item {item['n']} failed")
    return 2 * item["n"]


@app.task
async def single(n: int):
    return n


async def produce():
    acknowledged = open("acknowledged", "a", buffering=1)
    first = sum(1 for _ in open("acknowledged"))

    async def singles():
        for n in range(first, SINGLES):
            run = await single.options(idempotency_key=f"single-{n}").enqueue(n)
            acknowledged.write(run.id + "\\n")

    async with app:
        batch = asyncio.create_task(work.map(({"n": n} for n in range(ITEMS)), batch_key="chaos"))
        await asyncio.gather(batch, singles())
    open("produced", "w").close()


if __name__ == "__main__":
    asyncio.run(produce())
""".replace("SINGLES)", f"{SINGLES})").replace("ITEMS)", f"{ITEMS})")


class ChaosScenario:
    """A database, four workers, a producer, and the faults that they suffer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.random = random.Random(SEED)
        self.server = Server()
        self.log = folder / "side.log"
        self.log.touch()
        (folder / "chaos.py").write_text(TASKS)
        (folder / "acknowledged").touch()
        runtime = folder / "runtime"
        runtime.mkdir()
        self.url = f"{self.server.dsn}?schema=chaos"
        self.environment = {
            **os.environ, **SETTINGS, "SIDE_LOG": str(self.log), "HEADRACE_STORE": self.url,
            "XDG_RUNTIME_DIR": str(runtime),
        }  # fmt: skip
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.faults_count = {"killed": 0, "stopped": 0, "restarted": 0}
        self.observations: list[tuple[int, set[int]]] = []

    def start_missing(self) -> None:
        """Start each process that is not running: number 0 is the producer, until it has produced everything."""
        for number in range(WORKERS + 1):
            process = self.processes.get(number)
            if process is not None and process.poll() is None:
                continue
            if number == 0 and (self.folder / "produced").exists():
                continue
            worker = ["-m", "headrace", "worker", "chaos.py:app", "--concurrency", "20"]
            self.processes[number] = subprocess.Popen(
                [sys.executable, *(["chaos.py"] if number == 0 else worker)],
                cwd=self.folder,
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def inject_faults(self) -> Iterator[float]:
        """Inject faults one by one; yield the seconds to wait before the next."""
        until_s = monotonic() + CHAOS_S
        restarts = [until_s - CHAOS_S * (number + 1) / (RESTARTS + 1) for number in range(RESTARTS)]
        stopped: list[subprocess.Popen[bytes]] = []
        while monotonic() < until_s:
            self.start_missing()
            if restarts and monotonic() > restarts[-1]:
                restarts.pop()
                self.server.stop("immediate")
                self.server.start()
                self.faults_count["restarted"] += 1
            victim = self.random.choice(list(self.processes.values()))
            if stopped and self.random.random() < 0.7:
                stopped.pop().send_signal(signal.SIGCONT)
            elif self.random.random() < 0.5:
                victim.kill()
                self.faults_count["killed"] += 1
            else:
                victim.send_signal(signal.SIGSTOP)
                stopped.append(victim)
                self.faults_count["stopped"] += 1
            yield self.random.uniform(0.05, 0.5)
        for process in stopped:
            process.send_signal(signal.SIGCONT)

    async def record_ended(self) -> None:
        """Record the ended runs, and the length of the side log after reading them."""
        with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            connection = await asyncpg.connect(self.server.dsn, timeout=5)
            try:
                rows = await connection.fetch(
                    "SELECT block.first_index, block.gaps, part.positions, part.codes FROM chaos.part "
                    "JOIN chaos.block ON block.id = part.block_id JOIN chaos.batch ON batch.id = block.batch_id "
                    "WHERE batch.key = 'chaos'"
                )
            finally:
                await connection.close()
            ended = {index for row in rows for index in _ended_indexes(*row)}
            self.observations.append((self.log.stat().st_size, ended))

    def close(self) -> None:
        """Kill all processes and remove the database."""
        for process in self.processes.values():
            process.kill()
            process.wait()
        self.server.remove()


def _ended_indexes(first_index: int, gaps: bytes | None, positions: bytes | None, codes: bytes) -> list[int]:
    """Return the indexes of a part that have ended finally (this test uses no retries)."""
    block_offsets = range(len(codes)) if positions is None else memoryview(positions).cast("H")
    distances = None if gaps is None else memoryview(gaps).cast("I")
    final = (COMPLETED, FAILED)
    return [
        first_index + (block_offset if distances is None else distances[block_offset])
        for block_offset, code in zip(block_offsets, codes, strict=True)
        if code in final
    ]


async def _fault_phase(scenario: ChaosScenario) -> None:
    for number, wait_s in enumerate(scenario.inject_faults()):
        if number % 5 == 4:
            await scenario.record_ended()
        await asyncio.sleep(wait_s)  # faults come at random times and do not wait for an event


async def _quiet_phase(scenario: ChaosScenario) -> Any:
    """Keep all processes running until all runs have ended."""
    settings = load({"store": scenario.url}, {}, scenario.folder)
    engine = await compose.open_engine(settings)
    try:
        while True:
            scenario.start_missing()
            await scenario.record_ended()
            batch = await engine.store.find_batch("default", "chaos")
            if batch is not None and batch.is_finished and (scenario.folder / "produced").exists():
                singles = await engine.store.runs("default", task="single", state="waiting", limit=1)
                leased = await engine.store.runs("default", task="single", state="leased", limit=1)
                if not singles and not leased:
                    return engine, batch
            await engine.clock.sleep(0.1)
    except BaseException:
        await engine.close()
        raise


def test_nothing_is_lost_or_duplicated_when_any_process_is_killed(tmp_path: Path) -> None:
    print(f"seed {SEED}")
    scenario = ChaosScenario(tmp_path)
    try:
        asyncio.run(_play(scenario))
    finally:
        scenario.close()


async def _play(scenario: ChaosScenario) -> None:
    await _fault_phase(scenario)
    engine, batch = await _quiet_phase(scenario)
    try:
        await scenario.record_ended()
        assert await invariants.faults(engine.store, "default") == []
        outcomes: dict[int, tuple[int, bytes]] = {}
        while page := await engine.store.outcomes(batch.id, len(outcomes), 10_000):
            outcomes |= {outcome.index: (outcome.state, outcome.result) for outcome in page}
        assert sorted(outcomes) == list(range(ITEMS)), "expected each item once"
        for n, (state, result) in outcomes.items():
            expected = (FAILED, None) if n % 1_000 == 7 else (COMPLETED, b"%d" % (2 * n))
            assert state == expected[0]
            assert expected[1] in (None, result)
        acknowledged = (scenario.folder / "acknowledged").read_text().split()
        assert len(set(acknowledged)) == SINGLES
        for run_id in acknowledged:
            view = await engine.store.run(*parse_run_id(run_id))
            assert view.state == "completed", run_id
    finally:
        await engine.close()
    log = scenario.log.read_bytes()
    for size, ended in scenario.observations:
        start = log.rfind(b"\n", 0, size) + 1
        again = ended.intersection(int(line) for line in log[start : log.rfind(b"\n") + 1].split())
        assert not again, f"{len(again)} runs had ended and began again, {sorted(again)[:5]}"
    ran = log.count(b"\n")
    assert any(0 < len(ended) < ITEMS for _, ended in scenario.observations), (
        "no observation was made while runs were pending"
    )
    print(f"{scenario.faults_count}, {len(scenario.observations)} observations, {ran:,} runs began for {ITEMS:,} items")
    assert scenario.faults_count["restarted"] == RESTARTS
    assert ran >= ITEMS
