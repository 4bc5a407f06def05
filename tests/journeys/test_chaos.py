"""The story of one database, a producer and four workers who are killed and stopped all the time, while the database is
restarted under them. In the end nothing is lost, nothing is doubled, and what had ended never ran again.

What ran is counted in a side log that the task itself writes, outside the store, so the proof does not rest on what the
store says of itself. The seed is printed; HEADRACE_TEST_SEED replays the choices (not the machine's own timing).
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
    "HEADRACE_CRASHES_MAX": "1000",  # the murderer is outside; no run is to blame
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
        raise ValueError(f"item {item['n']} is not to be had")
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
        batch = asyncio.create_task(work.map(({"n": n} for n in range(ITEMS)), key="chaos"))
        await asyncio.gather(batch, singles())
    open("produced", "w").close()


if __name__ == "__main__":
    asyncio.run(produce())
""".replace("SINGLES)", f"{SINGLES})").replace("ITEMS)", f"{ITEMS})")


class Story:
    """A database of its own, four workers, a producer, and who does them harm."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.random = random.Random(SEED)
        self.server = Server()
        self.log = place / "side.log"
        self.log.touch()
        (place / "chaos.py").write_text(TASKS)
        (place / "acknowledged").touch()
        runtime = place / "runtime"
        runtime.mkdir()
        self.url = f"{self.server.dsn}?schema=chaos"
        self.environment = {
            **os.environ, **SETTINGS, "SIDE_LOG": str(self.log), "HEADRACE_STORE": self.url,
            "XDG_RUNTIME_DIR": str(runtime),
        }  # fmt: skip
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.harm = {"killed": 0, "stopped": 0, "restarted": 0}
        self.checked: list[tuple[int, set[int]]] = []

    def keep(self) -> None:
        """Start whoever is not there: number 0 is the producer, as long as it has not produced everything."""
        for number in range(WORKERS + 1):
            process = self.processes.get(number)
            if process is not None and process.poll() is None:
                continue
            if number == 0 and (self.place / "produced").exists():
                continue
            worker = ["-m", "headrace", "worker", "chaos.py:app", "--concurrency", "20"]
            self.processes[number] = subprocess.Popen(
                [sys.executable, *(["chaos.py"] if number == 0 else worker)],
                cwd=self.place,
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def do_harm(self) -> Iterator[float]:
        """One harm after the other; yields how long to wait before the next."""
        until_s = monotonic() + CHAOS_S
        restarts = [until_s - CHAOS_S * (number + 1) / (RESTARTS + 1) for number in range(RESTARTS)]
        stopped: list[subprocess.Popen[bytes]] = []
        while monotonic() < until_s:
            self.keep()
            if restarts and monotonic() > restarts[-1]:
                restarts.pop()
                self.server.stop("immediate")
                self.server.start()
                self.harm["restarted"] += 1
            victim = self.random.choice(list(self.processes.values()))
            if stopped and self.random.random() < 0.7:
                stopped.pop().send_signal(signal.SIGCONT)
            elif self.random.random() < 0.5:
                victim.kill()
                self.harm["killed"] += 1
            else:
                victim.send_signal(signal.SIGSTOP)
                stopped.append(victim)
                self.harm["stopped"] += 1
            yield self.random.uniform(0.05, 0.5)
        for process in stopped:
            process.send_signal(signal.SIGCONT)

    async def watch(self) -> None:
        """What has ended by now, and how long the side log is after that."""
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
            ended = {index for row in rows for index in _ended(*row)}
            self.checked.append((self.log.stat().st_size, ended))

    def end(self) -> None:
        """Nobody is left."""
        for process in self.processes.values():
            process.kill()
            process.wait()
        self.server.remove()


def _ended(first_index: int, gaps: bytes | None, positions: bytes | None, codes: bytes) -> list[int]:
    """The indexes of one part that came to an end for good (no retry is asked for here)."""
    places = range(len(codes)) if positions is None else memoryview(positions).cast("H")
    distances = None if gaps is None else memoryview(gaps).cast("I")
    final = (COMPLETED, FAILED)
    return [
        first_index + (place if distances is None else distances[place])
        for place, code in zip(places, codes, strict=True)
        if code in final
    ]


async def _harmed(story: Story) -> None:
    for number, wait_s in enumerate(story.do_harm()):
        if number % 5 == 4:
            await story.watch()
        await asyncio.sleep(wait_s)  # the harm comes at its own pace: nothing here waits for anything to happen


async def _calm(story: Story) -> Any:
    """Everybody lives now, until all is done."""
    settings = load({"store": story.url, "objects": str(story.place / "objects")}, {}, story.place)
    engine = await compose.open_engine(settings)
    try:
        while True:
            story.keep()
            await story.watch()
            batch = await engine.store.find_batch("default", "chaos")
            if batch is not None and batch.is_finished and (story.place / "produced").exists():
                singles = await engine.store.runs("default", task="single", state="waiting", limit=1)
                leased = await engine.store.runs("default", task="single", state="leased", limit=1)
                if not singles and not leased:
                    return engine, batch
            await engine.clock.sleep(0.1)
    except BaseException:
        await engine.close()
        raise


def test_nothing_is_lost_or_doubled_whoever_is_killed(tmp_path: Path) -> None:
    print(f"seed {SEED}")
    story = Story(tmp_path)
    try:
        asyncio.run(_told(story))
    finally:
        story.end()


async def _told(story: Story) -> None:
    await _harmed(story)
    engine, batch = await _calm(story)
    try:
        await story.watch()
        assert await invariants.faults(engine.store, "default") == []
        found: dict[int, tuple[int, bytes]] = {}
        while page := await engine.store.outcomes(batch.id, len(found), 10_000):
            found |= {outcome.index: (outcome.state, outcome.result) for outcome in page}
        assert sorted(found) == list(range(ITEMS)), "each item once, and nothing else"
        for n, (state, result) in found.items():
            expected = (FAILED, None) if n % 1_000 == 7 else (COMPLETED, b"%d" % (2 * n))
            assert state == expected[0]
            assert expected[1] in (None, result)
        acknowledged = (story.place / "acknowledged").read_text().split()
        assert len(set(acknowledged)) == SINGLES
        for run_id in acknowledged:
            view = await engine.store.run(*parse_run_id(run_id))
            assert view.state == "completed", run_id
    finally:
        await engine.close()
    log = story.log.read_bytes()
    for size, ended in story.checked:
        start = log.rfind(b"\n", 0, size) + 1
        again = ended.intersection(int(line) for line in log[start : log.rfind(b"\n") + 1].split())
        assert not again, f"{len(again)} runs had ended and began again, {sorted(again)[:5]}"
    ran = log.count(b"\n")
    assert any(0 < len(ended) < ITEMS for _, ended in story.checked), "no look came at a telling moment"
    print(f"{story.harm}, {len(story.checked)} looks, {ran:,} runs began for {ITEMS:,} items")
    assert story.harm["restarted"] == RESTARTS
    assert ran >= ITEMS
