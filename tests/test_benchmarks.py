"""`headrace bench`: its shape, and that floors can not flatter. Speeds are not asserted; they are printed."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench.floors import postgres_floor, sqlite_floor

from headrace import benchmarks
from headrace.benchmarks.places import OnServer
from headrace.benchmarks.scenarios import SCENARIOS
from headrace.foundation.errors import InvalidInput
from tests.support.postgres_server import server

ROOT = Path(__file__).parents[1]


def test_the_command_prints_what_other_programs_read(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "headrace", "bench", "append", "drain", "--quick", "--json"]
    done = subprocess.run(
        [*command, "--store", f"sqlite:///{tmp_path}/any.db"], capture_output=True, check=True, cwd=ROOT, timeout=100
    )
    report = json.loads(done.stdout)
    assert report.keys() == {"machine", "versions", "scenarios"}
    assert [figure["name"] for figure in report["scenarios"]] == ["append", "drain"]
    for figure in report["scenarios"]:
        assert figure.keys() == {"name", "store", "unit", "value", "floor", "ratio", "runs"}
        assert figure["store"] == "sqlite"
        assert figure["value"] > 0
        assert figure["ratio"] == pytest.approx(figure["value"] / figure["floor"], abs=0.01)
        assert figure["runs"] == 2
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_an_unknown_scenario_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidInput, match="no scenario is called 'speed'"):
        benchmarks.chosen(["speed"])
    assert [one.name for one in benchmarks.chosen([])][:4] == ["append", "drain", "sleep100ms", "map_memory"]
    with pytest.raises(InvalidInput, match="drain4 is not for sqlite"):
        benchmarks.chosen(["drain4"])
    assert {one.name for one in benchmarks.chosen([], "postgres")} > {"drain4", "snapshot", "dead_rows", "wal"}


@pytest.mark.parametrize("name", ["large_batch", "shuffled_batch", "claim_latency", "snapshot", "dead_rows", "wal"])
def test_a_scenario_measures_a_server_and_leaves_nothing_there(name: str) -> None:
    place = benchmarks.place_of(server().dsn)
    assert isinstance(place, OnServer)
    value, base = SCENARIOS[name].measure(20_000, place)
    assert value > 0
    assert base is None or base > 0
    assert asyncio.run(place._ask("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'bench%'")) == []


def test_the_time_from_enqueue_to_start_is_measured_across_processes(tmp_path: Path) -> None:
    value, goal = SCENARIOS["start_latency"].measure(20, benchmarks.place_of(f"sqlite:///{tmp_path}/any.db"))
    assert value > 0
    assert goal == 5


def test_a_slow_floor_is_refused() -> None:
    raw = sqlite_floor.PEER_RAW_ROWS_S
    sqlite_floor.check_floor(raw, sqlite_floor.PEER_APPEND_ITEMS_S, sqlite_floor.PEER_DRAIN_RUNS_S)
    with pytest.raises(AssertionError, match="the drain floor is slow"):
        sqlite_floor.check_floor(2 * raw, sqlite_floor.PEER_APPEND_ITEMS_S, 0.9 * sqlite_floor.PEER_DRAIN_RUNS_S)
    with pytest.raises(AssertionError, match="the append floor is slow"):
        sqlite_floor.check_floor(3 * raw, sqlite_floor.PEER_APPEND_ITEMS_S, 3 * sqlite_floor.PEER_DRAIN_RUNS_S)


def test_the_floors_do_the_product_s_work(tmp_path: Path) -> None:
    assert sqlite_floor.append_floor(1_000, tmp_path) > 0
    assert sqlite_floor.drain_floor(1_000, tmp_path) > 0, "it asserts that every run completed"


async def test_the_floors_do_the_product_s_work_on_a_server() -> None:
    dsn = server().dsn
    assert await postgres_floor.append_floor(dsn, 1_000) > 0, "it asserts that every item was accepted"
    assert await postgres_floor.drain_floor(dsn, 1_000) > 0, "and that every run completed"


def test_the_floors_import_nothing_of_headrace() -> None:
    code = "import sys, bench.floors.sqlite_floor, bench.floors.dispatch_floor; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT, text=True)
    assert not [name for name in done.stdout.split() if name.partition(".")[0] == "headrace"]
