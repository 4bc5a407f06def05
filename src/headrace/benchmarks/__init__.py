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
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypedDict
from urllib.parse import urlsplit

from headrace import __version__
from headrace.benchmarks.places import OnDisk, OnServer, Place
from headrace.benchmarks.scenarios import SCENARIOS, Scenario
from headrace.compose import POSTGRES, SQLITE, sqlite_path
from headrace.foundation.errors import InvalidInput

REPOSITORY: Final = Path(__file__).parents[3]
RUNS: Final = 5
QUICK_RUNS: Final = 2
CHECK_SIZE: Final = 100_000
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


def place_of(store: str | None) -> Place:
    """Where to measure: the disk or the server that a store's URL names; without one, the disk of temporary files."""
    scheme = "sqlite" if store is None else urlsplit(store).scheme
    if scheme in POSTGRES:
        assert store is not None
        return OnServer(store)
    if scheme != SQLITE:
        raise InvalidInput(
            "bench measures SQLite and PostgreSQL", hint="--store sqlite:///directory/any.db says on which disk"
        )
    return OnDisk(Path(tempfile.gettempdir()) if store is None else sqlite_path(store).parent)


def chosen(names: list[str], kind: str = "sqlite") -> list[Scenario]:
    """The scenarios of these names, all that fit the store when there are none. Raises `InvalidInput`."""
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise InvalidInput(f"no scenario is called {unknown[0]!r}", hint=f"there are: {', '.join(SCENARIOS)}")
    unfit = [name for name in names if kind not in SCENARIOS[name].kinds]
    if unfit:
        raise InvalidInput(f"{unfit[0]} is not for {kind}", hint=f"it is for {', '.join(SCENARIOS[unfit[0]].kinds)}")
    return [scenario for name, scenario in SCENARIOS.items() if (name in names if names else kind in scenario.kinds)]


def measured(scenarios: list[Scenario], place: Place, *, quick: bool) -> Iterator[Figure]:
    """Figures as they come, each scenario and its floor in turns; `quick` measures a tenth, twice."""
    floors = _floors(place)
    if "check" in floors and any(scenario.name in ("append", "drain") for scenario in scenarios):
        floors["check"](CHECK_SIZE)
    for scenario in scenarios:
        runs = 1 if scenario.is_slow else QUICK_RUNS if quick else RUNS
        size = scenario.size // (QUICK_SHARE if quick else 1)
        values: list[float] = []
        bases: list[float] = []
        for _ in range(runs):
            value, own_base = scenario.measure(size, place)
            values.append(value)
            if own_base is not None:
                bases.append(own_base)
            elif scenario.name in floors:
                bases.append(floors[scenario.name](size))
        value = statistics.median(values)
        floor = statistics.median(bases) if bases else None
        yield Figure(
            name=scenario.name,
            store=place.kind,
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


def _floors(place: Place) -> dict[str, Callable[[int], float]]:
    """The floors of the repository this package lies in; none when it was installed without one."""
    if not (REPOSITORY / "bench" / "floors").is_dir():
        return {}
    sys.path.insert(0, str(REPOSITORY))
    try:
        return place.floors()
    finally:
        sys.path.remove(str(REPOSITORY))
