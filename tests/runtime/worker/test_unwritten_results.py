"""Large results that the store has not taken yet: they are bounded in bytes, and slow their task."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from headrace.runtime.clock import ManualClock
from headrace.runtime.worker.unwritten_results import LARGE_BYTES, UNWRITTEN_BYTES_MAX, WAIT_S, UnwrittenResults
from headrace.runtime.worker.worker import Worker
from tests.support.engines import app_on, on_each_store, opened

CONCURRENCY = 4
RUNS = 2 * UNWRITTEN_BYTES_MAX // LARGE_BYTES


@on_each_store
async def test_a_task_waits_while_its_large_results_are_not_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Event()
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        settle = engine.store.settle

        async def settle_later(*args: Any, **kwargs: Any) -> list[str]:
            await gate.wait()
            return await settle(*args, **kwargs)

        @app.task
        async def blob(item: int) -> str:
            return f"{item} ".ljust(LARGE_BYTES, "x")

        batch = await blob.map(range(RUNS))
        monkeypatch.setattr(engine.store, "settle", settle_later)
        async with app.worker(concurrency=CONCURRENCY) as worker:
            assert isinstance(worker, Worker)
            while worker._unwritten.held_bytes <= UNWRITTEN_BYTES_MAX:
                await asyncio.sleep(0)
            for _ in range(1_000):
                await asyncio.sleep(0)
            assert worker._executor.ended_count * LARGE_BYTES <= UNWRITTEN_BYTES_MAX + 2 * CONCURRENCY * LARGE_BYTES
            gate.set()
            assert (await batch.wait()).ledger.completed == RUNS
            while worker._unwritten.held_bytes:
                await asyncio.sleep(0)


async def test_a_wait_for_other_results_ends_though_nothing_is_ever_written() -> None:
    clock = ManualClock()
    unwritten = UnwrittenResults(clock)
    await unwritten.hold(UNWRITTEN_BYTES_MAX)
    waiting = asyncio.create_task(unwritten.hold(1))
    await clock.settle()
    assert not waiting.done()
    await clock.advance_async(WAIT_S)
    await waiting
    unwritten.clear()
    await unwritten.hold(UNWRITTEN_BYTES_MAX)
    unwritten.release(LARGE_BYTES - 1)
    assert unwritten.held_bytes == UNWRITTEN_BYTES_MAX, "small parts hold no large results"
