"""The scenarios of `headrace bench`, each measured in turns with its baseline, in one process.

A baseline is the same work without the framework (`headrace.benchmarks.baselines`); it imports nothing of Headrace. The
ratio of the two is what the framework costs on this machine.
"""

from __future__ import annotations

import os
import platform
import sqlite3
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypedDict
from urllib.parse import urlsplit

from headrace import __version__
from headrace.benchmarks.scenarios import SCENARIOS, Scenario
from headrace.benchmarks.targets import BenchmarkTarget, PostgresTarget, SqliteTarget
from headrace.compose import POSTGRES, SQLITE, sqlite_path
from headrace.foundation.errors import InvalidInput

RUNS: Final = 5
QUICK_RUNS: Final = 2
CHECK_SIZE: Final = 100_000
QUICK_SHARE: Final = 10


class Figure(TypedDict):
    """The result of one scenario: medians over `runs` turns; `ratio` is value divided by baseline."""

    name: str
    store: str
    unit: str
    value: float
    baseline: float | None
    ratio: float | None
    runs: int


class BenchReport(TypedDict):
    """The output of `headrace bench --json`."""

    machine: dict[str, object]
    versions: dict[str, str]
    scenarios: list[Figure]


def target_of(store: str | None) -> BenchmarkTarget:
    """Return the disk or server that a store's URL names; without a URL, the disk of temporary files."""
    scheme = "sqlite" if store is None else urlsplit(store).scheme
    if scheme in POSTGRES:
        assert store is not None
        return PostgresTarget(store)
    if scheme != SQLITE:
        raise InvalidInput(
            f"expected a SQLite or PostgreSQL URL, got {store!r}",
            hint="--store sqlite:///folder/any.db selects a disk, --store postgresql://… a server",
        )
    return SqliteTarget(Path(tempfile.gettempdir()) if store is None else sqlite_path(store).parent)


def select(names: list[str], kind: str = "sqlite") -> list[Scenario]:
    """Return the scenarios with these names; without names, all that fit the store. Raises `InvalidInput`."""
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise InvalidInput(f"no scenario has the name {unknown[0]!r}", hint=f"scenarios: {', '.join(SCENARIOS)}")
    unfit = [name for name in names if kind not in SCENARIOS[name].kinds]
    if unfit:
        raise InvalidInput(
            f"the scenario {unfit[0]} does not run on {kind}", hint=f"it runs on {', '.join(SCENARIOS[unfit[0]].kinds)}"
        )
    return [scenario for name, scenario in SCENARIOS.items() if (name in names if names else kind in scenario.kinds)]


def measure_all(scenarios: list[Scenario], target: BenchmarkTarget, *, quick: bool) -> Iterator[Figure]:
    """Yield the figures one by one, each scenario in turns with its baseline; `quick` measures a tenth, twice."""
    baselines = target.baselines()
    if "check" in baselines and any(scenario.name in ("append", "drain") for scenario in scenarios):
        baselines["check"](CHECK_SIZE)
    for scenario in scenarios:
        runs = 1 if scenario.is_slow else QUICK_RUNS if quick else RUNS
        size = scenario.size // (QUICK_SHARE if quick else 1)
        values: list[float] = []
        baseline_values: list[float] = []
        for _ in range(runs):
            value, own_baseline = scenario.measure(size, target)
            values.append(value)
            if own_baseline is not None:
                baseline_values.append(own_baseline)
            elif scenario.name in baselines:
                baseline_values.append(baselines[scenario.name](size))
        value = statistics.median(values)
        baseline = statistics.median(baseline_values) if baseline_values else None
        yield Figure(
            name=scenario.name,
            store=target.kind,
            unit=scenario.unit,
            value=round(value, 1),
            baseline=None if baseline is None else round(baseline, 1),
            ratio=None if not baseline else round(value / baseline, 3),
            runs=runs,
        )


def machine() -> dict[str, object]:
    """Describe the machine."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
    }


def versions() -> dict[str, str]:
    """Return the versions of Headrace, Python and SQLite."""
    return {"headrace": __version__, "python": platform.python_version(), "sqlite": sqlite3.sqlite_version}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
