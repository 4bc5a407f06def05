"""The story of a map that is killed with -9 again and again, and of its owner, who only repeats the command.

The items are counted in a side log that the task itself writes, outside the store, a line an item and attempt. So
the proof that nothing settled ran again does not rest on what the store says of itself.
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

pytestmark = [pytest.mark.journey, pytest.mark.timeout(300)]

ITEMS: Final = 50_000
KILLS: Final = int(os.environ.get("HEADRACE_TEST_COUNT", "20"))
TASKS: Final = """
import os

LOG = os.open(os.environ["SIDE_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


async def work(item):
    os.write(LOG, b"%d\\n" % item["n"])
    if item["n"] % 1000 == 7:
        raise ValueError(f"item {item['n']} is not to be had")
    return {"n": item["n"], "double": 2 * item["n"]}
"""


class Story:
    """One input, one task, one output, in one directory."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.log = place / "side.log"
        self.output = place / "out.ndjson"
        (place / "tasks.py").write_text(TASKS)
        with (place / "in.ndjson").open("w") as file:
            file.writelines(f'{{"n": {n}, "text": "item number {n}"}}\n' for n in range(ITEMS))
        self.log.touch()

    def start(self) -> subprocess.Popen[bytes]:
        """The command, the same each time."""
        command = [sys.executable, "-m", "headrace", "map", "tasks.py:work", "in.ndjson", "-o", "out.ndjson"]
        return subprocess.Popen(
            [*command, "--no-progress"],
            cwd=self.place,
            env={**os.environ, "SIDE_LOG": str(self.log)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def ran(self) -> list[int]:
        """The items in the side log, in the order they ran. A line cut short by a kill is none."""
        data = self.log.read_bytes()
        return [int(line) for line in data[: data.rfind(b"\n") + 1].split()]

    def settled(self) -> set[int]:
        """The indexes that have ended, as the store's file says while no process has it open."""
        path = self.place / "headrace.db"
        if not path.exists():
            return set()
        found: set[int] = set()
        with closing(sqlite3.connect(path)) as connection:
            if not connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'span'").fetchone()[0]:
                return set()  # killed before the schema was there
            firsts = dict(connection.execute("SELECT id, first_index FROM block WHERE gaps IS NULL"))
            rows = connection.execute("SELECT block_id, positions, states FROM span")
            for block_id, positions, states in rows:
                places = range(len(states)) if positions is None else decode_uint16s(positions)
                ended = (place for place, state in zip(places, states, strict=True) if state in run.FINAL)
                found.update(firsts[block_id] + place for place in ended)
        return found

    def expected(self) -> bytes:
        """The output, byte for byte."""
        return b"".join(
            b'{"index":%d,"ok":false,"error":{"type":"ValueError","message":"item %d is not to be had","attempts":1}}\n'
            % (n, n)
            if n % 1_000 == 7
            else b'{"index":%d,"ok":true,"output":{"n":%d,"double":%d}}\n' % (n, n, 2 * n)
            for n in range(ITEMS)
        )


def wait_for(process: subprocess.Popen[bytes], is_time: Callable[[], bool]) -> bool:
    """True when it is time, False when the process ended before. Looks again each millisecond or two."""
    assert process.stderr is not None
    said = [process.stderr.fileno()]
    while not is_time():
        if select.select(said, [], [], 0.001)[0] and not os.read(said[0], 4_096):
            process.wait(30)
            return False
    return True


def moment_of(
    dice: random.Random, story: Story, *, settled_count: int, kills_left: int
) -> tuple[str, Callable[[], bool]]:
    """When to kill: after so many more items, so many more bytes of output, or as soon as there is a database."""
    left = ITEMS - settled_count
    if dice.random() < 0.1:
        path = story.place / ("headrace.db-wal" if dice.random() < 0.5 else "headrace.db")
        return f"{path.name} is there", path.exists
    before = story.log.stat().st_size
    more_bytes = int(dice.random() * left * 5 / (kills_left + 2))
    if dice.random() < 0.2:
        written = story.output.stat().st_size if story.output.exists() else 0
        return (
            f"{more_bytes} more bytes of output",
            lambda: story.output.exists() and story.output.stat().st_size > written + more_bytes,
        )
    return f"{more_bytes} more bytes in the side log", lambda: story.log.stat().st_size > before + more_bytes


def test_a_map_that_is_killed_twenty_times_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    seed = int(os.environ.get("HEADRACE_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"seed {seed}: HEADRACE_TEST_SEED={seed} replays it")
    dice = random.Random(seed)
    story = Story(tmp_path)
    kills_count = 0
    for _ in range(4 * KILLS):
        settled = story.settled()
        ran_before = len(story.ran())
        when, is_time = moment_of(dice, story, settled_count=len(settled), kills_left=KILLS - kills_count)
        process = story.start()
        is_killed = wait_for(process, is_time)
        process.kill()
        _, said = process.communicate(timeout=30)
        again = settled.intersection(story.ran()[ran_before:])
        assert not again, f"seed {seed}, kill {kills_count} ({when}): {len(again)} settled runs ran again"
        check_output(story)
        kills_count += is_killed
        print(f"kill {kills_count} when {when}: {len(settled)} were settled before it")
        if not is_killed:
            assert process.returncode in (0, 3), said.decode()
        if kills_count == KILLS or not is_killed:
            break
    settled = story.settled()
    ran_before = len(story.ran())
    process = story.start()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 3, f"seed {seed}: {said.decode()}"
    assert not settled.intersection(story.ran()[ran_before:])
    assert story.output.read_bytes() == story.expected(), f"seed {seed}"
    times = Counter(story.ran())
    assert set(times) == set(range(ITEMS)), f"seed {seed}: not every item ran"
    print(f"{kills_count} kills; {sum(times.values()) - ITEMS} of {ITEMS} runs were begun twice")
    assert kills_count == KILLS, f"seed {seed}: the map ended after {kills_count} kills"


def check_output(story: Story) -> None:
    """Whatever the moment, the output is right as far as it goes; only its last line may be torn."""
    if story.output.exists():
        data = story.output.read_bytes()
        assert story.expected().startswith(data)


def test_an_interrupted_map_says_how_to_go_on_and_does(tmp_path: Path) -> None:
    story = Story(tmp_path)
    process = story.start()
    assert wait_for(process, lambda: story.log.stat().st_size > 1_000)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said.decode()
    assert "To resume: " in said.decode()
    settled = story.settled()
    assert settled == set(story.ran()), "a graceful stop settles whatever it had begun"
    ran_before = len(story.ran())
    process = story.start()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 3, said.decode()
    assert not settled.intersection(story.ran()[ran_before:])
    assert story.output.read_bytes() == story.expected()
    assert sorted(story.ran()) == list(range(ITEMS))
