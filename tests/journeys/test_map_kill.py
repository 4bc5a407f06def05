"""A map that is killed with -9 repeatedly, and whose user only repeats the command.

The task itself logs its executions in a side log outside the store, a line for each item and attempt. So the proof that
no settled run ran again does not rest on the store's own report.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from headrace.core import run
from headrace.core.span import decode_uint16s
from tests.support.postgres_server import Server

pytestmark = [pytest.mark.journey, pytest.mark.timeout(300)]

ITEMS: Final = 50_000
KILLS: Final = int(os.environ.get("HEADRACE_TEST_COUNT", "20"))
TASKS: Final = """
import os

LOG = os.open(os.environ["SIDE_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


async def work(item):
    os.write(LOG, b"%d\\n" % item["n"])
    if item["n"] % 1000 == 7:
        raise ValueError(f"item {item['n']} failed")
    return {"n": item["n"], "double": 2 * item["n"]}
"""


class MapScenario:
    """A directory with an input, a task and an output."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "side.log"
        self.output = folder / "out.ndjson"
        (folder / "tasks.py").write_text(TASKS)
        with (folder / "in.ndjson").open("w") as file:
            file.writelines(f'{{"n": {n}, "text": "item number {n}"}}\n' for n in range(ITEMS))
        self.log.touch()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command, which is the same each time."""
        command = [sys.executable, "-m", "headrace", "map", "tasks.py:work", "in.ndjson", "-o", "out.ndjson"]
        return subprocess.Popen(
            [*command, "--no-progress"],
            cwd=self.folder,
            env={**os.environ, "SIDE_LOG": str(self.log)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def ran(self) -> list[int]:
        """Return the items of the side log in order of execution, without a line cut short by a kill."""
        data = self.log.read_bytes()
        return [int(line) for line in data[: data.rfind(b"\n") + 1].split()]

    def settled(self) -> set[int]:
        """Return the indexes that have ended, read from the store's file while no process has it open."""
        path = self.folder / "headrace.db"
        if not path.exists():
            return set()
        indexes: set[int] = set()
        with closing(sqlite3.connect(path)) as connection:
            if not connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'headrace_span'").fetchone()[0]:
                return set()  # killed before the schema was created
            firsts = dict(connection.execute("SELECT id, first_index FROM headrace_block WHERE gaps IS NULL"))
            rows = connection.execute("SELECT block_id, positions, states FROM headrace_span")
            for block_id, positions, states in rows:
                block_offsets = range(len(states)) if positions is None else decode_uint16s(positions)
                ended = (offset for offset, state in zip(block_offsets, states, strict=True) if state in run.FINAL)
                indexes.update(firsts[block_id] + offset for offset in ended)
        return indexes

    def expected(self) -> bytes:
        """Return the expected output, byte for byte."""
        return b"".join(
            b'{"index":%d,"ok":false,"error":{"type":"ValueError","message":"item %d failed","attempts":1}}\n' % (n, n)
            if n % 1_000 == 7
            else b'{"index":%d,"ok":true,"output":{"n":%d,"double":%d}}\n' % (n, n, 2 * n)
            for n in range(ITEMS)
        )


def wait_for(process: subprocess.Popen[bytes], is_reached: Callable[[], bool]) -> bool:
    """Return True when the condition holds, False if the process ended before. Check each millisecond or two."""
    assert process.stderr is not None
    outputs = [process.stderr.fileno()]
    while not is_reached():
        if select.select(outputs, [], [], 0.001)[0] and not os.read(outputs[0], 4_096):
            process.wait(30)
            return False
    return True


def kill_condition(
    dice: random.Random, scenario: MapScenario, *, settled_count: int, kills_left: int
) -> tuple[str, Callable[[], bool]]:
    """Draw when to kill: after more executed items, after more bytes of output, or as soon as a database exists."""
    unsettled_count = ITEMS - settled_count
    if dice.random() < 0.1:
        path = scenario.folder / ("headrace.db-wal" if dice.random() < 0.5 else "headrace.db")
        return f"{path.name} exists", path.exists
    before = scenario.log.stat().st_size
    more_bytes = int(dice.random() * unsettled_count * 5 / (kills_left + 2))
    if dice.random() < 0.2:
        written = scenario.output.stat().st_size if scenario.output.exists() else 0
        return (
            f"{more_bytes} more bytes of output",
            lambda: scenario.output.exists() and scenario.output.stat().st_size > written + more_bytes,
        )
    return f"{more_bytes} more bytes in the side log", lambda: scenario.log.stat().st_size > before + more_bytes


def test_a_map_that_is_killed_twenty_times_gives_the_expected_output(tmp_path: Path) -> None:
    seed = int(os.environ.get("HEADRACE_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"seed {seed}: HEADRACE_TEST_SEED={seed} replays it")
    dice = random.Random(seed)
    scenario = MapScenario(tmp_path)
    kills_count = 0
    for _ in range(4 * KILLS):
        settled = scenario.settled()
        ran_before = len(scenario.ran())
        condition, is_reached = kill_condition(
            dice, scenario, settled_count=len(settled), kills_left=KILLS - kills_count
        )
        process = scenario.start()
        is_killed = wait_for(process, is_reached)
        process.kill()
        _, error_output = process.communicate(timeout=30)
        repeated = settled.intersection(scenario.ran()[ran_before:])
        assert not repeated, f"seed {seed}, kill {kills_count} ({condition}): {len(repeated)} settled runs ran again"
        check_output(scenario)
        kills_count += is_killed
        print(f"kill {kills_count} when {condition}: {len(settled)} were settled before it")
        if not is_killed:
            assert process.returncode in (0, 3), error_output.decode()
        if kills_count == KILLS or not is_killed:
            break
    settled = scenario.settled()
    ran_before = len(scenario.ran())
    process = scenario.start()
    _, error_output = process.communicate(timeout=120)
    assert process.returncode == 3, f"seed {seed}: {error_output.decode()}"
    assert not settled.intersection(scenario.ran()[ran_before:])
    assert scenario.output.read_bytes() == scenario.expected(), f"seed {seed}"
    times = Counter(scenario.ran())
    assert set(times) == set(range(ITEMS)), f"seed {seed}: not every item ran"
    print(f"{kills_count} kills; {sum(times.values()) - ITEMS} of {ITEMS} runs were begun twice")
    assert kills_count == KILLS, f"seed {seed}: the map ended after {kills_count} kills"


def check_output(scenario: MapScenario) -> None:
    """Check that the output so far is a prefix of the expected output; its last line may be incomplete."""
    if scenario.output.exists():
        data = scenario.output.read_bytes()
        assert scenario.expected().startswith(data)


def test_an_interrupted_map_prints_how_to_resume_and_resumes(tmp_path: Path) -> None:
    scenario = MapScenario(tmp_path)
    process = scenario.start()
    assert wait_for(process, lambda: scenario.log.stat().st_size > 1_000)
    process.send_signal(signal.SIGINT)
    _, error_output = process.communicate(timeout=60)
    assert process.returncode == 130, error_output.decode()
    assert "To resume: " in error_output.decode()
    settled = scenario.settled()
    assert settled == set(scenario.ran()), "expected a graceful stop to settle all begun runs"
    ran_before = len(scenario.ran())
    process = scenario.start()
    _, error_output = process.communicate(timeout=120)
    assert process.returncode == 3, error_output.decode()
    assert not settled.intersection(scenario.ran()[ran_before:])
    assert scenario.output.read_bytes() == scenario.expected()
    assert sorted(scenario.ran()) == list(range(ITEMS))


def test_a_map_continues_when_the_database_is_back(tmp_path: Path) -> None:
    database = Server()
    try:
        (tmp_path / "tasks.py").write_text(
            "import asyncio\n\n\nasync def work(n):\n    await asyncio.sleep(0.01)\n    return n\n"
        )
        (tmp_path / "in.ndjson").write_text("".join(f"{n}\n" for n in range(20_000)))
        output = tmp_path / "out.ndjson"
        output.touch()
        command = [sys.executable, "-m", "headrace", "map", "tasks.py:work", "in.ndjson", "-o", "out.ndjson"]
        command += ["--store", f"{database.dsn}?schema=map", "--no-progress"]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=log)
        while not output.stat().st_size:
            assert process.poll() is None, (tmp_path / "log").read_text()
        database.stop()
        while "store.unreachable" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
        database.start()
        assert process.wait(120) == 0, (tmp_path / "log").read_text()
        assert len(output.read_text().splitlines()) == 20_000
    finally:
        database.remove()
