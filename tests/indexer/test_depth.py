"""Depth k equals serial: under stalls, failures and crashes, the contents equal those of serial processing."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.indexer.indexer_rig import FAULTS, NO_FAULT, FailingTables, IndexerContents, IndexerRig, ListSource, open_rig
from tests.indexer.indexer_stores import STORES, stores_in
from tests.indexer.scripted_handlers import OPERATIONS, Op, Ops, scripted_indexer

EXAMPLES = {"memory": 150, "sqlite": 40, "postgres": 5}

small = st.integers(0, 5)
operations = st.builds(Op, st.sampled_from(OPERATIONS), small, small, small)
events = st.lists(
    st.builds(Ops, st.lists(operations, min_size=1, max_size=4), st.integers(0, 2)), min_size=1, max_size=25
)
plans = st.fixed_dictionaries(
    {
        "depth": st.integers(0, 4),
        "batch": st.integers(1, 8),
        "piece": st.integers(1, 10),
        "memory": st.booleans(),
        "where": st.sampled_from(["overlay", "overlay", "overlay", "drain"]),
        "preload": st.booleans(),
        "faults": st.lists(st.sampled_from((*FAULTS, NO_FAULT, NO_FAULT)), max_size=8),
        "turns": st.lists(st.integers(0, 6), max_size=8),
    }
)


async def serial(log: list[Any]) -> IndexerContents:
    """Process the events serially, a commit for each event, in memory."""
    with tempfile.TemporaryDirectory() as folder:
        async with open_rig("memory", Path(folder), scripted_indexer) as rig:
            indexing = await rig.run(ListSource(enumerate(log, 1)), index_depth_max=0, index_batch_events_max=1)
            return await rig.contents(indexing)


async def scheduled(rig: IndexerRig, log: list[Any], plan: dict[str, Any]) -> IndexerContents:
    """Process the same events under a schedule, with so little memory that all committed rows leave it."""
    rig._make = lambda app, source: scripted_indexer(app, source, where=plan["where"], preload=plan["preload"])
    rig.tables = FailingTables(rig.stores.entities, plan["faults"], plan["turns"])
    source = ListSource(enumerate(log, 1), piece=plan["piece"])
    indexing = None
    while indexing is None or indexing.progress.committed_no < len(log):
        indexing = await rig.run(
            source,
            index_depth_max=plan["depth"],
            index_batch_events_max=plan["batch"],
            index_memory_mib=1 if plan["memory"] else 64,
        )
    return await rig.contents(indexing)


@pytest.mark.parametrize("name", list(STORES))
def test_any_depth_equals_serial_processing_under_stalls_failures_and_crashes(name: str, tmp_path: Path) -> None:
    async def check_fresh_stores(log: list[Any], plan: dict[str, Any]) -> None:
        async with stores_in(name, tmp_path) as stores:
            rig = IndexerRig(stores, scripted_indexer)
            await rig.forget()
            assert await scheduled(rig, log, plan) == await serial(log)

    @settings(max_examples=EXAMPLES[name], suppress_health_check=list(HealthCheck))
    @given(events, plans)
    def equals_serial(log: list[Any], plan: dict[str, Any]) -> None:
        if name == "memory":
            with tempfile.TemporaryDirectory() as folder:
                asyncio.run(_check_memory(Path(folder), log, plan))
        else:
            asyncio.run(check_fresh_stores(log, plan))

    equals_serial()


async def _check_memory(folder: Path, log: list[Any], plan: dict[str, Any]) -> None:
    async with open_rig("memory", folder, scripted_indexer) as rig:
        assert await scheduled(rig, log, plan) == await serial(log)
