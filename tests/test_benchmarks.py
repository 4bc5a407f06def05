"""`headrace bench`: its output, and baselines that can't flatter. No speed is asserted."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from headrace import benchmarks
from headrace.benchmarks.baselines import postgres, sqlite
from headrace.benchmarks.scenarios import SCENARIOS
from headrace.benchmarks.targets import PostgresTarget
from headrace.foundation.errors import InvalidInput
from tests.support.postgres_server import server


def test_the_command_prints_json_with_a_baseline_for_each_figure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "headrace", "bench", "append", "drain", "--quick", "--json"]
    done = subprocess.run(
        [*command, "--store", f"sqlite:///{tmp_path}/any.db"], capture_output=True, check=True, timeout=100
    )
    report = json.loads(done.stdout)
    assert report.keys() == {"machine", "versions", "scenarios"}
    assert [figure["name"] for figure in report["scenarios"]] == ["append", "drain"]
    for figure in report["scenarios"]:
        assert figure.keys() == {"name", "store", "unit", "value", "baseline", "ratio", "runs"}
        assert figure["store"] == "sqlite"
        assert figure["value"] > 0
        assert figure["ratio"] == pytest.approx(figure["value"] / figure["baseline"], abs=0.01)
        assert figure["runs"] == 2
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_an_unknown_scenario_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no scenario has the name 'speed'"):
        benchmarks.select(["speed"])
    assert [scenario.name for scenario in benchmarks.select([])][:4] == ["append", "drain", "sleep100ms", "map_memory"]
    with pytest.raises(InvalidInput, match="drain4 does not run on sqlite"):
        benchmarks.select(["drain4"])
    assert {scenario.name for scenario in benchmarks.select([], "postgres")} > {
        "drain4",
        "snapshot",
        "dead_rows",
        "wal",
    }


@pytest.mark.parametrize("name", ["large_batch", "shuffled_batch", "claim_latency", "snapshot", "dead_rows", "wal"])
def test_a_scenario_on_a_server_leaves_no_schema_behind(name: str) -> None:
    target = benchmarks.target_of(server().dsn)
    assert isinstance(target, PostgresTarget)
    value, base = SCENARIOS[name].measure(20_000, target)
    assert value > 0
    assert base is None or base > 0
    assert asyncio.run(target._fetch("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'bench%'")) == []


def test_start_latency_is_measured_across_processes(tmp_path: Path) -> None:
    value, goal = SCENARIOS["start_latency"].measure(20, benchmarks.target_of(f"sqlite:///{tmp_path}/any.db"))
    assert value > 0
    assert goal == 5


def test_a_slow_baseline_is_refused() -> None:
    raw = sqlite.PEER_RAW_ROWS_S
    sqlite.check_baseline(raw, sqlite.PEER_APPEND_ITEMS_S, sqlite.PEER_DRAIN_RUNS_S)
    with pytest.raises(AssertionError, match="the drain baseline is slow"):
        sqlite.check_baseline(2 * raw, sqlite.PEER_APPEND_ITEMS_S, 0.9 * sqlite.PEER_DRAIN_RUNS_S)
    with pytest.raises(AssertionError, match="the append baseline is slow"):
        sqlite.check_baseline(3 * raw, sqlite.PEER_APPEND_ITEMS_S, 3 * sqlite.PEER_DRAIN_RUNS_S)


def test_the_sqlite_baselines_append_and_drain_every_run(tmp_path: Path) -> None:
    assert sqlite.measure_append(1_000, tmp_path) > 0
    assert sqlite.measure_drain(1_000, tmp_path) > 0, "it asserts that every run completed"


async def test_the_postgres_baselines_append_and_drain_every_run() -> None:
    dsn = server().dsn
    assert await postgres.measure_append(dsn, 1_000) > 0, "it asserts that every item was accepted"
    assert await postgres.measure_drain(dsn, 1_000) > 0, "and that every run completed"
