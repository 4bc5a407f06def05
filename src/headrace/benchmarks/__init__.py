"""What `headrace bench` measures: each scenario beside its floor, in one process, taking turns.

A floor is the same work without the framework. Floors live in the repository (`bench/floors`) and import nothing of
headrace; an installed package without them measures all the same and says that it has no floor.
"""

from __future__ import annotations

import os
import platform
import sqlite3
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypedDict

from headrace import __version__
from headrace.benchmarks.scenarios import SCENARIOS, Scenario
from headrace.foundation.errors import InvalidInput

REPOSITORY: Final = Path(__file__).parents[3]
RUNS: Final = 5
QUICK_RUNS: Final = 2
QUICK_SHARE: Final = 10


class Figure(TypedDict):
    """One scenario's result: medians over `runs` turns; `ratio` is value over floor."""

    name: str
    store: str
    unit: str
    value: float
    floor: float | None
    ratio: float | None
    runs: int


class Report(TypedDict):
    """What `headrace bench --json` prints."""

    machine: dict[str, object]
    versions: dict[str, str]
    scenarios: list[Figure]


def chosen(names: list[str]) -> list[Scenario]:
    """The scenarios of these names, all when there are none. Raises `InvalidInput`."""
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise InvalidInput(f"no scenario is called {unknown[0]!r}", hint=f"there are: {', '.join(SCENARIOS)}")
    return [SCENARIOS[name] for name in names or SCENARIOS]


def measured(scenarios: list[Scenario], directory: Path, *, quick: bool) -> Iterator[Figure]:
    """Figures as they come, each scenario and its floor in turns; `quick` measures a tenth, twice."""
    floors = _floors()
    if floors is not None and any(scenario.name in ("append", "drain") for scenario in scenarios):
        floors["check"](directory)
    for scenario in scenarios:
        runs = 1 if scenario.is_slow else QUICK_RUNS if quick else RUNS
        size = scenario.size // (QUICK_SHARE if quick else 1)
        values: list[float] = []
        bases: list[float] = []
        for _ in range(runs):
            value, own_base = scenario.measure(size, directory)
            values.append(value)
            if own_base is not None:
                bases.append(own_base)
            elif floors is not None and scenario.name in floors:
                bases.append(floors[scenario.name](size, directory))
        value = statistics.median(values)
        floor = statistics.median(bases) if bases else None
        yield Figure(
            name=scenario.name,
            store="sqlite",
            unit=scenario.unit,
            value=round(value, 1),
            floor=None if floor is None else round(floor, 1),
            ratio=None if not floor else round(value / floor, 3),
            runs=runs,
        )


def machine() -> dict[str, object]:
    """Where the figures were measured."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
    }


def versions() -> dict[str, str]:
    """What was measured."""
    return {"headrace": __version__, "python": platform.python_version(), "sqlite": sqlite3.sqlite_version}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _floors() -> dict[str, Callable[..., Any]] | None:
    """The floors of the repository this package lies in, or None when it was installed without one."""
    if not (REPOSITORY / "bench" / "floors" / "sqlite_floor.py").exists():
        return None
    sys.path.insert(0, str(REPOSITORY))
    try:
        from bench.floors import dispatch_floor, sqlite_floor
    finally:
        sys.path.remove(str(REPOSITORY))

    def check(directory: Path) -> None:
        raw = sqlite_floor.raw_insert_rate(directory=directory)
        append, drain = sqlite_floor.append_floor(100_000, directory), sqlite_floor.drain_floor(100_000, directory)
        sqlite_floor.check_floor(raw, append, drain)

    return {
        "append": sqlite_floor.append_floor,
        "drain": sqlite_floor.drain_floor,
        "sleep100ms": lambda size, _directory: dispatch_floor.sleep_floor(size),
        "check": check,
    }
