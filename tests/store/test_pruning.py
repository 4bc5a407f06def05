"""Pruning costs as much for the last run of a long history as for the first, and little for each batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.foundation.limits import DEFAULT
from headrace.store.sqlite import SqliteStore
from tests.support.postgres_observer import sent_statements
from tests.support.store_rig import FACTORIES, StoreRig

STEPS_A_CALL = 100
"""Instructions of SQLite between two calls of the counter."""


async def pruned(rig: StoreRig, *, rows_max: int, batches_max: int = 250) -> int:
    """Prune everything that has finished. Returns the number of deleted batches."""
    count = 0
    while True:
        step = await rig.store.prune(rig.now_us, batches_max=batches_max, rows_max=rows_max)
        count += len(step.batches)
        if not step.more:
            return count


async def instructions_of_pruning(folder: Path, runs_count: int) -> int:
    """Return how many instructions of SQLite the pruning of a stream of single runs takes."""
    folder.mkdir()
    async with StoreRig(FACTORIES["sqlite"](folder, DEFAULT)) as rig:
        batch_id = await rig.batch(kind="stream")
        await rig.append(batch_id, range(runs_count), runs_max=1)
        await rig.store.seal(batch_id, None, now_us=rig.now_us)
        await rig.run_all(await rig.session())
        calls_count = 0

        def count() -> None:
            nonlocal calls_count
            calls_count += 1

        store = rig.store
        assert isinstance(store, SqliteStore)
        await store.change(lambda connection: connection.set_progress_handler(count, STEPS_A_CALL))
        assert await pruned(rig, rows_max=50) == 1
        return calls_count * STEPS_A_CALL


async def test_single_runs_are_pruned_in_linear_time(tmp_path: Path) -> None:
    half = await instructions_of_pruning(tmp_path / "half", 1_000)
    whole = await instructions_of_pruning(tmp_path / "whole", 2_000)
    assert whole < 2.2 * half, f"{half} instructions for 1,000 runs, {whole} for 2,000"


async def test_batches_of_single_runs_are_pruned_with_the_same_statements(tmp_path: Path) -> None:
    async with StoreRig(FACTORIES["postgres"](tmp_path, DEFAULT)) as rig:
        for _ in range(100):
            await rig.filled(1)
        await rig.run_all(await rig.session())
        count, sent = await sent_statements(rig, lambda: pruned(rig, rows_max=1_000))
        assert count == 100
        assert len(sent) <= 20, f"{len(sent)} statements for 100 batches"


@pytest.mark.parametrize("rows_max", [1, 2, 7, 1_000])
async def test_pruning_in_steps_of_any_size_deletes_everything(rig: StoreRig, rows_max: int) -> None:
    ids = [await rig.filled(5, runs_max=2) for _ in range(3)]
    unfinished = await rig.batch(1)
    await rig.run_all(await rig.session())
    deleted: list[str] = []
    for _ in range(200):
        step = await rig.store.prune(rig.now_us, batches_max=2, rows_max=rows_max)
        deleted += [batch_id for _, batch_id in step.batches]
        if not step.more:
            break
    assert sorted(deleted) == sorted(ids)
    assert [batch.id for batch, _ in await rig.store.batches("default")] == [unfinished]


async def test_batches_with_objects_are_named_when_their_objects_are_not_any_more(rig: StoreRig) -> None:
    plain = await rig.filled(1)
    with_result = await rig.filled(1)
    session_id = await rig.session()
    for lease in await rig.claim(session_id):
        await rig.settle(lease, object_keys=["result"] if lease.batch_id == with_result else [])
    step = await rig.store.prune(rig.now_us, batches_max=9, rows_max=99)
    assert sorted(step.batches) == sorted([("default", plain), ("default", with_result)])
    assert step.with_objects == [("default", with_result)]
    assert await rig.store.unnamed(["result"]) == ["result"]
