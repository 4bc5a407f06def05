"""Depth k equals serial: whatever stalls, fails and crashes, what is left is what one event after the other leaves."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.indexer.houses import HOUSES, opened
from tests.indexer.programs import OPERATIONS, Op, Ops, make
from tests.indexer.rig import FAULTS, STEADY, Left, Listed, Rig, Unsteady, rig

EXAMPLES = {"memory": 150, "sqlite": 40, "postgres": 5}

small = st.integers(0, 5)
operations = st.builds(Op, st.sampled_from(OPERATIONS), small, small, small)
events = st.lists(
    st.builds(Ops, st.lists(operations, min_size=1, max_size=4), st.integers(0, 2)), min_size=1, max_size=25
)
schedules = st.fixed_dictionaries(
    {
        "depth": st.integers(0, 4),
        "batch": st.integers(1, 8),
        "piece": st.integers(1, 10),
        "memory": st.booleans(),
        "where": st.sampled_from(["overlay", "overlay", "overlay", "drain"]),
        "preload": st.booleans(),
        "faults": st.lists(st.sampled_from((*FAULTS, STEADY, STEADY)), max_size=8),
        "turns": st.lists(st.integers(0, 6), max_size=8),
    }
)


async def serial(log: list[Any]) -> Left:
    """One event, one commit, one after the other, in memory."""
    with tempfile.TemporaryDirectory() as folder:
        async with rig("memory", Path(folder), make) as own:
            indexing = await own.run(Listed(enumerate(log, 1)), index_depth_max=0, index_batch_events_max=1)
            return await own.left(indexing)


async def scheduled(own: Rig, log: list[Any], plan: dict[str, Any]) -> Left:
    """The same events under a schedule; memory so small that everything committed leaves it."""
    own._make = lambda app, source: make(app, source, where=plan["where"], preload=plan["preload"])
    own.tables = Unsteady(own.house.entities, plan["faults"], plan["turns"])
    source = Listed(enumerate(log, 1), piece=plan["piece"])
    indexing = None
    while indexing is None or indexing.progress.committed_no < len(log):
        indexing = await own.run(
            source,
            index_depth_max=plan["depth"],
            index_batch_events_max=plan["batch"],
            index_memory_mib=1 if plan["memory"] else 64,
        )
    return await own.left(indexing)


@pytest.mark.parametrize("name", list(HOUSES))
def test_depth_k_equals_serial_whatever_stalls_fails_and_crashes(name: str, tmp_path: Path) -> None:
    async def one(log: list[Any], plan: dict[str, Any]) -> None:
        async with opened(name, tmp_path) as house:
            own = Rig(house, make)
            await own.forget()
            assert await scheduled(own, log, plan) == await serial(log)

    @settings(max_examples=EXAMPLES[name], suppress_health_check=list(HealthCheck))
    @given(events, schedules)
    def holds(log: list[Any], plan: dict[str, Any]) -> None:
        if name == "memory":
            with tempfile.TemporaryDirectory() as folder:
                asyncio.run(_fresh(Path(folder), log, plan))
        else:
            asyncio.run(one(log, plan))

    holds()


async def _fresh(folder: Path, log: list[Any], plan: dict[str, Any]) -> None:
    async with rig("memory", folder, make) as own:
        assert await scheduled(own, log, plan) == await serial(log)
